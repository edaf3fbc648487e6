"""Cross entropy per token, and the log-partition function that z-loss squares: of logits, or of what the head makes logits from.

Training takes the second way (`linear_cross_entropy`), which never holds the logits of a micro-batch: a few rows at a time
they become losses and gradients, and are gone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_plasticity.parallel.tensor import SINGLE, TensorRanks, gather_sequence, sum_over_ranks

IGNORE = -100
"""Target of a position that has no loss: a prompt, or padding."""

# Elements of logits that are worked on at once: in fp32 they stay in a CPU's cache, and are small beside a GPU's memory.
_ELEMENTS_AT_ONCE = {"cuda": 2**26, "cpu": 2**17}
# A GPU reads and writes the whole fp32 gradient of the head's matrix once per piece: with as many rows that is little beside the
# products. On a CPU a piece of this size shares its caches with the matrix, and memory is not returned and faulted in anew.
_ROWS_AT_ONCE = {"cuda": 4096, "cpu": 1024}


class TokenLoss(NamedTuple):
    cross_entropy: Tensor
    """[B, S] fp32, nats; 0 where the target is IGNORE."""
    log_partition: Tensor
    """[B, S] fp32, log Σ exp(logits), of every position, ignored or not; z-loss is the mean of its square (PaLM, 2204.02311)."""


class TrainingLoss(NamedTuple):
    total: Tensor
    """[] fp32: what is minimised, scale · Σ (cross-entropy + z_loss_weight · log-partition²) over target tokens."""
    cross_entropy: Tensor
    """[] fp64: Σ cross-entropy in nats over target tokens, unscaled and without gradient."""


@torch.no_grad()
def token_loss(logits: Tensor, targets: Tensor, ranks: TensorRanks = SINGLE) -> TokenLoss:
    """Loss of logits [B, S, V] (any float dtype, computed in fp32) for targets [B, S] (int64, or IGNORE). Without gradients.

    Under tensor parallelism each rank gives its part of the vocabulary, [B, S, V / ranks.size], and all get the same losses: of
    the logits only a maximum, a sum and the target's pass between ranks.
    """
    rows = Rows.of(logits.flatten(0, -2), targets.flatten(), ranks)
    return TokenLoss(rows.cross_entropy.view(targets.shape), rows.log_partition.view(targets.shape))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ranks: TensorRanks = SINGLE,
    *,
    scored: Tensor | None = None,
    z_loss_weight: float = 0.0,
    scale: float = 1.0,
    compiled: bool = False,
) -> TrainingLoss:
    """Loss of the logits hidden · weightᵀ for `targets` [B, S] (int64, or IGNORE), a few rows of logits at a time.

    `hidden` is [B, S, d], with sequence parallelism this rank's positions [B, S / ranks.size, d]; `weight` is this rank's part of
    the vocabulary [V / ranks.size, d]. `scored` [N] int64 are the positions of the flattened targets that are not IGNORE: logits
    are computed for these alone; without it, for all.

    Gradients are computed together with the loss, while the logits are there (as Liger Kernel does, 2410.10989, section 3.2).
    `scale` goes into them before they are rounded to the model's number format; what the backward pass multiplies them by comes
    after.
    The weight's is summed over rows in fp32. `compiled` makes few kernels of what is done to each logit.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # as for any product of matrices
        hidden, weight = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (hidden, weight))
    wanted = (torch.is_grad_enabled() and hidden.requires_grad, torch.is_grad_enabled() and weight.requires_grad)
    how = How(ranks, z_loss_weight, scale, compiled, *wanted)
    with torch.autocast(device, enabled=False):
        return TrainingLoss(*_LinearCrossEntropy.apply(hidden, weight, targets, scored, how))


class How(NamedTuple):
    """What `linear_cross_entropy` was asked for."""

    ranks: TensorRanks
    z_loss_weight: float
    scale: float
    compiled: bool
    of_hidden: bool
    """Whether the hidden state's gradient is wanted."""
    of_weight: bool


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scored: Tensor | None, how: How
    ) -> tuple[Tensor, Tensor]:
        whole = gather_sequence(hidden, how.ranks) if how.ranks.sequence else hidden
        rows, classes = whole.flatten(0, -2), targets.flatten()
        if scored is not None:
            rows, classes = rows[scored], classes[scored]
        pieces = max(1, -(-len(rows) // _ROWS_AT_ONCE["cuda" if rows.is_cuda else "cpu"]))
        size = max(1, -(-len(rows) // pieces))
        sums = torch.zeros(2, dtype=torch.float64, device=rows.device)
        of_rows = torch.empty_like(rows) if how.of_hidden else None
        of_weight: Tensor | None = None
        for start in range(0, len(rows), size):
            piece = slice(start, start + size)
            logits = rows[piece] @ weight.t()
            losses = Rows.of(logits, classes[piece], how.ranks, how.compiled)
            sums += losses.sums()
            if of_rows is not None or how.of_weight:
                losses.become_gradients(how)
            if of_rows is not None:
                torch.mm(logits, weight, out=of_rows[piece])
            if how.of_weight:
                of_weight = _with_product(of_weight, logits.t(), rows[piece], is_only=pieces == 1)
            del logits, losses  # or the next piece would be computed beside this one
        of_hidden = None if of_rows is None else _of_hidden(of_rows, whole.shape, scored, how.ranks)
        of_weight = torch.zeros_like(weight) if how.of_weight and of_weight is None else of_weight
        ctx.gradients, ctx.weight_dtype = (of_hidden, of_weight), weight.dtype
        cross_entropy, squares = sums
        ctx.mark_non_differentiable(cross_entropy)
        return (how.scale * (cross_entropy + how.z_loss_weight * squares)).float(), cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert ctx.gradients is not None, "the gradients are given away: there is no second backward pass"
        (of_hidden, of_weight), ctx.gradients = ctx.gradients, None
        of_hidden = None if of_hidden is None else of_hidden.mul_(gradients[0])
        of_weight = None if of_weight is None else of_weight.mul_(gradients[0]).to(ctx.weight_dtype)
        return of_hidden, of_weight, None, None, None


class Rows(NamedTuple):
    """Some rows of logits, and their losses."""

    logits: Tensor
    """[n, V], of this rank's part of the vocabulary."""
    classes: Tensor
    """[n] columns of the targets; 0 where this rank does not have them."""
    is_here: Tensor
    """[n] whether this rank has the target's column."""
    is_target: Tensor
    """[n] whether there is a target at all."""
    log_partition: Tensor
    """[n] fp32, over all ranks."""
    cross_entropy: Tensor
    """[n] fp32, 0 without a target."""
    compiled: bool

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, ranks: TensorRanks, compiled: bool = False) -> Rows:
        is_target = targets != IGNORE
        columns = targets - ranks.rank * logits.shape[-1]
        is_here = is_target & (columns >= 0) & (columns < logits.shape[-1])
        columns = columns.masked_fill(~is_here, 0)
        log_partition = torch.cat(_over(logits, compiled, _log_partition))
        chosen = logits.gather(-1, columns[:, None]).squeeze(-1).float().masked_fill(~is_here, 0.0)
        if ranks.size > 1:
            log_partition, chosen = _over_vocabulary(log_partition, chosen, ranks)
        cross_entropy = (log_partition - chosen).masked_fill(~is_target, 0.0)
        return cls(logits, columns, is_here, is_target, log_partition, cross_entropy, compiled)

    def sums(self) -> Tensor:
        """[2] fp64 of the rows with a target: Σ cross-entropy, and Σ log-partition²."""
        squares = self.log_partition.square().masked_fill(~self.is_target, 0.0)
        return torch.stack((self.cross_entropy.sum(dtype=torch.float64), squares.sum(dtype=torch.float64)))

    def become_gradients(self, how: How) -> None:
        """Overwrite the logits with the gradient of scale · Σ (cross-entropy + z_loss_weight · log-partition²)."""
        # d log-partition / d logits is the softmax; d chosen / d logits is 1 at the target, on the rank that has it.
        weight = how.scale * (1.0 + 2.0 * how.z_loss_weight * self.log_partition).masked_fill(~self.is_target, 0.0)
        columns = self.classes[:, None]
        # Before it is rounded: near certainty the softmax is 1 in bf16, and the difference would be lost.
        at_target = (self.logits.gather(-1, columns).squeeze(-1).float() - self.log_partition).exp() * weight
        at_target = at_target - how.scale * self.is_here
        _over(self.logits, self.compiled, _weighted_softmax, self.log_partition, weight)
        flat = columns.squeeze(1) + torch.arange(len(columns), device=columns.device) * self.logits.shape[-1]
        self.logits.view(-1).index_copy_(0, flat, at_target.to(self.logits.dtype))  # on a CPU scatter_ copies all logits


def _over(logits: Tensor, compiled: bool, function: Callable[..., Any], *by_row: Tensor) -> list[Any]:
    """What the function makes of logits and what stands beside each row: of all of them if compiled, else piece by piece."""
    if compiled:
        return [_compiled(function)(logits, *by_row)]
    rows = max(1, _ELEMENTS_AT_ONCE["cuda" if logits.is_cuda else "cpu"] // logits.shape[-1])
    return [function(*pieces) for pieces in zip(*(tensor.split(rows) for tensor in (logits, *by_row)), strict=True)]


def _log_partition(logits: Tensor) -> Tensor:
    return logits.float().logsumexp(dim=-1)


def _weighted_softmax(logits: Tensor, log_partition: Tensor, weight: Tensor) -> None:
    """In place of the logits."""
    wide = logits.float()
    wide.sub_(log_partition[:, None]).exp_().mul_(weight[:, None])
    if wide is not logits:
        logits.copy_(wide)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _over_vocabulary(log_partition: Tensor, chosen: Tensor, ranks: TensorRanks) -> tuple[Tensor, Tensor]:
    """log Σ exp over all ranks' logits, and the target's logit, which one rank knows and the others gave as 0."""
    largest = log_partition.clone()
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=ranks.group)
    sums = torch.stack(((log_partition - largest).exp(), chosen))
    ranks.all_reduce(sums)
    return sums[0].log() + largest, sums[1]


def _with_product(total: Tensor | None, a: Tensor, b: Tensor, is_only: bool) -> Tensor:
    """total + a·b in fp32, in place; a·b in their own number format if it is the only summand."""
    if is_only or (total is None and a.dtype == torch.float32):
        return a @ b
    if total is None:
        total = torch.zeros(len(a), b.shape[-1], dtype=torch.float32, device=a.device)
    if a.dtype == torch.float32:
        return total.addmm_(a, b)
    if a.is_cuda:  # CPUs have no product of bf16 with an fp32 result (torch 2.13)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.add_(a @ b)


def _of_hidden(of_rows: Tensor, whole: torch.Size, scored: Tensor | None, ranks: TensorRanks) -> Tensor:
    """Gradient of the hidden state from that of the rows, of which each rank has what comes from its part of the vocabulary."""
    if scored is not None:
        of_rows = of_rows.new_zeros(whole[:-1].numel(), whole[-1]).index_copy_(0, scored, of_rows)
    of_whole = of_rows.view(whole)
    return of_whole if ranks.size == 1 else sum_over_ranks(of_whole, ranks)
