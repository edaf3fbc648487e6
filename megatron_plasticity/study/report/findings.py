"""The statistics of one group of base models, as `analysis/plasticity.py` computes them, in the shape that the page needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_plasticity.analysis.paired_losses import SequenceLosses
from megatron_plasticity.analysis.plasticity import GridPoint, ScoreCurve, TaskOutcome, plasticity, score_curves
from megatron_plasticity.errors import UserError
from megatron_plasticity.study.results import BaseModel, CheckpointScores, Group, Outcome
from megatron_plasticity.study.scores import Estimate, TaskScores, bootstrap_settings, estimate

MEAN = "mean of tasks"
_KEPT = ("seen_losses", "held_out_losses", "seen_blocks", "held_out_blocks")


@dataclass(frozen=True)
class Findings:
    """Statistics by name, and the few that the answer is made of."""

    losses: Mapping[float, float]
    """λ → held-out loss, where there is one."""
    statistics: Mapping[str, Any]
    """What `plasticity` returned."""
    problem: str | None = None
    """Why there are no statistics on scores, in words."""
    over_steps: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Pretraining step → what `plasticity` returned of the checkpoints of that step, the last included; empty if only the last
    one was evaluated."""
    score_curves: Mapping[str, ScoreCurve] = field(default_factory=dict)
    """Outcome → its scores over λ with their resamples; empty where there are no statistics on scores."""

    @property
    def curves(self) -> dict[str, Mapping[str, Any]]:
        """Task → statistics of its scores (means over the variants); the mean of tasks last, if it is of more than one."""
        curves = dict(self.statistics.get("task_means") or self.statistics["tasks"])
        if self._mean and len(curves) > 1:
            curves[MEAN] = self._mean
        return curves

    @property
    def variants(self) -> Mapping[str, Mapping[str, Any]]:
        """Variant → best λ by mean score after it and rank correlation with the first; empty where there is one."""
        return self.statistics.get("variants") or {}

    @property
    def outcome_curves(self) -> Mapping[str, Mapping[str, Any]]:
        """Outcome → statistics of its scores; empty where the outcomes are the tasks."""
        return self.statistics["tasks"] if self.variants else {}

    @property
    def outcome_count(self) -> int:
        """Outcomes that at least one λ finished."""
        return len(self.statistics["tasks"])

    @property
    def task_count(self) -> int:
        """Tasks that at least one λ finished."""
        return len(self.statistics.get("task_means") or self.statistics["tasks"])

    @property
    def loss_statement(self) -> str:
        """Whether the curve of loss has its minimum inside the grid, in a sentence."""
        return self.statistics["loss_curve"]["statement"]

    @property
    def paired_losses(self) -> Mapping[str, Any] | None:
        """Comparison over λ on the same sequences, see `analysis/paired_losses.py`; None where there is none."""
        return self.statistics.get("paired_losses")

    @property
    def best_by_loss(self) -> float | None:
        return self.statistics["loss_curve"].get("minimum_at")

    @property
    def mean_scores(self) -> dict[float, float]:
        """λ → mean greedy score over tasks after fine-tuning, at the λ that finished every task."""
        return {row["weight_decay"]: row["score"]["value"] for row in self._mean.get("scores", ())}

    @property
    def best(self) -> Mapping[str, Any] | None:
        """Best λ by mean score, see `best_weight_decay`."""
        return self._mean.get("best")

    @property
    def advantage(self) -> Estimate | None:
        """Mean score at the best λ by score minus that at the best λ by loss."""
        return estimate(self._mean.get("advantage"))

    @property
    def discordant(self) -> tuple[int, int] | None:
        """Discordant pairs and pairs compared, for the mean score."""
        found = self._mean.get("discordant")
        return None if not found else (len(found["discordant"]), found["pairs"])

    @property
    def agree(self) -> bool:
        """Whether the λ with the least loss has (or shares) the best mean score."""
        return self.best is not None and self.best_by_loss in (self.best["weight_decay"], *self.best["ties"])

    @property
    def _mean(self) -> Mapping[str, Any]:
        return self.statistics.get("mean") or {}

    def record(self) -> dict[str, Any]:
        """For `report.json`."""
        best_by_score = None if self.best is None else self.best["weight_decay"]
        return {
            "best_by_loss": self.best_by_loss,
            "best_by_score": best_by_score,
            "problem": self.problem,
            "plasticity": self.statistics,
            **({"over_pretraining": {str(step): found for step, found in self.over_steps.items()}} if self.over_steps else {}),
        }


def find(group: Group, outcomes: Sequence[Outcome], config: Mapping[str, Any] | None = None) -> Findings:
    """Statistics over the λ of `group`. Scores that cannot be compared are left out, and the reason is kept.

    Resamples and seed are those of the study's evaluations, from `config`. Where an evaluation gave its score an interval, that
    one is kept, so that a score has one interval on the whole page.
    """
    settings = bootstrap_settings(config or {})
    losses = {model.weight_decay: loss for model in group.models if (loss := model.held_out_loss) is not None}
    try:
        points = [_point(model, outcomes) for model in group.models]
        curves = score_curves(points, *settings)
        statistics = plasticity(points, *settings, curves)
        over_steps = {step: plasticity(points, *settings) for step, points in _points_by_step(group, outcomes).items()}
    except UserError as error:
        return Findings(losses, plasticity([_point(model, ()) for model in group.models], *settings), str(error))
    _keep_own_intervals(statistics, group)
    return Findings(losses, statistics, over_steps=over_steps, score_curves=curves)


def _keep_own_intervals(statistics: Mapping[str, Any], group: Group) -> None:
    for model in group.models:
        for task, scores in model.finetuned_scores.items():
            own = scores.metrics.get("greedy")
            if own is None or own.low is None or own.high is None:
                continue
            for row in (statistics["tasks"].get(task) or {}).get("scores", ()):
                if row["weight_decay"] == model.weight_decay:
                    row["score"] = {"value": row["score"]["value"], "low": own.low, "high": own.high}


def _point(model: BaseModel, outcomes: Sequence[Outcome]) -> GridPoint:
    found = _task_outcomes(model, outcomes)
    return GridPoint(model.weight_decay, model.held_out_loss, found, sequence_losses(model))


def _points_by_step(group: Group, outcomes: Sequence[Outcome]) -> dict[int, list[GridPoint]]:
    """The grid at each pretraining step that was evaluated, ascending; empty if only the last was.

    Held-out losses are those of the last step, so that they stand in no earlier point.
    """
    points: dict[int, list[GridPoint]] = {}
    for model in group.models:
        last = model.pretrain.results.get("steps")
        for step, scores in {**model.earlier, **({last: model} if model.earlier and isinstance(last, int) else {})}.items():
            points.setdefault(step, []).append(GridPoint(model.weight_decay, None, _task_outcomes(scores, outcomes)))
    return dict(sorted(points.items()))


def _task_outcomes(scores: BaseModel | CheckpointScores, outcomes: Sequence[Outcome]) -> dict[str, TaskOutcome]:
    found: dict[str, TaskOutcome] = {}
    for outcome in outcomes:
        tuned, base = scores.finetuned_scores.get(outcome.name), scores.base_scores.get(outcome.task)
        if tuned is not None and tuned.greedy_correct:
            asked = base if base is not None and base.greedy_correct else None
            found[outcome.name] = task_outcome(tuned, asked, outcome.task, outcome.variant)
    return found


def task_outcome(tuned: TaskScores, base: TaskScores | None, task: str, variant: str = "") -> TaskOutcome:
    """Correctness per question of a fine-tuned model, and of its base model if that was asked."""
    return TaskOutcome(
        tuned.greedy_correct,
        base.greedy_correct if base else None,
        tuned.questions_sha256,
        base.questions_sha256 if base else None,
        tuned.strata,
        task,
        variant,
    )


def sequence_losses(model: BaseModel) -> SequenceLosses | None:
    """Losses of the single sequences; None where the overfitting run did not keep them."""
    kept = model.overfitting.results if model.overfitting else {}
    if not all(isinstance(kept.get(key), list) and kept[key] for key in _KEPT):
        return None
    seen, held_out, seen_blocks, held_out_blocks = (kept[key] for key in _KEPT)
    if len(seen) != len(seen_blocks) or len(held_out) != len(held_out_blocks):
        return None
    return SequenceLosses(seen, held_out, tuple(seen_blocks), tuple(held_out_blocks))
