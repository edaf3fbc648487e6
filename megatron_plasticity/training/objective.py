"""What is minimised: cross-entropy summed over target tokens, plus the z-loss where the family has one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_plasticity.models.attention import Segments
from megatron_plasticity.models.loss import IGNORE, TrainingLoss, linear_cross_entropy, token_loss
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.parallel.tensor import TensorRanks


class Objective(nn.Module):
    """The module that DeepSpeed runs: tokens in, loss out, so that logits never leave it."""

    def __init__(self, model: Transformer, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.compiled = compiled
        self.shows_logits = False
        """Whether the head returns logits, all at once, to whoever looks at what it returns; without gradients only."""

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        scale: float = 1.0,
        segments: Segments | None = None,
        scored: Tensor | None = None,
    ) -> TrainingLoss:
        """`inputs` and `targets` [B, S] int64 → their loss, times `scale`. `scored` is what `scored_positions` says."""
        return self.loss(self.model.hidden(inputs, segments=segments), self.model.tied_weight, targets, scale, scored)

    def loss(
        self, hidden: Tensor, weight: Tensor | None, targets: Tensor, scale: float = 1.0, scored: Tensor | None = None
    ) -> TrainingLoss:
        """As `forward`, of what `Transformer.hidden` returns on the last stage. `weight` goes before the head's own."""
        if self.shows_logits:
            cross_entropy = token_loss(self.model.head(hidden, weight), targets, self.model.ranks).cross_entropy
            return TrainingLoss(scale * cross_entropy.sum(), cross_entropy.sum(dtype=torch.float64))

        def result(hidden: Tensor, weight: Tensor, ranks: TensorRanks) -> TrainingLoss:
            return linear_cross_entropy(
                hidden,
                weight,
                targets,
                ranks,
                scored=scored,
                z_loss_weight=self.model.config.z_loss_weight,
                scale=scale,
                compiled=self.compiled,
            )

        return self.model.head(hidden, weight, result)


def scored_positions(targets: Tensor) -> Tensor | None:
    """[N] int64: which of the flattened targets are not IGNORE; None if all are. Ask it of targets in the CPU's memory: a GPU
    would have to finish the work before."""
    is_target = targets.flatten() != IGNORE
    return None if bool(is_target.all()) else is_target.nonzero().squeeze(1)
