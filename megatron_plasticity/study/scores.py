"""What an evaluation found out about one model on one task, and the average over models that differ in their seed alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np

from megatron_plasticity.analysis.bootstrap import interval, mean_over_strata
from megatron_plasticity.analysis.plasticity import GridPoint, TaskOutcome, task_curve

_RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its confidence interval, which are None where no interval was computed."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class SetScores:
    """Scores on one test set of a task."""

    name: str
    questions: int
    metrics: Mapping[str, Estimate]
    groups: Mapping[str, float] = field(default_factory=dict)
    """Group of questions, such as a level of difficulty → greedy score."""


@dataclass(frozen=True)
class TaskScores:
    """Scores of one model on the test questions of one task."""

    task: str
    answer_kind: str
    questions: int
    chance: float | None
    metrics: Mapping[str, Estimate]
    greedy_correct: tuple[float, ...]
    """Per question, test set after test set; a share where it is an average over seeds."""
    examples: tuple[Mapping[str, Any], ...] = ()
    grader: str | None = None
    """What judged the answers; None where it was not kept."""
    reward: str | None = None
    """Kind of the reward behind `rm` and `orm`; None where it was not kept."""
    questions_sha256: str | None = None
    """Hash of the questions; None where it was not kept."""
    test_sets: tuple[SetScores, ...] = ()
    """Empty for a task with one test set without groups, whose scores are those of the task."""
    by_seed: Mapping[str, float] = field(default_factory=dict)
    """Seed of fine-tuning → greedy score, of the seeds that this is an average over; empty without an axis of seeds."""

    @property
    def strata(self) -> tuple[int, ...]:
        """Numbers of questions of the test sets; empty where there is one."""
        sizes = tuple(test_set.questions for test_set in self.test_sets)
        return sizes if len(sizes) > 1 and sum(sizes) == len(self.greedy_correct) else ()


def number(value: Any) -> float | None:
    """`value` as a finite float, else None: a diverged run has no loss to compare."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def estimate(value: Any) -> Estimate | None:
    """An {"value", "low", "high"} object as a record; None when it has no finite value."""
    if not isinstance(value, Mapping) or (middle := number(value.get("value"))) is None:
        return None
    return Estimate(middle, number(value.get("low")), number(value.get("high")))


def bootstrap_settings(config: Mapping[str, Any]) -> tuple[int, int]:
    """Resamples and seed of a study's evaluations, from its config."""
    evaluate = config.get("evaluate") or {}
    return int(evaluate.get("bootstrap_resamples") or _RESAMPLES), int(evaluate.get("seed") or 0)


def read_scores(results: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, TaskScores]:
    """Scores by task from the `results.json` of an evaluation; `config` is that of the study."""
    examples = results.get("examples") or {}
    return {
        task: TaskScores(
            task=task,
            answer_kind=str(entry.get("answer_kind", "")),
            questions=int(entry.get("questions") or 0),
            chance=number(entry.get("chance")),
            metrics=_metrics(entry),
            greedy_correct=tuple(int(correct) for correct in entry.get("greedy_correct") or ()),
            examples=tuple(examples.get(task) or ()),
            grader=entry.get("grader"),
            reward=_reward_kind(entry, config),
            questions_sha256=entry.get("questions_sha256"),
            test_sets=_test_sets(entry),
        )
        for task, entry in (results.get("tasks") or {}).items()
    }


def _metrics(entry: Mapping[str, Any]) -> dict[str, Estimate]:
    return {name: found for name, value in (entry.get("metrics") or {}).items() if (found := estimate(value))}


def _test_sets(entry: Mapping[str, Any]) -> tuple[SetScores, ...]:
    found = tuple(
        SetScores(
            name=name,
            questions=int(part.get("questions") or 0),
            metrics=_metrics(part),
            groups={
                group: score
                for group, scores in (part.get("groups") or {}).items()
                if (score := number(scores.get("greedy"))) is not None
            },
        )
        for name, part in (entry.get("test_sets") or {}).items()
    )
    return found if len(found) > 1 or any(test_set.groups for test_set in found) else ()


def _reward_kind(entry: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """As the evaluation says, or, for one that does not, as the study's config asked."""
    reward = entry.get("reward") or (config.get("evaluate") or {}).get("reward")
    return str(reward["kind"]) if isinstance(reward, Mapping) and reward.get("kind") not in (None, "none") else None


def asked_alike(found: Mapping[str, TaskScores]) -> dict[str, TaskScores]:
    """Of models by seed, those that were asked what the first was."""
    first, *_ = found.values()
    asked = (len(first.greedy_correct), first.questions_sha256, first.strata)
    return {
        name: scores
        for name, scores in found.items()
        if (len(scores.greedy_correct), scores.questions_sha256, scores.strata) == asked
    }


def average_over_seeds(found: Mapping[str, TaskScores], resamples: int, seed: int) -> TaskScores:
    """One record of models that differ in the seed of fine-tuning alone, by that seed: the mean correctness of each question.

    The interval of the greedy score is over questions, as everywhere; other metrics are means over the seeds without intervals.
    All must have been asked alike. Without an axis of seeds there is one model, under an empty name.
    """
    repeats = list(found.values())
    first = repeats[0]
    if not first.greedy_correct:
        return first
    by_seed = {
        name: float(mean_over_strata(np.asarray(scores.greedy_correct), first.strata or (len(first.greedy_correct),)))
        for name, scores in found.items()
        if name
    }
    if len(repeats) == 1:
        return replace(first, by_seed=by_seed)
    correct = tuple(map(fmean, zip(*(scores.greedy_correct for scores in repeats), strict=True)))
    point = GridPoint(0.0, None, {first.task: TaskOutcome(correct, strata=first.strata)})
    curve = task_curve([point], first.task, resamples, seed)
    return replace(
        first,
        metrics={
            **_mean_metrics([scores.metrics for scores in repeats]),
            "greedy": Estimate(**interval(curve.scores[0], curve.resampled[:, 0])),
        },
        greedy_correct=correct,
        grader=", ".join(dict.fromkeys(scores.grader for scores in repeats if scores.grader)) or None,
        test_sets=tuple(_mean_set(parts) for parts in zip(*(scores.test_sets for scores in repeats), strict=True)),
        by_seed=by_seed,
    )


def _mean_metrics(metrics: Sequence[Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """Of the metrics that every repeat has."""
    return {name: Estimate(fmean(each[name].value for each in metrics)) for name in metrics[0] if all(name in m for m in metrics)}


def _mean_set(parts: Sequence[SetScores]) -> SetScores:
    groups = {
        group: fmean(part.groups[group] for part in parts)
        for group in parts[0].groups
        if all(group in part.groups for part in parts)
    }
    return replace(parts[0], metrics=_mean_metrics([part.metrics for part in parts]), groups=groups)
