"""One run of a study in a process of its own: `python -m megatron_plasticity.study.cell FOLDER`.

The folder says what to do: its name begins with the kind of run, and its `config.yaml` is the whole config.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_plasticity.errors import UserError, ending_the_process
from megatron_plasticity.launch.command import deepspeed_command
from megatron_plasticity.study.backends import SECONDS_TO_STOP
from megatron_plasticity.study.backends.remote import order
from megatron_plasticity.study.jobs import LAUNCHED_KINDS, job_for
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.training.signals import raise_interrupted_on_signals


class LaunchFailed(UserError):
    """The launcher of several ranks ended with an exit code that is not 0, which is the first failed rank's."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the deepspeed launcher ended with exit code {exit_code}; what the ranks said is above in this log")
        self.exit_code = exit_code


def run_cell(folder: Path, processes: int = 1, devices: Sequence[str] = ()) -> None:
    """Carry out the run of `folder`: in this process or, for kinds that may be spread, on `processes` ranks of this machine under
    the deepspeed launcher. `devices` are the indexes of the ranks' GPUs.

    Raises UserError if the run fails in a way that a person can mend, LaunchFailed if one of several ranks fails.
    """
    run = RunFolder.open(folder)
    if not is_launched(run.kind, processes):
        job_for(run.kind)(run.config, NoProgress())
        return
    exit_code = _run_guarded(deepspeed_command(run.kind, folder / "config.yaml", processes, devices))
    if exit_code:
        raise LaunchFailed(exit_code)


def is_launched(kind: str, processes: int) -> bool:
    """Whether a run of this kind is spread over ranks when it is given `processes` of them."""
    return processes > 1 and kind in LAUNCHED_KINDS


def _run_guarded(command: Sequence[str]) -> int:
    """Run a command and all that it starts; returns its exit code. When this process is told to end they save and end, or are
    killed; they do so too if it is killed itself, since the guard (`study/backends/remote.py`) sees the end of its pipe."""
    guard = subprocess.Popen(
        [sys.executable, "-m", "megatron_plasticity.study.backends.remote"], stdin=subprocess.PIPE, start_new_session=True
    )
    assert guard.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # its exit code says that it has failed
            guard.stdin.write(order(command, str(Path.cwd()), {}, SECONDS_TO_STOP, signs=False))
            guard.stdin.flush()
        return guard.wait()
    finally:
        guard.stdin.close()
        guard.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one cell and exit as the command line of the project does."""
    parser = argparse.ArgumentParser(description="Carry out one run of a study.")
    parser.add_argument("folder", type=Path, help="run folder")
    parser.add_argument("--processes", type=int, default=1, help="ranks on this machine")
    parser.add_argument("--devices", default="", help="indexes of the ranks' GPUs, with commas between them")
    parsed = parser.parse_args(arguments)
    raise_interrupted_on_signals()
    with ending_the_process():
        run_cell(parsed.folder, parsed.processes, [device for device in parsed.devices.split(",") if device])


if __name__ == "__main__":
    main()
