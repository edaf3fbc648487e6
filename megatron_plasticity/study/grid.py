"""Axes and what they span: the points of a grid, a point set into a config, and the names of points."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_plasticity.config.base import Section
from megatron_plasticity.config.hashing import canonical
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


def axes_in_the_way(axes: Mapping[str, Sequence[Any]], where: str) -> Iterator[str]:
    """Problems of axes of which one would undo another, so that runs would be called after values that they do not have."""
    for path, other in itertools.combinations(axes, 2):
        if {path, other} == {f"optimizer.{name}" for name in DECAY_FIELDS}:
            yield f"{where}: {path} and {other} are two ways to state one λ; keep one of the two axes"
        elif f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}."):
            yield f"{where}: of {path} and {other} one is a part of the other; keep one of the two axes"


def resolved_point(point: Mapping[str, Any], config: Section) -> dict[str, Any]:
    """The point with its values as `config`, which was made at it, has them: YAML reads `1e-1` as a text, a config as 0.1."""
    resolved = {}
    for path, value in point.items():
        node: Any = config
        for key in path.split("."):
            node = _at(node, key)
        resolved[path] = _resolved(value, node)
    return resolved


def equal_points(grid: Sequence[Mapping[str, Any]], configs: Sequence[Section], where: str) -> Iterator[str]:
    """Problems of points that make equal runs: in a report they would count as independent evidence."""
    first: dict[str, Mapping[str, Any]] = {}
    for point, config in zip(grid, configs, strict=True):
        # The hash of a run covers what a text holds, and not where it lies.
        key = f"{canonical(config)} {getattr(getattr(config, 'capture', None), 'texts', None)}"
        if (same := first.setdefault(key, point)) is not point:
            # By their text, since 1 and 1.0 are two values of an axis.
            changed = [path for path in point if repr(point[path]) != repr(same[path])]
            one, other = (", ".join(f"{path}={each[path]!r}" for path in changed) for each in (same, point))
            yield f"{where}: two points of the grid are the same run: {one} and {other} give equal results; keep one of them"


def point_text(point: Mapping[str, Any]) -> str:
    """A point for an error message."""
    return ", ".join(f"{path}={value}" for path, value in point.items())


def base_name(weight_decay: float, point: Mapping[str, Any], digits: int) -> str:
    """Name of a pretraining run: λ first, however it was stated, then the other axes by their last word."""
    parts = [f"wd{weight_decay:.{digits}g}"]
    for path, value in point.items():
        field_name = path.split(".")[-1]
        if field_name not in DECAY_FIELDS:
            parts.append(f"{field_name}{value:.{digits}g}" if isinstance(value, float) else _named(field_name, value))
    return _allowed("-".join(parts))


def variant_name(point: Mapping[str, Any]) -> str:
    """Name of a way to fine-tune: its axes by their last word, λ as `wd`. It does not depend on the other points of the grid, so
    that the names of runs stay when a value is added."""
    fields = ((path.split(".")[-1], value) for path, value in point.items())
    return _allowed("-".join(_named("wd" if name == "weight_decay" else name, value) for name, value in fields))


def value_text(value: Any) -> str:
    """A value in as few digits as tell it apart from every other number; a section by its settings."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, Mapping):
        return "-".join(_named(str(key), item) for key, item in value.items())
    return "none" if value is None else str(value)


def _named(name: str, value: Any) -> str:
    return f"{name}{'-' if isinstance(value, Mapping) else ''}{value_text(value)}"


def _at(node: Any, key: str) -> Any:
    return node[key] if isinstance(node, Mapping) else getattr(node, key)


def _resolved(value: Any, found: Any) -> Any:
    """What `found` says of everything that `value` states, as plain data."""
    if isinstance(value, Mapping):
        return {key: _resolved(item, _at(found, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_resolved(*pair) for pair in zip(value, found, strict=True)]
    return found if found is None or isinstance(found, (bool, int, float, str)) else str(found)


def _allowed(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name.replace("+", ""))
