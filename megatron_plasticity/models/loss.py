"""Cross entropy per token, and the log-partition function that z-loss squares."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_plasticity.parallel.tensor import SINGLE, TensorRanks

IGNORE = -100
"""Target of a position that has no loss: a prompt, or padding."""


class TokenLoss(NamedTuple):
    cross_entropy: Tensor
    """[B, S] fp32, nats; 0 where the target is IGNORE."""
    log_partition: Tensor
    """[B, S] fp32, log Σ exp(logits), of every position, ignored or not; z-loss is the mean of its square (PaLM, 2204.02311)."""


def token_loss(logits: Tensor, targets: Tensor, ranks: TensorRanks = SINGLE) -> TokenLoss:
    """Loss of logits [B, S, V] (any float dtype, computed in fp32) for targets [B, S] (int64, or IGNORE).

    Under tensor parallelism each rank gives its part of the vocabulary, [B, S, V / ranks.size], and all get the same losses: of
    the logits only a maximum, a sum and the target's pass between ranks.
    """
    return TokenLoss(*_CrossEntropy.apply(logits, targets, ranks))


class _CrossEntropy(torch.autograd.Function):
    """Both losses at once, a few rows at a time.

    The only tensor of the logits' size beside them is their gradient: no fp32 copy, no log-probabilities, and on a CPU the
    intermediate results stay in its cache.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ranks: TensorRanks) -> tuple[Tensor, Tensor]:
        ignored = targets == IGNORE
        classes = targets - ranks.rank * logits.shape[-1]
        elsewhere = ignored | (classes < 0) | (classes >= logits.shape[-1])
        classes = classes.masked_fill(elsewhere, 0)
        pieces = [rows.float().logsumexp(dim=-1) for rows in logits.flatten(0, -2).split(_rows_at_once(logits))]
        log_partition = torch.cat(pieces).view(targets.shape)
        chosen = logits.gather(-1, classes[..., None]).squeeze(-1).float().masked_fill(elsewhere, 0.0)
        if ranks.size > 1:
            log_partition, chosen = _over_vocabulary(log_partition, chosen, ranks)
        ctx.save_for_backward(logits, classes, ignored, elsewhere, log_partition)
        return (log_partition - chosen).masked_fill(ignored, 0.0), log_partition

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *output_gradients: Tensor
    ) -> tuple[Tensor, None, None]:
        cross_entropy_gradient, log_partition_gradient = output_gradients
        logits, classes, ignored, elsewhere, log_partition = ctx.saved_tensors
        # d log_partition / d logits is the softmax; d chosen / d logits is 1 at the target, on the rank that holds it.
        softmax_gradient = cross_entropy_gradient.masked_fill(ignored, 0.0) + log_partition_gradient
        chosen_gradient = cross_entropy_gradient.masked_fill(elsewhere, 0.0)
        gradient = torch.empty_like(logits)
        columns = (gradient, logits, *(x[..., None] for x in (log_partition, softmax_gradient, classes, chosen_gradient)))
        pieces = (column.flatten(0, -2).split(_rows_at_once(logits)) for column in columns)
        for into, logit, partition, weight, target, target_weight in zip(*pieces, strict=True):
            softmax = (logit.float() - partition).exp_()
            into.copy_(softmax.mul_(weight).scatter_add_(-1, target, -target_weight))
        return gradient, None, None


def _over_vocabulary(log_partition: Tensor, chosen: Tensor, ranks: TensorRanks) -> tuple[Tensor, Tensor]:
    """log Σ exp over all ranks' logits, and the target's logit, which one rank knows and the others gave as 0."""
    largest = log_partition.clone()
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=ranks.group)
    sums = torch.stack(((log_partition - largest).exp(), chosen))
    ranks.all_reduce(sums)
    return sums[0].log() + largest, sums[1]


def _rows_at_once(logits: Tensor) -> int:
    """Rows of logits [..., V] that make 512 KiB of fp32 on a CPU (they stay in its cache), 256 MiB elsewhere."""
    elements = 2**17 if logits.device.type == "cpu" else 2**26
    return max(1, elements // logits.shape[-1])
