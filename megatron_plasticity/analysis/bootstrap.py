"""The bootstrap of means (Efron, Annals of Statistics 7, 1979), shared by the analyses."""

from __future__ import annotations

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


def interval(value: float, resampled: np.ndarray) -> dict[str, float]:
    """`{"value", "low", "high"}`: an estimate and its 95 % percentile interval."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return {"value": float(value), "low": float(low), "high": float(high)}
