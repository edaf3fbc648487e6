"""Runs as Slurm's array jobs: one array for the ready runs of a kind, one element per run.

What was submitted is noted in the study's folder, so that the runner may end and come back: it adopts what is still queued or
running. An element saves before its time limit and queues itself again (`study/backends/slurm_element.py`); Slurm itself requeues
what lost its node. `study cancel` takes everything out of the queue.
"""

from __future__ import annotations

import itertools
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_plasticity.config.files import write_json_atomic, write_text_atomic
from megatron_plasticity.config.study import ResourcesConfig, StudyConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.slurm import directives
from megatron_plasticity.study.backends import Ended, Job
from megatron_plasticity.study.backends.slurm_queue import (
    SUBMITTED_FILE,
    Element,
    Finished,
    InQueue,
    SlurmIsAway,
    SlurmIsFull,
    SlurmQueue,
    read_submitted,
)
from megatron_plasticity.study.cell import is_launched
from megatron_plasticity.study.plan import PlannedCell
from megatron_plasticity.study.recipes import study_device, study_folder
from megatron_plasticity.study.retries import read_state

SCRIPTS_FOLDER = "slurm"
_SECONDS_BETWEEN_QUERIES = 10.0
_SECONDS_AFTER_A_REFUSAL = 60.0
# Slurm's own default limit of an array is 1001 elements.
_LARGEST_ARRAY = 500
_UNLIMITED = 100_000
# Accounting lags behind the queue.
_SECONDS_FOR_ACCOUNTING = 60.0
_NOT_FINAL = ("COMPLETED", "COMPLETING", "PENDING", "REQUEUED", "RUNNING", "SUSPENDED")
"""States from which accounting will move on, or of a job that ended well without results."""
_LOST = ("NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "TIMEOUT", "DEADLINE", "REVOKED", "OUT_OF_MEMORY")


@dataclass
class SlurmJob:
    """An element of an array job."""

    cell: PlannedCell
    element: Element
    backend: SlurmBackend = field(repr=False)
    gone_since: float | None = None
    """When it was first seen to have left the queue, by `time.monotonic`."""

    @property
    def where(self) -> str:
        found = self.backend.in_queue.get(str(self.element))
        if found is None:
            return f"job {self.element}"
        return f"job {self.element}, {found.state.lower()}: {found.where}"

    @property
    def is_active(self) -> bool:
        found = self.backend.in_queue.get(str(self.element))
        return found is not None and found.state == "RUNNING"

    def ended(self) -> Ended | None:
        return self.backend.how_ended(self)

    def stop(self) -> None:
        self.kill()  # scancel sends SIGTERM first, and SIGKILL after Slurm's KillWait

    def kill(self) -> None:
        self.backend.cancel(self)


@dataclass
class SlurmBackend:
    """A cluster that Slurm looks after."""

    folder: Path
    name: str
    resources: ResourcesConfig
    with_gpus: bool
    queue: SlurmQueue
    outlives_runner: bool = True
    in_queue: dict[str, InQueue] = field(default_factory=dict)
    """What was in the queue when it was last asked, as `JOB_INDEX`."""
    _jobs: list[SlurmJob] = field(default_factory=list)
    _ended: dict[str, Ended] = field(default_factory=dict)
    _accounts: dict[str, Finished] = field(default_factory=dict)
    _asked: float | None = None
    _resting_until: float = 0.0
    _said: str = ""
    """Why it rests, as a person was told."""

    @classmethod
    def of(cls, config: StudyConfig) -> SlurmBackend:
        """Raises UserError if Slurm is not there. How many GPUs a node has was asked before (`study/check.py`)."""
        with_gpus = study_device(config) != "cpu"
        return cls(study_folder(config).absolute(), config.name, config.resources, with_gpus, SlurmQueue.find())

    def check(self, folder: Path) -> None:
        try:
            self.queue.elements()
        except SlurmIsAway as error:
            raise UserError(f"Slurm does not answer: {error}. Run the same command again later.") from None

    def adopt(self, cells: Sequence[PlannedCell]) -> list[Job]:
        self._ask(at_once=True)
        by_folder = {cell.folder.name: cell for cell in cells}
        kept = []
        for array in read_submitted(self.folder):
            # A runner that was killed between submitting and writing the number down left the name.
            try:
                job = array["job"] or self.queue.named(array["name"])
            except SlurmIsAway as error:
                raise UserError(f"Slurm does not answer: {error}. Run the same command again later.") from None
            elements = [(Element(job, index), folder) for index, folder in enumerate(array["folders"])] if job else []
            living = [(element, folder) for element, folder in elements if str(element) in self.in_queue]
            if living:
                kept.append({**array, "job": job})
            self._jobs += [SlurmJob(by_folder[folder], element, self) for element, folder in living if folder in by_folder]
        self._note(kept)
        return list(self._jobs)

    def free(self) -> int:
        if time.monotonic() < self._resting_until:
            return 0
        return (self.resources.slots or _UNLIMITED) - len(self._jobs)

    def start(self, cells: Sequence[PlannedCell]) -> list[Job]:
        try:
            started: list[Job] = [*self._arrived_after_all(cells)]
        except SlurmIsAway as error:
            self._rest(f"Slurm does not answer now ({error})")
            return []  # what may have arrived must not be submitted again
        found = [job.cell.id for job in started]
        cells = [cell for cell in cells if cell.id not in found]
        for _, alike in itertools.groupby(cells, key=lambda cell: cell.kind):
            jobs = self._submit_all(list(alike))
            started += jobs
            if time.monotonic() < self._resting_until:
                break
        return started

    def _submit_all(self, cells: Sequence[PlannedCell]) -> list[SlurmJob]:
        """Submit these runs of a kind, in arrays as large as Slurm takes them, until it takes no more."""
        started: list[SlurmJob] = []
        largest = _LARGEST_ARRAY
        while left := list(cells[len(started) :]):
            array = left[:largest]
            try:
                jobs = self._submit(array)
            except SlurmIsFull as error:
                if len(array) == 1 and not self.in_queue:
                    raise UserError(
                        f"Slurm takes none of the study's jobs: {error}. See resources.slurm and the limits of your account."
                    ) from None
                largest = len(array) // 2
                if largest == 0:
                    self._rest(
                        f"Slurm takes no more jobs now ({error}); the others follow as these end, and resources.slots states how "
                        "many to submit at once"
                    )
                    break
                continue
            if not jobs:
                break
            started += jobs
        return started

    def _rest(self, why: str) -> None:
        """Leave Slurm alone for a while; said once for each reason in a row."""
        self._resting_until = time.monotonic() + _SECONDS_AFTER_A_REFUSAL
        if why != self._said:
            print(f"{why}; trying again every {_SECONDS_AFTER_A_REFUSAL:g} s", file=sys.stderr)
        self._said = why

    def wait(self, jobs: Sequence[Job], seconds: float) -> None:
        time.sleep(seconds)
        self._ask()

    def farewell(self, jobs: Sequence[Job]) -> str:
        if not jobs:
            return ""
        return (
            f"{len(jobs)} runs stay with Slurm, where they go on or wait; to take them out of the queue as well:\n"
            f"  megatron-plasticity study cancel {self.folder}"
        )

    def how_ended(self, job: SlurmJob) -> Ended | None:
        """How a job ended; None while it is in the queue, or as long as nobody knows."""
        name = str(job.element)
        if name not in self._ended:
            ended = None if name in self.in_queue or self._asked is None else self._judge(job)
            if ended is None:
                return None
            self._ended[name] = ended
            self._jobs = [other for other in self._jobs if other is not job]
        return self._ended[name]

    def cancel(self, job: SlurmJob) -> None:
        try:
            self.queue.cancel([str(job.element)])
        except (SlurmIsAway, UserError):
            return  # asked again by whoever waits for it to end

    def _judge(self, job: SlurmJob) -> Ended | None:
        """A job that has left the queue: its folder tells of success, accounting of everything else."""
        state = read_state(job.cell)
        status = state.status if state is not None else None
        if status == "done":
            return Ended(0)
        if (finished := self._accounts.get(str(job.element))) is not None and finished.state not in _NOT_FINAL:
            return _ended(finished)
        job.gone_since = job.gone_since or time.monotonic()
        if time.monotonic() - job.gone_since < _SECONDS_FOR_ACCOUNTING and "sacct" in self.queue.programs:
            return None
        return Ended(1) if status == "failed" else Ended(None, "its job left Slurm's queue without a word", lost=True)

    def _ask(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and self._asked is not None and now - self._asked < _SECONDS_BETWEEN_QUERIES:
            return
        try:
            self.in_queue = self.queue.elements()
        except SlurmIsAway:
            if at_once:
                raise UserError("Slurm does not answer; run the same command again later") from None
            return  # what was known stays so
        self._asked = now
        gone = {job.element.job for job in self._jobs if str(job.element) not in self.in_queue}
        self._accounts = self.queue.finished(sorted(gone))

    def _submit(self, cells: Sequence[PlannedCell]) -> list[SlurmJob]:
        submitted = read_submitted(self.folder)
        number = 1 + max((array["number"] for array in submitted), default=self._last_script())
        name = f"{self.name}-{number}"
        folders = [cell.folder.name for cell in cells]
        listing, script = (self.folder / SCRIPTS_FOLDER / f"{number}.{ending}" for ending in ("json", "sh"))
        launched = is_launched(cells[0].kind, self.resources.processes_per_run)
        write_json_atomic(listing, {"folders": [str(cell.folder.absolute()) for cell in cells], "launched": launched})
        write_text_atomic(script, self._script(name, listing, len(cells), launched))
        array = {"number": number, "name": name, "job": None, "kind": cells[0].kind, "folders": folders}
        self._note([*submitted, array])
        try:
            job = self.queue.submit(script)
        except SlurmIsAway as error:
            # It may have arrived all the same, so its name stays noted.
            self._rest(f"Slurm does not take jobs now ({error})")
            return []
        except (UserError, SlurmIsFull):
            self._note(submitted)
            raise
        self._said = ""
        self._note([*submitted, {**array, "job": job}])
        jobs = [SlurmJob(cell, Element(job, index), self) for index, cell in enumerate(cells)]
        for element in (str(job.element) for job in jobs):
            self.in_queue[element] = InQueue("PENDING", "submitted")
        self._jobs += jobs
        return jobs

    def _arrived_after_all(self, cells: Sequence[PlannedCell]) -> list[SlurmJob]:
        """Jobs for these cells of which Slurm did not say that it took them, although it did. Raises SlurmIsAway if that cannot
        be asked now."""
        by_folder = {cell.folder.name: cell for cell in cells}
        arrays, found = [], []
        for array in read_submitted(self.folder):
            if array["job"] is None:
                job = self.queue.named(array["name"])
                if job is None:
                    continue
                array = {**array, "job": job}
                elements = [(Element(job, index), folder) for index, folder in enumerate(array["folders"])]
                found += [SlurmJob(by_folder[folder], element, self) for element, folder in elements if folder in by_folder]
            arrays.append(array)
        self._note(arrays)
        for job in found:
            self.in_queue[str(job.element)] = InQueue("PENDING", "submitted")
        self._jobs += found
        return found

    def _last_script(self) -> int:
        names = (path.stem for path in (self.folder / SCRIPTS_FOLDER).glob("*.sh"))
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def _note(self, arrays: Sequence[dict[str, Any]]) -> None:
        write_json_atomic(self.folder / SUBMITTED_FILE, {"arrays": list(arrays)})

    def _script(self, name: str, listing: Path, count: int, launched: bool) -> str:
        """The batch script. Nothing of the environment is in it: sbatch hands that on by itself."""
        slurm = self.resources.slurm
        processes = self.resources.processes_per_run if launched else 1
        per_node = min(processes, slurm.gpus_per_node or processes)
        options = {
            "job-name": name,
            "array": f"0-{count - 1}" + (f"%{self.resources.slots}" if self.resources.slots else ""),
            "output": str(self.folder / SCRIPTS_FOLDER / "%A_%a.log"),
            "open-mode": "append",
            "time": slurm.time,
            "signal": f"B:USR1@{slurm.seconds_before_limit}",
            "nodes": str(processes // per_node),
            "ntasks-per-node": str(per_node),
            "cpus-per-task": str(slurm.cpus_per_process),
            "gpus-per-node": str(per_node) if self.with_gpus else None,
            "partition": slurm.partition,
            "account": slurm.account,
            "mem": slurm.memory,
        }
        lines = directives({key: value for key, value in options.items() if value is not None})
        lines += [f"#SBATCH {option}" for option in ("--requeue", *slurm.options)]
        element = [sys.executable, "-m", "megatron_plasticity.study.backends.slurm_element", str(listing)]
        body = [
            f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
            f"export OMP_NUM_THREADS={self.resources.threads}",
            *([] if self.with_gpus else ["export DS_ACCELERATOR=cpu"]),
            *slurm.setup,
            f"exec {shlex.join(element)}",  # in the shell's place, so that Slurm's signal reaches it
        ]
        return "\n".join(["#!/bin/bash", *lines, *body]) + "\n"


def _ended(finished: Finished) -> Ended:
    state = finished.state
    if state.startswith("CANCELLED"):
        return Ended(None, "its job was cancelled", cancelled=True)
    if state in _LOST:
        return Ended(None, f"Slurm ended its job: {state}", lost=True)
    return Ended(finished.exit_code or 1)


def cancel_submitted(folder: Path) -> Iterator[str]:
    """Take the study's jobs out of Slurm's queue; yields what was cancelled, as `JOB_INDEX`."""
    queue = SlurmQueue.find()
    try:
        in_queue = queue.elements()
        numbers = {array["job"] or queue.named(array["name"]) for array in read_submitted(folder.absolute())}
        living = [name for name in in_queue if name.partition("_")[0] in numbers]
        queue.cancel(living)
        if (folder / SUBMITTED_FILE).is_file():
            write_json_atomic(folder / SUBMITTED_FILE, {"arrays": []})
    except SlurmIsAway as error:
        raise UserError(f"Slurm does not answer: {error}. Run the same command again later.") from None
    yield from living
