"""The page of `study plan`: what a study consists of, what it needs, and what of it is done."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.data.stream import corpus_hash
from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.hostfile import read_hostfile
from megatron_plasticity.launch.plan import PEAK_FLOPS, WIDTH, Machine, decimal, hours_text
from megatron_plasticity.models.sizes import parameter_count
from megatron_plasticity.study.check import check_study, task_problems
from megatron_plasticity.study.cost import SAMPLING, Cost, Costs
from megatron_plasticity.study.places import places_of
from megatron_plasticity.study.plan import PlannedCell, StudyPlan, plan_study
from megatron_plasticity.study.recipes import corpus_folder, import_configs, study_device, study_folder, variants
from megatron_plasticity.study.retries import read_state

_COUNTED = ("import", "pretrain", "finetune", "evaluate")


def study_page(config: StudyConfig, machine: Machine, here: bool = True) -> str:
    """The whole plan as text, 110 columns wide. Without `here` it says nothing of this machine: what is prepared, done, free.

    Raises ConfigError, with all problems, for a study that cannot work on GPUs of this kind.
    """
    bases = check_study(config, tasks_needed=False, gpu_gibibytes=machine.usable)
    missing = list(_missing(config, bases)) if here else []
    plan = _plan(config, bases, known=here and not missing)
    lines = [*_bases(config, bases), *_what_follows(config, plan), "", *_graph(plan), "", *_costs(Costs(plan, machine, here))]
    lines += ["", *_places(config)]
    if here:
        lines += ["", *_state(Costs(plan, machine), missing)]
    return "\n".join(lines) + "\n"


def _plan(config: StudyConfig, bases: Sequence[PretrainConfig], known: bool) -> StudyPlan:
    if not known:
        return plan_study(config, "", {}, tasks_needed=False, bases=bases)
    if config.bases:
        from megatron_plasticity.interchange.sources import find_source

        sources = {recipe.name: find_source(recipe).inputs for recipe in import_configs(config)}
        return plan_study(config, sources=sources, bases=bases)
    folder = corpus_folder(config) or bases[0].data.folder
    return plan_study(config, corpus_hash(bases[0].data.model_copy(update={"folder": folder})), bases=bases)


def _missing(config: StudyConfig, bases: Sequence[PretrainConfig]) -> Iterator[str]:
    """What has to be there before the names of the runs' folders, and so what is done, can be known."""
    yield from task_problems(config)
    if config.bases:
        afar = [recipe.source for recipe in import_configs(config) if not Path(recipe.source).expanduser().is_dir()]
        if afar:
            yield f"{len(afar)} base models are on the Hugging Face hub; `study run` fetches them, which takes room as well"
        return
    folder = corpus_folder(config)
    try:
        corpus_hash(bases[0].data.model_copy(update={"folder": folder or bases[0].data.folder}))
    except UserError as error:
        yield "the corpus is not prepared; `study run` prepares it" if folder else str(error)


def _bases(config: StudyConfig, bases: Sequence[PretrainConfig]) -> Iterator[str]:
    yield f"study {config.name} → {study_folder(config)}"
    if config.bases:
        width = max(len(base.name) for base in config.bases)
        yield f"{'base model':{width}} {'λ':>6} {'tokens':>16}  imported from"
        for base in config.bases:
            tokens = "?" if base.tokens is None else f"{base.tokens:,}"
            yield f"{base.name:{width}} {base.weight_decay:>6.4g} {tokens:>16}  {base.source}"
        return
    yield f"{'base model':24} {'parameters':>14} {'tokens':>16} {'λ':>10} {'timescale':>10}"
    for base in bases:
        timescale = base.adamw_timescale
        shown = "∞" if timescale is None else f"{timescale:.3g}"
        tokens = base.total_steps * base.tokens_per_step
        yield f"{base.name:24} {parameter_count(base.model).total:>14,} {tokens:>16,} {base.weight_decay:>10.4g} {shown:>10}"


def _what_follows(config: StudyConfig, plan: StudyPlan) -> Iterator[str]:
    tasks = [task.name for task in config.tasks]
    text = f"each fine-tuned and evaluated on {len(tasks)} tasks: {', '.join(tasks) or 'none'}"
    yield from textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    if config.finetune_axes:
        yield f"in {len(variants(config))} ways:"
        for path, values in config.finetune_axes.items():
            yield f"  {path}: {', '.join(map(str, values))}"
    if steps := sorted(config.finetune_steps):
        yield f"from the last checkpoint and from those of steps {', '.join(map(str, steps))}"
    analyses = [name for name, recipe in config.analyses if recipe is not None]
    yield f"each analysed for: {', '.join(analyses) or 'nothing'}"
    kinds = Counter(cell.kind for cell in plan.cells)
    yield f"{kinds['finetune']} fine-tunings"
    yield f"{kinds['pretrain'] + kinds['import']} base models, {len(plan.cells)} runs in all"


def _graph(plan: StudyPlan) -> Iterator[str]:
    """What descends from what, with the number of runs of each kind."""
    yield "What needs what"
    yield from _children(plan.cells, None, "  ")


def _children(cells: Sequence[PlannedCell], parents: set[str] | None, margin: str) -> Iterator[str]:
    found = [cell for cell in cells if (cell.parent is None if parents is None else cell.parent in parents)]
    for kind in dict.fromkeys(cell.kind for cell in found):
        of_kind = [cell for cell in found if cell.kind == kind]
        earlier = sum(cell.step is not None for cell in of_kind)
        yield f"{margin}{kind} {len(of_kind)}" + (f", {earlier} of them from earlier checkpoints" if earlier else "")
        yield from _children(cells, {cell.id for cell in of_kind}, margin + "  ")


def _costs(costs: Costs) -> Iterator[str]:
    cells, config = costs.plan.cells, costs.plan.config
    yield f"{'':12} {'runs':>6} {'tokens':>10} {'FLOPs':>10} {'GPU-hours':>11} {'disk':>10}"
    total = Cost()
    on_gpus = study_device(config) != "cpu"
    for kind in _COUNTED:
        of_kind = [cell for cell in cells if cell.kind == kind]
        if not of_kind:
            continue
        cost = costs.of(of_kind)
        total += cost
        yield _cost_row(kind, cost, on_gpus)
    yield _cost_row("all", total, on_gpus)
    notes = [
        "Figures of fine-tuning and evaluation are upper bounds: every example that the task's source has, each of them and "
        "every answer as long as it may be; prompts do not count. Analyses do not count. ? cannot be known before it is there."
    ]
    if on_gpus:
        bf16, fp32 = (PEAK_FLOPS[precision] / 1e12 for precision in ("bf16", "fp32"))
        notes.append(
            f"GPU-hours ASSUME an MFU of {costs.machine.mfu:.0%} in training, and {SAMPLING:.0%} of that in sampling, of "
            f"{bf16:g} TFLOP/s in bf16 and {fp32:g} in fp32, the peaks of an H100 or H200 (not measured; --mfu changes it)."
        )
    for note in notes:
        yield from textwrap.wrap(note, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _cost_row(kind: str, cost: Cost, on_gpus: bool) -> str:
    hours = "–" if not on_gpus else "?" if cost.gpu_hours is None else hours_text(cost.gpu_hours) if cost.gpu_hours else "–"
    disk = "?" if cost.disk is None else decimal(cost.disk) if cost.disk else "–"
    return f"  {kind:10} {cost.runs:>6,} {_amount(cost.tokens):>10} {_amount(cost.flops):>10} {hours:>11} {disk:>10}"


def _amount(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}" if value else "–"


def _places(config: StudyConfig) -> Iterator[str]:
    resources = config.resources
    ranks = f"{resources.processes_per_run} rank{'s' if resources.processes_per_run > 1 else ''} each"
    at_once = f"{resources.slots} at once" if resources.slots else "as many at once as there is room for"
    if resources.hostfile is not None:
        hosts = read_hostfile(resources.hostfile)
        places = places_of(hosts, resources.processes_per_run, resources.hostfile)[: resources.slots]
        named = ", ".join(place.name for place in places[:8]) + (" …" if len(places) > 8 else "")
        yield f"Runs of {ranks} on {len(places)} places of {len(hosts)} machines: {named}"
    elif resources.backend == "slurm":
        yield f"Runs of {ranks} as array jobs of Slurm, {at_once}, up to {resources.slurm.time} at a time"
    else:
        yield f"Runs of {ranks} on this machine, {at_once}"
    yield f"What fails in a way that may pass is tried again up to {resources.retries} times"


def _state(costs: Costs, missing: Sequence[str]) -> Iterator[str]:
    """What is done, and whether the disk has room for the rest."""
    cells = costs.plan.cells
    left = list(cells)
    if not missing:
        left = [cell for cell in cells if (state := read_state(cell)) is None or state.status != "done"]
        yield f"{len(cells) - len(left)} of {len(cells)} runs are done"
    if left and (needed := costs.of(left).disk) is not None:
        free = shutil.disk_usage(_existing(costs.plan.folder)).free
        verdict = "" if needed <= free else ": NOT ENOUGH"
        yield f"{decimal(needed)} will be written, {decimal(free)} are free in {_existing(costs.plan.folder)}{verdict}"
    for problem in missing:
        yield f"before it can run: {problem}"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
