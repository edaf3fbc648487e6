"""Hook points: places in the model whose activations have a name that never changes.

A hook point is a module whose path in the model is its canonical name (`layers.3.resid_post`), so that finding one needs no
table, and a probe or a dump says the same thing for every family and layout. docs/capture.md lists them.

`logits` is the one that is no module: the largest logits that `head` gives at each position, as two tensors.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.partition import Sharding

if TYPE_CHECKING:
    from megatron_plasticity.parallel.tensor import TensorRanks

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
HEAD = "head"
LOGITS = "logits"
LOGIT_VALUES, LOGIT_IDS = "logits.values", "logits.ids"
"""What the point `logits` is recorded as: the largest logits of a position, in descending order, and their token ids."""
_NAME = re.compile(r"layers\.(\d+)\.(" + "|".join(map(re.escape, IN_LAYER)) + r")")


def hook_points(config: ModelConfig) -> list[str]:
    """Canonical names of a model's hook points, in the order of the forward pass."""
    layers = [f"layers.{layer}.{name}" for layer in range(config.layers) for name in IN_LAYER]
    return ["embed", *layers, "final_norm", HEAD]


def match_points(config: ModelConfig, globs: Iterable[str]) -> list[str]:
    """Hook points that match any of `globs` (as in a shell; `*` also crosses dots), each once, in the order of the forward pass.

    `logits`, which says nothing that `head` does not, is matched by its own name only.

    Raises:
        UserError: a glob matches nothing; the message names the nearest hook points.
    """
    points = [*hook_points(config), LOGITS]
    chosen: set[str] = set()
    for glob in globs:
        matches = [LOGITS] if glob == LOGITS else fnmatch.filter(points[:-1], glob)
        if not matches:
            raise UserError(f"no hook point matches {glob!r}; {_advice(glob, points)}")
        chosen.update(matches)
    return [name for name in points if name in chosen]


def point_sharding(point: str, config: ModelConfig, ranks: TensorRanks) -> Sharding:
    """How the activations at a hook point are cut over tensor-parallel ranks: by heads, by MLP columns, by vocabulary; and with
    sequence parallelism the residual stream by positions."""
    from megatron_plasticity.parallel.tensor import SEQUENCE_AXIS  # torch, which names of hook points do not need

    parts, axis = ranks.size, -1
    if point.endswith((".attn.q", ".attn.k", ".attn.v")):
        parts, axis = (ranks.size if point.endswith("q") else min(ranks.size, config.kv_heads)), 1
    elif not point.endswith((".attn.z", ".mlp.pre", ".mlp.gate", ".mlp.post", HEAD)):
        parts, axis = (ranks.size if ranks.sequence else 1), SEQUENCE_AXIS
    return Sharding(axis, parts, ranks.size // parts)


def layer_of(point: str) -> int | None:
    """Index of the layer that a hook point belongs to; None for `embed`, `final_norm`, `head` and `logits`."""
    match = _NAME.fullmatch(point)
    return int(match.group(1)) if match else None


def sequence_axis(point: str) -> int:
    """Axis of token positions in a point's activations: q, k and v are [B, heads, S, head_dim], all others [B, S, width]."""
    return 2 if point.endswith((".attn.q", ".attn.k", ".attn.v")) else 1


def state_shape(point: str, config: ModelConfig) -> tuple[int, ...]:
    """Shape of a hook point's activations at one position: (heads, head_dim) for q, k and v, (width,) for all others."""
    if point.endswith(".attn.q"):
        return config.query_heads, config.head_dim
    if point.endswith((".attn.k", ".attn.v")):
        return config.kv_heads, config.head_dim
    if point.endswith(".attn.z"):
        return (config.query_heads * config.head_dim,)
    if point.endswith((".mlp.pre", ".mlp.gate", ".mlp.post")):
        return (config.mlp_hidden_size,)
    return (config.vocab_size if point == HEAD else config.hidden_size,)


def _advice(glob: str, points: list[str]) -> str:
    near = difflib.get_close_matches(glob, points, n=3, cutoff=0.6)
    if near:
        return f"nearest: {', '.join(near)}"
    layers = [layer for layer in map(layer_of, points) if layer is not None]
    extent = f" with layers 0 to {max(layers)}" if layers else ""
    kinds = dict.fromkeys(_NAME.sub(r"layers.*.\2", point) for point in points)
    return f"this model{extent} has: {', '.join(kinds)}"
