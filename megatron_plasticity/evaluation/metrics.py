"""The paper's six metrics, the format rate, and their confidence intervals.

N questions, K samples each, correctness c_ij ∈ {0, 1}, reward r_ij. Every metric is the mean over questions of one number per
question; a question on which that number is undefined is left out, and a metric that is defined on no question does not exist.

| key | number of question i | undefined |
|---|---|---|
| `greedy` | correctness of the greedy answer | |
| `maj` | c of the first sample of the largest cluster of equal answers (ties: the earliest; no answer: a cluster alone) | |
| `rm` | c of the sample with the highest reward (ties: the earliest) | without a reward scorer |
| `pass` | 1 if any sample is correct | |
| `correct_ratio` | (1/K)·Σ_j c_ij | where no sample is correct |
| `orm` | (1/K)·Σ_j r_ij | without a reward scorer |
| `format_rate` | share of samples from which an answer could be extracted (ours) | |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A mean over questions and its bootstrap interval; None for an interval that was not asked for or does not exist."""

    value: float
    low: float | None
    high: float | None

    def as_json(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Outcomes:
    """What the two passes over one test set gave."""

    greedy_correct: NDArray[np.bool_]
    """[N]"""
    sampled_correct: NDArray[np.bool_]
    """[N, K]"""
    clusters: NDArray[np.int64]
    """[N, K]: cluster number of each sample's answer, as `cluster_answers` counts them."""
    answered: NDArray[np.bool_]
    """[N, K]: whether an answer could be extracted."""
    rewards: Floats | None = None
    """[N, K], finite."""


def cluster_answers(answers: Sequence[str | None], equivalent: Callable[[str, str], bool]) -> list[int]:
    """Number the clusters of equal answers 0, 1, … in sample order.

    A sample joins the earliest cluster whose first member it equals, or founds one; None founds one that nobody joins.
    """
    founders: list[str | None] = []
    clusters = []
    for answer in answers:
        found = None
        if answer is not None:
            found = next((i for i, founder in enumerate(founders) if founder is not None and equivalent(answer, founder)), None)
        if found is None:
            found = len(founders)
            founders.append(answer)
        clusters.append(found)
    return clusters


def question_values(outcomes: Outcomes) -> dict[str, Floats]:
    """Each metric's number per question, [N] with NaN where it is undefined; metrics that need rewards only if there are any."""
    correct = outcomes.sampled_correct.astype(np.float64)
    rows = np.arange(len(correct))
    ratio = correct.mean(axis=1)
    values = {
        "greedy": outcomes.greedy_correct.astype(np.float64),
        "maj": correct[rows, _first_of_largest_cluster(outcomes.clusters)],
        "pass": correct.max(axis=1),
        "correct_ratio": np.where(ratio > 0, ratio, np.nan),
        "format_rate": outcomes.answered.mean(axis=1),
    }
    if outcomes.rewards is not None:
        values["rm"] = correct[rows, outcomes.rewards.argmax(axis=1)]
        values["orm"] = outcomes.rewards.mean(axis=1)
    return values


def _first_of_largest_cluster(clusters: NDArray[np.int64]) -> NDArray[np.intp]:
    """Index [N] of the first sample of each row's largest cluster."""
    sizes = (clusters[:, :, None] == clusters[:, None, :]).sum(axis=2)
    return sizes.argmax(axis=1)  # the first sample of greatest size founded the earliest of the largest clusters


def bootstrap_metrics(values: Mapping[str, Floats], resamples: int, seed: int, confidence: float = 0.95) -> dict[str, Metric]:
    """Means over questions with percentile bootstrap intervals (Efron 1979), questions being what is resampled.

    Every metric sees the same resamples. Those in which a metric is defined on no question do not count for its interval. Metrics
    that are defined on no question at all are absent. With `resamples` 0 there are no intervals.
    """
    present = {name: value for name, value in values.items() if np.isfinite(value).any()}
    if not present:
        return {}
    table = np.stack(list(present.values()), axis=1)
    defined = np.isfinite(table)
    filled = np.where(defined, table, 0.0)
    means = filled.sum(axis=0) / defined.sum(axis=0)
    counts = _resampled_counts(len(table), resamples, seed)
    totals, weights = counts @ filled, counts @ defined
    metrics = {}
    for column, (name, mean) in enumerate(zip(present, means, strict=True)):
        usable = weights[:, column] > 0
        low, high = _interval(totals[usable, column] / weights[usable, column], confidence)
        metrics[name] = Metric(float(mean), low, high)
    return metrics


def _resampled_counts(questions: int, resamples: int, seed: int) -> Floats:
    """[resamples, questions]: how often each question was drawn when as many as there are were drawn with replacement."""
    shares = np.full(questions, 1 / questions)
    return np.random.default_rng(seed).multinomial(questions, shares, size=resamples).astype(np.float64)


def _interval(means: Floats, confidence: float) -> tuple[float, float] | tuple[None, None]:
    if not len(means):
        return None, None
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)
