"""The bootstrap of means (Efron, Annals of Statistics 7, 1979), shared by the analyses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
_CHUNK = 1 << 22  # draws held at once


def resampled_means(values: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Means of `values` [units] or [units, columns] over units drawn with replacement: [resamples] or [resamples, columns].

    All columns share each resample's units: columns that are measurements of the same units stay paired.
    """
    units = values.shape[0]
    if not units:
        raise ValueError("nothing to resample")
    means = np.empty((resamples, *values.shape[1:]))
    step = max(1, _CHUNK // units)
    for start in range(0, resamples, step):
        stop = min(resamples, start + step)
        # How often each unit is drawn, instead of which one is: the means of all columns are one matrix product.
        counts = generator.multinomial(units, np.full(units, 1 / units), size=stop - start)
        means[start:stop] = counts @ values / units
    return means


def mean_over_strata(values: np.ndarray, strata: Sequence[int]) -> np.ndarray:
    """Plain mean of the means of consecutive strata of so many units each, over the first axis."""
    return np.mean([part.mean(0) for part in _parts(values, strata)], axis=0)


def resampled_means_over_strata(
    values: np.ndarray, strata: Sequence[int], resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """`mean_over_strata` of units drawn with replacement within each stratum, as `resampled_means` gives it for one."""
    return np.mean([resampled_means(part, resamples, generator) for part in _parts(values, strata)], axis=0)


def _parts(values: np.ndarray, strata: Sequence[int]) -> list[np.ndarray]:
    if sum(strata) != len(values):
        raise ValueError(f"strata of {list(strata)} units do not make {len(values)}")
    return np.split(values, np.cumsum(strata)[:-1])


def interval(value: float, resampled: np.ndarray) -> dict[str, float]:
    """`{"value", "low", "high"}`: an estimate and its 95 % percentile interval."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return {"value": float(value), "low": float(low), "high": float(high)}


def choices(weight_decays: Sequence[float], is_best: np.ndarray) -> dict[str, Any]:
    """How often each of the ascending λ is the choice, from `is_best` [resamples, λ]; equally good λ share a resample.

    `{"low", "high", "distribution": [{"weight_decay", "share"}]}`; `low` to `high` are the λ between which the middle 95 % lie.
    """
    shares = (is_best / is_best.sum(axis=1, keepdims=True)).mean(axis=0)
    tail = (1 - CONFIDENCE) / 2 - 1e-12
    low = int(np.argmax(shares.cumsum() >= tail))
    high = len(shares) - 1 - int(np.argmax(shares[::-1].cumsum() >= tail))
    return {
        "low": weight_decays[low],
        "high": weight_decays[high],
        "distribution": [
            {"weight_decay": decay, "share": float(share)} for decay, share in zip(weight_decays, shares, strict=True)
        ],
    }
