"""One element of an array job: `python -m megatron_plasticity.study.backends.slurm_element LISTING`, in place of the batch shell.

It starts the run of its index, on several ranks through `srun`, tells it to save when Slurm says that the time is nearly up, and
queues itself again if the run is not done by then.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_plasticity.errors import TimeLimitTooShort, UserError
from megatron_plasticity.launch.kept import kept
from megatron_plasticity.launch.slurm import STEP_OPTIONS, meeting_place
from megatron_plasticity.tracking.run_folder import RunFolder

_RESTING = 0.2


@dataclass
class _Told:
    """What Slurm told this process to do."""

    time_is_up: bool = False
    cancelled: bool = False


def main() -> int:
    """Carry out the run; returns its exit code, or 0 if it was queued again."""
    listing = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(listing["folders"][int(os.environ["SLURM_ARRAY_TASK_ID"])])
    _write_to(folder / "log")
    told = _Told()

    def time_is_up(number: int, frame: FrameType | None) -> None:
        told.time_is_up = True

    def cancelled(number: int, frame: FrameType | None) -> None:
        told.cancelled = True

    signal.signal(signal.SIGUSR1, time_is_up)
    signal.signal(signal.SIGTERM, cancelled)
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1
    print(f"attempt {attempt} of job {_own_name()} on {os.environ.get('SLURM_JOB_NODELIST', 'this machine')}", flush=True)
    before = kept(folder)
    process = _start(folder, listing["launched"])
    code = _wait(process, told, launched=listing["launched"])
    if code == 0 or told.cancelled or not told.time_is_up:
        return code
    if set(kept(folder)) <= set(before):
        # It would go round for ever.
        advice = "the time limit came before anything was kept: raise resources.slurm.time"
        print(f"error: {advice}", file=sys.stderr, flush=True)
        # Where Slurm keeps no accounts nobody sees the exit code.
        with contextlib.suppress(UserError, OSError):
            run = RunFolder.open(folder)
            with run.lock():
                run.mark_failed(advice)
        return TimeLimitTooShort.exit_code
    if subprocess.run(["scontrol", "requeue", _own_name()]).returncode:
        print("error: saved before the time limit, but Slurm does not queue it again", file=sys.stderr, flush=True)
        return code
    print("saved before the time limit and queued again", flush=True)
    return 0


def _start(folder: Path, launched: bool) -> subprocess.Popen[bytes]:
    if not launched:
        return subprocess.Popen([sys.executable, "-m", "megatron_plasticity.study.cell", str(folder)])
    kind = folder.name.split("-", 1)[0]
    ranks = [sys.executable, "-m", "megatron_plasticity", kind, str(folder / "config.yaml")]
    return subprocess.Popen(["srun", *STEP_OPTIONS, *ranks], env={**os.environ, **meeting_place(os.environ)})


def _wait(process: subprocess.Popen[bytes], told: _Told, launched: bool) -> int:
    """Wait for the run, and pass on what Slurm tells: srun hands SIGUSR1 to its ranks, and ends them by force on SIGTERM."""
    passed_on = False
    while process.poll() is None:
        if (told.time_is_up or told.cancelled) and not passed_on:
            passed_on = True
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGUSR1 if launched else signal.SIGTERM)
        time.sleep(_RESTING)
    code = process.wait()
    return 128 - code if code < 0 else code


def _own_name() -> str:
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def _write_to(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
