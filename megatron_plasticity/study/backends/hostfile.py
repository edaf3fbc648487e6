"""Runs on the machines of a hostfile, over ssh.

The GPUs are divided into places of as many as a run has ranks: several on a machine, or whole machines together. On one machine
a run is started as on this one (`study/cell.py`); over several, the deepspeed launcher is started on each with the same hostfile
and its own rank. Each connection ends what it started when it closes (`study/backends/remote.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.errors import FolderHeld, UserError
from megatron_plasticity.launch.command import launcher_program
from megatron_plasticity.launch.environment import travelling
from megatron_plasticity.launch.hostfile import Host, read_hostfile
from megatron_plasticity.launch.preflight import PROBE, clock_check, findings_in, gpu_problems, same_code_check
from megatron_plasticity.launch.probe import Question
from megatron_plasticity.launch.remote import SSH_ARGUMENTS, SSH_OPTIONS, Answer, on_hosts
from megatron_plasticity.study.backends import SECONDS_TO_STOP_REMOTELY, Ended, Job, refuse
from megatron_plasticity.study.backends.remote import SECONDS_BETWEEN_SIGNS, order
from megatron_plasticity.study.cell import is_launched
from megatron_plasticity.study.places import Place, places_of
from megatron_plasticity.study.plan import PlannedCell
from megatron_plasticity.study.recipes import study_device

_FAR_END = "megatron_plasticity.study.backends.remote"
_SSH_FAILED = 255
_CHECK_SECONDS = 90.0
_PORT_SECONDS = 5.0
_FIRST_REST, _LONGEST_REST = 60.0, 3600.0


@dataclass
class RemoteJob:
    """A run on a place: one ssh connection for each of its machines that takes part."""

    cell: PlannedCell
    place: Place
    connections: list[subprocess.Popen[bytes]]
    is_active: bool = True
    _told: float = field(default_factory=time.monotonic)
    _ended: Ended | None = None

    @property
    def where(self) -> str:
        return self.place.name

    def ended(self) -> Ended | None:
        if self._ended is not None:
            return self._ended
        self._say_that_we_are_here()
        codes = [connection.poll() for connection in self.connections]
        # The ranks on other machines would wait for a failed one for ever.
        if any(codes):
            self.stop()
        if None in codes:
            return None
        # The others only tell that they were ended, or lost the one that was refused.
        first = FolderHeld.exit_code if FolderHeld.exit_code in codes else next((code for code in codes if code), 0)
        failed = [code for code in codes if code]
        lost = bool(failed) and all(code == _SSH_FAILED for code in failed)
        self._ended = Ended(first, f"the connection to {self.place.name} was lost" if lost else None, lost)
        return self._ended

    def stop(self) -> None:
        for connection in self.connections:
            if connection.stdin is not None and not connection.stdin.closed:
                with contextlib.suppress(OSError):
                    connection.stdin.close()

    def kill(self) -> None:
        self.stop()
        for connection in self.connections:
            connection.kill()

    def _say_that_we_are_here(self) -> None:
        if time.monotonic() - self._told < SECONDS_BETWEEN_SIGNS:
            return
        self._told = time.monotonic()
        for connection in self.connections:
            if connection.stdin is not None and not connection.stdin.closed:
                with contextlib.suppress(OSError):  # it has just ended
                    connection.stdin.write(b"\n")
                    connection.stdin.flush()


@dataclass
class HostfileBackend:
    """Places on the machines of a hostfile."""

    hostfile: Path
    places: tuple[Place, ...]
    threads: int
    processes_per_run: int
    with_gpus: bool
    outlives_runner: bool = False
    _jobs: dict[int, RemoteJob] = field(default_factory=dict)
    """Index of a place → what runs on it."""
    _resting: dict[int, float] = field(default_factory=dict)
    """Index of a place → when it may be used again, by `time.monotonic`."""
    _losses: dict[int, int] = field(default_factory=dict)
    """Index of a place → connections in a row that were lost."""
    _addresses: dict[str, str] = field(default_factory=dict)
    """Machine → the address by which it is reached: its own name may lead nowhere from another one."""

    @classmethod
    def of(cls, config: StudyConfig) -> HostfileBackend:
        """Raises UserError if the hostfile cannot be read, or has no place for a run."""
        resources = config.resources
        assert resources.hostfile is not None  # ResourcesConfig
        places = places_of(read_hostfile(resources.hostfile), resources.processes_per_run, resources.hostfile)
        with_gpus = study_device(config) != "cpu"
        return cls(
            resources.hostfile.absolute(),
            tuple(places[: resources.slots]),
            resources.threads,
            resources.processes_per_run,
            with_gpus,
        )

    def check(self, folder: Path) -> None:
        """Ask every machine whether it can be reached, has this project at this path and the same versions as the others, sees
        the study's folder, and has a GPU for each of its slots."""
        slots: dict[str, tuple[int, ...]] = {}
        for host in (host for place in self.places for host in place.hosts):
            slots[host.name] = (*slots.get(host.name, ()), *host.slots)
        sign = folder.absolute() / f".seen-by-all-{uuid.uuid4().hex}"
        sign.write_text("shared\n", encoding="utf-8")
        question = json.dumps(asdict(Question(output=str(folder.absolute()), token=str(sign))))
        try:
            answers = on_hosts(list(slots), PROBE, given=question, seconds=_CHECK_SECONDS, over_ssh=True)
        finally:
            sign.unlink()
        found = findings_in(answers)
        problems = [_problem(answer) for answer in answers if answer.host not in found]
        problems += [_not_seen(name, folder) for name, there in found.items() if not there.sees_token]
        if found:
            problems += same_code_check(found).problems
            problems += clock_check(found, {answer.host: answer.at for answer in answers}).problems
        if found and self.with_gpus:
            problems += gpu_problems([Host(name, slots[name]) for name in found], found)
        self._addresses = {name: there.addresses[0] for name, there in found.items() if there.addresses}
        refuse(f"{self.hostfile}: these machines cannot carry out runs of the study", problems)

    def adopt(self, cells: Sequence[PlannedCell]) -> list[Job]:
        return []

    def free(self) -> int:
        return len(self._free_places())

    def start(self, cells: Sequence[PlannedCell]) -> list[Job]:
        started: list[Job] = []
        for index, cell in zip(self._free_places(), cells, strict=False):
            self._jobs[index] = self._start(self.places[index], cell)
            started.append(self._jobs[index])
        return started

    def wait(self, jobs: Sequence[Job], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and all(job.ended() is None for job in jobs):
            time.sleep(0.05)

    def farewell(self, jobs: Sequence[Job]) -> str:
        return ""

    def _free_places(self) -> list[int]:
        for index, job in list(self._jobs.items()):
            ended = job.ended()
            if ended is not None:
                del self._jobs[index]
                self._note_end(index, ended)
        now = time.monotonic()
        return [index for index in range(len(self.places)) if index not in self._jobs and self._resting.get(index, 0) <= now]

    def _note_end(self, index: int, ended: Ended) -> None:
        """A machine that is gone must not use up the attempts of one run after the other."""
        if not ended.lost:
            self._losses.pop(index, None)
            return
        losses = self._losses[index] = self._losses.get(index, 0) + 1
        self._resting[index] = time.monotonic() + min(_LONGEST_REST, _FIRST_REST * 2 ** (losses - 1))

    def _start(self, place: Place, cell: PlannedCell) -> RemoteJob:
        launched = is_launched(cell.kind, self.processes_per_run)
        hosts = place.hosts if launched else place.hosts[:1]
        port = str(_port_on(hosts[0]) if len(hosts) > 1 else 0)
        connections = []
        with (cell.folder / "log").open("ab") as log:
            for rank, host in enumerate(hosts):
                if len(hosts) == 1:
                    command = self._command_on_one(host, cell, launched)
                else:
                    command = self._command_on_many(place, cell, rank, port)
                connections.append(self._connect(host, command, log))
        return RemoteJob(cell, place, connections)

    def _command_on_one(self, host: Host, cell: PlannedCell, launched: bool) -> list[str]:
        command = [sys.executable, "-m", "megatron_plasticity.study.cell", str(cell.folder)]
        if launched:
            command += ["--processes", str(self.processes_per_run)]
            command += ["--devices", ",".join(map(str, host.slots))] if self.with_gpus else []
        return command

    def _command_on_many(self, place: Place, cell: PlannedCell, rank: int, port: str) -> list[str]:
        """The deepspeed launcher of one machine. It connects to no other: pdsh, which would, leaves ranks behind."""
        return [
            *launcher_program(),
            "--hostfile", str(self.hostfile),
            "--include", "@".join(host.name for host in place.hosts),
            "--no_ssh",
            "--node_rank", str(rank),
            "--master_addr", self._addresses.get(place.hosts[0].name, place.hosts[0].name),
            "--master_port", port,
            "--module", "megatron_plasticity", cell.kind, str(cell.folder / "config.yaml"),
        ]  # fmt: skip

    def _connect(self, host: Host, command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        environment = {
            **_forwarded(),
            "OMP_NUM_THREADS": str(self.threads),
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, host.slots)) if self.with_gpus else "",
            **({} if self.with_gpus else {"DS_ACCELERATOR": "cpu"}),
        }
        more = shlex.split(os.environ.get(SSH_ARGUMENTS, ""))
        far = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join([sys.executable, '-m', _FAR_END])}"
        try:
            connection = subprocess.Popen(
                ["ssh", "-T", *SSH_OPTIONS, *more, host.name, far],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in the terminal is for the runner, which decides
            )
        except FileNotFoundError:
            raise UserError("resources.backend=hostfile needs the program ssh, which is not on PATH") from None
        assert connection.stdin is not None
        with contextlib.suppress(OSError):  # it has failed already, and its exit code says so
            connection.stdin.write(order(command, str(Path.cwd()), environment, SECONDS_TO_STOP_REMOTELY))
            connection.stdin.flush()
        return connection


def _port_on(host: Host) -> int:
    """A port that is free on a machine, as far as it says so soon: the signs of life to other machines must not wait long."""
    first, second = random.sample(range(20000, 30000), 2)
    question = json.dumps(asdict(Question(port=first)))
    answers = on_hosts([host.name], PROBE, given=question, seconds=_PORT_SECONDS, over_ssh=True)
    there = findings_in(answers).get(host.name)
    return second if there is not None and there.port_problem is not None else first


def _not_seen(host: str, folder: Path) -> str:
    return f"{host}: does not see {folder.absolute()}; the study's `output` must lie on a disk that all machines share"


def _problem(answer: Answer) -> str:
    host = answer.host
    if answer.exit_code in (_SSH_FAILED, None):
        return f"{host}: cannot be reached by ssh without a password: {answer.complaint}; try `ssh {host} hostname`"
    here = f"{sys.executable} with this project in {Path.cwd()}"
    return f"{host}: cannot run {here}, which must be there at the same paths: {answer.complaint}"


def _forwarded() -> dict[str, str]:
    """What of our environment runs get: ssh itself passes nothing on."""
    ways = travelling(os.environ)
    of_python = {name: value for name, value in ways.launcher.items() if name.startswith("PYTHON")}
    return {**of_python, **ways.open, **ways.private}
