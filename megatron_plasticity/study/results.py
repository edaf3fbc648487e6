"""A study folder, read back into frozen records.

Reading never fails because of one cell: a cell that is missing, running, failed or damaged is kept with the reason in words, so
that a report can show it. Only a folder that is no study at all is a `UserError`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_plasticity.data.ledger import read_ledger
from megatron_plasticity.errors import UserError
from megatron_plasticity.study.grid import value_text
from megatron_plasticity.study.scores import TaskScores, average_over_seeds, bootstrap_settings, number, read_scores
from megatron_plasticity.tracking.metrics import read_metrics
from megatron_plasticity.tracking.run_folder import RunFolder, RunState

Status = Literal["missing", "pending", "running", "done", "failed", "interrupted", "damaged"]
BASE_KINDS = ("pretrain", "import")
"""Kinds of run that yield a base model."""
WEIGHT_DECAY_PATHS = ("optimizer.weight_decay", "optimizer.adamw_timescale")
SEED = "seed"
"""The axis of fine-tuning whose values are repeats, not variants."""


@dataclass(frozen=True)
class Series:
    """One metric over the steps at which it was logged; values that JSON calls NaN stay NaN."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """Something that is measured at every λ: a task on which models were fine-tuned in one way."""

    name: str
    """The task's, with the variant behind it if there are several."""
    task: str
    variant: str = ""
    """How models were fine-tuned, in words; empty where there is one way."""


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
    variant: Mapping[str, Any] = field(default_factory=dict)
    """Values of the axes of fine-tuning, the seed among them."""
    step: int | None = None
    """Pretraining step of the checkpoint that it descends from; None for the last."""
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
class CheckpointScores:
    """Scores of one checkpoint of a base model, before and after fine-tuning."""

    base_scores: Mapping[str, TaskScores]
    """By task."""
    finetuned_scores: Mapping[str, TaskScores]
    """By name of the outcome."""


@dataclass(frozen=True)
class BaseModel:
    """A pretraining run and what was made of it. An analysis that has no results is None."""

    pretrain: Cell
    """Or the import of a model that was pretrained elsewhere."""
    base_scores: Mapping[str, TaskScores]
    """By task."""
    finetuned_scores: Mapping[str, TaskScores]
    """By name of the outcome; averages over the seeds of fine-tuning."""
    earlier: Mapping[int, CheckpointScores] = field(default_factory=dict)
    """Pretraining step → scores of the checkpoint of that step, for those before the last."""
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
    outcomes: tuple[Outcome, ...]
    """The tasks, or each of them in each variant where there are several."""
    variants: Mapping[str, Mapping[str, Any]]
    """Ways to fine-tune: what a variant is called → values of the axes of fine-tuning but the seed. Empty where there is one."""

    @property
    def finetune_seeds(self) -> tuple[str, ...]:
        """Values of the axis of seeds of fine-tuning, empty without one."""
        return tuple(dict.fromkeys(str(cell.variant[SEED]) for cell in self.cells if SEED in cell.variant))

    @property
    def earlier_steps(self) -> tuple[int, ...]:
        """Pretraining steps before the last whose checkpoints were evaluated, ascending."""
        return tuple(sorted({cell.step for cell in self.cells if cell.step is not None}))

    @property
    def weight_decays(self) -> tuple[float, ...]:
        """λ of the grid, ascending, each once."""
        return tuple(sorted({cell.weight_decay for cell in self.cells if cell.kind in BASE_KINDS}))


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
    tasks, variants = _task_names(config, cells), _variants(cells)
    return StudyResults(
        folder=study_folder,
        name=name,
        description=str(study.get("description") or ""),
        config=config,
        corpus=study.get("corpus"),
        cells=cells,
        groups=tuple(_groups(cells, config, variants)),
        tasks=tasks,
        outcomes=tuple(Outcome(_outcome_name(t, v), t, v) for t in tasks for v in (variants or [""])),
        variants=variants,
    )


def _task_names(config: Mapping[str, Any], cells: tuple[Cell, ...]) -> tuple[str, ...]:
    """Tasks in the order of the config, then any that only cells name."""
    named = [str(task["name"]) for task in config.get("tasks") or () if isinstance(task, Mapping) and "name" in task]
    return tuple(dict.fromkeys([*named, *(cell.task for cell in cells if cell.task)]))


def _variants(cells: tuple[Cell, ...]) -> dict[str, Mapping[str, Any]]:
    """What each way to fine-tune is called → its point without the seed, in the order of the cells; empty if there is one way."""
    points = [_without_seed(cell.variant) for cell in cells if cell.task]
    paths = list(dict.fromkeys(path for point in points for path in point))
    found: dict[str, Mapping[str, Any]] = {_variant_label(point, paths): point for point in points}
    return found if len(found) > 1 else {}


def _without_seed(point: Mapping[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in point.items() if path != SEED}


def _variant_label(point: Mapping[str, Any], paths: Sequence[str]) -> str:
    return ", ".join(f"{short_path(path, paths)} = {value_text(value)}" for path, value in point.items())


def short_path(path: str, paths: Sequence[str]) -> str:
    """The last word of a config path, if that tells it apart from the other `paths`."""
    last = path.split(".")[-1]
    return last if sum(other.split(".")[-1] == last for other in paths) <= 1 else path


def _outcome_name(task: str, variant: str) -> str:
    return f"{task}, {variant}" if variant else task


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
        variant=dict(entry.get("variant") or {}),
        step=entry.get("step"),
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


def _groups(cells: tuple[Cell, ...], config: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]]) -> Iterator[Group]:
    by_label: dict[str, list[BaseModel]] = {}
    for cell in cells:
        if cell.kind in BASE_KINDS:
            label = ", ".join(f"{path} = {value}" for path, value in cell.point.items() if path not in WEIGHT_DECAY_PATHS)
            by_label.setdefault(label, []).append(_base_model(cell, cells, config, variants))
    for label, models in by_label.items():
        yield Group(label, tuple(sorted(models, key=lambda model: model.weight_decay)))


def _base_model(
    pretrain: Cell, cells: tuple[Cell, ...], config: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]]
) -> BaseModel:
    children = [cell for cell in cells if cell.parent == pretrain.id]
    finetunes = {cell.id for cell in children if cell.kind == "finetune"}
    evaluations = [cell for cell in cells if cell.kind == "evaluate" and (cell.parent == pretrain.id or cell.parent in finetunes)]
    scores = {step: _checkpoint_scores(evaluations, step, config, variants) for step in {None, *(c.step for c in evaluations)}}
    analyses = {cell.kind: cell for cell in children if cell.status == "done"}
    overfitting = analyses.get("overfitting")
    return BaseModel(
        pretrain=pretrain,
        base_scores=scores[None].base_scores,
        finetuned_scores=scores[None].finetuned_scores,
        earlier={step: scores[step] for step in sorted(step for step in scores if step is not None)},
        probes=analyses.get("probes"),
        attention=analyses.get("attention"),
        overfitting=overfitting,
        passes=_passes(pretrain, overfitting),
    )


def _checkpoint_scores(
    evaluations: list[Cell], step: int | None, config: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]]
) -> CheckpointScores:
    """Of the evaluations of a base model and of what was fine-tuned from it, those of one checkpoint."""
    base: dict[str, TaskScores] = {}
    repeats: dict[str, dict[str, TaskScores]] = {}
    for cell in evaluations:
        scores = read_scores(cell.results, config) if cell.step == step else {}
        if cell.task is None:
            base |= scores
        elif cell.task in scores:
            point = _without_seed(cell.variant)
            name = _outcome_name(cell.task, next((label for label, other in variants.items() if other == point), ""))
            repeats.setdefault(name, {})[str(cell.variant.get(SEED, ""))] = scores[cell.task]
    return CheckpointScores(
        base, {name: average_over_seeds(found, *bootstrap_settings(config)) for name, found in repeats.items()}
    )


def _passes(pretrain: Cell, overfitting: Cell | None) -> float | None:
    """From the overfitting run, or from the ledger of the pretraining run where an older overfitting run did not say."""
    if overfitting is not None and (passes := number(overfitting.results.get("passes"))) is not None:
        return passes
    try:
        return read_ledger(pretrain.folder).passes
    except UserError:
        return None
