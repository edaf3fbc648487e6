"""Hook points: places in the model whose activations have a name that never changes.

A hook point is a module whose path in the model is its canonical name (`layers.3.resid_post`), so that finding one needs no
table, and a probe or a dump says the same thing for every family and layout. docs/architecture.md lists them.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable

from torch import nn

from megatron_plasticity.errors import UserError

# In the order in which the forward pass reaches them.
IN_LAYER = (
    "resid_pre",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.z",
    "attn.out",
    "resid_mid",
    "mlp.pre",
    "mlp.gate",
    "mlp.post",
    "mlp.out",
    "resid_post",
)
_NAME = re.compile(r"layers\.(\d+)\.(" + "|".join(map(re.escape, IN_LAYER)) + r")")
_OUTER = ("embed", "final_norm", "head")


def hook_points(model: nn.Module) -> list[str]:
    """Canonical names of the model's hook points, in the order of the forward pass."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name in _OUTER or _NAME.fullmatch(name)]
    return sorted(names, key=_forward_order)


def match_points(model: nn.Module, globs: Iterable[str]) -> list[str]:
    """Hook points that match any of `globs` (as in a shell; `*` also crosses dots), each once, in the order of the forward pass.

    Raises:
        UserError: a glob matches nothing; the message names the nearest hook points.
    """
    points = hook_points(model)
    chosen: set[str] = set()
    for glob in globs:
        matches = fnmatch.filter(points, glob)
        if not matches:
            raise UserError(f"no hook point matches {glob!r}; {_advice(glob, points)}")
        chosen.update(matches)
    return [name for name in points if name in chosen]


def layer_of(point: str) -> int | None:
    """Index of the layer that a hook point belongs to; None for `embed`, `final_norm` and `head`."""
    match = _NAME.fullmatch(point)
    return int(match.group(1)) if match else None


def sequence_axis(point: str) -> int:
    """Axis of token positions in a point's activations: q, k and v are [B, heads, S, head_dim], all others [B, S, width]."""
    return 2 if point.endswith((".attn.q", ".attn.k", ".attn.v")) else 1


def _forward_order(name: str) -> tuple[int, int, int]:
    match = _NAME.fullmatch(name)
    if match:
        return 1, int(match.group(1)), IN_LAYER.index(match.group(2))
    return (0 if name == "embed" else 2), _OUTER.index(name), 0


def _advice(glob: str, points: list[str]) -> str:
    if not points:
        return "this model has no hook points at all"
    near = difflib.get_close_matches(glob, points, n=3, cutoff=0.6)
    if near:
        return f"nearest: {', '.join(near)}"
    layers = [layer for layer in map(layer_of, points) if layer is not None]
    extent = f" with layers 0 to {max(layers)}" if layers else ""
    kinds = dict.fromkeys(_NAME.sub(r"layers.*.\2", point) for point in points)
    return f"this model{extent} has: {', '.join(kinds)}"
