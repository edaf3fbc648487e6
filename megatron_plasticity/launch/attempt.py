"""One start of the deepspeed launcher: its command and environment, what is shown of it, signals, and how it ended."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_plasticity.errors import LostProcess
from megatron_plasticity.launch.command import Meeting, cluster_command, launcher_command
from megatron_plasticity.launch.environment import Travelling, write_deepspeed_file
from megatron_plasticity.launch.folder import LaunchFolder, RankRecord
from megatron_plasticity.launch.machines import Machines
from megatron_plasticity.launch.rank import LAUNCH_FOLDER
from megatron_plasticity.launch.remote import SSH_ARGUMENTS, SSH_OPTIONS, SSH_SECONDS, on_hosts
from megatron_plasticity.training.signals import StopSignal

_SECONDS_BETWEEN_LOOKS = 0.5
# What a rank ends with that was told to end by a signal, or because another rank is gone.
_TOLD_TO_END = {*(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)), LostProcess.exit_code}
_SSH_FAILED = 255


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    launcher_code: int
    records: list[RankRecord]
    processes: int
    stopped_by: int | None = None
    """The signal by which this process was told to stop."""
    too_long: bool = False

    @cached_property
    def first_to_fail(self) -> RankRecord | None:
        """The rank that failed by itself, the first if there are several; None where none could say so."""
        failed = [record for record in self.records if record.exit_code not in (None, 0, *_TOLD_TO_END)]
        # Clocks of two machines differ; who ended because of another knows it.
        return min(failed, key=lambda record: (record.because_of_another, record.ended or 0.0), default=None)

    @property
    def without_a_word(self) -> list[int]:
        """Ranks that began and could not say how they ended."""
        return [record.rank for record in self.records if record.exit_code is None]

    @property
    def exit_code(self) -> int:
        """That of the rank that failed first; 128 + signal if it was killed or we were stopped; 75 if machines were lost."""
        if self.stopped_by is not None:
            return 128 + self.stopped_by
        if self.first_to_fail is not None:
            return self.first_to_fail.exit_code or 0
        if self.launcher_code < 0:
            return 128 - self.launcher_code
        if self.launcher_code == _SSH_FAILED:
            return LostProcess.exit_code
        # DeepSpeed hands on −N for signal N, of which the shell leaves 256 − N.
        number = 256 - self.launcher_code
        return 128 + number if number in set(signal.Signals) else self.launcher_code


@dataclass(frozen=True)
class Launcher:
    """Starts programs on the ranks of some machines."""

    machines: Machines
    meeting: Meeting
    sent: Travelling
    devices: tuple[str, ...] = ()
    """On this machine alone: the GPUs to use, by index."""
    cpu: bool = False
    """Whether the ranks run without GPUs."""
    threads: int | None = None
    """For the libraries of each rank, unless the environment says; None leaves it to them."""

    def command(self, program: Sequence[str], logs: Path) -> list[str]:
        """The deepspeed command. Raises UserError for a path that it cannot carry."""
        machines = self.machines
        if machines.hostfile is not None:
            return cluster_command(program, machines.hostfile, self.meeting, logs, machines.include, machines.exclude)
        return launcher_command(program, machines.processes, self.devices, logs, self.meeting.port)

    def shown(self, program: Sequence[str], logs: Path) -> str:
        """The command for a person to read, and to run by hand: what it needs of harmless variables before it, the others, whose
        values may be secret, by name."""
        private, opened = self._environment_of_ranks()
        mine = {name: private.pop(name) for name in ("OMP_NUM_THREADS",) if name in private and name not in os.environ}
        if self.machines.over_ssh:  # these would not reach the ranks
            private, harmless = {**private, **mine, **opened}, {}
        else:
            harmless = {**opened, **mine}
        before = [f"{name}={shlex.quote(value)}" for name, value in harmless.items()]
        text = " ".join([*before, shlex.join(self.command(program, logs))])
        return text + (f"\n  the ranks get besides: {', '.join(sorted(private))}" if private else "")

    def run(self, program: Sequence[str], logs: Path, *, echo: bool = False, seconds: float | None = None) -> Outcome:
        """Start a program and watch it to its end; `echo` prints what rank 0 says.

        Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal go on to every rank, so that the run can save; they are given the time that
        they need. A second Ctrl-C, seconds later, kills them. After `seconds` everything is killed.
        """
        command = self.command(program, logs)
        private, opened = self._environment_of_ranks()
        folder = LaunchFolder.create(logs, private)
        folder.record_launcher()
        (logs / "command").write_text(shlex.join(command) + "\n", encoding="utf-8")
        opened[LAUNCH_FOLDER] = str(logs)
        with (
            tempfile.TemporaryDirectory(prefix="megatron-plasticity-") as temporary,
            StopSignal() as stop,
            _hang_up_as_termination(),
        ):
            environment = self._environment_of_launcher(Path(temporary) / "environment", opened)
            with (logs / "launcher.log").open("ab") as log:
                # In a session of its own, so that a Ctrl-C in the terminal is ours to hand on: DeepSpeed would end its processes
                # on every machine by their names, and give ranks half a minute.
                process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            try:
                return self._watch(process, folder, stop, echo, seconds)
            except BaseException:
                self._kill(process, folder)
                raise
            finally:
                with contextlib.suppress(OSError):  # the next launch looks again
                    folder.forget_environment()

    def _watch(
        self, process: subprocess.Popen[bytes], folder: LaunchFolder, stop: StopSignal, echo: bool, seconds: float | None
    ) -> Outcome:
        begin, asked, tail, all_started = time.monotonic(), False, _Tail(), False
        too_long = False
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_BETWEEN_LOOKS)
            if echo:
                tail.print_new(folder.log_of(0))
            if not all_started and len(folder.records()) == self.machines.processes:
                all_started = True
                with contextlib.suppress(OSError):
                    folder.forget_environment()
            if stop.received is not None and not asked:
                asked = True
                say(f"{stop.received.name}: the ranks are told to save and stop\n")
                with contextlib.suppress(OSError):  # only ranks that have not started yet look for it
                    folder.ask_to_stop(stop.received)
                if unreached := self.signal_ranks(folder, stop.received):
                    say(f"not reached: {', '.join(unreached)}; ranks there stop with the others, or when they miss them\n")
            if seconds is not None and time.monotonic() - begin > seconds:
                too_long = True
                self._kill(process, folder)
        if echo:
            tail.print_new(folder.log_of(0))
        code = process.wait()
        return Outcome(code, folder.records(), self.machines.processes, stop.received, too_long)

    def signal_ranks(self, folder: LaunchFolder, number: int) -> list[str]:
        """Send every rank a signal; returns the machines that could not be reached."""
        arguments = [str(folder.path), "--ranks", str(int(number))]
        answers = on_hosts(
            self.machines.names,
            "megatron_plasticity.launch.stop",
            arguments,
            seconds=2 * SSH_SECONDS,
            over_ssh=self.machines.over_ssh,
        )
        return [answer.host for answer in answers if not answer.ended_well]

    def _kill(self, process: subprocess.Popen[bytes], folder: LaunchFolder) -> None:
        """End everything at once, first the ranks, since their machines' launchers outlive the one here."""
        with contextlib.suppress(OSError):
            folder.ask_to_stop(signal.SIGKILL)
        self.signal_ranks(folder, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _environment_of_ranks(self) -> tuple[dict[str, str], dict[str, str]]:
        """What they read from a file, and what must be there before they start."""
        private, opened = dict(self.sent.private), dict(self.sent.open)
        if self.threads is not None and "OMP_NUM_THREADS" not in os.environ:
            private["OMP_NUM_THREADS"] = str(self.threads)
        if self.cpu:
            opened["DS_ACCELERATOR"] = "cpu"
        return private, opened

    def _environment_of_launcher(self, file: Path, opened: Mapping[str, str]) -> dict[str, str]:
        if not self.machines.over_ssh:  # its ranks are its children
            return {**self.sent.launcher, **opened}
        write_deepspeed_file(file, opened)
        ssh = f"{shlex.join(SSH_OPTIONS)} {self.sent.launcher.get(SSH_ARGUMENTS, '')}".strip()
        return {**self.sent.launcher, **opened, "DS_ENV_FILE": str(file), SSH_ARGUMENTS: ssh}


@dataclass
class _Tail:
    """Prints what is added to a file."""

    seen: int = 0

    def print_new(self, path: Path | None) -> None:
        for text in self._new(path):
            say(text)

    def _new(self, path: Path | None) -> Iterator[str]:
        if path is None:
            return
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(self.seen)
            new = file.read()
            self.seen += len(new)
            yield new.decode("utf-8", errors="replace")


def say(text: str) -> None:
    """Print, unless nobody is there to read: a terminal that was closed or a reader that has left is no reason to end ranks."""
    try:
        print(text, end="", flush=True)
    except OSError:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # for as long as this process lives


@contextlib.contextmanager
def _hang_up_as_termination() -> Iterator[None]:
    """Take the end of the terminal (a closed laptop) for SIGTERM, unless it is ignored, as under `nohup`."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGHUP, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def last_lines(path: Path | None, count: int) -> list[str]:
    """The last lines of a log that say something; none if it is not there."""
    try:
        lines = [] if path is None else path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip()][-count:]
