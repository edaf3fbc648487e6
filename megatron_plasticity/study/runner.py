"""Carries out a study: starts what is ready on free places, keeps what is done, tries again what may yet succeed, and lets one
failure stop only what depends on it.

Where runs are carried out is a back end's business (`study/backends/`).
"""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_plasticity.config.files import write_json_atomic
from megatron_plasticity.config.interchange import ImportConfig
from megatron_plasticity.config.study import ResourcesConfig, StudyConfig
from megatron_plasticity.data.prepare import read_manifest
from megatron_plasticity.data.stream import corpus_hash
from megatron_plasticity.errors import Interrupted, UserError
from megatron_plasticity.launch.plan import Machine, decimal
from megatron_plasticity.study.backends import SECONDS_TO_STOP_ALL, Backend, Job
from megatron_plasticity.study.backends.hostfile import HostfileBackend
from megatron_plasticity.study.backends.local import LocalBackend, gpu_gibibytes, run_alone, study_workers
from megatron_plasticity.study.backends.slurm import SlurmBackend
from megatron_plasticity.study.check import check_sources, check_study
from megatron_plasticity.study.claim import Claim, claimed
from megatron_plasticity.study.cost import Costs
from megatron_plasticity.study.display import StudyDisplay
from megatron_plasticity.study.jobs import prepare_corpus
from megatron_plasticity.study.plan import PlannedCell, StudyPlan, plan_study
from megatron_plasticity.study.recipes import import_configs, study_folder
from megatron_plasticity.study.retries import Failure, Retries, explain, log_size, read_state
from megatron_plasticity.tracking.disk import explain_disk_errors
from megatron_plasticity.tracking.lock import file_lock
from megatron_plasticity.tracking.mlflow_mirror import MlflowMirror, mirror_in_background
from megatron_plasticity.tracking.process import host_name
from megatron_plasticity.tracking.progress import ConsoleProgress, NoProgress
from megatron_plasticity.tracking.run_folder import SECONDS_UNTIL_FORGOTTEN, RunFolder
from megatron_plasticity.training.signals import StopSignal

STUDY_FILE = "study.json"
_SECONDS_BETWEEN_LOOKS = 0.5
# Long runs first: what is left at the end is short, so that no place stays idle for long.
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


def run_study(config: StudyConfig, only: Collection[str] | None = None) -> StudyOutcome:
    """Carry out all of the study that is not done yet; with `only`, these cells and what descends from them.

    Raises Interrupted after Ctrl-C or SIGTERM, with every run saved or left to the queue that it is in.
    """
    bases = check_study(config, gpu_gibibytes=gpu_gibibytes(config))
    folder = study_folder(config)
    with explain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder) as claim, StopSignal() as stop:
        backend = backend_of(config)
        backend.check(folder)
        corpus = _prepare(config, folder, stop)
        if config.bases:
            plan = plan_study(config, sources=_find_sources(config, folder, stop))
        else:
            data = bases[0].data
            plan = plan_study(config, corpus_hash(data.model_copy(update={"folder": corpus or data.folder})))
        _write_study_file(plan, corpus)
        _warn_of_a_small_disk(plan)
        with _mirrored(config, folder):
            return _Runner(plan, backend, claim, stop, only).run()


def backend_of(config: StudyConfig) -> Backend:
    """What `resources.backend` names. Raises UserError if it does not suit this machine."""
    backends: dict[str, type[LocalBackend | HostfileBackend | SlurmBackend]] = {
        "local": LocalBackend,
        "hostfile": HostfileBackend,
        "slurm": SlurmBackend,
    }
    return backends[config.resources.backend].of(config)


def _prepare(config: StudyConfig, folder: Path, stop: StopSignal) -> Path | None:
    if config.corpus is None:
        return None
    # In a worker, since training a tokenizer starts threads; its own progress lines go where ours would.
    context = study_workers(config.resources.threads, cuda=False)
    run_alone(context, "corpus", _prepare_in_worker, (config.corpus,), folder / "corpus.log", stop)
    return prepare_corpus(config.corpus, NoProgress())


def _prepare_in_worker(corpus: Any) -> None:
    with ConsoleProgress("corpus") as progress:
        prepare_corpus(corpus, progress)


def _find_sources(config: StudyConfig, folder: Path, stop: StopSignal) -> dict[str, dict[str, str]]:
    """The hashes of what each import reads, by the name of the base; what lies on the hub is fetched first."""
    from megatron_plasticity.interchange.sources import find_source

    imports = import_configs(config)
    if any(not Path(recipe.source).expanduser().is_dir() for recipe in imports):
        # In a worker, so that Ctrl-C stops a download at once.
        context = study_workers(config.resources.threads, cuda=False)
        run_alone(context, "sources", _find_in_worker, (imports,), folder / "sources.log", stop)
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
                "config": _plain(plan.config.model_dump()),
                "corpus": {"folder": str(corpus), "manifest": read_manifest(corpus)} if corpus else None,
                "cells": [cell.to_json() for cell in plan.cells],
            },
        )


def _warn_of_a_small_disk(plan: StudyPlan) -> None:
    """A warning, and no more: a study runs for weeks, in which others may make room."""
    needed = Costs(plan, Machine()).of(cell for cell in plan.cells if not _is_done(cell)).disk or 0
    free = shutil.disk_usage(plan.folder).free
    if needed > free:
        print(
            f"warning: the runs that are left will write {decimal(needed)} of checkpoints and activations, and {decimal(free)} "
            f"are free in {plan.folder}: make room in time, or choose another `output`",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _mirrored(config: StudyConfig, folder: Path) -> Iterator[None]:
    if not config.mlflow:
        yield
        return
    with mirror_in_background(MlflowMirror(folder, experiment=config.name), folder):
        yield


@dataclass
class _Attempt:
    """A job under way, and when it was last heard of."""

    job: Job
    log_size: int
    """Bytes of the log before it."""
    heartbeat: float | None = None
    """Its last sign of life, by its own clock."""
    heard: float = field(default_factory=time.monotonic)
    """When that was seen, by ours: the clocks of two machines may differ."""
    given_up: float | None = None
    """When it was asked to end, since it was silent for too long."""

    def silent_for(self) -> float:
        """Seconds since the last sign of life was seen; a job in a queue has none to give."""
        state = read_state(self.job.cell)
        heartbeat = state.heartbeat if state is not None else None
        if heartbeat != self.heartbeat or not self.job.is_active:
            self.heartbeat, self.heard = heartbeat, time.monotonic()
        return time.monotonic() - self.heard


@dataclass(frozen=True)
class _Waiting:
    """A run that failed and is tried again."""

    until: float
    """Unix seconds."""
    failure: Failure
    failures: int
    """So many in a row without a new checkpoint."""


@dataclass
class _Runner:
    plan: StudyPlan
    backend: Backend
    claim: Claim
    stop: StopSignal
    only: Collection[str] | None = None
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    running: dict[str, _Attempt] = field(default_factory=dict)
    """Cell id → its job."""
    waiting: dict[str, _Waiting] = field(default_factory=dict)
    """Cell id → when it is tried again."""
    told: dict[str, str] = field(default_factory=dict)
    """Cell id → who has its folder, as a person was told."""

    def __post_init__(self) -> None:
        resources = self.resources
        self.retries = Retries(resources.retries, resources.retry_seconds)
        wanted = self.plan.cells if self.only is None else _with_descendants(self.plan, self.only)
        self.wanted = {cell.id for cell in wanted}

    @property
    def resources(self) -> ResourcesConfig:
        return self.plan.config.resources

    def run(self) -> StudyOutcome:
        self.done = {cell.id for cell in self.plan.cells if _is_done(cell)}
        with StudyDisplay(self.plan, already_done=self.done) as display:
            for job in self.backend.adopt([cell for cell in self.plan.cells if cell.id not in self.done]):
                self.running[job.cell.id] = _Attempt(job, log_size(job.cell))
            try:
                while self._start_ready(display) or self._left():
                    self.backend.wait([attempt.job for attempt in self.running.values()], _SECONDS_BETWEEN_LOOKS)
                    self._collect(display)
                    self._end_hung(display)
                    self._refresh(display)
                    self._listen()
            finally:
                self._end_jobs()
        return StudyOutcome(self.plan.folder, tuple(sorted(self.done)), dict(self.failed), tuple(self._unreachable()))

    def _start_ready(self, display: StudyDisplay) -> bool:
        """Start ready cells on free places; whether any was started."""
        free, cells = self.backend.free(), []
        for cell in self._ready() if free else ():
            if len(cells) == free:
                break
            if _is_done(cell):  # by another process, or a job that was thought lost
                self.done.add(cell.id)
                display.finished(cell)
                continue
            # A queue's job that arrived although nobody said so is found when the run is to be started, not before.
            unnoticed = self.backend.outlives_runner and _runs_here(cell)
            if not unnoticed and (holder := _held_elsewhere(cell)) is not None:
                self._tell_once(cell, holder, display)
                continue
            try:
                # The folder says what to do, so that any machine can do it.
                RunFolder.create(cell.folder.parent, cell.kind, cell.name, cell.config, cell.inputs)
            except UserError as error:
                self.failed[cell.id] = str(error)
                display.failed(cell, str(error))
                continue
            cells.append(cell)
        sizes = {cell.id: log_size(cell) for cell in cells}
        jobs = self.backend.start(cells) if cells else []
        for job in jobs:
            self.waiting.pop(job.cell.id, None)
            self.running[job.cell.id] = _Attempt(job, sizes[job.cell.id])
        return bool(jobs)

    def _ready(self) -> list[PlannedCell]:
        now = time.time()
        ready = [
            cell
            for cell in self._left()
            if cell.id not in self.running and (cell.id not in self.waiting or self.waiting[cell.id].until <= now)
        ]
        return sorted(ready, key=lambda cell: _ORDER.index(cell.kind))

    def _left(self) -> list[PlannedCell]:
        """Cells that can be run, or are: neither done nor failed, and with the model that they read."""
        return [
            cell
            for cell in self.plan.cells
            if cell.id in self.wanted
            and cell.id not in self.done
            and cell.id not in self.failed
            and (cell.parent is None or cell.parent in self.done)
        ]

    def _collect(self, display: StudyDisplay) -> None:
        for cell_id, attempt in list(self.running.items()):
            cell = attempt.job.cell
            ended = attempt.job.ended()
            if ended is None:
                continue
            del self.running[cell_id]
            if _is_done(cell):
                self.done.add(cell_id)
                display.finished(cell)
                continue
            if self.stop.received is not None:
                continue
            failure = explain(cell, ended, attempt.log_size)
            if attempt.given_up is not None:
                failure = Failure(
                    f"it gave no sign of life for {self.resources.silent_minutes:g} minutes and was ended", passing=True
                )
            self._fail(cell, failure, display)

    def _fail(self, cell: PlannedCell, failure: Failure, display: StudyDisplay) -> None:
        if failure.held:  # no attempt: its state belongs to whoever has it
            self.waiting[cell.id] = _Waiting(time.time() + self.resources.retry_seconds, failure, self.retries.count(cell))
            self._tell_once(cell, failure.headline, display)
            return
        pause = self.retries.pause_after(cell, failure)
        if pause is not None:
            self.waiting[cell.id] = _Waiting(time.time() + pause, failure, self.retries.count(cell))
            display.waiting(cell, failure.headline, pause)
            return
        times = self.retries.count(cell)
        reason = failure.reason if times == 1 else f"{failure.reason}\n({times} attempts that got no further failed)"
        self.failed[cell.id] = reason
        # A process that was killed could not say so itself. Under the lock alone: a process of another host that was heard of a
        # moment ago is, as its back end knows, the one that failed.
        with contextlib.suppress(UserError, OSError):
            folder = RunFolder.open(cell.folder)
            with file_lock(folder.path / "lock"):
                state = folder.state
                lives_here = state.status == "running" and state.host == host_name()
                if state.status not in ("done", "failed") and not lives_here:
                    folder.mark_failed(failure.reason)
        display.failed(cell, reason)

    def _tell_once(self, cell: PlannedCell, why: str, display: StudyDisplay) -> None:
        """Say why a run has to wait, unless that was the last thing said of it."""
        if self.told.get(cell.id) != why:
            self.told[cell.id] = why
            display.held(cell, why)

    def _end_hung(self, display: StudyDisplay) -> None:
        """Ask what is silent for too long to end; kill what does not."""
        minutes = self.resources.silent_minutes
        if minutes is None:
            return
        for attempt in self.running.values():
            if attempt.given_up is not None:
                if time.monotonic() - attempt.given_up > SECONDS_TO_STOP_ALL:
                    attempt.given_up = time.monotonic()  # not at every look; but again, should Slurm not have heard it
                    attempt.job.kill()
            elif attempt.silent_for() > 60 * minutes:
                attempt.given_up = time.monotonic()
                display.hung(attempt.job.cell, minutes)
                attempt.job.stop()

    def _refresh(self, display: StudyDisplay) -> None:
        running = {id: attempt.job.where for id, attempt in self.running.items()}
        waiting = {
            id: {"until": entry.until, "reason": entry.failure.headline, "failures": entry.failures}
            for id, entry in self.waiting.items()
        }
        self.claim.note({"backend": self.resources.backend, "running": running, "waiting": waiting})
        display.refresh([attempt.job.cell for attempt in self.running.values()], self.done, self.failed)

    def _listen(self) -> None:
        if self.claim.lost is not None:
            raise UserError(f"{self.plan.folder}: {self.claim.lost} took this study over; this runner ends")
        if self.stop.received is None:
            return
        farewell = self.backend.farewell([attempt.job for attempt in self.running.values()])
        kept = "finished runs are kept, and the same command goes on from here"
        raise Interrupted(
            f"stopped by {self.stop.received.name}; {kept}" + (f"\n{farewell}" if farewell else ""), self.stop.received
        )

    def _end_jobs(self) -> None:
        """Let every job save and end, but for those that outlive their runner."""
        if self.backend.outlives_runner:
            return
        jobs = [attempt.job for attempt in self.running.values()]
        for job in jobs:
            job.stop()
        deadline = time.monotonic() + SECONDS_TO_STOP_ALL
        while (left := [job for job in jobs if job.ended() is None]) and time.monotonic() < deadline:
            self.backend.wait(left, 0.1)
        for job in left:
            job.kill()

    def _unreachable(self) -> list[str]:
        return [cell.id for cell in self.plan.cells if cell.id in self.wanted - self.done - self.failed.keys()]


def _with_descendants(plan: StudyPlan, ids: Collection[str]) -> list[PlannedCell]:
    """The cells of these ids, and all that descends from them; parents come before children in a plan."""
    chosen: dict[str, PlannedCell] = {}
    for cell in plan.cells:
        if cell.id in ids or cell.parent in chosen:
            chosen[cell.id] = cell
    return list(chosen.values())


def _is_done(cell: PlannedCell) -> bool:
    state = read_state(cell)
    return state is not None and state.status == "done"


def _runs_here(cell: PlannedCell) -> bool:
    state = read_state(cell)
    return state is not None and state.status == "running" and state.host == host_name()


def _held_elsewhere(cell: PlannedCell) -> str | None:
    """Who else is at this run, in words: a process of this host that lives, or one of another host that may, since one that a
    network cut off goes on until it notices."""
    state = read_state(cell)
    if state is None or state.status != "running":
        return None
    holder = f"process {state.pid} on {state.host} is at it"
    if state.host == host_name():  # one that is gone counts as interrupted
        return f"{holder}; this study goes on with it when that process has ended"
    if time.time() - (state.heartbeat or 0) >= SECONDS_UNTIL_FORGOTTEN:
        return None
    return f"{holder}, or was cut off; it is started here when that process has ended, or was silent for " + (
        f"{SECONDS_UNTIL_FORGOTTEN / 60:.0f} minutes"
    )


def _plain(value: Any) -> Any:
    """A config for JSON, which has no name for infinity: a text stands for it, as it may in YAML. (pydantic's own way turns it
    into null where any type is allowed, as in `axes`.)"""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) or value in (math.inf, -math.inf) else value
