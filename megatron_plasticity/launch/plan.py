"""Plans a pretraining run before any GPU is touched: which layouts fit, what each costs, and which one to take.

Layouts that fit are ranked by the step time that `launch/cost.py` predicts; where an MFU is assumed instead, by a simple order
(see `Layout.rank`). What is assumed about the machine is stated on the page.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_plasticity.config.deepspeed import accumulation_steps, effective_zero_stage
from megatron_plasticity.config.parallel import ParallelConfig
from megatron_plasticity.config.support import SUPPORT, unsupported
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.errors import ConfigError, UserError
from megatron_plasticity.launch.cost import StepTime, step_time
from megatron_plasticity.launch.hardware import H100, Hardware, assumptions
from megatron_plasticity.launch.memory import StageMemory, largest_stage, memory, stage_parameter_count
from megatron_plasticity.models.partition import stage_layers
from megatron_plasticity.models.sizes import checkpoint_bytes, flops_per_token, parameter_count

GIB = 2**30
WIDTH = 110
SHOWN = 5
"""Layouts per number of GPUs."""

_FIXED_RESERVE = 2  # GiB for the CUDA context, kernels' workspaces and NCCL: an assumption
_FRAGMENTATION = 0.05  # share of the memory that the allocator cannot use: an assumption
_NODE = 8  # tensor-parallel ranks talk in every layer: they stay on the fast links of one machine, which has so many GPUs
_BUBBLE_CLASS = 0.05  # pipelines whose idle shares fall into the same 5 % count as equal
_EQUAL = 0.05  # predicted times that differ by no more
# NVIDIA H100 and H200 SXM data sheets, without sparsity: bf16 on tensor cores; fp32 outside of them.
PEAK_FLOPS = {"bf16": H100.bf16, "fp32": H100.fp32}


@dataclass(frozen=True)
class Machine:
    """What is known or assumed about the GPUs."""

    gibibytes: float = 80.0
    """Memory of one GPU."""
    mfu: float = 0.40
    """Assumed model FLOPs utilisation (PaLM, 2204.02311) of a layout without bubble and without recomputation, where no hardware
    is given."""
    hardware: Hardware | None = None
    """What step times are predicted for."""

    def __post_init__(self) -> None:
        if not (self.gibibytes > self.reserve and math.isfinite(self.gibibytes)):
            raise UserError(
                f"--memory {self.gibibytes:g}: one GPU's memory in GiB, more than the {self.reserve:.1f} that are kept free"
            )
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu {self.mfu:g}: a share of the GPU's peak, above 0 and up to 1, such as 0.4")

    @property
    def reserve(self) -> float:
        """GiB that no plan uses."""
        return _FIXED_RESERVE + _FRAGMENTATION * self.gibibytes

    @property
    def usable(self) -> float:
        return self.gibibytes - self.reserve

    @property
    def gpus_per_node(self) -> int:
        return self.hardware.links.gpus_per_node if self.hardware else _NODE

    def peak(self, precision: str) -> float:
        """FLOP/s of one GPU on its data sheet."""
        if self.hardware is None:
            return PEAK_FLOPS[precision]
        return self.hardware.device.bf16 if precision == "bf16" else self.hardware.device.fp32


@dataclass(frozen=True)
class Layout:
    """One way to run a config on a number of GPUs."""

    config: PretrainConfig
    gpus: int

    @property
    def parallel(self) -> ParallelConfig:
        return self.config.parallel

    @cached_property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.parallel.data_parallel_size(self.gpus)

    @cached_property
    def accumulation(self) -> int:
        """Micro-batches per data-parallel rank and step."""
        return accumulation_steps(self.config.batch, self.data)

    @property
    def zero_stage(self) -> int:
        return effective_zero_stage(self.config.engine, self.parallel)

    @property
    def bubble(self) -> float:
        """Idle share of a pipeline under the 1F1B schedule, (p − 1)/(m + p − 1) of the step for p stages and m micro-batches
        (Narayanan et al., 2104.04473, section 2.2)."""
        return (self.parallel.pipeline - 1) / (self.accumulation + self.parallel.pipeline - 1)

    @cached_property
    def stages(self) -> list[StageMemory]:
        return memory(self.config.model, self.config, self.data)

    @cached_property
    def gibibytes(self) -> float:
        """The most that a GPU needs, of those of the largest stage."""
        return largest_stage(self.stages).peak.total / GIB

    @property
    def work(self) -> float:
        """GPU-time relative to a layout without bubble and recomputation: a forward pass is a third of forward and backward."""
        return (4 / 3 if self.config.engine.activation_checkpointing else 1) / (1 - self.bubble)

    def predicted(self, hardware: Hardware) -> StepTime:
        """Seconds of a step by what they are spent on, predicted."""
        return step_time(self.config.model, self.config, self.data, hardware)

    def step_seconds(self, machine: Machine) -> float:
        """Seconds of a step: predicted, or under the assumed MFU."""
        if machine.hardware is not None:
            return self.predicted(machine.hardware).total
        flops = flops_per_token(self.config.model, self.config.model.context_length) * self.config.tokens_per_step
        return flops * self.work / (machine.peak(self.config.engine.precision) * machine.mfu * self.gpus)

    @property
    def rank(self) -> tuple[Any, ...]:
        """Better layouts have a smaller one, as far as times do not tell. In this order: nothing is computed twice; weights are
        not gathered in every pass, as ZeRO 3 does (1.5 times the communication, 1910.02054, section 7); little bubble; little
        communication within layers; gradients reduced once per step (ZeRO 1) rather than per micro-batch; few stages; a large
        micro-batch. (Sequence parallelism goes with tensor parallelism wherever it can: it communicates as much, 2205.05198,
        section 4.2.2.)"""
        return (
            self.config.engine.activation_checkpointing,
            self.zero_stage == 3,
            int(self.bubble / _BUBBLE_CLASS),
            self.parallel.tensor,
            self.zero_stage,
            self.parallel.pipeline,
            -self.config.batch.micro_batch_size,
        )

    def overrides(self, base: PretrainConfig) -> str:
        """What to add to a command with `base` to run like this."""
        pairs = {
            "parallel.pipeline": (base.parallel.pipeline, self.parallel.pipeline),
            "parallel.tensor": (base.parallel.tensor, self.parallel.tensor),
            "parallel.sequence": (base.parallel.sequence, self.parallel.sequence),
            "parallel.layers_per_stage": (base.parallel.layers_per_stage, self.parallel.layers_per_stage),
            # What the base would run as under this layout.
            "engine.zero_stage": (effective_zero_stage(base.engine, self.parallel), self.zero_stage),
            "engine.activation_checkpointing": (
                base.engine.activation_checkpointing,
                self.config.engine.activation_checkpointing,
            ),
            "batch.micro_batch_size": (base.batch.micro_batch_size, self.config.batch.micro_batch_size),
        }
        return " ".join(f"{key}={_yaml(new)}" for key, (old, new) in pairs.items() if old != new)

    def variant(self, **changes: Any) -> Layout | None:
        """This layout with other values of pipeline, tensor, sequence, zero_stage, activation_checkpointing or micro_batch_size;
        None if it does not go together or does not divide the batch."""
        old = self.config
        values = self.settings | changes
        sequence = values["sequence"] and values["tensor"] > 1
        parallel = ParallelConfig(pipeline=values["pipeline"], tensor=values["tensor"], sequence=sequence)
        engine = old.engine.model_copy(
            update={"zero_stage": values["zero_stage"], "activation_checkpointing": values["activation_checkpointing"]}
        )
        batch = old.batch.model_copy(update={"micro_batch_size": values["micro_batch_size"]})
        layout = Layout(old.model_copy(update={"parallel": parallel, "engine": engine, "batch": batch}), self.gpus)
        try:
            layout.accumulation  # noqa: B018  raises if GPUs or sequences cannot be divided
        except ConfigError:
            return None
        return None if any(unsupported(layout.config, layout.config.model)) else layout

    @property
    def settings(self) -> dict[str, Any]:
        """What `variant` can change."""
        return {
            "pipeline": self.parallel.pipeline,
            "tensor": self.parallel.tensor,
            "sequence": self.parallel.sequence,
            "zero_stage": self.zero_stage,
            "activation_checkpointing": self.config.engine.activation_checkpointing,
            "micro_batch_size": self.config.batch.micro_batch_size,
        }


def layouts(config: PretrainConfig, gpus: int, gpus_per_node: int = _NODE) -> Iterator[Layout]:
    """Every layout that is supported and divides the batch, whether it fits or not; micro-batches are powers of two, and
    tensor-parallel ranks share a node."""
    origin = Layout(config, gpus)
    tensors, pipelines = _divisors(gpus, gpus_per_node), _divisors(gpus, config.model.layers)
    for tensor, pipeline in itertools.product(tensors, pipelines):
        if gpus % (tensor * pipeline):
            continue
        share = config.batch.global_batch_size * tensor * pipeline // gpus
        for zero_stage, checkpointing, power in itertools.product((1, 2, 3), (False, True), range(share.bit_length())):
            layout = origin.variant(
                pipeline=pipeline,
                tensor=tensor,
                sequence=tensor > 1 and config.model.context_length % tensor == 0,
                zero_stage=zero_stage,
                activation_checkpointing=checkpointing,
                micro_batch_size=2**power,
            )
            if layout is not None:
                yield layout


def _divisors(number: int, largest: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, largest) + 1) if number % divisor == 0]


def best_layouts(config: PretrainConfig, gpus: int, machine: Machine, count: int = SHOWN) -> list[Layout]:
    """The best `count` layouts that fit, best first; of those that differ in the micro-batch alone, the best.

    Predicted times that lie within a few percent of the shortest do not tell layouts apart: among those the simplest comes first.
    """
    if machine.hardware is None:
        ordered = [
            (float(place), layout) for place, layout in enumerate(sorted(layouts(config, gpus), key=lambda found: found.rank))
        ]
    else:
        timed = [(layout.step_seconds(machine), layout) for layout in layouts(config, gpus, machine.gpus_per_node)]
        ordered = sorted(timed, key=lambda pair: (pair[0], pair[1].rank))
    best: dict[tuple[Any, ...], tuple[float, Layout]] = {}
    equal = math.inf  # up to which time none is better than another
    for seconds, layout in ordered:
        if len(best) >= count and seconds > equal:
            break
        kind = (layout.parallel, layout.zero_stage, layout.config.engine.activation_checkpointing)
        if kind not in best and layout.gibibytes <= machine.usable:
            best[kind] = (seconds, layout)
            equal = min(equal, seconds * (1 + _EQUAL))
    found = sorted(best.values(), key=lambda pair: (pair[0] > equal, pair[1].rank if pair[0] <= equal else (pair[0],)))
    return [layout for _, layout in found[:count]]


def reasons(layout: Layout, machine: Machine) -> Iterator[str]:
    """Why this layout, a line for each of its settings."""

    def otherwise(setting: str, **changes: Any) -> str:
        other = layout.variant(**changes)
        if other is None:
            return f"{setting} does not divide the batch or the model"
        if other.gibibytes > machine.usable:
            return f"with {setting} a GPU would need {other.gibibytes:.1f} GiB"
        if machine.hardware is None:
            return f"with {setting} something else would cost more"
        return f"with {setting} a step would take {seconds_text(other.step_seconds(machine))}"

    yield from _time_reasons(layout, machine)
    parallel, engine, micro = layout.parallel, layout.config.engine, layout.config.batch.micro_batch_size
    if engine.activation_checkpointing:
        without = otherwise("no recomputation", activation_checkpointing=False)
        yield f"activation checkpointing, a third more to compute: {without}"
    else:
        yield "no activation checkpointing: nothing is computed twice"
    if parallel.tensor > 1:
        fewer = _next_smaller(layout, "tensor")
        least = otherwise(f"tensor {fewer} and micro-batch 1", tensor=fewer, micro_batch_size=1)
        yield f"tensor {parallel.tensor}, which communicates in every layer: {least}"
    else:
        yield "tensor 1: no communication within layers"
    if parallel.sequence:
        yield "sequence parallelism: less memory for norms and residuals, and no more communication"
    if parallel.pipeline > 1:
        fewer = _next_smaller(layout, "pipeline")
        least = otherwise(f"pipeline {fewer}", pipeline=fewer)
        yield f"pipeline {parallel.pipeline}, {layout.bubble:.1%} of the time idle: {least}"
    else:
        yield "pipeline 1: no bubble"
    if layout.zero_stage > 1:
        fewer = layout.zero_stage - 1
        what = "gradients are reduced in every micro-batch" if layout.zero_stage == 2 else "weights are gathered in every pass"
        yield f"ZeRO {layout.zero_stage}, {what}: {otherwise(f'ZeRO {fewer}', zero_stage=fewer)}"
    else:
        yield "ZeRO 1: optimizer states are shared out, and gradients reduced once per step"
    larger = layout.variant(micro_batch_size=2 * micro)
    if larger is None:
        yield f"micro-batch {micro}: the largest that divides the batch"
    elif larger.gibibytes > machine.usable:
        yield f"micro-batch {micro}: twice as many sequences would need {larger.gibibytes:.1f} GiB"
    elif machine.hardware is not None:
        yield f"micro-batch {micro}: {otherwise('twice as many sequences', micro_batch_size=2 * micro)}"
    else:
        yield f"micro-batch {micro}: twice as many sequences would mean {larger.bubble:.1%} of bubble"


def _time_reasons(layout: Layout, machine: Machine) -> Iterator[str]:
    """What a step is spent on, the largest parts first."""
    if machine.hardware is None:
        return
    time = layout.predicted(machine.hardware)
    parts = sorted(((seconds / time.total, name) for name, seconds in time.parts.items()), reverse=True)
    spent = ", ".join(f"{share:.0%} {name}" for share, name in parts if share >= 0.005)
    yield f"a step takes {seconds_text(time.total)}, the shortest of all layouts that fit or within {_EQUAL:.0%} of it: {spent}"


def _next_smaller(layout: Layout, setting: str) -> int:
    """The largest smaller value of a setting with which the layout goes together, or 1."""
    values = range(layout.settings[setting] - 1, 0, -1)
    return next((value for value in values if layout.variant(**{setting: value})), 1)


# --- The page.


def assumptions_page(hardware: Hardware) -> str:
    """Every figure on which predicted times rest, with its source, as text."""
    lines = ["Times are predicted from these figures; none was measured here. docs/planning.md says how they are used."]
    for figure in assumptions(hardware):
        lines.append(f"  {figure.part:5} {figure.name:22} {figure.value}")
        lines += _wrapped(f"{figure.meaning}; source: {figure.source}", "        ", indent=0)
    return "\n".join(lines) + "\n"


def plan_page(config: PretrainConfig, gpus: Sequence[int], machine: Machine) -> str:
    """The whole plan as text, at most 110 columns wide. Raises UserError for a number of GPUs that is none."""
    for count in gpus:
        if count < 1:
            raise UserError(f"--gpus {count}: a number of GPUs is at least 1")
    lines = [*_run(config, machine)]
    for count in gpus:
        lines += ["", *_for_gpus(config, count, machine)]
    lines += ["", *_support()]
    return "\n".join(lines) + "\n"


def _run(config: PretrainConfig, machine: Machine) -> Iterator[str]:
    model, count = config.model, parameter_count(config.model)
    tokens = config.total_steps * config.tokens_per_step
    yield (
        f"{config.name}: {count.total:,} parameters, {count.non_embedding:,} without embeddings; "
        f"{model.layers} layers, {config.engine.precision}"
    )
    yield (
        f"  {config.total_steps:,} steps of {config.batch.global_batch_size:,} × {model.context_length:,} = "
        f"{config.tokens_per_step:,} tokens, {tokens:,} in all"
    )
    yield from _assumed(config, machine)
    checkpoint, saved = checkpoint_bytes(model), config.checkpoint.count(config.total_steps)
    times = f", {saved:,} of them {decimal(saved * checkpoint)}" if saved > 1 else ""
    yield f"  {decimal(checkpoint)} on disk per checkpoint (fp32 weights and two moments){times}"
    yield (
        f"  {machine.gibibytes:g} GiB per GPU, of which plans use {machine.usable:.1f}; "
        "the rest is for the CUDA context, workspaces, NCCL, fragmentation"
    )
    yield "  GiB are those of the stage that needs most, at the moment of a step when it needs most, computed and not"
    yield "    measured on a GPU (docs/memory.md)"


def _assumed(config: PretrainConfig, machine: Machine) -> Iterator[str]:
    precision = config.engine.precision
    peak = machine.peak(precision) / 1e12
    if machine.hardware is None:
        hours = hours_text(_flops(config) / (machine.peak(precision) * machine.mfu) / 3600)
        yield f"  {_flops(config):.3g} FLOPs; {hours} GPU-hours, without bubble and recomputation, ASSUMING"
        yield (
            f"    an MFU of {machine.mfu:.0%} of {peak:g} TFLOP/s, the peak of an H100 or H200 in {precision} "
            "(--mfu changes it; not measured)"
        )
        return
    device, links = machine.hardware.device, machine.hardware.links
    yield f"  {_flops(config):.3g} FLOPs; MFU is of {peak:g} TFLOP/s, the peak in {precision}. Times are PREDICTED for"
    nodes = f"{device.name.upper()} GPUs, {links.gpus_per_node} per node, {links.network_gigabits:g} Gbit/s per GPU between them"
    yield f"    {nodes}, not measured (docs/planning.md, --assumptions)"


def _for_gpus(config: PretrainConfig, gpus: int, machine: Machine) -> Iterator[str]:
    yield f"{gpus} GPU{'s' if gpus > 1 else ''}"
    configured = Layout(config, gpus)
    try:
        verdict = "fits" if configured.gibibytes <= machine.usable else "DOES NOT FIT"
    except ConfigError as error:
        yield from _wrapped(f"as configured: impossible: {error}", "  ")
        configured = None
    else:
        yield f"  as configured: {verdict}, {configured.gibibytes:.1f} of {machine.usable:.1f} GiB"
    found = best_layouts(config, gpus, machine)
    if not found:
        yield from _wrapped(_why_none(config, gpus, machine), "  ")
    if configured is not None or found:
        yield _HEADER
    if configured is not None:
        yield _row("config", configured, machine)
    for number, layout in enumerate(found, start=1):
        yield _row(f"{number}", layout, machine)
    if configured is not None or found:
        yield _DETAILS if machine.hardware else " " * _DETAILS.index("|") + _DETAILS[_DETAILS.index("|") :]
    if configured is not None:
        yield _parts("config", configured, machine)
    for number, layout in enumerate(found, start=1):
        yield _parts(f"{number}", layout, machine)
    if found:
        best = found[0]
        yield "  Take 1:"
        for reason in reasons(best, machine):
            yield from _wrapped(f"- {reason}", "    ")
        yield f"    {best.overrides(config) or '(the config as it is)'}"
    shown = found[0] if found else configured
    if shown is not None and shown.parallel.pipeline > 1:
        yield from _stages(shown)


_HEADER = "  pipe×data×tensor  seq ZeRO micro ckpt accum bubble  step s      tok/s   MFU  hours    GiB"
_WIDTHS = (6, 9, 6, 8, 6, 9, 5)
_DETAILS = " step: matmul attention memory exchange bubble optimizer  host | weights grads optim buffers activ. logits"


def _row(label: str, layout: Layout, machine: Machine) -> str:
    parallel, config = layout.parallel, layout.config
    size = f"{parallel.pipeline}×{layout.data}×{parallel.tensor}"
    seconds = layout.step_seconds(machine)
    tokens = config.tokens_per_step / seconds
    mfu = tokens * flops_per_token(config.model, config.model.context_length)
    mfu /= layout.gpus * machine.peak(config.engine.precision)
    return (
        f"{label:>6} {size:>11} {_yes(parallel.sequence):>4} {layout.zero_stage:>4} "
        f"{config.batch.micro_batch_size:>5} {_yes(config.engine.activation_checkpointing):>4} "
        f"{layout.accumulation:>5} {layout.bubble:>6.1%} {seconds:>7.3g} {tokens:>10,.0f} {mfu:>5.1%} "
        f"{hours_text(config.total_steps * seconds / 3600):>6} {layout.gibibytes:>6.1f}"
    )


def _parts(label: str, layout: Layout, machine: Machine) -> str:
    """What a step is spent on, and what the memory holds."""
    peak = largest_stage(layout.stages).peak
    held = [part / GIB for part in (peak.weights, peak.gradients, peak.optimizer, peak.buffers, peak.activations, peak.loss)]
    spent = " " * (sum(_WIDTHS) + len(_WIDTHS) - 1)
    if machine.hardware is not None:
        time = layout.predicted(machine.hardware)
        shares = (f"{seconds / time.total:>{width}.1%}" for seconds, width in zip(time.parts.values(), _WIDTHS, strict=True))
        spent = " ".join(shares)
    return f"{label:>6} {spent} | {held[0]:>7.1f} {held[1]:>5.1f} {held[2]:>5.1f} {held[3]:>7.1f} {held[4]:>6.1f} {held[5]:>6.1f}"


def _why_none(config: PretrainConfig, gpus: int, machine: Machine) -> str:
    possible = list(layouts(config, gpus))
    if possible:
        least = min(possible, key=lambda layout: layout.gibibytes)
        return (
            f"no layout fits: the one that needs least, {least.overrides(config) or 'the config as it is'}, needs "
            f"{least.gibibytes:.1f} GiB of {machine.usable:.1f}; use more GPUs, or GPUs with more memory"
        )
    counts = (count for distance in range(1, gpus + 1) for count in (gpus - distance, gpus + distance))
    near = next((count for count in counts if count > 0 and any(layouts(config, count))), None)
    return (
        f"no layout: batch.global_batch_size={config.batch.global_batch_size} and the model's {config.model.layers} layers "
        f"cannot be split evenly over {gpus} GPUs" + (f"; {near} would do" if near else "")
    )


def _stages(layout: Layout) -> Iterator[str]:
    model, parallel = layout.config.model, layout.parallel
    yield f"  layers of the {parallel.pipeline} stages, parameters and GiB per GPU:"
    for stage, layers in enumerate(stage_layers(model, parallel)):
        ends = " + embedding" if stage == 0 else " + head" if stage == parallel.pipeline - 1 else ""
        held = f"{layers.start}" if len(layers) == 1 else f"{layers.start}–{layers.stop - 1}"
        peak = layout.stages[stage].peak.total / GIB
        yield f"    stage {stage}: {held + ends:20} {stage_parameter_count(model, parallel, stage):>14,} {peak:>7.1f}"


def _support() -> Iterator[str]:
    yield "What goes together"
    for row in SUPPORT:
        yield from _wrapped(f"{row.verdict:8} {row.combination}: {row.reason}", "  ", indent=9)


def _flops(config: PretrainConfig) -> float:
    return flops_per_token(config.model, config.model.context_length) * config.total_steps * config.tokens_per_step


def seconds_text(seconds: float) -> str:
    """Seconds in three digits."""
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def hours_text(hours: float) -> str:
    """Hours in as many digits as matter."""
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}" if hours >= 0.1 else "< 0.1"


def _wrapped(text: str, prefix: str, indent: int = 2) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=prefix,
        subsequent_indent=prefix + " " * indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(list(value)) if isinstance(value, tuple) else str(value)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def decimal(size: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    return f"{size / 1e12:.1f} TB" if size >= 1e12 else f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
