"""The tables of the report: rows of text for the page, and the same numbers in full for the CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_plasticity.study.results import BaseModel, Cell, CheckpointScores, Outcome, StudyResults
from megatron_plasticity.study.scores import Estimate, TaskScores, number

METRICS = {
    "greedy": ("greedy", "share of questions answered correctly at temperature 0"),
    "maj": ("majority", "share answered correctly by the largest cluster of equal sampled answers"),
    "rm": ("best by reward", "share answered correctly by the sample with the highest reward"),
    "pass": ("pass", "share with at least one correct sample"),
    "correct_ratio": ("correct ratio", "share of correct samples, over the questions with at least one"),
    "orm": ("reward", "mean reward of the samples, in the reward model's own unit"),
    "format_rate": ("has an answer", "share of samples from which an answer can be read"),
}
"""Metric → heading, meaning. All but `orm` are shares, shown in per cent."""


@dataclass(frozen=True)
class Entry:
    """One field of a table: its text, the interval in small print, and a CSS class."""

    text: str
    interval: str = ""
    look: str = ""


@dataclass(frozen=True)
class Table:
    """Column headings, which of them are numbers (right-aligned), and rows."""

    headings: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[Entry, ...], ...]


def table(columns: Mapping[str, bool], rows: Iterable[Sequence[Entry | str]]) -> Table:
    """A table from heading → is a number, and rows of entries or plain text."""
    entries = tuple(tuple(field if isinstance(field, Entry) else Entry(field) for field in row) for row in rows)
    return Table(tuple(columns), tuple(columns.values()), entries)


def decimals(value: float | None, digits: int = 3) -> str:
    """A number with a fixed count of decimals and a true minus sign; `–` for a missing one."""
    if value is None:
        return "–"
    rounded = round(value, digits) + 0.0  # no "−0.0"
    return f"{rounded:.{digits}f}".replace("-", "−")


def percent(value: float | None) -> str:
    """A share in per cent with one decimal, without the sign."""
    return decimals(None if value is None else 100 * value, 1)


def estimate_entry(found: Estimate | None, *, share: bool = True, digits: int = 3) -> Entry:
    """An estimate with its interval; per cent if it is a share."""
    if found is None:
        return Entry("–")
    show = percent if share else lambda value: decimals(value, digits)
    known = found.low is not None and found.high is not None
    return Entry(show(found.value), f"{show(found.low)} to {show(found.high)}" if known else "")


def score_table(models: Sequence[BaseModel], outcomes: Sequence[Outcome]) -> Table:
    """Every metric of the outcomes of one task, for each base model before and after fine-tuning."""
    stages = [(m, variant or stage, scores) for m in models for stage, variant, scores in stages_of(m, outcomes)]
    found = [name for name in METRICS if any(scores and name in scores.metrics for _, _, scores in stages)]
    rewards = {scores.reward for _, _, scores in stages if scores and scores.reward}
    columns = {"λ": True, "model": False, **{_metric_heading(name, rewards): True for name in found}}
    rows = [
        (
            f"{model.weight_decay:.3g}",
            stage,
            *(estimate_entry(scores.metrics.get(name) if scores else None, share=name != "orm") for name in found),
        )
        for model, stage, scores in stages
    ]
    return table(columns, rows)


def _metric_heading(metric: str, rewards: set[str]) -> str:
    """Heading of a metric; it says so where the reward is a mere stand-in for a reward model."""
    name = METRICS[metric][0]
    if metric in ("rm", "orm") and rewards == {"length"}:
        name += " (shortest answer; a stand-in, not a reward model)" if metric == "rm" else " (minus the number of characters)"
    return name + ("" if metric == "orm" else " %")


def stages_of(checkpoint: BaseModel | CheckpointScores, outcomes: Sequence[Outcome]) -> list[tuple[str, str, TaskScores | None]]:
    """Stage, variant and scores on one task, before fine-tuning and after each way of it; `outcomes` are those of the task."""
    tuned = [("fine-tuned", outcome.variant, checkpoint.finetuned_scores.get(outcome.name)) for outcome in outcomes]
    return [("base", "", checkpoint.base_scores.get(outcomes[0].task)), *tuned]


def cell_table(cells: Sequence[Cell]) -> Table:
    """Every run with its state, and the reason where there is no result."""
    columns = {"cell": False, "kind": False, "λ": True, "task": False, "state": False, "time": True, "reason": False}
    return table(
        columns,
        [
            (
                cell.id,
                cell.kind,
                f"{cell.weight_decay:.3g}",
                cell.task or "",
                Entry(cell.status, look=cell.status),
                duration(cell.seconds),
                cell.reason or "",
            )
            for cell in cells
        ],
    )


def duration(seconds: float | None) -> str:
    """Seconds as `42 s`, `3 min 5 s` or `2 h 10 min`."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


_CELL_COLUMNS = (
    "id",
    "kind",
    "status",
    "reason",
    "weight_decay",
    "adamw_timescale",
    "task",
    "parent",
    "folder",
    "seconds",
    "held_out_loss",
    "train_loss",
    "point",
)
_SCORE_COLUMNS = (
    "group",
    "weight_decay",
    "adamw_timescale",
    "task",
    "model",
    "metric",
    "value",
    "low",
    "high",
    "questions",
    "chance",
    "cell",
)


def cell_columns(results: StudyResults) -> tuple[str, ...]:
    """Columns of `cells.csv`: those of fine-tuning in several ways and from several steps only if the study does so."""
    return (*_CELL_COLUMNS, *_further_columns(results))


def score_columns(results: StudyResults) -> tuple[str, ...]:
    """Columns of `scores.csv`, likewise; the test set if a task has several, and the seed if fine-tuning has an axis of seeds."""
    several = any(scores.test_sets for model in _models(results) for scores in _all_scores(model))
    seeds = ["seed"] if results.finetune_seeds else []
    return (*_SCORE_COLUMNS, *_further_columns(results), *(["test_set"] if several else []), *seeds)


def _further_columns(results: StudyResults) -> list[str]:
    varied = any(cell.variant for cell in results.cells)
    return [*(["variant"] if varied else []), *(["step"] if results.earlier_steps else [])]


def cell_records(results: StudyResults) -> list[dict[str, Any]]:
    """One record per cell, for `cells.csv` and `report.json`."""
    columns = cell_columns(results)
    records = (
        {
            "id": cell.id,
            "kind": cell.kind,
            "status": cell.status,
            "reason": cell.reason,
            "weight_decay": cell.weight_decay,
            "adamw_timescale": cell.adamw_timescale,
            "task": cell.task,
            "parent": cell.parent,
            "folder": cell.folder.name,
            "seconds": cell.seconds,
            "held_out_loss": number(cell.results.get("held_out_loss")) if cell.kind == "pretrain" else None,
            "train_loss": number(cell.results.get("train_loss")),
            "point": _point_text(cell.point),
            "variant": _point_text(cell.variant),
            "step": cell.step,
        }
        for cell in results.cells
    )
    return [{column: record[column] for column in columns} for record in records]


def score_records(results: StudyResults) -> list[dict[str, Any]]:
    """One record per model, task and metric, for `scores.csv`; shares are fractions of 1.

    A record without a test set is of the whole task, one without a step of the last checkpoint. One with a seed is the greedy
    score after fine-tuning with it; the others are means over the seeds.
    """
    columns = score_columns(results)
    return [
        {column: record[column] for column in columns}
        for group in results.groups
        for model in group.models
        for record in _records_of_model(group.label, model, results.outcomes)
    ]


def _records_of_model(group: str, model: BaseModel, outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    for step, checkpoint in (None, model), *model.earlier.items():
        for task in dict.fromkeys(outcome.task for outcome in outcomes):
            for stage, variant, scores in stages_of(checkpoint, [outcome for outcome in outcomes if outcome.task == task]):
                if scores is None:
                    continue
                where = {
                    "group": group,
                    "weight_decay": model.weight_decay,
                    "adamw_timescale": model.pretrain.adamw_timescale,
                    "task": task,
                    "model": stage,
                    "chance": scores.chance,
                    "cell": model.pretrain.id,
                    "variant": variant,
                    "step": step,
                }
                parts = [("", scores.questions, scores.metrics)]
                parts += [(part.name, part.questions, part.metrics) for part in scores.test_sets]
                for test_set, questions, metrics in parts:
                    for metric, found in metrics.items():
                        measured = {"metric": metric, "value": found.value, "low": found.low, "high": found.high}
                        yield {**where, **measured, "questions": questions, "test_set": test_set, "seed": ""}
                for seed, value in scores.by_seed.items():
                    measured = {"metric": "greedy", "value": value, "low": None, "high": None}
                    yield {**where, **measured, "questions": scores.questions, "test_set": "", "seed": seed}


def _models(results: StudyResults) -> Iterator[BaseModel]:
    return (model for group in results.groups for model in group.models)


def _all_scores(model: BaseModel) -> Iterator[TaskScores]:
    for checkpoint in (model, *model.earlier.values()):
        yield from checkpoint.base_scores.values()
        yield from checkpoint.finetuned_scores.values()


def _point_text(point: Mapping[str, Any]) -> str:
    return "; ".join(f"{path}={value}" for path, value in point.items())


def csv_text(columns: Sequence[str], records: Iterable[Mapping[str, Any]]) -> str:
    """Records as CSV (RFC 4180 but for plain line feeds); a missing value is an empty field."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()
