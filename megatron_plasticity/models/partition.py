"""Where each parameter lies under a layout: its pipeline stage, and its part on each tensor-parallel rank.

Arithmetic on names and shapes, which `plan` needs without importing torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.parallel import ParallelConfig
from megatron_plasticity.models.sizes import HEAD, TOKEN_EMBEDDING, parameter_shapes

if TYPE_CHECKING:
    from torch import Tensor

_SPLIT_OUTPUTS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "q_norm.weight", "k_norm.weight")
_SPLIT_MLP = ("gate_proj.weight", "up_proj.weight")
_SPLIT_INPUTS = ("out_proj.weight", "down_proj.weight")
_PER_KV_HEAD = ("k_proj.weight", "v_proj.weight", "k_norm.weight")


@dataclass(frozen=True)
class Sharding:
    """How one parameter is cut over the tensor-parallel ranks: into `parts` equal pieces along `axis`, each held by as many ranks
    in a row (`copies`). One piece is the whole parameter, replicated."""

    axis: int
    parts: int
    copies: int

    def part_of(self, rank: int) -> int:
        """The piece that a tensor-parallel rank holds."""
        return rank // self.copies

    def is_first_copy(self, rank: int) -> bool:
        """Whether this rank stands for its piece where each must count once: in norms, and in checkpoints."""
        return rank % self.copies == 0

    def take(self, whole: Tensor, rank: int) -> Tensor:
        """The piece of `whole` that a rank holds; a view."""
        size = whole.shape[self.axis] // self.parts
        return whole.narrow(self.axis, self.part_of(rank) * size, size)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole parameter from what each rank holds, in order of rank."""
        return pieces[0] if self.parts == 1 else _concatenated(pieces[:: self.copies], self.axis)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each piece of a parameter of shape `whole`."""
        return tuple(size // self.parts if axis == self.axis else size for axis, size in enumerate(whole))


def _concatenated(pieces: Sequence[Tensor], axis: int) -> Tensor:
    import torch

    return torch.cat(list(pieces), dim=axis)


def sharding(name: str, model: ModelConfig, tensor: int) -> Sharding:
    """How the parameter of this canonical name is cut over `tensor` ranks (Megatron-LM, 1909.08053, section 3).

    Projections into heads and into the MLP are cut by output, those out of them by input, the token embedding and the head by
    vocabulary; QK-norm gains go with their heads; other norm gains are whole on every rank. With more ranks than key/value heads,
    several ranks hold each of them.
    """
    parts, axis = 1, 0
    if name in (TOKEN_EMBEDDING, HEAD) or name.endswith(_SPLIT_OUTPUTS + _SPLIT_MLP):
        parts = min(tensor, model.kv_heads) if name.endswith(_PER_KV_HEAD) else tensor
    elif name.endswith(_SPLIT_INPUTS):
        parts, axis = tensor, 1
    return Sharding(axis, parts, tensor // parts)


def stage_layers(model: ModelConfig, parallel: ParallelConfig) -> list[range]:
    """The layers of each pipeline stage, as stated, or such that the largest stage has as few parameters as can be.

    All layers are alike, so giving one layer at a time to the stage that would stay smallest is optimal. Where several would,
    the earliest gets it.
    """
    counts = list(parallel.layers_per_stage or _balanced(model, parallel.pipeline))
    starts = [sum(counts[:stage]) for stage in range(len(counts))]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def _balanced(model: ModelConfig, stages: int) -> list[int]:
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(model).items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("layers.0."))
    outside = [0] * stages
    outside[0] += sizes[TOKEN_EMBEDDING]
    outside[-1] += sizes[TOKEN_EMBEDDING]  # the head, or with tied embeddings a copy of them
    counts = [1] * stages
    for _ in range(model.layers - stages):
        lightest = min(range(stages), key=lambda stage: outside[stage] + counts[stage] * layer)
        counts[lightest] += 1
    return counts


def stage_of(name: str, model: ModelConfig, parallel: ParallelConfig) -> int:
    """The pipeline stage on which a parameter or a hook point lies. (A tied embedding has a copy on the last stage.)"""
    if name in ("embed", TOKEN_EMBEDDING):
        return 0
    if not name.startswith("layers."):
        return parallel.pipeline - 1
    layer = int(name.split(".")[1])
    return next(stage for stage, layers in enumerate(stage_layers(model, parallel)) if layer in layers)


def stage_parameters(stage: int, model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """Canonical names of the parameters that a stage holds, the copy of a tied embedding included."""
    names = [name for name in parameter_shapes(model) if stage_of(name, model, parallel) == stage]
    if model.tied_embeddings and stage == parallel.pipeline - 1 and stage > 0:
        names.append(TOKEN_EMBEDDING)
    return names
