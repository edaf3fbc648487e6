"""Carries out a study: starts what is ready on free slots, keeps what is done, lets one failure stop only what depends on it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_plasticity.config.files import write_json_atomic
from megatron_plasticity.config.interchange import ImportConfig
from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.data.prepare import read_manifest
from megatron_plasticity.data.stream import corpus_hash
from megatron_plasticity.errors import Interrupted, UserError
from megatron_plasticity.launch.command import deepspeed_command
from megatron_plasticity.launch.workers import start_worker, worker_context
from megatron_plasticity.study.check import check_sources, check_study
from megatron_plasticity.study.display import StudyDisplay
from megatron_plasticity.study.jobs import JOB_MODULES, LAUNCHED_KINDS, job_for, prepare_corpus
from megatron_plasticity.study.plan import PlannedCell, StudyPlan, plan_study
from megatron_plasticity.study.recipes import import_configs, study_folder
from megatron_plasticity.tracking.disk import explain_disk_errors
from megatron_plasticity.tracking.lock import file_lock
from megatron_plasticity.tracking.mlflow_mirror import MlflowMirror, mirror_in_background
from megatron_plasticity.tracking.progress import ConsoleProgress, NoProgress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.training.signals import StopSignal

STUDY_FILE = "study.json"
# Long enough to write a checkpoint of any model that runs on one machine.
SECONDS_TO_STOP = 120.0
_SECONDS_BETWEEN_LOOKS = 0.5
# Long runs first: what is left at the end is short, so that no slot stays idle for long.
_ORDER = ("import", "pretrain", "finetune", "overfitting", "truncation", "features", "probes", "attention", "evaluate")


@dataclass(frozen=True)
class StudyOutcome:
    """How a study ended."""

    folder: Path
    done: tuple[str, ...]
    failed: dict[str, str]
    """Cell id → reason."""
    not_started: tuple[str, ...]
    """Cells whose parent failed."""


def run_study(config: StudyConfig) -> StudyOutcome:
    """Carry out all of the study that is not done yet. Raises Interrupted after Ctrl-C or SIGTERM, with every run saved."""
    bases = check_study(config)
    folder = study_folder(config)
    with explain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / "lock"), StopSignal() as stop:
        slots = _Slots.of(config)
        corpus = _prepare(config, slots, folder, stop)
        if config.bases:
            plan = plan_study(config, sources=_find_sources(config, slots, folder, stop))
        else:
            data = bases[0].data
            plan = plan_study(config, corpus_hash(data.model_copy(update={"folder": corpus or data.folder})))
        _write_study_file(plan, corpus)
        with _mirrored(config, folder):
            return _Runner(plan, slots, stop).run()


def _prepare(config: StudyConfig, slots: _Slots, folder: Path, stop: StopSignal) -> Path | None:
    if config.corpus is None:
        return None
    # In a worker, since training a tokenizer starts threads; its own progress lines go where ours would.
    slots.run_alone("corpus", _prepare_in_worker, (config.corpus,), folder / "corpus.log", stop)
    return prepare_corpus(config.corpus, NoProgress())


def _prepare_in_worker(corpus: Any) -> None:
    with ConsoleProgress("corpus") as progress:
        prepare_corpus(corpus, progress)


def _find_sources(config: StudyConfig, slots: _Slots, folder: Path, stop: StopSignal) -> dict[str, dict[str, str]]:
    """The hashes of what each import reads, by the name of the base; what lies on the hub is fetched first."""
    from megatron_plasticity.interchange.sources import find_source

    imports = import_configs(config)
    if any(not Path(recipe.source).expanduser().is_dir() for recipe in imports):
        # In a worker, so that Ctrl-C stops a download at once.
        slots.run_alone("sources", _find_in_worker, (imports,), folder / "sources.log", stop)
    sources = {recipe.name: find_source(recipe) for recipe in imports}
    check_sources(config, {name: source.model for name, source in sources.items()})
    return {name: source.inputs for name, source in sources.items()}


def _find_in_worker(imports: list[ImportConfig]) -> None:
    from megatron_plasticity.interchange.sources import find_source

    for recipe in imports:
        print(f"looking for {recipe.source}", flush=True)
        find_source(recipe)


def _write_study_file(plan: StudyPlan, corpus: Path | None) -> None:
    with explain_disk_errors(plan.folder):
        write_json_atomic(
            plan.folder / STUDY_FILE,
            {
                "name": plan.config.name,
                "description": plan.config.description,
                "config": _finite(plan.config.model_dump(mode="json")),
                "corpus": {"folder": str(corpus), "manifest": read_manifest(corpus)} if corpus else None,
                "cells": [cell.to_json() for cell in plan.cells],
            },
        )


@contextlib.contextmanager
def _mirrored(config: StudyConfig, folder: Path) -> Iterator[None]:
    if not config.mlflow:
        yield
        return
    with mirror_in_background(MlflowMirror(folder, experiment=config.name), folder):
        yield


@dataclass
class _Slots:
    """Places for runs side by side, and how a process is put on one."""

    count: int
    threads: int
    devices: tuple[str, ...]
    """GPUs that the study may use, by index; none on a CPU."""
    processes_per_run: int
    context: BaseContext

    @classmethod
    def of(cls, config: StudyConfig) -> _Slots:
        resources = config.resources
        device = config.finetune.device if config.bases and config.finetune else config.base.get("device", "auto")
        devices = _visible_devices() if device != "cpu" else ()
        places = len(devices) // resources.processes_per_run if devices else 0
        if devices and (resources.slots or 1) > places:
            raise UserError(
                f"resources: {resources.slots or 1} slots of {resources.processes_per_run} processes need more than the "
                f"{len(devices)} GPUs that are visible; lower resources.slots or resources.processes_per_run"
            )
        cores = _cores() // (resources.threads * resources.processes_per_run)
        os.environ["OMP_NUM_THREADS"] = str(resources.threads)  # read when the fork server imports torch
        context = worker_context(JOB_MODULES, cuda=bool(devices))
        return cls(resources.slots or places or max(1, cores), resources.threads, devices, resources.processes_per_run, context)

    def start(self, slot: int, cell: PlannedCell) -> BaseProcess:
        devices = self.devices[slot * self.processes_per_run : (slot + 1) * self.processes_per_run]
        return start_worker(
            self.context,
            _run_cell,
            (cell.kind, cell.config, self.processes_per_run, devices),
            name=cell.id,
            log=cell.folder / "log",
            threads=self.threads,
            # None of them for a study on the CPU: analyses take a GPU where they see one.
            environment={"CUDA_VISIBLE_DEVICES": ",".join(devices)},
        )

    def run_alone(self, name: str, target: Any, arguments: tuple[Any, ...], log: Path, stop: StopSignal) -> None:
        """Run one job to its end while nothing else runs. Raises UserError with the end of its log if it fails."""
        process = start_worker(self.context, target, arguments, name=name, log=log, threads=_cores())
        seen = log.stat().st_size if log.exists() else 0
        while process.exitcode is None:
            wait([process.sentinel], timeout=_SECONDS_BETWEEN_LOOKS)
            seen = _echo(log, seen)
            if stop.received is not None:
                process.terminate()
                process.join(SECONDS_TO_STOP)
                raise Interrupted(f"stopped by {stop.received.name}; run the same command again to go on", stop.received)
        if process.exitcode:
            raise UserError(f"{name}: failed with exit code {process.exitcode}; see {log}\n{_tail(log)}")


def _visible_devices() -> tuple[str, ...]:
    """The GPUs that this process may use: those that CUDA_VISIBLE_DEVICES leaves, else all."""
    import torch

    if not torch.cuda.is_available():
        return ()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(named.split(",")) if named else tuple(str(index) for index in range(torch.cuda.device_count()))


def _run_cell(kind: str, config: Any, processes: int, devices: Sequence[str]) -> None:
    """In a worker: one cell, in this process or, on several ranks, under the deepspeed launcher."""
    if processes == 1 or kind not in LAUNCHED_KINDS:
        job_for(kind)(config, NoProgress())
        return
    command = deepspeed_command(kind, _folder_of(kind, config) / "config.yaml", processes, devices)
    # A session of its own, so that launcher and ranks can be reached together.
    launcher = subprocess.Popen(command, start_new_session=True)
    try:
        exit_code = launcher.wait()
    except BaseException:
        _stop_group(launcher)
        raise
    if exit_code:
        raise UserError(f"the deepspeed launcher ended with exit code {exit_code}; what the ranks said is above in this log")


def _stop_group(launcher: subprocess.Popen[bytes]) -> None:
    """Let every rank save and end; what does not end in time is killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGTERM)
        try:
            launcher.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()


def _folder_of(kind: str, config: Any) -> Path:
    from megatron_plasticity.evaluation.job import evaluation_folder
    from megatron_plasticity.tracking.trained_model import TrainedModel
    from megatron_plasticity.training.finetune import finetune_folder
    from megatron_plasticity.training.pretrain import pretrain_folder

    match kind:
        case "pretrain":
            return pretrain_folder(config).path
        case "finetune":
            return finetune_folder(config, TrainedModel.open(config.base)).path
        case _:
            return evaluation_folder(config).path


@dataclass
class _Runner:
    plan: StudyPlan
    slots: _Slots
    stop: StopSignal
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    running: dict[int, tuple[PlannedCell, BaseProcess]] = field(default_factory=dict)
    """Slot → what runs on it."""

    def run(self) -> StudyOutcome:
        self.done = {cell.id for cell in self.plan.cells if _is_done(cell)}
        with StudyDisplay(self.plan, already_done=self.done) as display:
            try:
                while self._fill_slots() or self.running:
                    wait([process.sentinel for _, process in self.running.values()], timeout=_SECONDS_BETWEEN_LOOKS)
                    self._collect(display)
                    display.refresh([cell for cell, _ in self.running.values()], self.done, self.failed)
                    if self.stop.received is not None:
                        raise Interrupted(
                            f"stopped by {self.stop.received.name}; finished runs are kept, "
                            "and the same command goes on from here",
                            self.stop.received,
                        )
            finally:
                self._stop_workers()
        return StudyOutcome(self.plan.folder, tuple(sorted(self.done)), dict(self.failed), tuple(self._unreachable()))

    def _fill_slots(self) -> bool:
        """Start ready cells on free slots; whether any was started."""
        ready = iter(self._ready())
        started = False
        for slot in range(self.slots.count):
            if slot not in self.running and (cell := next(ready, None)) is not None:
                self.running[slot] = (cell, self.slots.start(slot, cell))
                started = True
        return started

    def _ready(self) -> list[PlannedCell]:
        busy = {cell.id for cell, _ in self.running.values()}
        waiting = [c for c in self.plan.cells if c.id not in self.done and c.id not in self.failed and c.id not in busy]
        ready = [cell for cell in waiting if cell.parent is None or cell.parent in self.done]
        return sorted(ready, key=lambda cell: _ORDER.index(cell.kind))

    def _collect(self, display: StudyDisplay) -> None:
        for slot, (cell, process) in list(self.running.items()):
            if process.exitcode is None:
                continue
            del self.running[slot]
            if process.exitcode == 0 and _is_done(cell):
                self.done.add(cell.id)
                display.finished(cell)
            elif self.stop.received is None:
                self.failed[cell.id] = _reason(cell, process.exitcode)
                display.failed(cell, self.failed[cell.id])

    def _stop_workers(self) -> None:
        for _, process in self.running.values():
            process.terminate()
        deadline = time.monotonic() + SECONDS_TO_STOP
        for _, process in self.running.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()

    def _unreachable(self) -> list[str]:
        return [cell.id for cell in self.plan.cells if cell.id not in self.done and cell.id not in self.failed]


def _is_done(cell: PlannedCell) -> bool:
    """Also false for a folder whose state cannot be read: its own run will fail and say why, and the others go on."""
    try:
        return (cell.folder / "state.json").is_file() and RunFolder.open(cell.folder).is_done
    except UserError:
        return False


def _reason(cell: PlannedCell, exit_code: int) -> str:
    with contextlib.suppress(UserError):
        state = RunFolder.open(cell.folder).state
        if state.status == "failed" and state.error:
            return state.error
    if exit_code < 0:
        return f"its process was killed by signal {-exit_code} (out of memory?)"
    return _tail(cell.folder / "log") or f"its process ended with exit code {exit_code}"


def _tail(log: Path, lines: int = 5) -> str:
    try:
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


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


def _finite(value: Any) -> Any:
    """Infinity as a string, since JSON has no name for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if value in (float("inf"), float("-inf")) else value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
