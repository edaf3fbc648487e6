"""What the page shows of single attention heads: every head as a cell, and what is lost when heads are cut to a lower rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_plasticity.analysis.head_statistics import PRODUCTS, greatest_entropy, summary_label
from megatron_plasticity.study.scores import Estimate, estimate

Heads = Sequence[Sequence[float]]
"""[layer][head]"""


def statistics_of_heads(results: Mapping[str, Any]) -> Iterator[tuple[str, Heads, float]]:
    """(title, values, the most that a head can have) for each statistic of an `attention` run that is there."""
    layers = results.get("layers") or ()
    for product, name in PRODUCTS.items():
        ranks = [_at_summary_threshold(layer.get(product) or {}) for layer in layers]
        if ranks and all(ranks):
            yield f"{name}: pseudo-rank", ranks, float(results.get("head_dim") or max(map(max, ranks)))
    for key, title in (("entropy", "entropy (nats)"), ("sink", "on the first token"), ("previous_token", "on the previous")):
        values = [found for layer in layers if (found := (layer.get("maps") or {}).get(key))]
        if values and len(values) == len(layers):
            yield title, values, _most_entropy(results, values) if key == "entropy" else 1.0


def _at_summary_threshold(product: Mapping[str, Any]) -> Sequence[float]:
    """Pseudo-ranks at 0.95 of the sum, or at the nearest share that was asked for."""
    by_threshold: Mapping[str, Sequence[float]] = product.get("pseudo_rank") or {}
    return by_threshold[summary_label(by_threshold)] if by_threshold else ()


def _most_entropy(results: Mapping[str, Any], values: Heads) -> float:
    tokens = results.get("map_tokens")
    return greatest_entropy(tokens) if tokens else max(map(max, values))


def loss_increases(results: Mapping[float, Mapping[str, Any]], product: str, which: str) -> dict[float, dict[int, Estimate]]:
    """λ → rank k → by how much the loss is higher once heads are cut to it; `which` is `truncated` or `control`."""
    found: dict[float, dict[int, Estimate]] = {}
    for decay, of_run in results.items():
        ranks = (of_run.get("targets") or {}).get(product) or {}
        increases = {int(rank): estimate((entry.get(which) or {}).get("increase")) for rank, entry in ranks.items()}
        if known := {rank: increase for rank, increase in increases.items() if increase is not None}:
            found[decay] = known
    return found
