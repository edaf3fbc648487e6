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
from megatron_plasticity.config.hashing import canonical, config_hash
from megatron_plasticity.config.interchange import ImportConfig, ImportedBase
from megatron_plasticity.config.load import check_config, merge, set_at
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.config.support import check_supported
from megatron_plasticity.config.training import FinetuneConfig, FinetuneRecipe, PretrainConfig, TaskConfig
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
    """The pretraining configs of the grid, in its order; none for a study of imported bases. Raises ConfigError with the problems
    of all of them."""
    problems = list(_problems_of_bases(config)) if config.bases else []
    if config.tasks and (config.finetune is None or config.evaluate is None):
        problems.append("tasks are named, so `finetune` and `evaluate` must be there as well")
    if len({task.name for task in config.tasks}) != len(config.tasks):
        problems.append("tasks: a task is named twice")
    if config.evaluate and config.finetune and config.evaluate.template != config.finetune.template:
        problems.append(
            "evaluate.template differs from finetune.template: the models would be asked in a form they were not taught"
        )
    for axis in config.axes:
        if axis == "data" or axis.startswith(("data.folder", "data.blend")):
            problems.append(
                f"axes: {axis}: a study is of one text, since its hash is in the name of every run; make a study of each"
            )
    points = [] if config.bases else _points(config)
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


def _problems_of_bases(config: StudyConfig) -> Iterator[str]:
    names = [base.name for base in config.bases]
    yield from (f"bases: {name} is named twice" for name in sorted({name for name in names if names.count(name) > 1}))
    for base in config.bases:
        if base.weight_decay is None:
            yield f"bases: {base.name} needs `weight_decay`, the λ that it was pretrained with, to stand on the axis of the study"
        if base.finetune and config.finetune is None:
            yield f"bases: {base.name} changes `finetune`, which the study does not have"
        elif config.finetune is not None:
            try:
                recipe = _finetune_recipe(config, base.finetune)
                accumulation_steps(recipe.batch, recipe.parallel.data_parallel_size(config.resources.processes_per_run))
            except UserError as error:
                yield from _lines_of(error)
    yield from _differing_recipes(config)
    places = [(base.group, base.weight_decay) for base in config.bases if base.weight_decay is not None]
    for group, weight_decay in sorted({place for place in places if places.count(place) > 1}):
        yield f"bases: two models of group {group!r} have λ = {weight_decay:g}; give what differs otherwise another `group`"
    if config.analyses.overfitting:
        yield "analyses.overfitting: the gap is over the data of pretraining, which is not known of imported models; leave it out"
    if config.analyses.attention and config.analyses.attention.map_sequences:
        yield (
            "analyses.attention.map_sequences: maps are of held-out sequences of pretraining, which are not known of imported "
            "models; set it to 0, and the spectra remain"
        )


def _differing_recipes(config: StudyConfig) -> Iterator[str]:
    """Models of a group are compared for λ only, so what fine-tuning does to them must be the same."""
    for first, other in _pairs_of_groups(config):
        try:
            recipes = [canonical(_finetune_recipe(config, base.finetune)) for base in (first, other)] if config.finetune else []
        except UserError:
            continue  # named already
        if recipes and recipes[0] != recipes[1]:
            yield f"bases: {_both(first, other)} differ in `finetune`; give one of them another `group`"


def _pairs_of_groups(config: StudyConfig) -> Iterator[tuple[ImportedBase, ImportedBase]]:
    """Each group's first base with each of its others."""
    first: dict[str, ImportedBase] = {}
    for base in config.bases:
        if (known := first.setdefault(base.group, base)) is not base:
            yield known, base


def _both(first: ImportedBase, other: ImportedBase) -> str:
    return f"{first.name} and {other.name} of group {first.group!r} are compared for λ only, but"


def check_sources(config: StudyConfig, models: Mapping[str, ModelConfig]) -> None:
    """Whether the study's fine-tuning works with the architectures of its imported bases, by name, and whether these are the same
    within a group. Raises ConfigError if not."""
    problems: list[str] = []
    for first, other in _pairs_of_groups(config):
        one, two = models[first.name].model_dump(), models[other.name].model_dump()
        if differing := [key for key in one if one[key] != two[key]]:
            problems.append(f"bases: {_both(first, other)} differ in {', '.join(differing)}; give one of them another `group`")
    for base in config.bases:
        if config.finetune is None:
            continue
        recipe, model = _finetune_recipe(config, base.finetune), models[base.name]
        try:
            check_supported(recipe, model, f"finetune of {base.name}")
        except UserError as error:
            problems += _lines_of(error)
        if recipe.max_length > model.context_length:
            problems.append(
                f"finetune.max_length={recipe.max_length} exceeds the context length of {base.name}, {model.context_length}"
            )
    if problems:
        raise ConfigError(f"study {config.name}:\n" + "\n".join(f"  {problem}" for problem in dict.fromkeys(problems)))


def import_configs(config: StudyConfig) -> list[ImportConfig]:
    """What a study of imported bases imports, in its order."""
    shared = ImportConfig.model_fields.keys() - {"output"}
    return [ImportConfig(**base.model_dump(include=set(shared)), output=study_folder(config)) for base in config.bases]


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


def plan_study(
    config: StudyConfig, corpus_hash: str | None = None, sources: Mapping[str, Mapping[str, str]] | None = None
) -> StudyPlan:
    """The graph of runs, parents before children.

    `corpus_hash` is the sha256 of the corpus manifest, which enters every hash. For a study of imported bases `sources` takes its
    place: the hashes of what each import reads, by the name of the base. Raises ConfigError if any cell's config is not valid.
    """
    cells: list[PlannedCell] = []
    for root, finetune_changes in _imports(config, sources or {}) if config.bases else _pretrainings(config, corpus_hash or ""):
        common = {"point": root.point, "weight_decay": root.weight_decay, "adamw_timescale": root.adamw_timescale}
        cells += [root, *_descendants(config, root, finetune_changes, common)]
    return StudyPlan(config, study_folder(config), tuple(cells), _corpus_folder(config))


_Root = tuple[PlannedCell, Mapping[str, Any]]
"""A cell that yields a base model, and what its fine-tuning changes in the study's recipe."""


def _pretrainings(config: StudyConfig, corpus_hash: str) -> Iterator[_Root]:
    for base, point in zip(check_study(config), _points(config), strict=True):
        common = {"point": point, "weight_decay": base.weight_decay, "adamw_timescale": base.adamw_timescale}
        yield _cell("pretrain", base.name, base, {"corpus": corpus_hash}, **common), {}


def _imports(config: StudyConfig, sources: Mapping[str, Mapping[str, str]]) -> Iterator[_Root]:
    check_study(config)
    for base, imported in zip(config.bases, import_configs(config), strict=True):
        point = {"optimizer.weight_decay": base.weight_decay, **({"group": base.group} if base.group else {})}
        common = {"point": point, "weight_decay": base.weight_decay, "adamw_timescale": None}
        yield _cell("import", base.name, imported, dict(sources[base.name]), **common), base.finetune


def study_folder(config: StudyConfig) -> Path:
    return config.output / config.name


def _descendants(
    config: StudyConfig, root: PlannedCell, finetune_changes: Mapping[str, Any], common: dict[str, Any]
) -> Iterator[PlannedCell]:
    name = root.id.removeprefix(f"{root.kind}-")
    of_base = {"name": name, "output": study_folder(config), "run": root.folder}
    inputs = {"model": _hash_of(root)}
    analyses = config.analyses
    if analyses.probes:
        yield _cell("probes", name, ProbesConfig(**analyses.probes.model_dump(), **of_base), inputs, root, **common)
    if analyses.attention:
        yield _cell("attention", name, AttentionConfig(**analyses.attention.model_dump(), **of_base), inputs, root, **common)
    if analyses.overfitting:
        yield _cell(
            "overfitting",
            name,
            OverfittingConfig(**analyses.overfitting.model_dump(), **of_base),
            inputs,
            root,
            **common,
        )
    if not config.tasks:
        return
    assert config.finetune is not None  # check_study
    assert config.evaluate is not None
    yield _cell(
        "evaluate",
        name,
        EvaluateConfig(**config.evaluate.model_dump(), tasks=config.tasks, **of_base),
        inputs,
        root,
        **common,
    )
    for task in config.tasks:
        finetune = _finetune_cell(config, name, root, finetune_changes, task, common)
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
    config: StudyConfig,
    name: str,
    root: PlannedCell,
    changes: Mapping[str, Any],
    task: TaskConfig,
    common: dict[str, Any],
) -> PlannedCell:
    recipe = merge(_finetune_recipe(config, changes).model_dump(), {"logging": {"mlflow": False}})
    finetune = FinetuneConfig(**recipe, name=f"{name}-{task.name}", output=study_folder(config), base=root.folder, task=task)
    return _cell("finetune", finetune.name, finetune, {"base": _hash_of(root)}, root, task=task.name, **common)


def _finetune_recipe(config: StudyConfig, changes: Mapping[str, Any]) -> FinetuneRecipe:
    """The study's recipe with what one of its bases changes in it."""
    assert config.finetune is not None  # check_study
    if not changes:
        return config.finetune
    return check_config(FinetuneRecipe, merge(config.finetune.model_dump(), dict(changes)), "finetune of a base")


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
