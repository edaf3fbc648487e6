"""Axes and what they span: the points of a grid, a point set into a config, and the names of points."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_plasticity.config.load import set_at

# The two ways to state λ; an axis over one takes the place of the other.
DECAY_FIELDS = ("weight_decay", "adamw_timescale")


def points(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the axes' values, the last axis fastest; without axes the one empty point."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def with_point(tree: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a plain config tree with the point's values in it. Raises ConfigError for a path through a value."""
    changed = copy.deepcopy(dict(tree))
    for path, value in point.items():
        keys = path.split(".")
        set_at(changed, keys, value, f"axis {path!r}")
        if keys[:-1] == ["optimizer"] and keys[-1] in DECAY_FIELDS:
            for other in DECAY_FIELDS:
                if other != keys[-1]:
                    changed["optimizer"].pop(other, None)
    return changed


def point_text(point: Mapping[str, Any]) -> str:
    """A point for an error message."""
    return ", ".join(f"{path}={value}" for path, value in point.items())


def base_name(weight_decay: float, point: Mapping[str, Any], digits: int) -> str:
    """Name of a pretraining run: λ first, however it was stated, then the other axes by their last word."""
    parts = [f"wd{weight_decay:.{digits}g}"]
    for path, value in point.items():
        field_name = path.split(".")[-1]
        if field_name not in DECAY_FIELDS:
            parts.append(f"{field_name}{value:.{digits}g}" if isinstance(value, float) else f"{field_name}{value}")
    return _allowed("-".join(parts))


def variant_name(point: Mapping[str, Any]) -> str:
    """Name of a way to fine-tune: its axes by their last word, λ as `wd`. It does not depend on the other points of the grid, so
    that the names of runs stay when a value is added."""
    fields = ((path.split(".")[-1], value) for path, value in point.items())
    return _allowed("-".join(f"{'wd' if name == 'weight_decay' else name}{value_text(value)}" for name, value in fields))


def value_text(value: Any) -> str:
    """A value in as few digits as tell it apart from every other number."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def _allowed(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name.replace("+", ""))
