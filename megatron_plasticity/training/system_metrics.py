"""Rows of system metrics during training, written by the first process of each host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed

from megatron_plasticity.parallel.grid import ProcessGrid
from megatron_plasticity.tracking.metrics import MetricLog
from megatron_plasticity.tracking.process import host_name
from megatron_plasticity.tracking.system_metrics import Machine, MachineSampler, Reading, file_name, prefix
from megatron_plasticity.training.loop import Callback, StepOutcome


class SystemMetrics(Callback):
    """Writes what `take` gives after the first step that ends `seconds` or more after the last row, and after the last step."""

    def __init__(
        self,
        take: Callable[[], Reading],
        log: MetricLog,
        prefix: str,
        seconds: float,
        total_steps: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._take, self._log, self._prefix, self._total = take, log, prefix, total_steps
        self._seconds, self._clock, self._written = seconds, clock, clock()

    def after_step(self, outcome: StepOutcome) -> None:
        now = self._clock()
        if now - self._written < self._seconds and outcome.step != self._total:
            return
        self._written = now
        with suppress(OSError):  # a full disk stops a run where something is lost by it
            self._log.write(outcome.step, {self._prefix + name: round(value, 1) for name, value in self._take().items()})


@contextmanager
def watched_machine(
    folder: Path, seconds: float, grid: ProcessGrid, start_step: int, total_steps: int
) -> Iterator[list[Callback]]:
    """The callbacks that write system metrics into the run folder every `seconds`; none for 0, or if another process of this
    host does. Every process calls it."""
    if seconds == 0:
        yield []
        return
    host = host_name()
    hosts = grid.from_main(grid.gather(host))
    rank = torch.distributed.get_rank() if grid.size > 1 else 0
    if hosts.index(host) != rank:
        yield []
        return
    machine = Machine(folder, _visible_gpus(grid.device))
    with MetricLog(folder / file_name(host, hosts), start_step) as log, MachineSampler(machine.read) as sampler:
        yield [SystemMetrics(sampler.take, log, prefix(host, hosts), seconds, total_steps)]


def _visible_gpus(device: torch.device) -> list[str]:
    """UUIDs of the GPUs that this process may use; under our launchers, all of this host that the launch uses."""
    if device.type != "cuda":
        return []
    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(torch.cuda.device_count())]
