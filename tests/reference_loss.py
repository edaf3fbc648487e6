"""The losses of logits from torch's own operations, with gradients, to compare ours with."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from megatron_plasticity.models.loss import IGNORE, TokenLoss


def reference_loss(logits: Tensor, targets: Tensor) -> TokenLoss:
    """Of logits [B, S, V] for targets [B, S]; at least in fp32."""
    wide = logits.float() if logits.element_size() < 4 else logits
    cross_entropy = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE)
    return TokenLoss(cross_entropy.view(targets.shape), wide.logsumexp(-1))
