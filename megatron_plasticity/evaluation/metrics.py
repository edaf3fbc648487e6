"""The paper's six metrics, pass@k, the format rate, and their confidence intervals.

N questions, K samples each, correctness c_ij ∈ {0, 1}, reward r_ij. Every metric is the mean over questions of one number per
question; a question on which that number is undefined is left out, and a metric that is defined on no question does not exist.

| key | number of question i | undefined |
|---|---|---|
| `greedy` | correctness of the greedy answer | |
| `maj` | c of the first sample of the largest cluster of equal answers (ties: the earliest; no answer: a cluster alone) | |
| `rm` | c of the sample with the highest reward (ties: the earliest) | without a reward scorer |
| `pass` | 1 if any sample is correct: pass@K | |
| `pass@k` | 1 − C(K − c_i, k)/C(K, k) with c_i = Σ_j c_ij: whether k samples hold a correct one (2107.03374, eq. 1) | |
| `correct_ratio` | (1/K)·Σ_j c_ij | where no sample is correct |
| `orm` | (1/K)·Σ_j r_ij | without a reward scorer |
| `format_rate` | share of samples from which an answer could be extracted (ours) | |

k runs over the powers of two up to K and K itself. A task's score is the plain mean of its test sets' scores.
"""

from __future__ import annotations

import math
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
    """[N, K]; NaN where nothing was rewarded, since the question was not asked."""


def cluster_answers(
    answers: Sequence[Sequence[str | None]], equivalent: Callable[[Sequence[tuple[int, str, str]]], Sequence[bool]]
) -> list[list[int]]:
    """Number the clusters of equal answers [question][sample] 0, 1, … in sample order.

    A sample joins the earliest cluster whose first member it equals, or founds one; None founds one that nobody joins.
    `equivalent` says of many (question, a, b) whether a and b are the same. It is asked once for each round, in which every
    question compares with the first sample that has no cluster yet; so comparisons of all questions can run side by side.
    """
    none = -1
    clusters = [[none] * len(row) for row in answers]
    for number in range(max(map(len, answers), default=0)):  # a cluster of each question at a time
        pairs: list[tuple[int, int, str, str]] = []
        for question, (row, cluster) in enumerate(zip(answers, clusters, strict=True)):
            if none not in cluster:
                continue
            first = cluster.index(none)
            cluster[first] = number
            if (founder := row[first]) is not None:
                others = [sample for sample, found in enumerate(cluster) if found == none]
                pairs += [(question, sample, answer, founder) for sample in others if (answer := row[sample]) is not None]
        verdicts = equivalent([(question, answer, founder) for question, _, answer, founder in pairs])
        for (question, sample, _, _), same in zip(pairs, verdicts, strict=True):
            if same:
                clusters[question][sample] = number
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
        **_pass_at_k(outcomes.sampled_correct),
    }
    if outcomes.rewards is not None:
        # Of a question that was not asked all samples are wrong, whichever is taken; it has no reward to average.
        values["rm"] = correct[rows, np.nan_to_num(outcomes.rewards, nan=-np.inf).argmax(axis=1)]
        values["orm"] = outcomes.rewards.mean(axis=1)
    return values


def _first_of_largest_cluster(clusters: NDArray[np.int64]) -> NDArray[np.intp]:
    """Index [N] of the first sample of each row's largest cluster."""
    sizes = (clusters[:, :, None] == clusters[:, None, :]).sum(axis=2)
    return sizes.argmax(axis=1)  # the first sample of greatest size founded the earliest of the largest clusters


def _pass_at_k(sampled_correct: NDArray[np.bool_]) -> dict[str, Floats]:
    """Unbiased estimate [N] of pass@k for each k; the binomials are exact integers."""
    samples = sampled_correct.shape[1]
    right = sampled_correct.sum(axis=1)
    sizes = sorted({samples, *(2**power for power in range(samples.bit_length()))})
    chances = {k: [1 - math.comb(samples - c, k) / math.comb(samples, k) for c in range(samples + 1)] for k in sizes}
    return {f"pass@{k}": np.array(by_count)[right] for k, by_count in chances.items()}


def group_values(
    values: Mapping[str, Floats], groups: Sequence[str], metrics: Sequence[str] = ("greedy", "maj")
) -> dict[str, dict[str, float]]:
    """Scores of the parts of a test set, such as MATH's levels: `{group: {"questions": count, metric: mean, …}}` in their order.

    `groups` names each question's group, [N]; questions without one ("") are left out. Undefined means are absent.
    """
    names = np.array(groups)
    scores: dict[str, dict[str, float]] = {}
    for group in sorted(set(groups) - {""}):
        chosen = names == group
        scores[group] = {"questions": int(chosen.sum())}
        for metric in metrics:
            defined = values[metric][chosen]
            defined = defined[np.isfinite(defined)]
            if len(defined):
                scores[group][metric] = float(defined.mean())
    return scores


def bootstrap_metrics(values: Mapping[str, Floats], resamples: int, seed: int, confidence: float = 0.95) -> dict[str, Metric]:
    """Means over questions with percentile bootstrap intervals (Efron 1979), questions being what is resampled.

    Every metric sees the same resamples, and so does every model that is asked as many questions under the same seed: models are
    compared on paired resamples. Those in which a metric is defined on no question do not count for its interval. Metrics that
    are defined on no question at all are absent. With `resamples` 0 there are no intervals.
    """
    return bootstrap_task_metrics({"": values}, resamples, seed, confidence)


def bootstrap_task_metrics(
    values_by_test_set: Mapping[str, Mapping[str, Floats]], resamples: int, seed: int, confidence: float = 0.95
) -> dict[str, Metric]:
    """Plain means of the test sets' scores, with intervals for which questions are resampled within each test set.

    A metric that is undefined on a test set is absent, and a resample in which it is undefined on one does not count.
    """
    draw = np.random.default_rng(seed)
    test_sets = [_resampled_means(values, resamples, draw) for values in values_by_test_set.values()]
    shared = [name for name in test_sets[0] if all(name in scores for scores in test_sets)] if test_sets else []
    metrics = {}
    for name in shared:
        mean, *resampled = np.mean([scores[name] for scores in test_sets], axis=0)
        usable = np.array(resampled)[np.isfinite(resampled)]
        metrics[name] = Metric(float(mean), *_interval(usable, confidence))
    return metrics


def _resampled_means(values: Mapping[str, Floats], resamples: int, draw: np.random.Generator) -> dict[str, Floats]:
    """Each metric's mean over a test set's questions, then over those of each resample, NaN where undefined: [1 + resamples].

    A resample is as many questions as there are, drawn with replacement.
    """
    present = {name: value for name, value in values.items() if np.isfinite(value).any()}
    if not present:
        return {}
    table = np.stack(list(present.values()), axis=1)
    defined = np.isfinite(table)
    questions = len(table)
    drawn = draw.multinomial(questions, np.full(questions, 1 / questions), size=resamples)
    counts = np.concatenate([np.ones((1, questions)), drawn])
    with np.errstate(invalid="ignore"):
        means = (counts @ np.where(defined, table, 0.0)) / (counts @ defined)
    return dict(zip(present, means.T, strict=True))


def _interval(means: Floats, confidence: float) -> tuple[float, float] | tuple[None, None]:
    if not len(means):
        return None, None
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)
