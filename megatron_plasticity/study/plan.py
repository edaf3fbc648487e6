"""From a study's config to its graph of runs. Every folder's name, with its hash, is known before anything runs."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_plasticity.config.analysis import AttentionConfig, OverfittingConfig, ProbesConfig
from megatron_plasticity.config.base import Section
from megatron_plasticity.config.deepspeed import accumulation_steps
from megatron_plasticity.config.evaluation import EvaluateConfig
from megatron_plasticity.config.hashing import config_hash
from megatron_plasticity.config.load import check_config, merge, set_at
from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.config.support import check_supported
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig, TaskConfig
from megatron_plasticity.data.prepare import prepared_folder
from megatron_plasticity.errors import ConfigError, UserError
from megatron_plasticity.evaluation.tasks import get_task

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


def check_study(config: StudyConfig) -> list[PretrainConfig]:
    """The pretraining configs of the grid, in its order. Raises ConfigError with the problems of all of them."""
    problems: list[str] = []
    if config.tasks and (config.finetune is None or config.evaluate is None):
        problems.append("tasks are named, so `finetune` and `evaluate` must be there as well")
    if len({task.name for task in config.tasks}) != len(config.tasks):
        problems.append("tasks: a task is named twice")
    if config.evaluate and config.finetune and config.evaluate.template != config.finetune.template:
        problems.append(
            "evaluate.template differs from finetune.template: the models would be asked in a form they were not taught"
        )
    points = _points(config)
    bases: list[PretrainConfig] = []
    for check in (
        *(partial(get_task, task.name) for task in config.tasks),
        *(partial(_check_base, config, point, bases) for point in points),
    ):
        try:
            check()
        except UserError as error:
            problems += _lines_of(error)
    if problems:
        # The points of a grid share their base, so that one mistake in it is found at each of them.
        raise ConfigError(f"study {config.name}:\n" + "\n".join(f"  {problem}" for problem in dict.fromkeys(problems)))
    return _named(bases, points)


def _check_base(config: StudyConfig, point: Mapping[str, Any], bases: list[PretrainConfig]) -> None:
    """Append one point's pretraining config, not named yet. Raises ConfigError if it, or what follows from it, cannot work."""
    base = _pretrain_config(config, point)
    processes = config.resources.processes_per_run
    accumulation_steps(base.batch, base.parallel.data_parallel_size(processes))
    if config.finetune is not None:
        accumulation_steps(config.finetune.batch, config.finetune.parallel.data_parallel_size(processes))
        check_supported(config.finetune, base.model, "finetune")
        if config.finetune.max_length > base.model.context_length:
            raise ConfigError(
                f"finetune.max_length={config.finetune.max_length} exceeds base.model.context_length={base.model.context_length}"
            )
    bases.append(base)


def _lines_of(error: UserError) -> list[str]:
    """The problems in a message, without the heading that says where in the grid they were found."""
    heading, *rest = str(error).splitlines()
    return [line.strip() for line in rest] or [heading]


def plan_study(config: StudyConfig, corpus_hash: str) -> StudyPlan:
    """The graph of runs, parents before children. `corpus_hash` is the sha256 of the corpus manifest, which enters every hash.

    Raises ConfigError if any cell's config is not valid.
    """
    cells: list[PlannedCell] = []
    for base, point in zip(check_study(config), _points(config), strict=True):
        weight_decay = base.weight_decay
        timescale = base.adamw_timescale
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
    return check_config(PretrainConfig, tree, origin)


def _named(bases: list[PretrainConfig], points: list[dict[str, Any]]) -> list[PretrainConfig]:
    """The configs with a name each: λ first, however it was stated, then the other axes by their last word."""
    for digits in (3, 6, 17):
        names = [_name(base, point, digits) for base, point in zip(bases, points, strict=True)]
        if len(set(names)) == len(names):
            return [base.model_copy(update={"name": name}) for base, name in zip(bases, names, strict=True)]
    twice = sorted({name for name in names if names.count(name) > 1})
    raise ConfigError(f"axes: two points of the grid are the same: {', '.join(twice)}")


def _name(base: PretrainConfig, point: Mapping[str, Any], digits: int) -> str:
    parts = [f"wd{base.weight_decay:.{digits}g}"]
    for path, value in point.items():
        field_name = path.split(".")[-1]
        if field_name not in _DECAY_FIELDS:
            parts.append(f"{field_name}{value:.{digits}g}" if isinstance(value, float) else f"{field_name}{value}")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts).replace("+", ""))


def _corpus_folder(config: StudyConfig) -> Path | None:
    return prepared_folder(config.corpus) if config.corpus else None
