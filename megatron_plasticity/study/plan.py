"""From a study's config to its graph of runs. Every folder's name, with its hash, is known before anything runs."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_plasticity.config.analysis import AttentionConfig, OverfittingConfig, ProbesConfig
from megatron_plasticity.config.base import Section
from megatron_plasticity.config.evaluation import EvaluateConfig
from megatron_plasticity.config.hashing import config_hash
from megatron_plasticity.config.load import check_config, merge, set_at
from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig, TaskConfig
from megatron_plasticity.data.prepare import prepared_folder
from megatron_plasticity.errors import ConfigError
from megatron_plasticity.evaluation.tasks import get_task
from megatron_plasticity.optim.schedule import adamw_timescale

# The two ways to state λ; an axis over one takes the place of the other in the base run.
_DECAY_FIELDS = ("weight_decay", "adamw_timescale")


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

    def to_json(self) -> dict[str, Any]:
        """The cell's entry in `study.json`."""
        return {
            "id": self.id,
            "kind": self.kind,
            "folder": self.folder.name,
            # JSON has no infinity, which is what λ = 0 is as a timescale.
            "point": {path: str(v) if isinstance(v, float) and math.isinf(v) else v for path, v in self.point.items()},
            "weight_decay": self.weight_decay,
            "adamw_timescale": self.adamw_timescale,
            "task": self.task,
            "parent": self.parent,
            "needs": [self.parent] if self.parent else [],
        }


@dataclass(frozen=True)
class StudyPlan:
    config: StudyConfig
    folder: Path
    cells: tuple[PlannedCell, ...]
    corpus_folder: Path | None = field(default=None)
    """Prepared corpus, if the study has one of its own."""

    def children(self, cell: PlannedCell) -> list[PlannedCell]:
        return [other for other in self.cells if other.parent == cell.id]


def check_study(config: StudyConfig) -> list[PretrainConfig]:
    """The pretraining configs of the grid, in its order. Raises ConfigError with the problems of all of them."""
    problems = []
    if config.tasks and (config.finetune is None or config.evaluate is None):
        problems.append("tasks are named, so `finetune` and `evaluate` must be there as well")
    if len({task.name for task in config.tasks}) != len(config.tasks):
        problems.append("tasks: a task is named twice")
    for task in config.tasks:
        get_task(task.name)
    bases = []
    for point in _points(config):
        try:
            bases.append(_pretrain_config(config, point))
        except ConfigError as error:
            problems.append(str(error))
    names = [base.name for base in bases]
    problems += [
        f"axes: two points of the grid are both called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if config.finetune and bases and config.finetune.max_length > bases[0].model.context_length:
        problems.append(
            f"finetune.max_length={config.finetune.max_length} exceeds base.model.context_length={bases[0].model.context_length}"
        )
    if config.evaluate and config.finetune and config.evaluate.template != config.finetune.template:
        problems.append(
            "evaluate.template differs from finetune.template: the models would be asked in a form they were not taught"
        )
    if problems:
        raise ConfigError(f"study {config.name}:\n" + "\n".join(f"  {problem}" for problem in dict.fromkeys(problems)))
    return bases


def plan_study(config: StudyConfig, corpus_hash: str) -> StudyPlan:
    """The graph of runs, parents before children. `corpus_hash` is the sha256 of the corpus manifest, which enters every hash.

    Raises ConfigError if any cell's config is not valid.
    """
    cells: list[PlannedCell] = []
    for base, point in zip(check_study(config), _points(config), strict=True):
        weight_decay = base.weight_decay
        timescale = adamw_timescale(base.optimizer.learning_rate, weight_decay, base.total_steps)
        common = {"point": point, "weight_decay": weight_decay, "adamw_timescale": timescale}
        pretrain = _cell("pretrain", base.name, base, {"corpus": corpus_hash}, **common)
        cells += [pretrain, *_descendants(config, base, pretrain, common)]
    return StudyPlan(config, study_folder(config), tuple(cells), _corpus_folder(config))


def study_folder(config: StudyConfig) -> Path:
    return config.output / config.name


def _descendants(
    config: StudyConfig, base: PretrainConfig, pretrain: PlannedCell, common: dict[str, Any]
) -> Iterator[PlannedCell]:
    of_base = {"name": base.name, "output": study_folder(config), "run": pretrain.folder}
    inputs = {"model": _hash_of(pretrain)}
    analyses = config.analyses
    if analyses.probes:
        yield _cell("probes", base.name, ProbesConfig(**analyses.probes.model_dump(), **of_base), inputs, pretrain, **common)
    if analyses.attention:
        yield _cell(
            "attention", base.name, AttentionConfig(**analyses.attention.model_dump(), **of_base), inputs, pretrain, **common
        )
    if analyses.overfitting:
        yield _cell(
            "overfitting",
            base.name,
            OverfittingConfig(**analyses.overfitting.model_dump(), **of_base),
            inputs,
            pretrain,
            **common,
        )
    if not config.tasks:
        return
    assert config.finetune is not None  # check_study
    assert config.evaluate is not None
    yield _cell(
        "evaluate",
        base.name,
        EvaluateConfig(**config.evaluate.model_dump(), tasks=config.tasks, **of_base),
        inputs,
        pretrain,
        **common,
    )
    for task in config.tasks:
        finetune = _finetune_cell(config, base, pretrain, task, common)
        yield finetune
        assert isinstance(finetune.config, FinetuneConfig)
        evaluation = EvaluateConfig(
            **config.evaluate.model_dump(),
            tasks=(task,),
            name=finetune.config.name,
            output=study_folder(config),
            run=finetune.folder,
        )
        yield _cell("evaluate", evaluation.name, evaluation, {"model": _hash_of(finetune)}, finetune, task=task.name, **common)


def _finetune_cell(
    config: StudyConfig, base: PretrainConfig, pretrain: PlannedCell, task: TaskConfig, common: dict[str, Any]
) -> PlannedCell:
    assert config.finetune is not None
    recipe = merge(config.finetune.model_dump(), {"logging": {"mlflow": False}})
    finetune = FinetuneConfig(
        **recipe, name=f"{base.name}-{task.name}", output=study_folder(config), base=pretrain.folder, task=task
    )
    return _cell("finetune", finetune.name, finetune, {"base": _hash_of(pretrain)}, pretrain, task=task.name, **common)


def _cell(
    kind: str,
    name: str,
    config: Any,
    inputs: dict[str, str],
    parent: PlannedCell | None = None,
    *,
    task: str | None = None,
    **common: Any,
) -> PlannedCell:
    folder = config.output / f"{kind}-{name}-{config_hash(config, **inputs)}"
    return PlannedCell(f"{kind}-{name}", kind, config, folder, parent=parent.id if parent else None, task=task, **common)


def _hash_of(cell: PlannedCell) -> str:
    return cell.folder.name.rsplit("-", 1)[1]


def _points(config: StudyConfig) -> list[dict[str, Any]]:
    return [dict(zip(config.axes, values, strict=True)) for values in itertools.product(*config.axes.values())]


def _pretrain_config(config: StudyConfig, point: Mapping[str, Any]) -> PretrainConfig:
    tree = copy.deepcopy(config.base)
    for path, value in point.items():
        *section, field_name = path.split(".")
        set_at(tree, path.split("."), value, f"axis {path!r}")
        if section == ["optimizer"] and field_name in _DECAY_FIELDS:
            for other in _DECAY_FIELDS:
                if other != field_name:
                    tree["optimizer"].pop(other, None)
    tree = merge(tree, {"name": "unnamed", "output": str(study_folder(config)), "logging": {"mlflow": False}})
    if config.corpus is not None:
        tree = merge(tree, {"data": {"folder": str(_corpus_folder(config))}})
    origin = "base with " + ", ".join(f"{path}={value}" for path, value in point.items())
    unnamed = check_config(PretrainConfig, tree, origin)
    return unnamed.model_copy(update={"name": _name(unnamed, point)})


def _name(base: PretrainConfig, point: Mapping[str, Any]) -> str:
    """λ first, in however it was stated, then the other axes by their last word."""
    parts = [f"wd{base.weight_decay:.3g}"]
    for path, value in point.items():
        field_name = path.split(".")[-1]
        if field_name not in _DECAY_FIELDS:
            parts.append(f"{field_name}{value:g}" if isinstance(value, int | float) else f"{field_name}{value}")
    return "-".join(parts).replace("+", "").replace("/", "_").replace(" ", "")


def _corpus_folder(config: StudyConfig) -> Path | None:
    return prepared_folder(config.corpus) if config.corpus else None
