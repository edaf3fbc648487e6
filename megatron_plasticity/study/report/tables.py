"""The tables of the report: rows of text for the page, and the same numbers in full for the CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_plasticity.study.results import BaseModel, Cell, Estimate, StudyResults, TaskScores, number

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


def score_table(task: str, models: Sequence[BaseModel]) -> Table:
    """Every metric of one task, for each base model before and after fine-tuning."""
    stages = [(model, stage, scores) for model in models for stage, scores in _stages(model, task)]
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


def _stages(model: BaseModel, task: str) -> list[tuple[str, TaskScores | None]]:
    return [("base", model.base_scores.get(task)), ("fine-tuned", model.finetuned_scores.get(task))]


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


CELL_COLUMNS = (
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
SCORE_COLUMNS = (
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


def cell_records(results: StudyResults) -> list[dict[str, Any]]:
    """One record per cell, for `cells.csv` and `report.json`."""
    return [
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
            "point": "; ".join(f"{path}={value}" for path, value in cell.point.items()),
        }
        for cell in results.cells
    ]


def score_records(results: StudyResults) -> list[dict[str, Any]]:
    """One record per model, task and metric, for `scores.csv`; shares are fractions of 1."""
    return [
        {
            "group": group.label,
            "weight_decay": model.weight_decay,
            "adamw_timescale": model.pretrain.adamw_timescale,
            "task": task,
            "model": stage,
            "metric": metric,
            "value": found.value,
            "low": found.low,
            "high": found.high,
            "questions": scores.questions,
            "chance": scores.chance,
            "cell": model.pretrain.id,
        }
        for group in results.groups
        for model in group.models
        for task in results.tasks
        for stage, scores in _stages(model, task)
        if scores is not None
        for metric, found in scores.metrics.items()
    ]


def csv_text(columns: Sequence[str], records: Iterable[Mapping[str, Any]]) -> str:
    """Records as CSV (RFC 4180 but for plain line feeds); a missing value is an empty field."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()
