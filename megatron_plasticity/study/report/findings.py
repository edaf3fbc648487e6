"""The statistics of one group of base models, as `analysis/plasticity.py` computes them, in the shape that the page needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_plasticity.analysis.paired_losses import SequenceLosses
from megatron_plasticity.analysis.plasticity import GridPoint, TaskOutcome, plasticity
from megatron_plasticity.errors import UserError
from megatron_plasticity.study.results import BaseModel, Estimate, Group, estimate

MEAN = "mean of tasks"
_RESAMPLES = 1000
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

    @property
    def curves(self) -> dict[str, Mapping[str, Any]]:
        """Task → statistics of its scores; the mean of tasks last, if there is one of more than one task."""
        curves = dict(self.statistics["tasks"])
        if self._mean and len(curves) > 1:
            curves[MEAN] = self._mean
        return curves

    @property
    def task_count(self) -> int:
        """Tasks that at least one λ finished."""
        return len(self.statistics["tasks"])

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
        }


def find(group: Group, tasks: Sequence[str], config: Mapping[str, Any] | None = None) -> Findings:
    """Statistics over the λ of `group`. Scores that cannot be compared are left out, and the reason is kept.

    Resamples and seed are those of the study's evaluations, from `config`. Where an evaluation gave its score an interval, that
    one is kept, so that a score has one interval on the whole page.
    """
    evaluate = (config or {}).get("evaluate") or {}
    resamples, seed = int(evaluate.get("bootstrap_resamples") or _RESAMPLES), int(evaluate.get("seed") or 0)
    losses = {model.weight_decay: loss for model in group.models if (loss := model.held_out_loss) is not None}
    try:
        statistics = plasticity([_point(model, tasks) for model in group.models], resamples, seed)
    except UserError as error:
        return Findings(losses, plasticity([_point(model, ()) for model in group.models], resamples, seed), str(error))
    _keep_own_intervals(statistics, group)
    return Findings(losses, statistics)


def _keep_own_intervals(statistics: Mapping[str, Any], group: Group) -> None:
    for model in group.models:
        for task, scores in model.finetuned_scores.items():
            own = scores.metrics.get("greedy")
            if own is None or own.low is None or own.high is None:
                continue
            for row in (statistics["tasks"].get(task) or {}).get("scores", ()):
                if row["weight_decay"] == model.weight_decay:
                    row["score"] = {"value": row["score"]["value"], "low": own.low, "high": own.high}


def _point(model: BaseModel, tasks: Sequence[str]) -> GridPoint:
    outcomes: dict[str, TaskOutcome] = {}
    for task in tasks:
        tuned, base = model.finetuned_scores.get(task), model.base_scores.get(task)
        if tuned is not None and tuned.greedy_correct:
            asked = base if base is not None and base.greedy_correct else None
            outcomes[task] = TaskOutcome(
                tuned.greedy_correct,
                asked.greedy_correct if asked else None,
                tuned.questions_sha256,
                asked.questions_sha256 if asked else None,
            )
    return GridPoint(model.weight_decay, model.held_out_loss, outcomes, _sequences(model))


def _sequences(model: BaseModel) -> SequenceLosses | None:
    """Losses of the single sequences; None where the overfitting run did not keep them."""
    kept = model.overfitting.results if model.overfitting else {}
    if not all(isinstance(kept.get(key), list) and kept[key] for key in _KEPT):
        return None
    seen, held_out, seen_blocks, held_out_blocks = (kept[key] for key in _KEPT)
    if len(seen) != len(seen_blocks) or len(held_out) != len(held_out_blocks):
        return None
    return SequenceLosses(seen, held_out, tuple(seen_blocks), tuple(held_out_blocks))
