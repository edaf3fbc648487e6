"""The statistics of the groups: their curves over λ, and which λ may be the best, by loss and after fine-tuning.

Which λ is best is a set: all λ of the grid that no other beats by more than noise (`contenders` in
`analysis/assertions/curves.py`, where the noise is the paired bootstrap and all pairs of λ are corrected for). A curve with one
peak has it between the neighbours of that set in the grid; where the set reaches an end of the grid, it may lie beyond.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_plasticity.analysis.assertions.curves import Curve, contenders, curve
from megatron_plasticity.analysis.bootstrap import interval
from megatron_plasticity.analysis.paired_losses import resample_losses
from megatron_plasticity.analysis.plasticity import (
    GridPoint,
    ScoreCurve,
    TaskOutcome,
    advantage,
    curve_statistics,
    mean_curve,
    task_curve,
)
from megatron_plasticity.study.report.comparison.common import Common, SharedOutcome
from megatron_plasticity.study.report.comparison.groups import ComparedGroup, Study
from megatron_plasticity.study.report.comparison.terms import Evaluated, Terms
from megatron_plasticity.study.report.findings import sequence_losses, task_outcome
from megatron_plasticity.study.scores import Estimate, TaskScores, average_over_seeds, bootstrap_settings, estimate


@dataclass(frozen=True)
class Choice:
    """The best λ of a group by one judge."""

    grid: tuple[float, ...]
    """λ that the judge knows, ascending."""
    best: float
    ties: tuple[float, ...] = ()
    """Other λ with just the same value."""
    candidates: tuple[float, ...] | None = None
    """λ that no other beats by more than noise; None where the noise is not known."""

    @property
    def neighbours(self) -> tuple[float | None, float | None]:
        """Of the candidates in the grid; None where it ends, and where the noise is not known."""
        if self.candidates is None:
            return None, None
        low, high = self.grid.index(self.candidates[0]), self.grid.index(self.candidates[-1])
        return (self.grid[low - 1] if low else None, self.grid[high + 1] if high + 1 < len(self.grid) else None)

    @property
    def bracket(self) -> tuple[float, float] | None:
        """Between the neighbours a curve with one peak has it; 0 and infinity where there is none. None where the noise is not
        known."""
        if self.candidates is None:
            return None
        low, high = self.neighbours
        return (0.0 if low is None else low, math.inf if high is None else high)


@dataclass(frozen=True)
class GroupFindings:
    """Of one group; what is not known is None or absent."""

    group: ComparedGroup
    losses: Mapping[float, float]
    """λ → held-out loss, in nats per token."""
    losses_of: str
    """Which kind of run measured them; empty where there are none."""
    loss_rises: Mapping[float, Estimate]
    """λ → loss above the lowest of the group, with the interval of the difference where its noise is known."""
    by_loss: Choice | None
    by_score: Choice | None
    mean: ScoreCurve | None
    """Mean score over the tasks that are compared, at the λ that finished every one."""
    curves: Mapping[str, ScoreCurve]
    """Shared outcome → its scores."""
    statistics: Mapping[str, Any] = field(default_factory=dict)
    """See `curve_statistics`, of the mean; empty where there is none."""
    finetuned: Terms = field(default_factory=dict)
    """How the group was fine-tuned on the first of the tasks that are compared."""

    @property
    def gap(self) -> Estimate | None:
        """Mean score lost by choosing λ by loss: that of the best λ by score minus that of the best by loss."""
        return estimate(self.statistics.get("advantage"))

    @property
    def score_at_best(self) -> Estimate | None:
        return None if self.by_score is None else self.scores[self.by_score.best]

    @property
    def scores(self) -> dict[float, Estimate]:
        """λ → mean score."""
        return points_of(self.statistics, "score")

    @property
    def gains(self) -> dict[float, Estimate]:
        """λ → mean gain from fine-tuning."""
        return points_of(self.statistics, "gain")

    def outcome(self, name: str) -> Mapping[str, Any]:
        """Statistics of one shared outcome, see `curve_statistics`; empty where the group has no scores of it."""
        found = self.curves.get(name)
        return {} if found is None else curve_statistics(found, found.weight_decays, self.losses)

    def choice(self, name: str) -> Choice | None:
        """The best λ on one shared outcome."""
        return _by_score(self.curves.get(name))


def points_of(statistics: Mapping[str, Any], quantity: str) -> dict[float, Estimate]:
    """λ → `score` or `gain` of the statistics of a curve."""
    return {row["weight_decay"]: found for row in statistics.get("scores", ()) if (found := estimate(row.get(quantity)))}


def settings_of(studies: Sequence[Study]) -> tuple[int, int]:
    """Resamples and seed of the bootstrap: one for all groups, so that they share each resample's questions."""
    settings = [bootstrap_settings(study.results.config) for study in studies]
    return max(resamples for resamples, _ in settings), settings[0][1]


def find_all(groups: Sequence[ComparedGroup], common: Common, settings: tuple[int, int]) -> list[GroupFindings]:
    """The statistics of each group."""
    return [_find(index, group, common, settings) for index, group in enumerate(groups)]


def _find(index: int, group: ComparedGroup, common: Common, settings: tuple[int, int]) -> GroupFindings:
    losses, source, paired = _losses(group, settings)
    by_loss = None
    if losses:
        lowest = min(losses, key=losses.__getitem__)
        ties = tuple(decay for decay in losses if decay != lowest and losses[decay] == losses[lowest])
        candidates = None if paired is None else contenders(paired, lowest=True)
        by_loss = Choice(tuple(losses), lowest, ties, candidates)
    curves = {outcome.name: _curve(outcome, index, group, settings) for outcome in common.all_outcomes if index in outcome.runs}
    compared = [curves[outcome.name] for outcome in common.outcomes if outcome.name in curves]
    mean = mean_curve(compared) if index in common.groups else None
    statistics = {} if mean is None else curve_statistics(mean, mean.weight_decays, losses)
    if mean is not None and (gap := advantage(mean, losses)) is not None:
        statistics["advantage"] = gap
    finetuned = _finetuned(common.outcomes[0], index) if mean is not None else {}
    rises = _rises(losses, paired)
    return GroupFindings(group, losses, source, rises, by_loss, _by_score(mean), mean, curves, statistics, finetuned)


def _finetuned(outcome: SharedOutcome, index: int) -> Terms:
    return next(run.finetuned for seeds in outcome.runs[index].values() for run in seeds.values())


def _losses(group: ComparedGroup, settings: tuple[int, int]) -> tuple[dict[float, float], str, Curve | None]:
    """Losses by ascending λ and what measured them, and the same with resamples where there are some.

    Those of the overfitting analysis where it knows every λ that has a loss, on the same sequences: their noise is known. Else
    those that the pretraining runs measured at their ends.
    """
    own = {model.weight_decay: loss for model in group.models if (loss := model.held_out_loss) is not None}
    kept = {model.weight_decay: found for model in group.models if (found := sequence_losses(model)) is not None}
    paired = resample_losses(kept, *settings)
    if paired is not None and set(own) <= set(paired.weight_decays):
        values = dict(zip(paired.weight_decays, (float(value) for value in paired.held_out), strict=True))
        return values, "overfitting", Curve(paired.weight_decays, paired.held_out, paired.resampled_held_out)
    return dict(sorted(own.items())), "pretraining" if own else "", None


def _rises(losses: Mapping[float, float], paired: Curve | None) -> dict[float, Estimate]:
    if not losses:
        return {}
    lowest = min(losses, key=losses.__getitem__)
    if paired is None or paired.resampled is None:
        return {decay: Estimate(loss - losses[lowest]) for decay, loss in losses.items()}
    at = paired.weight_decays.index(lowest)
    rises = {}
    for index, decay in enumerate(paired.weight_decays):
        resampled = paired.resampled[:, index] - paired.resampled[:, at]
        rises[decay] = Estimate(**interval(float(paired.values[index] - paired.values[at]), resampled))
    return rises


def _by_score(found: ScoreCurve | None) -> Choice | None:
    if found is None:
        return None
    as_curve = curve(found.weight_decays, found.scores, found.resampled)
    highest = float(np.max(found.scores))
    best = [decay for decay, score in zip(found.weight_decays, found.scores, strict=True) if score >= highest - 1e-12]
    return Choice(found.weight_decays, best[0], tuple(best[1:]), contenders(as_curve, lowest=False))


def _curve(outcome: SharedOutcome, index: int, group: ComparedGroup, settings: tuple[int, int]) -> ScoreCurve:
    points = []
    for member in group.members:
        runs = outcome.runs[index].get(member.weight_decay)
        if runs is not None:
            points.append(
                GridPoint(member.weight_decay, None, {outcome.name: _answers(outcome, runs, member.evaluations.base, settings)})
            )
    return task_curve(points, outcome.name, *settings)


def _answers(
    outcome: SharedOutcome, runs: Mapping[str, Evaluated], base: Sequence[Evaluated], settings: tuple[int, int]
) -> TaskOutcome:
    """Correctness per question, mean over the seeds, and that of the base model if it was asked and judged alike."""
    scores = averaged(runs, settings)
    judged = next(iter(runs.values())).judged
    before = next((run.scores for run in base if run.task == outcome.task and run.judged == judged), None)
    return task_outcome(scores, before, outcome.task)


def averaged(runs: Mapping[str, Evaluated], settings: tuple[int, int]) -> TaskScores:
    """The scores of one model on one task, mean over the seeds of fine-tuning."""
    return average_over_seeds({seed: run.scores for seed, run in runs.items()}, *settings)


def format_rates(outcome: SharedOutcome, index: int, group: ComparedGroup) -> list[float]:
    """How often each base model gave an answer that can be read, as fractions, where that is known."""
    judged = outcome.evaluated.judged
    found = [
        run.scores.metrics["format_rate"].value
        for member in group.members
        if member.weight_decay in outcome.runs.get(index, {})
        for run in member.evaluations.base
        if run.task == outcome.task and run.judged == judged and "format_rate" in run.scores.metrics
    ]
    return found
