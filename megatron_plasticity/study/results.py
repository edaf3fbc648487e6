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
from megatron_plasticity.study.scores import (
    TaskScores,
    asked_alike,
    average_over_seeds,
    bootstrap_settings,
    number,
    read_scores,
)
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
    features: Cell | None = None
    truncation: Cell | None = None
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
class UnequalSeeds:
    """An outcome at which some λ lack seeds of fine-tuning that others finished."""

    outcome: str
    step: int | None
    """Pretraining step of the checkpoint; None for the last."""
    compared: tuple[str, ...]
    """The seeds that all have, over which scores are averaged. Empty: there is nothing to compare, and no λ has a score."""
    lacking: Mapping[float, tuple[str, ...]]
    """λ → seeds that it lacks."""


@dataclass(frozen=True)
class Group:
    """The base models that differ in weight decay only, by ascending λ."""

    label: str
    """Values of the other axes of the grid, empty when λ is the only one."""
    models: tuple[BaseModel, ...]
    unequal_seeds: tuple[UnequalSeeds, ...] = ()
    """Where a run that is missing at one λ leaves seeds of others out; the λ that have none at all are not among them."""


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
    by_label: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.kind in BASE_KINDS:
            label = ", ".join(
                f"{path} = {value_text(value)}" for path, value in cell.point.items() if path not in WEIGHT_DECAY_PATHS
            )
            by_label.setdefault(label, []).append(cell)
    for label, bases in by_label.items():
        bases.sort(key=lambda cell: cell.weight_decay)
        runs = [_runs_by_step(base, cells, config, variants) for base in bases]
        paired = _paired_seeds(runs)
        models = [_base_model(base, cells, by_step, paired, config) for base, by_step in zip(bases, runs, strict=True)]
        yield Group(label, tuple(models), tuple(_unequal_seeds(bases, runs, paired)))


@dataclass(frozen=True)
class _Runs:
    """The evaluations of one checkpoint of a base model and of what was fine-tuned from it."""

    base: dict[str, TaskScores] = field(default_factory=dict)
    """By task."""
    repeats: dict[str, dict[str, TaskScores]] = field(default_factory=dict)
    """Name of the outcome → seed of fine-tuning → scores; the seed is empty without an axis of seeds."""


_RunsByStep = Mapping[int | None, _Runs]
_Paired = Mapping[tuple[int | None, str], tuple[str, ...]]
"""Step and outcome → the seeds that every λ of a group has, of those that have any."""


def _runs_by_step(
    base: Cell, cells: tuple[Cell, ...], config: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]]
) -> _RunsByStep:
    finetunes = {cell.id for cell in cells if cell.parent == base.id and cell.kind == "finetune"}
    by_step: dict[int | None, _Runs] = {None: _Runs()}
    for cell in cells:
        if cell.kind != "evaluate" or not (cell.parent == base.id or cell.parent in finetunes):
            continue
        runs = by_step.setdefault(cell.step, _Runs())
        scores = read_scores(cell.results, config)
        if cell.task is None:
            runs.base.update(scores)
        elif cell.task in scores:
            point = _without_seed(cell.variant)
            name = _outcome_name(cell.task, next((label for label, other in variants.items() if other == point), ""))
            runs.repeats.setdefault(name, {})[str(cell.variant.get(SEED, ""))] = scores[cell.task]
    for runs in by_step.values():
        runs.repeats.update({name: asked_alike(found) for name, found in runs.repeats.items()})
    return by_step


def _paired_seeds(of_bases: Sequence[_RunsByStep]) -> _Paired:
    """λ are compared over the same seeds, so that a seed that failed at one of them does not count at the others either."""
    paired: dict[tuple[int | None, str], tuple[str, ...]] = {}
    for by_step in of_bases:
        for step, runs in by_step.items():
            for name, found in runs.repeats.items():
                seeds = paired.setdefault((step, name), tuple(found))
                paired[step, name] = tuple(seed for seed in seeds if seed in found)
    return paired


def _unequal_seeds(bases: Sequence[Cell], of_bases: Sequence[_RunsByStep], paired: _Paired) -> Iterator[UnequalSeeds]:
    for (step, name), compared in paired.items():
        finished = {
            base.weight_decay: list(by_step[step].repeats[name])
            for base, by_step in zip(bases, of_bases, strict=True)
            if step in by_step and name in by_step[step].repeats
        }
        every = list(dict.fromkeys(seed for seeds in finished.values() for seed in seeds))
        lacking = {decay: tuple(seed for seed in every if seed not in seeds) for decay, seeds in finished.items()}
        if any(lacking.values()):
            yield UnequalSeeds(name, step, compared, {decay: seeds for decay, seeds in lacking.items() if seeds})


def _base_model(
    base: Cell, cells: tuple[Cell, ...], by_step: _RunsByStep, paired: _Paired, config: Mapping[str, Any]
) -> BaseModel:
    def averages(step: int | None) -> dict[str, TaskScores]:
        return {
            name: average_over_seeds({seed: found[seed] for seed in paired[step, name]}, *bootstrap_settings(config))
            for name, found in by_step[step].repeats.items()
            if paired[step, name]
        }

    analyses = {cell.kind: cell for cell in cells if cell.parent == base.id and cell.status == "done"}
    overfitting = analyses.get("overfitting")
    return BaseModel(
        pretrain=base,
        base_scores=by_step[None].base,
        finetuned_scores=averages(None),
        earlier={step: CheckpointScores(by_step[step].base, averages(step)) for step in sorted(filter(None, by_step))},
        probes=analyses.get("probes"),
        attention=analyses.get("attention"),
        overfitting=overfitting,
        features=analyses.get("features"),
        truncation=analyses.get("truncation"),
        passes=_passes(base, overfitting),
    )


def _passes(pretrain: Cell, overfitting: Cell | None) -> float | None:
    """From the overfitting run, or from the ledger of the pretraining run where an older overfitting run did not say."""
    if overfitting is not None and (passes := number(overfitting.results.get("passes"))) is not None:
        return passes
    try:
        return read_ledger(pretrain.folder).passes
    except UserError:
        return None
