"""Whether a study can work: everything that is wrong with it is found before anything runs, and told at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from megatron_plasticity.config.deepspeed import check_engine
from megatron_plasticity.config.files import text_hash
from megatron_plasticity.config.hashing import canonical
from megatron_plasticity.config.interchange import ImportedBase
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.config.training import FinetuneRecipe, PretrainConfig, TrainingRecipe
from megatron_plasticity.data.probe_sets import probe_inputs
from megatron_plasticity.errors import ConfigError, UserError, problems_of
from megatron_plasticity.evaluation.tasks.catalogue import shipped_tasks
from megatron_plasticity.evaluation.tasks.registry import get_task
from megatron_plasticity.launch.hostfile import read_hostfile
from megatron_plasticity.study.grid import (
    axes_in_the_way,
    base_name,
    equal_points,
    points,
    resolved_point,
    variant_name,
)
from megatron_plasticity.study.memory import gibibytes_needed
from megatron_plasticity.study.places import places_of
from megatron_plasticity.study.recipes import finetune_recipe, pretrain_config, study_device, variants


def check_study(config: StudyConfig, *, tasks_needed: bool = True, gpu_gibibytes: float | None = None) -> list[PretrainConfig]:
    """The pretraining configs of the grid, in its order; none for a study of imported bases.

    Raises ConfigError with the problems of all of them. Without `tasks_needed`, shipped tasks need not be there yet: a study
    can be planned before its tasks are prepared. With `gpu_gibibytes`, the memory of a GPU in GiB that training may use, runs
    that need more are problems.
    """
    problems = list(_problems_of_bases(config)) if config.bases else []
    problems += problems_of([partial(check_resources, config)])
    if config.tasks and (config.finetune is None or config.evaluate is None):
        problems.append("tasks are named, so `finetune` and `evaluate` must be there as well")
    if len({task.name for task in config.tasks}) != len(config.tasks):
        problems.append("tasks: a task is named twice")
    for axis in config.axes:
        if axis == "data" or axis.startswith(("data.folder", "data.blend")):
            problems.append(
                f"axes: {axis}: a study is of one text, since its hash is in the name of every run; make a study of each"
            )
    problems += [*axes_in_the_way(config.axes, "axes"), *axes_in_the_way(config.finetune_axes, "finetune_axes")]
    problems += _problems_of_finetuning(config)
    problems += task_problems(config) if tasks_needed else _problems_of_unknown_tasks(config)
    if config.analyses.probes:
        problems += problems_of([partial(probe_inputs, config.analyses.probes)])
    texts = [recipe.text for _, recipe in config.analyses.on_held_out_sequences() if recipe.text]
    problems += problems_of(partial(text_hash, text) for text in texts)
    grid = [] if config.bases else points(config.axes)
    bases: list[PretrainConfig] = []
    problems += problems_of(partial(_check_base, config, point, bases) for point in grid)
    if len(bases) == len(grid):
        problems += equal_points(grid, bases, "axes")
    if gpu_gibibytes is not None:
        problems += _problems_of_memory(config, bases, gpu_gibibytes)
    _refuse(config, problems)
    return _named(bases, grid)


def check_resources(config: StudyConfig) -> None:
    """Whether the machines that `resources` names have places for the study's runs. Raises UserError."""
    resources = config.resources
    if resources.hostfile is not None:
        places = places_of(read_hostfile(resources.hostfile), resources.processes_per_run, resources.hostfile)
        if resources.slots is not None and resources.slots > len(places):
            raise UserError(
                f"resources.slots={resources.slots}: {resources.hostfile} has {len(places)} places for runs of "
                f"resources.processes_per_run={resources.processes_per_run}; lower one of the two"
            )
    if resources.backend == "slurm" and study_device(config) != "cpu" and resources.slurm.gpus_per_node is None:
        raise UserError("resources.slurm.gpus_per_node: state how many GPUs a node has; a study without GPUs says `device: cpu`")


def _problems_of_memory(config: StudyConfig, bases: Iterable[PretrainConfig], gibibytes: float) -> Iterator[str]:
    """Of runs that do not fit their GPUs, by the formula of docs/memory.md. LoRA needs less than it says, and is left out."""
    if study_device(config) == "cpu":
        return
    processes = config.resources.processes_per_run
    for base in bases:
        for what, recipe in (("base", base), *(("finetune", recipe) for recipe in _recipes(config) if recipe.lora is None)):
            try:
                needed = gibibytes_needed(recipe, base.model, processes)
            except UserError:
                continue  # the batch or the layout, named elsewhere
            if needed > gibibytes:
                yield (
                    f"{what}: does not fit: on {processes} GPUs one needs {needed:.1f} GiB, and {gibibytes:.1f} can be used; "
                    f"raise resources.processes_per_run, or change {what}.parallel, {what}.engine or "
                    f"{what}.batch.micro_batch_size (`megatron-plasticity plan` proposes layouts)"
                )


def task_problems(config: StudyConfig) -> list[str]:
    """Why tasks cannot be read: they are unknown, or not prepared."""
    return problems_of(partial(get_task, task) for task in config.tasks)


def _problems_of_unknown_tasks(config: StudyConfig) -> list[str]:
    return problems_of(partial(get_task, task) for task in config.tasks if task.name not in shipped_tasks())


def check_sources(config: StudyConfig, models: Mapping[str, ModelConfig]) -> None:
    """Whether the study's fine-tuning works with the architectures of its imported bases, by name, and whether these are the same
    within a group. Raises ConfigError if not."""
    from megatron_plasticity.training.preflight import finetuning_problems  # torch, which planning needs for nothing else

    problems: list[str] = []
    for first, other in _pairs_of_groups(config):
        one, two = models[first.name].model_dump(), models[other.name].model_dump()
        if differing := [key for key in one if one[key] != two[key]]:
            problems.append(f"bases: {_both(first, other)} differ in {', '.join(differing)}; give one of them another `group`")
    for base in config.bases:
        for recipe in _recipes(config, base.finetune):
            problems += [f"finetune of {base.name}: {problem}" for problem in finetuning_problems(recipe, models[base.name])]
    _refuse(config, problems)


def _refuse(config: StudyConfig, problems: Iterable[str]) -> None:
    # The points of a grid share their base, so that one mistake in it is found at each of them.
    if different := list(dict.fromkeys(problems)):
        raise ConfigError(f"study {config.name}:\n" + "\n".join(f"  {problem}" for problem in different))


def _check_base(config: StudyConfig, point: Mapping[str, Any], bases: list[PretrainConfig]) -> None:
    """Append one point's pretraining config, not named yet. Raises ConfigError if it, or what follows from it, cannot work."""
    from megatron_plasticity.training.preflight import finetuning_problems, pretraining_problems

    base = pretrain_config(config, point)
    problems = [f"base.{problem}" for problem in (*_problems_of_engine(config, base), *pretraining_problems(base))]
    problems += _problems_of_steps(config, base)
    truncation = config.analyses.truncation
    if truncation and (too_large := [rank for rank in truncation.ranks if rank > base.model.head_dim]):
        problems.append(f"analyses.truncation.ranks: {too_large} exceed base.model.head_dim={base.model.head_dim}")
    for recipe in _recipes(config):
        problems += [f"finetune.{problem}" for problem in finetuning_problems(recipe, base.model)]
    if problems:
        raise ConfigError("\n".join(["base", *problems]))
    bases.append(base)


def _problems_of_engine(config: StudyConfig, recipe: TrainingRecipe) -> list[str]:
    """Of the layout, the batch, the raw DeepSpeed settings, and the checkpoint to start from."""
    problems = problems_of([partial(check_engine, recipe, config.resources.processes_per_run)])
    if (start := recipe.checkpoint.resume_from) is not None:
        from megatron_plasticity.models.checkpoint import open_checkpoint

        opened = problems_of([partial(open_checkpoint, start, verify=False)])
        problems += [f"checkpoint.resume_from: {problem}" for problem in opened]
    return problems


def _problems_of_steps(config: StudyConfig, base: PretrainConfig) -> Iterator[str]:
    every = base.checkpoint.every_steps
    for step in config.finetune_steps:
        if every is None:
            yield f"finetune_steps: {step}: the base run writes one checkpoint, its last; state base.checkpoint.every_steps"
        elif step % every or step >= base.total_steps:
            yield (
                f"finetune_steps: {step}: the base run writes checkpoints every {every} steps, and the last of its "
                f"{base.total_steps} is fine-tuned anyway"
            )


def _problems_of_finetuning(config: StudyConfig) -> Iterator[str]:
    """Problems of the ways to fine-tune, whatever the base."""
    if config.finetune is None:
        return
    yield from problems_of(partial(_check_recipe, config, {}, variant) for variant in variants(config))
    ways, recipes = variants(config), list(_recipes(config))
    if len(recipes) < len(ways):
        return
    if equal := list(equal_points(ways, recipes, "finetune_axes")):
        yield from equal
        return
    names = [variant_name(resolved_point(*pair)) for pair in zip(ways, recipes, strict=True)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield f"finetune_axes: two points of the grid would have one name: {', '.join(twice)}"


def _check_recipe(config: StudyConfig, changes: Mapping[str, Any], variant: Mapping[str, Any]) -> None:
    from megatron_plasticity.training.preflight import duration_problems

    recipe = finetune_recipe(config, changes, variant)
    problems = [f"finetune.{problem}" for problem in _problems_of_engine(config, recipe)]
    for task in config.tasks:
        problems += [f"finetune on {task.name}: {problem}" for problem in duration_problems(recipe, task.train_examples)]
    if config.evaluate and config.evaluate.template != recipe.template:
        problems.append(
            "evaluate.template differs from finetune.template: the models would be asked in a form they were not taught"
        )
    if problems:
        raise ConfigError("\n".join(["finetune", *problems]))


def _recipes(config: StudyConfig, changes: Mapping[str, Any] | None = None) -> Iterator[FinetuneRecipe]:
    """Every way to fine-tune a base that is valid; what is not is named elsewhere."""
    if config.finetune is None:
        return
    for variant in variants(config):
        try:
            yield finetune_recipe(config, changes, variant)
        except UserError:
            continue


def _problems_of_bases(config: StudyConfig) -> Iterator[str]:
    names = [base.name for base in config.bases]
    yield from (f"bases: {name} is named twice" for name in sorted({name for name in names if names.count(name) > 1}))
    for base in config.bases:
        if base.weight_decay is None:
            yield f"bases: {base.name} needs `weight_decay`, the λ that it was pretrained with, to stand on the axis of the study"
        if base.finetune and config.finetune is None:
            yield f"bases: {base.name} changes `finetune`, which the study does not have"
        elif base.finetune:
            yield from problems_of(partial(_check_recipe, config, base.finetune, variant) for variant in variants(config))
            yield from (
                f"bases: {base.name} changes finetune.{axis}, which is one of `finetune_axes`; leave it out of one of the two"
                for axis in config.finetune_axes
                if _holds(base.finetune, axis)
            )
    yield from _differing_recipes(config)
    places = [(base.group, base.weight_decay) for base in config.bases if base.weight_decay is not None]
    for group, weight_decay in sorted({place for place in places if places.count(place) > 1}):
        yield f"bases: two models of group {group!r} have λ = {weight_decay:g}; give what differs otherwise another `group`"
    if config.analyses.overfitting:
        yield "analyses.overfitting: the gap is over the data of pretraining, which is not known of imported models; leave it out"
    for kind, recipe in config.analyses.on_held_out_sequences():
        if recipe.text is not None:
            continue
        yield (
            f"analyses.{kind}: its sequences are held-out ones of pretraining, which are not known of imported models; name a "
            "text to take them from by `text`"
        )
    if config.analyses.attention and config.analyses.attention.map_sequences:
        yield (
            "analyses.attention.map_sequences: maps are of held-out sequences of pretraining, which are not known of imported "
            "models; set it to 0, and the spectra remain"
        )


def _holds(tree: Mapping[str, Any], path: str) -> bool:
    """Whether a plain tree says something about a config path."""
    node: Any = tree
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return False
        node = node[key]
    return True


def _differing_recipes(config: StudyConfig) -> Iterator[str]:
    """Models of a group are compared for λ only, so what fine-tuning does to them must be the same."""
    for first, other in _pairs_of_groups(config):
        try:
            recipes = [canonical(finetune_recipe(config, base.finetune)) for base in (first, other)] if config.finetune else []
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


def _named(bases: list[PretrainConfig], grid: list[dict[str, Any]]) -> list[PretrainConfig]:
    """The configs with a name each, in as few digits as tell them apart."""
    resolved = [resolved_point(point, base) for base, point in zip(bases, grid, strict=True)]
    for digits in (3, 6, 17):
        names = [base_name(base.weight_decay, point, digits) for base, point in zip(bases, resolved, strict=True)]
        if len(set(names)) == len(names):
            return [base.model_copy(update={"name": name}) for base, name in zip(bases, names, strict=True)]
    twice = sorted({name for name in names if names.count(name) > 1})
    raise ConfigError(f"axes: two points of the grid would have one name: {', '.join(twice)}")
