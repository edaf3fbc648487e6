"""A quantity over λ with its bootstrap resamples, and what can be told from it in spite of noise.

A difference counts only if it is larger than its noise. The noise is the standard deviation of the paired bootstrap, and the
interval is normal, since percentiles of a thousand resamples do not reach as far out as a correction for many pairs needs. The
correction is Bonferroni's: with m comparisons each is made at the level 0.05/m.

Which λ is best is a set, not a λ: all that no other beats by more than noise. How often a λ is best among the resamples would not
do: of equal λ one leads by chance, and the resamples scatter around that lead.

The bootstrap is over questions, sequences or heads. What another training seed would change is not in it; only the permutation
test of `trend`, whose units are the runs themselves, has a share of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations

import numpy as np
from scipy import stats

from megatron_plasticity.analysis.bootstrap import CONFIDENCE, resampled_means

SURE = CONFIDENCE
"""Share of resamples from which on something counts as certain; the level of all intervals."""
LEAST_UNITS = 10
"""Units that have to differ by exactly the same for a difference without any spread to be believed. Our own choice."""
LEAST_FOR_TREND = 5
"""λ that a rank test needs: of four, even a perfect order has a one-sided p of 1/24, which is more than 0.025."""
_ENUMERATED = 8
"""Up to so many λ every order is counted (8! = 40,320); beyond it orders are drawn."""
_DRAWN = 20_000
_EQUAL = 1e-12


@dataclass(frozen=True)
class Curve:
    """A quantity at ascending λ; make it with `curve`."""

    weight_decays: tuple[float, ...]
    values: np.ndarray
    """[λ]"""
    resampled: np.ndarray | None = None
    """[resamples, λ], paired over λ; None where the noise is not known."""
    units: int = 0
    """What was resampled: number of heads, say; 0 where it is not known."""

    def at(self, weight_decay: float) -> float:
        return float(self.values[self.weight_decays.index(weight_decay)])

    def only(self, weight_decays: Sequence[float]) -> Curve:
        """At those of `weight_decays` that it has."""
        kept = [index for index, decay in enumerate(self.weight_decays) if decay in weight_decays]
        resampled = None if self.resampled is None else self.resampled[:, kept]
        return Curve(tuple(self.weight_decays[index] for index in kept), self.values[kept], resampled, self.units)


@dataclass(frozen=True)
class Difference:
    """With an interval that is corrected for the number of comparisons; its ends are infinite where the noise is not known."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or −1 where the interval leaves out zero, else 0."""
        return self.beyond(0.0)

    def beyond(self, margin: float) -> int:
        """1 or −1 where the whole interval is more than `margin` from zero, else 0."""
        return int(self.low > margin) - int(self.high < -margin)

    def inside(self, margin: float) -> bool:
        return -margin <= self.low and self.high <= margin


@dataclass(frozen=True)
class Trend:
    """Spearman's rank correlation of a quantity with λ."""

    correlation: float
    p_rise: float
    """Share of the orders of the values over λ whose correlation is at least as large: a one-sided permutation p-value."""
    p_fall: float
    low: float | None = None
    """Ends of the bootstrap interval of the correlation; None where there are no resamples."""
    high: float | None = None

    def direction(self, comparisons: int = 1) -> int:
        """1 or −1 where values rise or fall with λ by both tests, at 0.025 a side over the number of comparisons, else 0."""
        level = (1 - CONFIDENCE) / 2 / comparisons
        rises = self.p_rise <= level and (self.low is None or self.low > 0)
        falls = self.p_fall <= level and (self.high is None or self.high < 0)
        return int(rises) - int(falls)


def curve(weight_decays: Sequence[float], values: Sequence[float] | np.ndarray, resampled: np.ndarray | None = None) -> Curve:
    """Of λ in any order; `values` [λ] and `resampled` [resamples, λ] in the same one."""
    order = np.argsort(weight_decays, kind="stable")
    return Curve(
        tuple(float(weight_decays[index]) for index in order),
        np.asarray(values, dtype=float)[order],
        None if resampled is None else np.asarray(resampled, dtype=float)[:, order],
    )


def curve_over_units(units: Mapping[float, Sequence[float]], resamples: int = 1000, seed: int = 42) -> Curve:
    """Means over units (λ → value of each), which are resampled together for all λ."""
    decays = sorted(units)
    table = np.column_stack([np.asarray(units[decay], dtype=float) for decay in decays])
    generator = np.random.default_rng(abs(seed))
    return Curve(tuple(decays), table.mean(axis=0), resampled_means(table, resamples, generator), len(table))


def shared(one: Curve, other: Curve) -> tuple[Curve, Curve]:
    """Both at the λ that both have."""
    return one.only(other.weight_decays), other.only(one.weight_decays)


def difference(found: Curve, one: float, other: float, comparisons: int = 1, scale: float = 1.0) -> Difference:
    """Value at λ = `other` minus `scale` times that at λ = `one`.

    Noise that is not known makes the interval infinite, and so does a bootstrap without any spread, unless at least `LEAST_UNITS`
    units are known to have been resampled: then each of them differs by just this.
    """
    first, second = found.weight_decays.index(one), found.weight_decays.index(other)
    value = float(found.values[second] - scale * found.values[first])
    resampled = None if found.resampled is None else found.resampled[:, second] - scale * found.resampled[:, first]
    spread = 0.0 if resampled is None else float(resampled.std())
    if found.resampled is not None and spread <= _EQUAL and found.units >= LEAST_UNITS:
        return Difference(value, value, value)
    if spread <= _EQUAL:
        return Difference(value, -math.inf, math.inf)
    reach = float(stats.norm.ppf(1 - (1 - CONFIDENCE) / 2 / max(1, comparisons))) * spread
    return Difference(value, value - reach, value + reach)


def contenders(found: Curve, lowest: bool, margin: float = 0.0) -> tuple[float, ...]:
    """The λ that may have the lowest (or the highest) value: all that no other beats by more than `margin` and more than noise,
    corrected for all pairs. In at least 95 % of studies the truly best λ is among them, however many λ there are."""
    pairs = list(combinations(found.weight_decays, 2))
    beaten = set()
    for one, other in pairs:
        sign = difference(found, one, other, len(pairs)).beyond(margin)
        if sign:
            beaten.add(other if (sign > 0) == lowest else one)
    return tuple(decay for decay in found.weight_decays if decay not in beaten)


def trend(found: Curve) -> Trend | None:
    """Rank correlation with λ; None for fewer than two λ, or if all values are equal.

    The p-values count, exactly up to eight λ and by 20,000 drawn orders beyond, in how many orders of the values over the λ the
    correlation is as strong: they hold for any distribution of the values, with ties as mean ranks.
    """
    values = np.round(found.values, 12)
    if len(values) < 2 or np.ptp(values) <= _EQUAL:
        return None
    ranks = np.asarray(stats.rankdata(values))
    places = np.arange(1, len(ranks) + 1, dtype=float)
    orders = _orders(len(ranks))
    strengths, own = ranks[orders] @ places, float(ranks @ places)
    extra = 0 if len(ranks) <= _ENUMERATED else 1  # the observed order is one of them
    low, high = None, None
    if found.resampled is not None:
        of_resamples = _correlations(np.asarray(stats.rankdata(np.round(found.resampled, 12), axis=1)))
        tail = (1 - CONFIDENCE) / 2
        low, high = (float(end) for end in np.quantile(of_resamples, [tail, 1 - tail]))
    return Trend(
        float(_correlations(ranks[None])[0]),
        float(((strengths >= own - 1e-9).sum() + extra) / (len(strengths) + extra)),
        float(((strengths <= own + 1e-9).sum() + extra) / (len(strengths) + extra)),
        low,
        high,
    )


def _correlations(ranks: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each row of ranks [rows, λ] with the order of λ; 0 for a row of equal ranks."""
    places = np.arange(ranks.shape[1]) - (ranks.shape[1] - 1) / 2
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    norms = np.sqrt((centred**2).sum(axis=1) * (places**2).sum())
    return np.divide(centred @ places, norms, out=np.zeros(len(ranks)), where=norms > _EQUAL)


@lru_cache(maxsize=16)
def _orders(count: int) -> np.ndarray:
    """Every order of `count` things, or many drawn ones: int [orders, count]."""
    if count <= _ENUMERATED:
        return np.array(list(permutations(range(count))))
    generator = np.random.default_rng(count)
    return generator.permuted(np.tile(np.arange(count), (_DRAWN, 1)), axis=1)


def flatness(found: Curve, weight_decays: Sequence[float], margin: float) -> bool | None:
    """Whether no two of `weight_decays` differ by more than `margin`: an equivalence test, so that noise alone is never flat.

    True if the interval of every difference lies within ±margin, False if one lies beyond, else None; also for fewer than two λ.
    """
    pairs = [(one, other) for one in weight_decays for other in weight_decays if one < other]
    found_differences = [difference(found, one, other, len(pairs)) for one, other in pairs]
    if any(item.beyond(margin) for item in found_differences):
        return False
    return True if pairs and all(item.inside(margin) for item in found_differences) else None


def widest(found: Curve, weight_decays: Sequence[float]) -> float:
    """Largest minus smallest value at `weight_decays`."""
    values = [found.at(decay) for decay in weight_decays]
    return max(values) - min(values)
