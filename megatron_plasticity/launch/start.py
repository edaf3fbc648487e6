"""Carries a launch out: preflight, the launcher, and what its end means; or a batch script for Slurm."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.attempt import Launcher, Outcome, last_lines
from megatron_plasticity.launch.command import Meeting, free_port
from megatron_plasticity.launch.environment import Travelling, travelling
from megatron_plasticity.launch.folder import LaunchFolder, sweep
from megatron_plasticity.launch.job import LaunchedJob
from megatron_plasticity.launch.machines import Machines
from megatron_plasticity.launch.preflight import (
    Check,
    all_reduce_problems,
    ask_hosts,
    place_here_check,
    run_check,
    table,
    tool_check,
    uses_gpus,
)
from megatron_plasticity.launch.probe import Findings
from megatron_plasticity.launch.slurm import SlurmRequest, batch_script, submit
from megatron_plasticity.tracking.run_folder import RunFolder

ALL_REDUCE_SECONDS = 300.0
"""For a thousand ranks to import torch from one network file system."""
SECONDS_FOR_FILES = 30
"""A network file system may show what another machine wrote only after so long."""
_LINES_SHOWN = 8


@dataclass(frozen=True)
class Options:
    """What a person may choose besides the machines."""

    logs: Path | None = None
    """Folder under which the folder of this launch is made; None is `launches` in the run's output folder."""
    environment: tuple[str, ...] = ()
    """Names of further variables for the ranks."""
    preflight: bool = True
    dry_run: bool = False
    all_reduce_seconds: float = ALL_REDUCE_SECONDS
    """How long the all-reduce of the preflight may take, with the start of Python."""


def launch(job: LaunchedJob, machines: Machines, options: Options) -> int:
    """Check everything, start the ranks and watch them; returns the exit code: 0, that of the rank that failed first, or
    128 + signal where a signal stopped it.

    Raises UserError, with all problems, before anything is started.
    """
    sent = travelling(os.environ, options.environment, openly=machines.over_ssh)
    logs = _logs(job, options)
    sweep(logs.parent)
    found = _preflight(job, machines, options)
    launcher = _launcher(job, machines, found, sent)
    config = logs / "config.yaml"  # written when it starts
    program = ["--module", "megatron_plasticity", job.verb, str(config)]
    print(f"starts: {launcher.shown(program, logs)}", flush=True)
    if options.dry_run:
        return 0
    if (earlier := job.earlier()) is not None and earlier.is_done and (folder := job.folder()).is_done:
        print(f"is done already: {folder.path}")
        return 0
    # gloo needs nothing that can be missing within one machine.
    if options.preflight and machines.processes > 1 and (machines.over_ssh or not launcher.cpu):
        _check_collective(launcher, logs.with_name(f"{logs.name}-check"), options.all_reduce_seconds)
    folder = job.folder()
    _write_config(config, job)
    print(f"logs of {machines.processes} ranks: {logs}", flush=True)
    stop = shlex.join([sys.executable, "-m", "megatron_plasticity.launch.stop", str(logs)])
    print(f"save and stop: Ctrl-C here, or from another terminal: {stop}", flush=True)
    outcome = launcher.run(program, logs, echo=True)
    return _verdict(outcome, launcher, LaunchFolder(logs), folder)


def launch_on_slurm(job: LaunchedJob, request: SlurmRequest, options: Options) -> int:
    """Check what can be checked here, write the batch script and submit it; `options.dry_run` prints it instead.

    Raises UserError, with all problems, before anything is submitted.
    """
    logs = _logs(job, options).absolute()
    checks = [run_check(job, request.processes), place_here_check(job)] if options.preflight else []
    if not options.dry_run:
        checks.append(tool_check("sbatch", "--slurm is for a machine from which jobs are submitted"))
    _judge(checks, options)
    config = logs / "config.yaml"
    seconds = options.all_reduce_seconds if options.preflight else None
    script = batch_script(request, job.name, [job.verb, str(config)], logs, seconds)
    if options.dry_run:
        print(script, end="")
        return 0
    _write_config(config, job)
    path = logs / "job.sbatch"
    path.write_text(script, encoding="utf-8")
    print(f"job {submit(path)}: {path}")
    return 0


def _logs(job: LaunchedJob, options: Options) -> Path:
    """A folder of this launch's own. Absolute, but with its links, which every machine may resolve in its own way."""
    return (options.logs or job.output / "launches").absolute() / f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def _write_config(path: Path, job: LaunchedJob) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(job.settings, encoding="utf-8")


# --- Before the start.


def _preflight(job: LaunchedJob, machines: Machines, options: Options) -> dict[str, Findings]:
    """What the machines say; at least the first one does."""
    hosts = machines.hosts
    if not options.preflight:
        checks, found = ask_hosts(job, hosts[:1], None, machines.over_ssh, hides_gpus=machines.hides_gpus)
        if not found:
            _judge(checks[:1], options)
        return found
    checks = [run_check(job, machines.processes)]
    if machines.over_ssh:
        checks += [tool_check(name, "DeepSpeed's launcher needs it") for name in ("pdsh", "ssh")]
    asked, found = ask_hosts(job, hosts, machines.port, machines.over_ssh, hides_gpus=machines.hides_gpus)
    _judge([*checks, *asked], options)
    return found


def _judge(checks: list[Check], options: Options) -> None:
    """Print the table. Raises UserError if a check failed."""
    if options.preflight or not all(check.passed for check in checks):
        print(f"preflight\n{table(checks)}", file=sys.stderr, flush=True)
    if failed := [check for check in checks if not check.passed]:
        count = sum(len(check.problems) for check in failed)
        raise UserError(f"{count} problem{'s' if count > 1 else ''}, see above; nothing was started")


def _check_collective(launcher: Launcher, logs: Path, seconds: float) -> None:
    """An all-reduce over all ranks under the launcher that will start the run. Raises UserError, with who did not join."""
    backend = "gloo" if launcher.cpu else "nccl"
    begin = time.monotonic()
    program = ["--module", "megatron_plasticity.launch.collective_check"]
    program += ["--backend", backend, "--seconds", f"{seconds:g}"]
    outcome = launcher.run(program, logs, seconds=seconds + 30)
    machines, folder = launcher.machines, LaunchFolder(logs)
    if outcome.stopped_by is None and outcome.exit_code == 0:
        detail = f"{machines.processes} ranks over {backend}, {time.monotonic() - begin:.0f} s with the start of Python"
        print(table([Check("all-reduce", (), detail)]), file=sys.stderr, flush=True)
        shutil.rmtree(logs)
        return
    if outcome.stopped_by is not None:
        raise UserError("stopped while the machines were checked; nothing was started")
    said = [_text(folder.log_of(rank)) for rank in range(machines.processes)]
    problems = [*all_reduce_problems(machines.hosts, said, backend), *_complaints(outcome, folder), f"logs: {logs}"]
    print(table([Check("all-reduce", tuple(problems))]), file=sys.stderr, flush=True)
    raise UserError("the ranks cannot talk to one another, see above; the run was not started")


def _launcher(job: LaunchedJob, machines: Machines, found: dict[str, Findings], sent: Travelling) -> Launcher:
    first = found[machines.names[0]]
    cpu = not uses_gpus(job, found)
    if machines.over_ssh:
        meeting = Meeting(machines.address or (first.addresses or machines.names)[0], machines.port or 0)
    else:
        meeting = Meeting("127.0.0.1", machines.port or free_port())
    threads = None
    if cpu:
        slots = {host.name: len(host.slots) for host in machines.hosts}
        threads = max(1, min(there.cores // slots[name] for name, there in found.items()))
    devices = () if cpu or machines.over_ssh else tuple(str(slot) for slot in machines.hosts[0].slots)
    return Launcher(machines, meeting, sent, devices, cpu, threads)


# --- After the end.


def _verdict(outcome: Outcome, launcher: Launcher, logs: LaunchFolder, folder: RunFolder) -> int:
    """Say how it went; returns the exit code."""
    code = outcome.exit_code
    if code == 0:
        if _becomes_done(folder, SECONDS_FOR_FILES if launcher.machines.over_ssh else 0):
            return 0
        # DeepSpeed's launcher ends well when a signal kills its process on this machine.
        raise UserError(f"the launcher ended without an error, but {folder.path} is {folder.state.status!r}; see {logs.path}")
    if outcome.stopped_by is not None:
        if _becomes_done(folder, 0):
            print(f"is done: it ended before it could be stopped: {folder.path}")
            return 0
        why = [] if outcome.first_to_fail is None else _complaints(outcome, logs)
        raise _Ended("\n  ".join(["stopped; run the same command again to go on", *why]), code)
    unreached = launcher.signal_ranks(logs, signal.SIGTERM)  # what outlived its launcher
    said = "\n  ".join([f"the run ended with exit code {code}", *_complaints(outcome, logs), f"logs: {logs.path}"])
    if unreached:
        said += f"\n  not reached: {', '.join(unreached)}; ranks there end by themselves when they miss the others"
    if folder.is_done:
        said += f"\n  the run itself is done: {folder.path}"
    elif code == UserError.exit_code:
        said += "\n  nothing will change until that is mended"
    else:
        said += "\n  the same command goes on from the latest checkpoint"
    raise _Ended(said, code)


class _Ended(UserError):
    """A launch that did not end well, with the exit code that it ends with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _complaints(outcome: Outcome, logs: LaunchFolder) -> list[str]:
    """Which rank failed, as far as that is known, and the last words of its log."""
    if outcome.too_long:
        return ["it took too long and was ended"]
    if not outcome.records:
        lines = last_lines(logs.path / "launcher.log", _LINES_SHOWN)
        return ["no rank began its work; the launcher said:", *(f"| {line}" for line in lines)]
    if (first := outcome.first_to_fail) is not None:
        blamed, said = first.rank, f"rank {first.rank} on {first.host} failed first, with exit code {first.exit_code}"
    elif outcome.without_a_word:
        ranks = outcome.without_a_word
        blamed = min(set(range(outcome.processes)) & set(ranks))
        said = f"without a word ended: rank {', '.join(map(str, ranks))}; what rank {blamed} said last:"
    else:
        blamed, said = 0, "what rank 0 said last:"
    return [said, *(f"| {line}" for line in last_lines(logs.log_of(blamed), _LINES_SHOWN))]


def _becomes_done(folder: RunFolder, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not folder.is_done:
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def _text(path: Path | None) -> str:
    return "" if path is None else path.read_text(encoding="utf-8", errors="replace")
