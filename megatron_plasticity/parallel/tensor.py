"""Tensor and sequence parallelism: what passes between the ranks that share each matrix, forwards and backwards.

Megatron-LM's scheme (Shoeybi et al., 1909.08053; sequence parallelism: Korthikanti et al., 2205.05198). A block's input is whole
on every rank, or with sequence parallelism split along its positions [B, S/size, d]. `column_parallel` takes it to a part of the
outputs (heads, MLP columns, vocabulary) on each rank; after a matrix that is cut by its inputs, `combine` adds up what every rank
has computed. Each function states its adjoint, which autograd would not find by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SEQUENCE_AXIS = 1

# torch 2.13 has new names for these two, and warns of the old ones.
_all_gather: Any = getattr(torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor)
_reduce_scatter: Any = getattr(torch.distributed, "reduce_scatter_single", torch.distributed.reduce_scatter_tensor)


@dataclass(frozen=True)
class TensorRanks:
    """The ranks that share each matrix of a block. With `size` 1 nothing is split, and nothing below communicates."""

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, repr=False, compare=False)
    """torch's process group of these ranks."""
    sequence: bool = False
    """Whether norms and residuals are split along the sequence."""

    def all_reduce(self, tensor: Tensor, asynchronous: bool = False) -> Any:
        """Sum `tensor` over the ranks, in place; returns the handle of an asynchronous operation."""
        return torch.distributed.all_reduce(tensor, group=self.group, async_op=asynchronous)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """`tensor` of every rank, in order of rank; all have the same shape."""
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(gathered, tensor.contiguous(), group=self.group)
        return gathered

    def sum_over_copies(self, gradient: Tensor, copies: int) -> Tensor:
        """Sum of `gradient` over the `copies` ranks in a row that hold the same piece of a parameter.

        One all-reduce over all ranks of one slot per piece: smaller groups would have to be made by every process of the job. In
        fp32, so that rounding does not grow with the number of ranks.
        """
        if copies == 1:
            return gradient
        slots = gradient.new_zeros((self.size // copies, *gradient.shape), dtype=torch.float32)
        slots[self.rank // copies] = gradient
        self.all_reduce(slots)
        return slots[self.rank // copies].to(gradient.dtype)


SINGLE = TensorRanks()


def column_parallel(x: Tensor, weights: Sequence[Tensor], copies: Sequence[int], ranks: TensorRanks) -> tuple[Tensor, ...]:
    """x [B, S or S/size, d] times each weight [part of outputs, d], transposed: [B, S, part of outputs] each.

    `copies` says for each weight by how many ranks in a row it is held. Several weights share one exchange of the input and of
    its gradient. Going backwards, the exchange of the input's gradient runs while the weights' gradients are computed.
    """
    return _ColumnParallel.apply(x, ranks, tuple(copies), *weights)


def combine(partial: Tensor, ranks: TensorRanks) -> Tensor:
    """Sum of `partial` [B, S, d] over the ranks: whole, or with sequence parallelism this rank's positions [B, S/size, d]."""
    return partial if ranks.size == 1 else _Combine.apply(partial, ranks)


def gather_sequence(x: Tensor, ranks: TensorRanks) -> Tensor:
    """[B, S/size, d] of each rank → [B, S, d], without a gradient."""
    return _Gathering(x, ranks).result()


def sum_over_ranks(partial: Tensor, ranks: TensorRanks) -> Tensor:
    """As `combine`, without a gradient, and without sequence parallelism in place."""
    if ranks.sequence:
        return _Scattering(partial, ranks).result()
    ranks.all_reduce(partial)
    return partial


class RMSNorm(nn.RMSNorm):
    """RMSNorm of a residual stream. The gain is whole on every rank; where each sees only its positions of the sequence, the
    gain's gradient is summed over the ranks."""

    def __init__(self, width: int, eps: float, ranks: TensorRanks) -> None:
        super().__init__(width, eps=eps)
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        weight = _SumGradientOverCopies.apply(self.weight, self.ranks, self.ranks.size) if self.ranks.sequence else self.weight
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class HeadParallelRMSNorm(nn.RMSNorm):
    """RMSNorm over all heads at once, of which each rank holds some: the mean square spans the ranks."""

    def __init__(self, width: int, eps: float, ranks: TensorRanks, parts: int) -> None:
        """`width` counts all heads; `parts` is the number of different pieces that the ranks hold."""
        super().__init__(width // parts, eps=eps)
        self.ranks = ranks
        self.width = width
        self.copies = ranks.size // parts

    def forward(self, x: Tensor) -> Tensor:
        if self.ranks.size == 1:
            return super().forward(x)
        wide = x.float()
        squares = _SumBothWays.apply(wide.square().sum(dim=-1, keepdim=True), self.ranks)
        assert self.eps is not None
        normed = wide * torch.rsqrt(squares / (self.copies * self.width) + self.eps)
        weight = self.weight if self.copies == 1 else _SumGradientOverCopies.apply(self.weight, self.ranks, self.copies)
        return (normed * weight).to(x.dtype)


class VocabularyParallelEmbedding(nn.Embedding):
    """A token embedding, of which each rank holds an equal run of rows. Its weights are left as they are, for others to fill."""

    def __init__(self, rows: int, width: int, ranks: TensorRanks) -> None:
        self.ranks = ranks
        super().__init__(rows // ranks.size, width)

    def reset_parameters(self) -> None:
        """Leave the memory as it is: drawing weights twice would cost time and disturb the global random state."""

    def forward(self, input: Tensor) -> Tensor:
        if self.ranks.size == 1:
            return super().forward(input)
        local = input - self.ranks.rank * self.num_embeddings
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        looked_up = super().forward(local.masked_fill(elsewhere, 0))
        return combine(looked_up.masked_fill(elsewhere[..., None], 0), self.ranks)


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorRanks, copies: tuple[int, ...], *weights: Tensor) -> tuple[Tensor, ...]:
        # The split input is kept, not the gathered one: gathering again costs less than the memory would.
        ctx.save_for_backward(x, *weights)
        ctx.ranks, ctx.copies = ranks, copies
        whole = gather_sequence(x, ranks) if ranks.sequence else x
        return tuple(F.linear(whole, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ranks: TensorRanks = ctx.ranks
        x, *weights = ctx.saved_tensors
        gathering = _Gathering(x, ranks) if ranks.sequence else None
        of_input = gradients[0] @ weights[0]
        for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
            of_input += gradient @ weight
        whole = gathering.result() if gathering else x
        exchange = _Scattering(of_input, ranks) if ranks.sequence else ranks.all_reduce(of_input, asynchronous=True)
        rows = whole.flatten(0, -2)
        of_weights = [
            ranks.sum_over_copies(gradient.flatten(0, -2).t() @ rows, copies)
            for gradient, copies in zip(gradients, ctx.copies, strict=True)
        ]
        if isinstance(exchange, _Scattering):
            of_input = exchange.result()
        else:
            exchange.wait()
        return of_input, None, None, *of_weights


class _Combine(torch.autograd.Function):
    """Forwards a sum over ranks, split along the sequence or not; backwards each rank needs the gradient of the whole sum."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, ranks: TensorRanks) -> Tensor:
        ctx.ranks = ranks
        if not ranks.sequence:
            ctx.mark_dirty(partial)  # in place: nobody else reads what a matrix has just computed
        return sum_over_ranks(partial, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (gather_sequence(gradient, ctx.ranks) if ctx.ranks.sequence else gradient), None


class _SumGradientOverCopies(torch.autograd.Function):
    """The identity, whose gradient is summed over the ranks that hold the same piece."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorRanks, copies: int) -> Tensor:
        ctx.ranks, ctx.copies = ranks, copies
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.ranks.sum_over_copies(gradient, ctx.copies), None, None


class _SumBothWays(torch.autograd.Function):
    """A sum over ranks that every rank goes on to use differently, so that its gradient is a sum over ranks too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorRanks) -> Tensor:
        ctx.ranks = ranks
        summed = x.clone()
        ranks.all_reduce(summed)
        return summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = gradient.clone()
        ctx.ranks.all_reduce(gradient)
        return gradient, None


class _Gathering:
    """An all-gather along the sequence under way: [B, S/size, d] of each rank → [B, S, d]."""

    def __init__(self, x: Tensor, ranks: TensorRanks) -> None:
        self._pieces = x.new_empty((ranks.size, *x.shape))
        self._work: Any = _all_gather(self._pieces.view(-1, *x.shape[1:]), x.contiguous(), group=ranks.group, async_op=True)

    def result(self) -> Tensor:
        self._work.wait()
        return self._pieces.movedim(0, SEQUENCE_AXIS).flatten(SEQUENCE_AXIS, SEQUENCE_AXIS + 1)


class _Scattering:
    """A reduce-scatter along the sequence under way: the sum over ranks of [B, S, d], of which each keeps [B, S/size, d]."""

    def __init__(self, x: Tensor, ranks: TensorRanks) -> None:
        pieces = x.unflatten(SEQUENCE_AXIS, (ranks.size, -1)).movedim(SEQUENCE_AXIS, 0).contiguous()
        self._result = pieces.new_empty(pieces.shape[1:])
        self._work: Any = _reduce_scatter(self._result, pieces.view(-1, *pieces.shape[2:]), group=ranks.group, async_op=True)

    def result(self) -> Tensor:
        self._work.wait()
        return self._result
