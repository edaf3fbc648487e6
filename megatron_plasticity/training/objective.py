"""What is minimised: cross-entropy summed over target tokens, plus the z-loss where the family has one."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_plasticity.models.attention import Segments
from megatron_plasticity.models.loss import IGNORE, TokenLoss, token_loss
from megatron_plasticity.models.transformer import Transformer


class Objective(nn.Module):
    """The module that DeepSpeed runs: tokens in, per-token losses out, so that logits never leave it."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor, segments: Segments | None = None) -> TokenLoss:
        """`inputs` and `targets` [B, S] int64 → losses [B, S] fp32, 0 where the target is ignored."""
        return token_loss(self.model(inputs, segments=segments), targets, self.model.ranks)


def training_loss(losses: TokenLoss, targets: Tensor, z_loss_weight: float) -> Tensor:
    """Scalar to differentiate: Σ cross-entropy + z_loss_weight·Σ logsumexp² over target tokens (z-loss: PaLM, 2204.02311, §5)."""
    total = losses.cross_entropy.sum()
    if z_loss_weight:
        total = total + z_loss_weight * (losses.log_partition.square() * (targets != IGNORE)).sum()
    return total
