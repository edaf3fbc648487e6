"""Many logistic regressions at once: of several layers, with several penalties and strengths, on rows that they share.

Of each layer all problems read the same features X [n, d] and differ in the penalty alone. So they run side by side: what is a
product of X with a vector for one problem is a product with a matrix for all, and X, which is far larger than all the rest, is
read once for them. Two things keep the number of such products small. *Standardising is a penalty:* weights w on standardised
features are weights w/σ on the features themselves, and the mean goes into the bias, which is free; so both variants share X.
*The Hessian is known in advance but for a factor:* it is XᵀDX/n + I/(C·n) with D = p(1 − p), and with the mean of D in place of
D one eigendecomposition of XᵀX/n inverts it for every C. L-BFGS (Nocedal and Wright, "Numerical Optimization", algorithm 7.4)
starts from that inverse at each step, with the mean of D at that step, and takes tens of steps where it takes hundreds without.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

TOLERANCE = 1e-6  # of the objective per sample, in nats
_ITERATIONS = 2000
_HISTORY = 10
_SEARCH_STEPS = 40
_ENOUGH_DECREASE, _ENOUGH_FLATTENING = 1e-4, 0.9  # Wolfe's conditions, with the usual constants of quasi-Newton methods
_ROUNDING = 1e-14  # of the objective; below it a decrease cannot be told from none
_LEAST_CURVATURE = 1e-6  # mean of p(1 − p) when all rows are told apart for certain
_CONSTANT = 1e-6  # deviation, relative to the mean, up to which a feature counts as constant


@dataclass(frozen=True)
class SharedFeatures:
    """Rows of several layers, with what all regressions on them have in common. Everything is float64."""

    rows: Tensor
    """[layers, n, d + 1]: features less their mean, and a column of ones for the bias."""
    mean: Tensor
    """[layers, 1, d]."""
    scales: Tensor
    """[layers, variants, d + 1]: the penalty is that of the weights times these; σ for standardised features, 1 for raw ones."""
    eigenvalues: Tensor
    """[layers, variants, d + 1]: of the second moments of `rows / scales`."""
    eigenvectors: Tensor
    """[layers, variants, d + 1, d + 1]."""

    @classmethod
    def of(cls, features: Tensor, standardise: Sequence[bool]) -> SharedFeatures:
        """Of the training rows [layers, n, d], with one variant for each of `standardise`: whether features are standardised.

        A constant feature stays as it is. Its deviation is rounding of its size, not exactly zero: states are computed in fp32,
        whose relative rounding is 6e-8 and grows over the layers.
        """
        features = features.double()
        mean = features.mean(dim=1, keepdim=True)
        rows = _with_ones(features - mean)
        deviation = rows.square().mean(dim=1).sqrt()  # the column of ones has 1
        constant = deviation[:, :-1] <= _CONSTANT * mean[:, 0].abs()
        deviation[:, :-1][constant] = 1.0
        scales = torch.stack([deviation if standardised else torch.ones_like(deviation) for standardised in standardise], dim=1)
        moments = rows.mT @ rows / rows.shape[1]
        scaled = moments[:, None] / scales[..., :, None] / scales[..., None, :]
        eigenvalues, eigenvectors = torch.linalg.eigh(scaled)
        return cls(rows, mean, scales, eigenvalues.clamp_min(0), eigenvectors)

    def like(self, features: Tensor) -> Tensor:
        """Other rows [layers, m, d], less the mean of these and with a column of ones [layers, m, d + 1]."""
        return _with_ones(features.double() - self.mean)


def _with_ones(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(*features.shape[:2], 1)], dim=2)


def scores(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Of each class [..., K, m], from coefficients [layers, ..., K, d + 1] and rows [layers, m, d + 1]."""
    layers, width = coefficients.shape[0], coefficients.shape[-1]
    return (coefficients.reshape(layers, -1, width) @ rows.mT).reshape(*coefficients.shape[:-1], rows.shape[1])


def accuracy(coefficients: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Share of `rows` [layers, m, d + 1] whose highest score is their label's [m]; [...] for coefficients [..., K, d + 1]."""
    found = scores(coefficients, rows)
    predicted = (found[..., 0, :] > 0).long() if found.shape[-2] == 1 else found.argmax(dim=-2)
    return (predicted == labels).double().mean(dim=-1)


@torch.no_grad()
def fit_logistic(
    shared: SharedFeatures,
    labels: Tensor,
    classes: int,
    strengths: Tensor,
    first_row: int = 0,
    start: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Coefficients [layers, variants, strengths, K, d + 1] on `shared.rows`; the last is the bias.

    Each minimises C·Σ_i CE(W·x_i + b, y_i) + ½·‖W·scale‖² over the rows from `first_row` on, with `labels` [n] (0 … classes − 1)
    of all rows and C one of `strengths` [layers, variants, strengths]. The bias is free. With two classes K is 1, and the score
    is the log-odds of class 1; otherwise K is `classes`. That is scikit-learn's `LogisticRegression(C=C)` on features over scale.

    A problem is done when its objective, divided by C·n, is within `tolerance` of the optimum, by what its gradient tells. All
    begin at `start` (the same shape), or at zero. Warns of problems that are not done after very many steps.
    """
    problems = _Problems.begin(shared, labels[first_row:], classes, strengths, first_row, start)
    best = torch.empty_like(problems.point)
    for _ in range(_ITERATIONS):
        finished = problems.gap() <= tolerance
        everywhere = finished.all(dim=0)
        if everywhere.any():
            best[:, problems.number[everywhere]] = problems.point[:, everywhere]
            problems.keep(~everywhere)
            finished = finished[:, ~everywhere]
        if not len(problems.number):
            break
        problems.step(finished)
    else:
        best[:, problems.number] = problems.point
        gap = problems.gap().max().item()
        warnings.warn(f"a probe is not at its optimum after {_ITERATIONS} steps (bound on the gap: {gap:.1e})", stacklevel=2)
    scales = shared.scales.repeat_interleave(strengths.shape[2], dim=1)[:, :, None]
    return (best / scales).reshape(*strengths.shape, *best.shape[2:])


@dataclass
class _Problems:
    """The problems that are not finished in every layer, and where they stand.

    Dimensions are [layers, problems, K, d + 1 or n]. A point is in the units of the penalty: coefficients times scale.
    """

    rows: Tensor
    targets: Tensor
    """[K, n]: 1 where a row is of the class."""
    basis: SharedFeatures
    number: Tensor
    """[problems]: which of the problems at the beginning."""
    variant: Tensor
    """[problems]: which of the variants of `basis`."""
    scale: Tensor
    ridge: Tensor
    """1/(C·n), and zero for the bias."""
    point: Tensor
    scores: Tensor
    value: Tensor
    """[layers, problems]: objective divided by C·n."""
    probabilities: Tensor
    gradient: Tensor
    pairs: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Of the last steps: the step, the change of the gradient, and one over the product of the two."""

    @classmethod
    def begin(
        cls, basis: SharedFeatures, labels: Tensor, classes: int, strengths: Tensor, first_row: int, start: Tensor | None
    ) -> _Problems:
        rows = basis.rows[:, first_row:]
        layers, n, width = rows.shape
        _, variants, count = strengths.shape
        targets = one_hot(labels, classes).mT.double()
        targets = targets[1:] if classes == 2 else targets
        scale = basis.scales.repeat_interleave(count, dim=1)[:, :, None]
        penalised = torch.cat([rows.new_ones(width - 1), rows.new_zeros(1)])
        ridge = penalised / (strengths.to(rows) * n).reshape(layers, -1, 1, 1)
        point = rows.new_zeros(layers, variants * count, len(targets), width)
        if start is not None:
            point = start.reshape(point.shape) * scale
        number = torch.arange(variants * count, device=rows.device)
        at = scores(point / scale, rows)
        value, probabilities, _ = _cross_entropy(at, targets)
        self = cls(rows, targets, basis, number, number // count, scale, ridge, point, at, value, probabilities, point)
        self.value = value + _product(ridge * point, point) / 2
        self.gradient = self._gradient()
        return self

    def _gradient(self) -> Tensor:
        layers, n, _ = self.rows.shape
        residual = (self.probabilities - self.targets).reshape(layers, -1, n)
        return (residual @ self.rows).reshape(self.point.shape) / self.scale / n + self.ridge * self.point

    def _curvature(self) -> Tensor:
        """Mean of p(1 − p) [layers, problems, K, 1]."""
        return (self.probabilities * (1 - self.probabilities)).mean(dim=-1, keepdim=True).clamp_min(_LEAST_CURVATURE)

    def gap(self) -> Tensor:
        """How far the objective is above its minimum at most [layers, problems].

        The penalty makes the objective strongly convex in the weights with modulus `ridge`, so half the squared gradient over it
        is a bound. The bias has no penalty; the mean of p(1 − p), the curvature along it, stands for its modulus.
        """
        modulus = self.ridge.expand_as(self.gradient).clone()
        modulus[..., -1:] = self._curvature()
        return _product(self.gradient / modulus, self.gradient) / 2

    def keep(self, kept: Tensor) -> None:
        """Go on with the problems where `kept` [problems] is true."""
        self.number, self.variant = self.number[kept], self.variant[kept]
        for name in ("scale", "ridge", "point", "scores", "value", "probabilities", "gradient"):
            setattr(self, name, getattr(self, name)[:, kept])
        self.pairs = [(step[:, kept], change[:, kept], inverse[:, kept]) for step, change, inverse in self.pairs]

    def step(self, finished: Tensor) -> None:
        """One step of L-BFGS of each problem, but for those where `finished` [layers, problems] is true."""
        direction = self._direction().masked_fill_(finished[..., None, None], 0.0)
        length = self._line_search(direction, scores(direction / self.scale, self.rows))
        step = length * direction
        before = self.gradient
        self.point = self.point + step
        self.gradient = self._gradient()
        change = self.gradient - before
        product = _product(step, change)
        inverse = torch.where(product > 0, 1 / product, 0.0)  # no step, no pair
        self.pairs = [*self.pairs, (step, change, inverse)][-_HISTORY:]

    def _direction(self) -> Tensor:
        """Minus the inverse Hessian, as the last steps show it, times the gradient."""
        rest = self.gradient.clone()
        parts = []
        for step, change, inverse in reversed(self.pairs):
            part = (inverse * _product(step, rest))[..., None, None]
            rest -= part * change
            parts.append(part)
        direction = self._precondition(rest)
        for (step, change, inverse), part in zip(self.pairs, reversed(parts), strict=True):
            direction += (part - (inverse * _product(change, direction))[..., None, None]) * step
        return -direction

    def _precondition(self, vectors: Tensor) -> Tensor:
        """Times the inverse of the Hessian in which every p(1 − p) is their mean."""
        curvature, ridge = self._curvature(), self.ridge[..., :1]
        result = torch.empty_like(vectors)
        for variant in self.variant.unique().tolist():
            own = self.variant == variant
            basis = self.basis.eigenvectors[:, None, variant]
            values = self.basis.eigenvalues[:, None, None, variant]
            result[:, own] = vectors[:, own] @ basis / (curvature[:, own] * values + ridge[:, own]) @ basis.mT
        return result

    def _line_search(self, direction: Tensor, change: Tensor) -> Tensor:
        """Length of the step [layers, problems, 1, 1] by Wolfe's conditions; moves scores, probabilities and value along.

        `change` is what a step of length one adds to the scores, so that no trial has to read the features.
        """
        penalty = [_product(self.ridge * a, b) for a, b in ((self.point, direction), (direction, direction))]
        penalty_here = _product(self.ridge * self.point, self.point)
        slope_here = _product(self.gradient, direction)
        length = torch.ones_like(self.value)
        low, high = torch.zeros_like(length), torch.full_like(length, math.inf)
        trials = 0
        while True:
            at = self.scores + length[..., None, None] * change
            loss, probabilities, residual = _cross_entropy(at, self.targets)
            value = loss + penalty_here / 2 + length * penalty[0] + length.square() * penalty[1] / 2
            slope = _product(residual, change) / at.shape[-1] + penalty[0] + length * penalty[1]
            most = self.value + _ENOUGH_DECREASE * length * slope_here + _ROUNDING * self.value.abs()
            too_long = ~(value <= most)  # so that a number that is none counts as well
            too_short = ~too_long & (slope < _ENOUGH_FLATTENING * slope_here)
            trials += 1
            if trials == _SEARCH_STEPS or not (too_long | too_short).any():
                break
            high, low = torch.where(too_long, length, high), torch.where(too_short, length, low)
            wanted = torch.where(high.isinf(), 2 * length, (low + high) / 2)
            length = torch.where(too_long | too_short, wanted, length)
        self.scores, self.probabilities, self.value = at, probabilities, value
        return length[..., None, None]


def _cross_entropy(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy over rows [layers, problems]; of each class and row the probability, and that less the target."""
    # Of a single score, the log-odds, the other class's score is zero.
    total = softplus(scores, threshold=40) if len(targets) == 1 else scores.logsumexp(dim=2, keepdim=True)
    probabilities = (scores - total).exp()
    loss = (total.sum(dim=(2, 3)) - (targets * scores).sum(dim=(2, 3))) / scores.shape[-1]
    return loss, probabilities, probabilities - targets


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over the last two dimensions."""
    return (a * b).sum(dim=(2, 3))
