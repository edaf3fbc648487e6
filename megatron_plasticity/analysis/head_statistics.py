"""Which number of an `attention` run stands for a head, and how large it can be: shared by the run's picture and the report."""

from __future__ import annotations

import math
from collections.abc import Iterable

PRODUCTS = {"qk": "W_QK", "vp": "W_VP"}
"""The weight products of a head, as results and as people call them."""
SUMMARY_THRESHOLD = 0.95
"""Share of Σσ at which a pseudo-rank stands for a head."""


def summary_label(thresholds: Iterable[str]) -> str:
    """Of the shares for which pseudo-ranks were computed the one nearest to `SUMMARY_THRESHOLD`."""
    return min(thresholds, key=lambda label: abs(float(label) - SUMMARY_THRESHOLD))


def greatest_entropy(tokens: int) -> float:
    """Entropy in nats of even attention, mean over queries: query i sees i + 1 tokens, so its entropy is ln(i + 1) at most."""
    return sum(math.log(seen) for seen in range(1, tokens + 1)) / tokens
