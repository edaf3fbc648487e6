"""A study folder, read back into frozen records.

Reading never fails because of one cell: a cell that is missing, running, failed or damaged is kept with the reason in words, so
that a report can show it. Only a folder that is no study at all is a `UserError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_plasticity.data.ledger import read_ledger
from megatron_plasticity.errors import UserError
from megatron_plasticity.tracking.metrics import read_metrics
from megatron_plasticity.tracking.run_folder import RunFolder, RunState

Status = Literal["missing", "pending", "running", "done", "failed", "interrupted", "damaged"]
BASE_KINDS = ("pretrain", "import")
"""Kinds of run that yield a base model."""
WEIGHT_DECAY_PATHS = ("optimizer.weight_decay", "optimizer.adamw_timescale")


@dataclass(frozen=True)
class Series:
    """One metric over the steps at which it was logged; values that JSON calls NaN stay NaN."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its confidence interval, which are None where no interval was computed."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class TaskScores:
    """Scores of one model on the test questions of one task."""

    task: str
    answer_kind: str
    questions: int
    chance: float | None
    metrics: Mapping[str, Estimate]
    greedy_correct: tuple[int, ...]
    examples: tuple[Mapping[str, Any], ...] = ()
    grader: str | None = None
    """What judged the answers; None where it was not kept."""
    reward: str | None = None
    """Kind of the reward behind `rm` and `orm`; None where it was not kept."""
    questions_sha256: str | None = None
    """Hash of the questions; None where it was not kept."""


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    id: str
    kind: str
    folder: Path
    point: Mapping[str, Any]
    weight_decay: float
    adamw_timescale: float | None
    """1/(lr·λ·steps), the fraction of the run that the weights remember; None for λ = 0, where it is infinite."""
    task: str | None
    parent: str | None
    status: Status
    reason: str | None = None
    """Why there are no results, in words; None for a cell that is done."""
    started: float | None = None
    finished: float | None = None
    results: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Series] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        """Wall-clock time from the start to the end of the (last) attempt."""
        return None if self.started is None or self.finished is None else max(0.0, self.finished - self.started)


@dataclass(frozen=True)
class BaseModel:
    """A pretraining run and what was made of it. An analysis that has no results is None."""

    pretrain: Cell
    """Or the import of a model that was pretrained elsewhere."""
    base_scores: Mapping[str, TaskScores]
    finetuned_scores: Mapping[str, TaskScores]
    finetunes: Mapping[str, Cell]
    probes: Cell | None = None
    attention: Cell | None = None
    overfitting: Cell | None = None
    passes: float | None = None
    """How often the run went over its training data, on average; None where that is not known."""

    @property
    def weight_decay(self) -> float:
        return self.pretrain.weight_decay

    @property
    def held_out_loss(self) -> float | None:
        """Mean cross-entropy in nats per token on the held-out sequences after the last step."""
        return number(self.pretrain.results.get("held_out_loss"))


@dataclass(frozen=True)
class Group:
    """The base models that differ in weight decay only, by ascending λ."""

    label: str
    """Values of the other axes of the grid, empty when λ is the only one."""
    models: tuple[BaseModel, ...]


@dataclass(frozen=True)
class StudyResults:
    """Everything that a study folder holds."""

    folder: Path
    name: str
    description: str
    config: Mapping[str, Any]
    corpus: Mapping[str, Any] | None
    cells: tuple[Cell, ...]
    groups: tuple[Group, ...]
    tasks: tuple[str, ...]

    @property
    def weight_decays(self) -> tuple[float, ...]:
        """λ of the grid, ascending, each once."""
        return tuple(sorted({cell.weight_decay for cell in self.cells if cell.kind in BASE_KINDS}))


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


def collect(study_folder: Path) -> StudyResults:
    """Read `study_folder` (see the study folder's layout in docs/architecture.md).

    Raises UserError when there is no readable `study.json` in it.
    """
    path = study_folder / "study.json"
    if not path.is_file():
        raise UserError(f"{study_folder} is not a study folder: it has no study.json. Name the folder that `study run` printed.")
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        entries, name = study["cells"], str(study["name"])
        cells = tuple(_read_cell(study_folder, entry) for entry in entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as a study ({type(error).__name__}: {error}). Run the study again to write it anew."
        ) from error
    config = study.get("config") or {}
    return StudyResults(
        folder=study_folder,
        name=name,
        description=str(study.get("description") or ""),
        config=config,
        corpus=study.get("corpus"),
        cells=cells,
        groups=tuple(_groups(cells, config)),
        tasks=_task_names(config, cells),
    )


def _task_names(config: Mapping[str, Any], cells: tuple[Cell, ...]) -> tuple[str, ...]:
    """Tasks in the order of the config, then any that only cells name."""
    named = [str(task["name"]) for task in config.get("tasks") or () if isinstance(task, Mapping) and "name" in task]
    return tuple(dict.fromkeys([*named, *(cell.task for cell in cells if cell.task)]))


def _read_cell(study_folder: Path, entry: Mapping[str, Any]) -> Cell:
    run = RunFolder(study_folder / str(entry["folder"]))
    status, reason, state = _read_state(run)
    results: Mapping[str, Any] = {}
    if status == "done":
        try:
            results = run.results
        except UserError as error:
            status, reason = "damaged", f"marked as done, but its results cannot be read: {error}"
    return Cell(
        id=str(entry["id"]),
        kind=str(entry["kind"]),
        folder=run.path,
        point=dict(entry.get("point") or {}),
        weight_decay=float(entry["weight_decay"]),
        adamw_timescale=number(entry.get("adamw_timescale")),
        task=entry.get("task"),
        parent=entry.get("parent"),
        status=status,
        reason=reason,
        started=state.started,
        finished=state.finished,
        results=results,
        metrics=_series(run.metrics_path) if entry["kind"] in ("pretrain", "finetune") else {},
    )


def _read_state(run: RunFolder) -> tuple[Status, str | None, RunState]:
    if not run.path.is_dir():
        return "missing", "not started: there is no run folder", RunState()
    try:
        state = run.state
    except UserError as error:
        return "damaged", str(error), RunState()
    progress = _progress_text(state.progress or {})
    reasons = {
        "pending": "waiting to be started",
        "running": "still running when the report was written" + progress,
        "interrupted": (state.error or "stopped before its end") + progress,
        "failed": (state.error or "failed without a message; see its log") + progress,
        "done": None,
    }
    if state.status not in reasons:
        return "damaged", f"state.json has the unknown status {state.status!r}", state
    return state.status, reasons[state.status], state


def _progress_text(progress: Mapping[str, Any]) -> str:
    done, total = number(progress.get("done")), number(progress.get("total"))
    return "" if done is None or total is None else f" ({done:g} of {total:g} {progress.get('unit') or ''}".rstrip() + ")"


def _series(path: Path) -> dict[str, Series]:
    """`metrics.jsonl` by metric; nothing from a file with damaged lines, since the cell's results do not rest on it."""
    try:
        rows = read_metrics(path)
    except UserError:
        return {}
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, (int, float)):
                steps, values = columns.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    return {name: Series(tuple(steps), tuple(values)) for name, (steps, values) in columns.items()}


def _groups(cells: tuple[Cell, ...], config: Mapping[str, Any]) -> Iterator[Group]:
    by_label: dict[str, list[BaseModel]] = {}
    for cell in cells:
        if cell.kind in BASE_KINDS:
            label = ", ".join(f"{path} = {value}" for path, value in cell.point.items() if path not in WEIGHT_DECAY_PATHS)
            by_label.setdefault(label, []).append(_base_model(cell, cells, config))
    for label, models in by_label.items():
        yield Group(label, tuple(sorted(models, key=lambda model: model.weight_decay)))


def _base_model(pretrain: Cell, cells: tuple[Cell, ...], config: Mapping[str, Any]) -> BaseModel:
    children = [cell for cell in cells if cell.parent == pretrain.id]
    finetunes = {cell.task: cell for cell in children if cell.kind == "finetune" and cell.task}
    base: dict[str, TaskScores] = {}
    for cell in children:
        if cell.kind == "evaluate":
            base |= _task_scores(cell, config)
    finetuned: dict[str, TaskScores] = {}
    for task, finetune in finetunes.items():
        for cell in cells:
            if cell.kind == "evaluate" and cell.parent == finetune.id and task in (scores := _task_scores(cell, config)):
                finetuned[task] = scores[task]
    analyses = {cell.kind: cell for cell in children if cell.status == "done"}
    overfitting = analyses.get("overfitting")
    return BaseModel(
        pretrain=pretrain,
        base_scores=base,
        finetuned_scores=finetuned,
        finetunes=finetunes,
        probes=analyses.get("probes"),
        attention=analyses.get("attention"),
        overfitting=overfitting,
        passes=_passes(pretrain, overfitting),
    )


def _passes(pretrain: Cell, overfitting: Cell | None) -> float | None:
    """From the overfitting run, or from the ledger of the pretraining run where an older overfitting run did not say."""
    if overfitting is not None and (passes := number(overfitting.results.get("passes"))) is not None:
        return passes
    try:
        return read_ledger(pretrain.folder).passes
    except UserError:
        return None


def _task_scores(cell: Cell, config: Mapping[str, Any]) -> dict[str, TaskScores]:
    examples = cell.results.get("examples") or {}
    return {
        task: TaskScores(
            task=task,
            answer_kind=str(entry.get("answer_kind", "")),
            questions=int(entry.get("questions") or 0),
            chance=number(entry.get("chance")),
            metrics={name: found for name, value in (entry.get("metrics") or {}).items() if (found := estimate(value))},
            greedy_correct=tuple(int(correct) for correct in entry.get("greedy_correct") or ()),
            examples=tuple(examples.get(task) or ()),
            grader=entry.get("grader"),
            reward=_reward_kind(entry, config),
            questions_sha256=entry.get("questions_sha256"),
        )
        for task, entry in (cell.results.get("tasks") or {}).items()
    }


def _reward_kind(entry: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """As the evaluation says, or, for one that does not, as the study's config asked."""
    reward = entry.get("reward") or (config.get("evaluate") or {}).get("reward")
    return str(reward["kind"]) if isinstance(reward, Mapping) and reward.get("kind") not in (None, "none") else None
