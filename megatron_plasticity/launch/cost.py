"""How long a training step takes, predicted: what is done (`launch/operations.py`) times what each operation takes
(`launch/hardware.py`, or rates that were measured on a machine), put together as the code runs it.

The parts: kernels follow one another; the host starts them meanwhile, and whichever takes longer counts; an exchange counts as
far as nothing is computed beside it; pipeline stages follow the 1F1B schedule (2104.04473, section 2.2); at the end of a step
gradients are reduced, and the optimizer steps. Left out: stragglers, failures, data loading, evaluation, checkpoints, logging.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Protocol

from megatron_plasticity.config.deepspeed import accumulation_steps
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import TrainingRecipe
from megatron_plasticity.launch.hardware import Group
from megatron_plasticity.launch.operations import (
    Attention,
    Axis,
    Beside,
    Exchange,
    Kernels,
    Matmul,
    Repeated,
    StageWork,
    Sweep,
    Work,
    step_work,
)


class Timing(Protocol):
    """What the model has to know of a machine."""

    @property
    def hides_exchanges(self) -> bool:
        """Whether an exchange and a kernel run at the same time."""
        ...

    @property
    def kernel_host_seconds(self) -> float: ...

    @property
    def micro_batch_seconds(self) -> float: ...

    @property
    def step_seconds(self) -> float: ...

    @property
    def hook_seconds(self) -> float: ...

    @property
    def zero3_overlap(self) -> float: ...

    def group(self, axis: Axis, data: int, tensor: int) -> Group: ...

    def compute(self, work: Matmul | Attention | Sweep) -> float: ...

    def exchange(self, exchange: Exchange, group: Group) -> float: ...


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the stage that takes longest, by what they are spent on."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    """Kernels that only read and write memory: norms, rotary embedding, SwiGLU, residuals, loss, gradients into their buffers."""
    exchange: float = 0.0
    """Between ranks, as far as nothing hides it."""
    bubble: float = 0.0
    """The stage waits for others."""
    optimizer: float = 0.0
    host: float = 0.0
    """The device waits for the host."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, factor: float) -> StepTime:
        return StepTime(*(factor * getattr(self, field.name) for field in fields(self)))


def step_time(
    model: ModelConfig, recipe: TrainingRecipe, data_parallel_size: int, timing: Timing, kernels: Kernels | None = None
) -> StepTime:
    """The prediction. Raises ConfigError if the global batch cannot be split."""
    stages = step_work(model, recipe, data_parallel_size, kernels)
    clock = _Clock(timing, data_parallel_size, recipe.parallel.tensor)
    count = accumulation_steps(recipe.batch, data_parallel_size)
    alike = {id(stage): clock.micro_batch(stage) for stage in stages}
    turns = [alike[id(stage)] for stage in stages]
    slowest = max(turns, key=lambda turn: turn.total)
    # 1F1B: the first micro-batch passes all stages, the others follow at the pace of the slowest.
    bubble = StepTime(bubble=sum(turn.total for turn in turns) - slowest.total)
    ends = [clock.end_of_step(stage) for stage in {id(stage): stage for stage in stages}.values()]
    return slowest * count + bubble + max(ends, key=lambda end: end.total)


class _Clock:
    """Adds up operations on a machine under a layout."""

    def __init__(self, timing: Timing, data: int, tensor: int) -> None:
        self.timing, self.data, self.tensor = timing, data, tensor

    def micro_batch(self, stage: StageWork) -> StepTime:
        """Forward and backward of one micro-batch on one stage, without waiting for other stages."""
        time = self._spent((*stage.forward, *stage.backward))
        # A stage that is neither first nor last takes and hands on activations and gradients; DeepSpeed waits for each.
        messages = 2 * self._exchange(stage.message) if stage.message else 0.0
        gathers = sum(map(self._exchange, stage.gathers))
        hidden = self.timing.zero3_overlap * time.total if self.timing.hides_exchanges else 0.0
        time += StepTime(exchange=messages + max(0.0, gathers - hidden))
        kernels = _kernels((*stage.forward, *stage.backward))
        host = (
            kernels * self.timing.kernel_host_seconds + stage.hooks * self.timing.hook_seconds + self.timing.micro_batch_seconds
        )
        waits = max(0.0, host - time.total) if self.timing.hides_exchanges else host
        return time + StepTime(host=waits)

    def end_of_step(self, stage: StageWork) -> StepTime:
        reduction, update = self._spent(stage.reduction), self._spent(stage.update)
        exchange = reduction.exchange + update.exchange
        return StepTime(exchange=exchange, optimizer=reduction.memory + update.memory, host=self.timing.step_seconds)

    def _spent(self, work: Iterable[Work]) -> StepTime:
        matmul = attention = memory = exchange = 0.0
        for item in work:
            if isinstance(item, Matmul):
                matmul += self.timing.compute(item)
            elif isinstance(item, Attention):
                attention += self.timing.compute(item)
            elif isinstance(item, Sweep):
                memory += self.timing.compute(item)
            elif isinstance(item, Exchange):
                exchange += self._exchange(item)
            elif isinstance(item, Repeated):
                inside = self._spent(item.work) * item.times
                matmul, attention, memory = matmul + inside.matmul, attention + inside.attention, memory + inside.memory
                exchange += inside.exchange
            else:
                inside = self._spent(item.work)
                hidden = inside.total if self.timing.hides_exchanges else 0.0
                matmul, attention, memory = matmul + inside.matmul, attention + inside.attention, memory + inside.memory
                exchange += inside.exchange + max(0.0, self._exchange(item.exchange) - hidden)
        return StepTime(matmul=matmul, attention=attention, memory=memory, exchange=exchange)

    def _exchange(self, exchange: Exchange) -> float:
        return self.timing.exchange(exchange, self.timing.group(exchange.axis, self.data, self.tensor))


def _kernels(work: Iterable[Work]) -> int:
    """Kernels that the host starts."""
    count = 0
    for item in work:
        if isinstance(item, Repeated):
            count += item.times * _kernels(item.work)
        elif isinstance(item, Beside):
            count += 1 + _kernels(item.work)
        else:
            count += item.kernels if isinstance(item, Sweep) else 1
    return count
