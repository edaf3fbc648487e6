"""Mean, covariance and norms of activations, accumulated batch by batch, where a dump of the states would be too large.

Batches are merged by the pairwise formulas of Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (The
American Statistician 37, 1983): with n = nₐ + n_b and δ = mean_b − meanₐ,

    mean = meanₐ + δ·n_b/n        M = Mₐ + M_b + δδᵀ·nₐ·n_b/n

where M is the sum of the products of deviations from the mean, so that covariance = M/(n − 1). Summing squares instead would lose
the digits that mean and square have in common. Everything is in fp64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_plasticity.capture.points import sequence_axis


@dataclass(frozen=True)
class PointStatistics:
    """Of n states of one hook point, all fp64. For q, k and v each head has its own; elsewhere H, "heads", is left out."""

    count: int
    """n, the number of states: kept positions of all sequences."""
    mean: Tensor
    """[H, d]."""
    variance: Tensor
    """[H, d]; of a sample: the sum of squared deviations over n − 1. NaN for a single state."""
    covariance: Tensor | None
    """[H, d, d], likewise; None if it was not wanted."""
    norm_mean: Tensor
    """[H]; mean of the states' L2 norms."""
    norm_deviation: Tensor
    """[H]; their standard deviation (n − 1)."""
    norm_max: Tensor
    """[H]; the largest."""


class StreamingStatistics:
    """Accumulates the statistics of one hook point.

    Args:
        covariance: keep whole matrices; otherwise their diagonals.
    """

    def __init__(self, covariance: bool = True) -> None:
        self.covariance = covariance
        self.count = 0
        self._mean = self._products = self._norm_mean = self._norm_squares = self._norm_max = torch.empty(0)

    def add(self, states: Tensor) -> None:
        """Take in `states` [n, …, d], of any number format; an empty batch changes nothing."""
        new = states.double()
        count = len(new)
        if not count:
            return
        mean = new.mean(dim=0)
        deviations = new - mean
        products = torch.einsum("n...i,n...j->...ij", deviations, deviations) if self.covariance else deviations.square().sum(0)
        norms = new.norm(dim=-1)
        norm_mean = norms.mean(dim=0)
        norm_squares = (norms - norm_mean).square().sum(dim=0)
        norm_max = norms.amax(dim=0)
        if self.count:
            total = self.count + count
            share, weight = count / total, self.count * count / total
            shift, norm_shift = mean - self._mean, norm_mean - self._norm_mean
            outer = shift[..., :, None] * shift[..., None, :] if self.covariance else shift.square()
            mean, products = self._mean + shift * share, self._products + products + outer * weight
            norm_mean = self._norm_mean + norm_shift * share
            norm_squares = self._norm_squares + norm_squares + norm_shift.square() * weight
            norm_max = torch.maximum(self._norm_max, norm_max)
        self.count += count
        self._mean, self._products = mean, products
        self._norm_mean, self._norm_squares, self._norm_max = norm_mean, norm_squares, norm_max

    def tensors(self) -> dict[str, Tensor]:
        """What a file of statistics holds (see `from_tensors`). ValueError if nothing was added."""
        if not self.count:
            raise ValueError("no states were added")
        return {
            "count": torch.tensor([self.count]),
            "mean": self._mean,
            "products": self._products,
            "norm_mean": self._norm_mean.reshape(-1),
            "norm_squares": self._norm_squares.reshape(-1),
            "norm_max": self._norm_max.reshape(-1),
        }

    @property
    def result(self) -> PointStatistics:
        """The statistics of all states so far. ValueError if there are none."""
        return from_tensors(self.tensors())


def from_tensors(tensors: Mapping[str, Tensor]) -> PointStatistics:
    """The statistics in what `StreamingStatistics.tensors` gave. KeyError if one is missing."""
    count, mean, products = int(tensors["count"]), tensors["mean"], tensors["products"]
    heads = mean.shape[:-1]
    divisor = count - 1 if count > 1 else float("nan")
    whole = products.dim() > mean.dim()
    return PointStatistics(
        count=count,
        mean=mean,
        variance=(products.diagonal(dim1=-2, dim2=-1) if whole else products) / divisor,
        covariance=products / divisor if whole else None,
        norm_mean=tensors["norm_mean"].reshape(heads),
        norm_deviation=(tensors["norm_squares"] / divisor).sqrt().reshape(heads),
        norm_max=tensors["norm_max"].reshape(heads),
    )


def kept_states(point: str, activations: Tensor, kept: Tensor) -> Tensor:
    """The states [n, …, d] of those positions in a recorded batch that `kept` [B, K] does not mark, by −1, as absent.

    `activations` are as recorded: with an axis of positions ([B, K, d], or [B, heads, K, head_dim]), or without one if K is 1.
    """
    shape = 3 if sequence_axis(point) == 1 else 4
    by_position = activations.movedim(sequence_axis(point), 1) if activations.dim() == shape else activations[:, None]
    return by_position[kept >= 0]
