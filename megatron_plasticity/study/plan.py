"""From a study's config to its graph of runs. Every folder's name, with its hash, is known before anything runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_plasticity.config.analysis import (
    AnalysesConfig,
    AttentionConfig,
    CaptureConfig,
    FeaturesConfig,
    OverfittingConfig,
    ProbesConfig,
    TruncationConfig,
)
from megatron_plasticity.config.base import Section
from megatron_plasticity.config.evaluation import EvaluateConfig
from megatron_plasticity.config.files import text_hash
from megatron_plasticity.config.hashing import config_hash
from megatron_plasticity.config.load import merge
from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.data.probe_sets import probe_inputs
from megatron_plasticity.errors import ConfigError
from megatron_plasticity.evaluation.inputs import grading_inputs, reward_inputs
from megatron_plasticity.evaluation.tasks.registry import get_task
from megatron_plasticity.study.check import check_study, task_problems
from megatron_plasticity.study.grid import points, resolved_point, variant_name
from megatron_plasticity.study.recipes import corpus_folder, finetune_recipe, import_configs, study_folder, variants


@dataclass(frozen=True)
class PlannedCell:
    """One run of the study, before it exists."""

    id: str
    kind: str
    config: Section
    folder: Path
    """Run folder, under the study's folder."""
    point: Mapping[str, Any]
    """The axes' values of the pretraining run that it descends from."""
    weight_decay: float
    adamw_timescale: float | None
    parent: str | None = None
    """Id of the run whose model it reads."""
    task: str | None = None
    variant: Mapping[str, Any] = field(default_factory=dict)
    """The values of `finetune_axes` of the fine-tuning that it is, or that it evaluates."""
    step: int | None = None
    """Pretraining step of the checkpoint that it descends from; None for the last."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Name → hash of what it reads; in the hash of its folder."""

    @property
    def name(self) -> str:
        """Readable name, in the folder's name."""
        return getattr(self.config, "name")  # noqa: B009  every kind of run has one, and Section has not

    def to_json(self) -> dict[str, Any]:
        """The cell's entry in `study.json`."""
        return {
            "id": self.id,
            "kind": self.kind,
            "folder": self.folder.name,
            "point": _finite(self.point),
            "weight_decay": self.weight_decay,
            "adamw_timescale": self.adamw_timescale,
            "task": self.task,
            "variant": _finite(self.variant),
            "step": self.step,
            "parent": self.parent,
            "needs": [self.parent] if self.parent else [],
        }


def _finite(point: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity, which is what λ = 0 is as a timescale."""
    return {path: str(value) if isinstance(value, float) and math.isinf(value) else value for path, value in point.items()}


@dataclass(frozen=True)
class StudyPlan:
    config: StudyConfig
    folder: Path
    cells: tuple[PlannedCell, ...]
    corpus_folder: Path | None = field(default=None)
    """Prepared corpus, if the study has one of its own."""


def plan_study(
    config: StudyConfig,
    corpus_hash: str | None = None,
    sources: Mapping[str, Mapping[str, str]] | None = None,
    *,
    tasks_needed: bool = True,
    bases: Sequence[PretrainConfig] | None = None,
) -> StudyPlan:
    """The graph of runs, parents before children.

    `corpus_hash` is the sha256 of the corpus manifest, which enters every hash. For a study of imported bases `sources` takes its
    place: the hashes of what each import reads, by the name of the base. Where one of them is not known yet, or with
    `tasks_needed` false a task is not prepared, the graph is right and the names of its folders are not. `bases` are what
    `check_study` gives, if it was asked already. Raises ConfigError if any cell's config is not valid.
    """
    bases = check_study(config, tasks_needed=tasks_needed) if bases is None else bases
    tasks = _tasks_read(config, tasks_needed)
    roots = _imports(config, sources or {}) if config.bases else _pretrainings(config, bases, corpus_hash or "")
    read = _texts_read(config.analyses)
    cells: list[PlannedCell] = []
    for root, finetune_changes in roots:
        cells += [root, *_analyses(config, root, read)]
        for step in (None, *sorted(config.finetune_steps)):
            cells += _plasticity(config, _Base(root, step), finetune_changes, tasks)
    if twice := [name for name, count in Counter(cell.id for cell in cells).items() if count > 1]:
        raise ConfigError(f"study {config.name}: two runs would have one name; call a base model otherwise: {', '.join(twice)}")
    _refuse_equal_runs(config, cells)
    return StudyPlan(config, study_folder(config), tuple(cells), corpus_folder(config))


def _refuse_equal_runs(config: StudyConfig, cells: Iterable[PlannedCell]) -> None:
    """Equal runs under two names would count as independent evidence, and be done twice."""
    first: dict[tuple[str, str], str] = {}
    for cell in cells:
        if (same := first.setdefault((cell.kind, _hash_of(cell)), cell.id)) != cell.id:
            where = {"import": "bases", "pretrain": "axes"}.get(cell.kind, "finetune_axes")
            raise ConfigError(
                f"study {config.name}: {where}: {same} and {cell.id} are one run under two names, with equal results; "
                "leave one of them out"
            )


_Root = tuple[PlannedCell, Mapping[str, Any]]
"""A cell that yields a base model, and what its fine-tuning changes in the study's recipe."""


@dataclass(frozen=True)
class _Base:
    """A base model: a checkpoint of a run, as what follows from it reads it."""

    root: PlannedCell
    step: int | None
    """None for the last checkpoint."""

    @property
    def name(self) -> str:
        name = self.root.id.removeprefix(f"{self.root.kind}-")
        return name if self.step is None else f"{name}-step{self.step}"

    @property
    def folder(self) -> Path:
        return self.root.folder if self.step is None else self.root.folder / "checkpoints" / f"step-{self.step}"

    @property
    def identity(self) -> str:
        """See `TrainedModel.identity`, which is the same once the model exists."""
        return _hash_of(self.root) if self.step is None else f"{_hash_of(self.root)}@{self.step}"


@dataclass(frozen=True)
class _TaskInputs:
    """A task, and what it puts into the hashes of the two kinds of run that read it."""

    config: TaskConfig
    of_finetune: Mapping[str, str]
    of_evaluate: Mapping[str, str]


@dataclass(frozen=True)
class _Tasks:
    """The tasks of a study."""

    each: tuple[_TaskInputs, ...]
    of_evaluate: Mapping[str, str]
    """What all of them put into the hash of an evaluation that asks all."""


def _tasks_read(config: StudyConfig, tasks_needed: bool) -> _Tasks:
    if not tasks_needed and task_problems(config):
        return _Tasks(tuple(_TaskInputs(task, {}, {}) for task in config.tasks), {})
    recipe, rewards = config.evaluate, reward_inputs(config.evaluate) if config.evaluate else {}

    def of_evaluate(*tasks: TaskConfig) -> dict[str, str]:
        return {**grading_inputs(recipe, tasks), **rewards} if recipe else {}

    identities = [get_task(task).identity for task in config.tasks]
    each = (
        _TaskInputs(task, {"task": identity} if identity else {}, of_evaluate(task))
        for task, identity in zip(config.tasks, identities, strict=True)
    )
    return _Tasks(tuple(each), of_evaluate(*config.tasks))


def _pretrainings(config: StudyConfig, bases: Sequence[PretrainConfig], corpus_hash: str) -> Iterator[_Root]:
    for base, point in zip(bases, points(config.axes), strict=True):
        common = {
            "point": resolved_point(point, base),
            "weight_decay": base.weight_decay,
            "adamw_timescale": base.adamw_timescale,
        }
        inputs = {"corpus": corpus_hash, **_capture_inputs(base.capture)}
        yield _cell("pretrain", base.name, base, inputs, **common), {}


def _imports(config: StudyConfig, sources: Mapping[str, Mapping[str, str]]) -> Iterator[_Root]:
    for base, imported in zip(config.bases, import_configs(config), strict=True):
        point = {"optimizer.weight_decay": base.weight_decay, **({"group": base.group} if base.group else {})}
        common = {"point": point, "weight_decay": base.weight_decay, "adamw_timescale": None}
        inputs = dict(sources.get(base.name) or {"not read yet": base.source})
        yield (
            _cell("import", base.name, imported, inputs, **common),
            base.finetune,
        )


def _analyses(config: StudyConfig, root: PlannedCell, read: Mapping[str, Mapping[str, str]]) -> Iterator[PlannedCell]:
    """What is looked at inside a base model; `read` are hashes of the texts that each kind of analysis reads."""
    base = _Base(root, None)
    analyses = config.analyses
    of_base = {"name": base.name, "output": study_folder(config), "run": base.folder}
    for kind, cls, recipe in (
        ("probes", ProbesConfig, analyses.probes),
        ("attention", AttentionConfig, analyses.attention),
        ("overfitting", OverfittingConfig, analyses.overfitting),
        ("features", FeaturesConfig, analyses.features),
        ("truncation", TruncationConfig, analyses.truncation),
    ):
        if recipe:
            inputs = {"model": base.identity, **read.get(kind, {})}
            yield _child(kind, cls(**recipe.model_dump(), **of_base), inputs, root)


def _texts_read(analyses: AnalysesConfig) -> dict[str, Mapping[str, str]]:
    """Kind of analysis → hashes of the texts that it reads, by name."""
    texts = {kind: recipe.text for kind, recipe in analyses.on_held_out_sequences() if recipe.text}
    return {
        "probes": probe_inputs(analyses.probes) if analyses.probes else {},
        **{kind: {"text": text_hash(text)} for kind, text in texts.items()},
    }


def _plasticity(config: StudyConfig, base: _Base, changes: Mapping[str, Any], tasks: _Tasks) -> Iterator[PlannedCell]:
    """The evaluation of a base model, and its fine-tuning on each task in each way with the evaluation of what came out."""
    if not tasks.each:
        return
    assert config.evaluate is not None  # check_study
    output = study_folder(config)
    asked = EvaluateConfig(**config.evaluate.model_dump(), tasks=config.tasks, name=base.name, output=output, run=base.folder)
    inputs = {"model": base.identity, **tasks.of_evaluate}
    yield _child("evaluate", asked, inputs, base.root, step=base.step)
    for task in tasks.each:
        for variant in variants(config):
            finetune = _finetune_cell(config, base, changes, task, variant)
            evaluation = EvaluateConfig(
                **config.evaluate.model_dump(),
                tasks=(task.config,),
                name=finetune.id.removeprefix("finetune-"),
                output=output,
                run=finetune.folder,
            )
            inputs = {"model": _hash_of(finetune), **task.of_evaluate}
            what = {"task": task.config.name, "variant": finetune.variant, "step": base.step}
            yield finetune
            yield _child("evaluate", evaluation, inputs, finetune, **what)


def _finetune_cell(
    config: StudyConfig, base: _Base, changes: Mapping[str, Any], task: _TaskInputs, variant: Mapping[str, Any]
) -> PlannedCell:
    recipe = finetune_recipe(config, changes, variant)
    tree = merge(recipe.model_dump(), {"logging": {"mlflow": False}})
    variant = resolved_point(variant, recipe)
    name = "-".join(part for part in (base.name, task.config.name, variant_name(variant)) if part)
    finetune = FinetuneConfig(**tree, name=name, output=study_folder(config), base=base.folder, task=task.config)
    inputs = {"base": base.identity, **task.of_finetune, **_capture_inputs(recipe.capture)}
    return _child("finetune", finetune, inputs, base.root, task=task.config.name, variant=variant, step=base.step)


def _child(kind: str, config: Any, inputs: dict[str, str], parent: PlannedCell, **what: Any) -> PlannedCell:
    """A cell that reads the model of `parent`, and stands at its λ."""
    common = {"point": parent.point, "weight_decay": parent.weight_decay, "adamw_timescale": parent.adamw_timescale}
    return _cell(kind, config.name, config, inputs, parent=parent.id, **common, **what)


def _cell(kind: str, name: str, config: Any, inputs: dict[str, str], **what: Any) -> PlannedCell:
    """A cell in the folder of an equal run, if there is one: what a run is called may depend on the other points of a grid."""
    digest = config_hash(config, **inputs)
    folder = config.output / f"{kind}-{name}-{digest}"
    if not folder.is_dir() and (known := sorted(config.output.glob(f"{kind}-*-{digest}"))):
        folder = known[0]
        config = config.model_copy(update={"name": folder.name.removeprefix(f"{kind}-").removesuffix(f"-{digest}")})
    return PlannedCell(f"{kind}-{name}", kind, config, folder, inputs=inputs, **what)


def _capture_inputs(capture: CaptureConfig | None) -> dict[str, str]:
    if capture is None or (capture.texts is None and capture.task is None):
        return {}  # it reads what the run reads anyway
    from megatron_plasticity.training.activations import capture_inputs  # torch, which planning needs for nothing else

    return capture_inputs(capture)


def _hash_of(cell: PlannedCell) -> str:
    return cell.folder.name.rsplit("-", 1)[1]
