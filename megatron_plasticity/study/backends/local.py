"""Runs on this machine: one process each, several side by side, each on GPUs of its own where there are any."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.errors import Interrupted, UserError
from megatron_plasticity.launch.workers import start_worker, worker_context
from megatron_plasticity.study.backends import SECONDS_TO_STOP_ALL, Ended, Job
from megatron_plasticity.study.cell import run_cell
from megatron_plasticity.study.jobs import JOB_MODULES
from megatron_plasticity.study.plan import PlannedCell
from megatron_plasticity.study.recipes import study_device
from megatron_plasticity.tracking.process import host_name, usable_cores
from megatron_plasticity.training.signals import StopSignal

_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass
class LocalJob:
    cell: PlannedCell
    slot: int
    process: BaseProcess
    is_active: bool = True

    @property
    def where(self) -> str:
        return host_name()

    def ended(self) -> Ended | None:
        return None if self.process.exitcode is None else Ended(self.process.exitcode)

    def stop(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()


@dataclass
class LocalBackend:
    """Slots of this machine."""

    count: int
    threads: int
    devices: tuple[str, ...]
    """GPUs that the study may use, by index; none on a CPU."""
    processes_per_run: int
    context: BaseContext
    outlives_runner: bool = False
    _jobs: dict[int, LocalJob] = field(default_factory=dict)
    """Slot → what runs on it."""

    @classmethod
    def of(cls, config: StudyConfig) -> LocalBackend:
        """Raises UserError if the slots need more GPUs than there are."""
        resources = config.resources
        devices = _visible_devices() if study_device(config) != "cpu" else ()
        places = len(devices) // resources.processes_per_run if devices else 0
        if devices and (resources.slots or 1) > places:
            raise UserError(
                f"resources: {resources.slots or 1} slots of {resources.processes_per_run} processes need more than the "
                f"{len(devices)} GPUs that are visible; lower resources.slots or resources.processes_per_run"
            )
        ranks = resources.processes_per_run
        count = resources.slots or places or max(1, usable_cores() // (resources.threads * ranks))
        return cls(count, resources.threads, devices, ranks, study_workers(resources.threads, cuda=bool(devices)))

    def check(self, folder: Path) -> None:
        pass

    def adopt(self, cells: Sequence[PlannedCell]) -> list[Job]:
        return []

    def free(self) -> int:
        return self.count - len(self._occupied())

    def start(self, cells: Sequence[PlannedCell]) -> list[Job]:
        slots = (slot for slot in range(self.count) if slot not in self._occupied())
        return [self._start(slot, cell) for slot, cell in zip(slots, cells, strict=False)]

    def wait(self, jobs: Sequence[Job], seconds: float) -> None:
        wait([job.process.sentinel for job in jobs if isinstance(job, LocalJob)], timeout=seconds)

    def farewell(self, jobs: Sequence[Job]) -> str:
        return ""

    def _occupied(self) -> dict[int, LocalJob]:
        self._jobs = {slot: job for slot, job in self._jobs.items() if job.process.exitcode is None}
        return self._jobs

    def _start(self, slot: int, cell: PlannedCell) -> LocalJob:
        devices = self.devices[slot * self.processes_per_run : (slot + 1) * self.processes_per_run]
        process = start_worker(
            self.context,
            run_cell,
            (cell.folder, self.processes_per_run, devices),
            name=cell.id,
            log=cell.folder / "log",
            threads=self.threads,
            # None of them for a study on the CPU: analyses take a GPU where they see one.
            environment={"CUDA_VISIBLE_DEVICES": ",".join(devices)},
        )
        self._jobs[slot] = LocalJob(cell, slot, process)
        return self._jobs[slot]


def study_workers(threads: int, cuda: bool) -> BaseContext:
    """How processes of a study start on this machine."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when the fork server imports torch
    return worker_context(JOB_MODULES, cuda)


def run_alone(
    context: BaseContext, name: str, target: Callable[..., Any], arguments: tuple[Any, ...], log: Path, stop: StopSignal
) -> None:
    """Run one job on this machine to its end while nothing else runs. Raises UserError with the end of its log if it fails."""
    process = start_worker(context, target, arguments, name=name, log=log, threads=usable_cores())
    seen = log.stat().st_size if log.exists() else 0
    while process.exitcode is None:
        wait([process.sentinel], timeout=_SECONDS_BETWEEN_LOOKS)
        seen = _echo(log, seen)
        if stop.received is not None:
            process.terminate()
            process.join(SECONDS_TO_STOP_ALL)
            raise Interrupted(f"stopped by {stop.received.name}; run the same command again to go on", stop.received)
    if process.exitcode:
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        end = "\n".join(text.splitlines()[-5:])
        raise UserError(f"{name}: failed with exit code {process.exitcode}; see {log}\n{end}")


def gpu_gibibytes(config: StudyConfig) -> float | None:
    """Memory in GiB of the smallest GPU of this machine; None if the study is carried out elsewhere, or without GPUs."""
    if config.resources.backend != "local" or study_device(config) == "cpu":
        return None
    import torch

    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return min(sizes) / 2**30 if sizes else None


def _visible_devices() -> tuple[str, ...]:
    """The GPUs that this process may use: those that CUDA_VISIBLE_DEVICES leaves, else all."""
    import torch

    if not torch.cuda.is_available():
        return ()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(named.split(",")) if named else tuple(str(index) for index in range(torch.cuda.device_count()))


def _echo(log: Path, seen: int) -> int:
    """Print what was added to `log` since `seen` bytes; returns its size now."""
    try:
        with log.open("rb") as file:
            file.seek(seen)
            text = file.read()
    except OSError:
        return seen
    if text:
        print(text.decode("utf-8", errors="replace"), end="", flush=True)
    return seen + len(text)
