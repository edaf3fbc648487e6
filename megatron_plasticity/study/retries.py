"""Which failures are worth another attempt, and when.

A failure is *passing* if the same run may well succeed next time: a machine that went away, a kill for lack of memory, a
connection that broke. An error in a config, or a loss that is not finite, comes again however often it is tried.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field

from megatron_plasticity.errors import FolderHeld, LostProcess, TimeLimitTooShort, UserError
from megatron_plasticity.study.backends import Ended
from megatron_plasticity.study.plan import PlannedCell
from megatron_plasticity.tracking.run_folder import RunFolder, RunState

LONGEST_PAUSE = 3600.0
_LOG_BYTES = 1 << 16
"""How much of the end of a log is looked through."""

# What torch, CUDA, NCCL, gloo and the kernel say when something broke that is not ours to mend.
_PASSING = re.compile(
    "|".join(
        (
            *("out of memory", "OutOfMemoryError", "Cannot allocate memory"),
            *("CUDA error", r"CUBLAS_STATUS_\w+", r"CUDNN_STATUS_\w+", r"cudaError\w+", r"nccl\w*Error", "NCCL error"),
            *("DistBackendError", "DistNetworkError", "DistStoreError"),
            *(
                "Connection (?:reset|refused|closed|timed out|aborted)",
                "Broken pipe",
                "No route to host",
                "Network is unreachable",
            ),
            *("timed ?out", "TimeoutError", "Timeout waiting", "Stale file handle", "Input/output error", "Bus error"),
            *("Address already in use", "EADDRINUSE", "Resource temporarily unavailable"),
        )
    ),
    re.IGNORECASE,
)
# What CUDA says of a program or a machine that does not suit: it says so each time.
_LASTING = re.compile("no kernel image|device-side assert|invalid device ordinal|driver version is insufficient", re.IGNORECASE)
# A message of ours, and the lines that belong to it; but not that of whoever only tells of another process's end.
_SAID = re.compile(r"^error(?: \(rank \d+\))?: (?!the deepspeed launcher ended)(.*(?:\n  .*)*)", re.MULTILINE)


@dataclass(frozen=True)
class Failure:
    """Why an attempt failed."""

    reason: str
    passing: bool
    held: bool = False
    """Nothing was tried: another process has the run folder, such as one that a network has cut off. It ends, or is forgotten."""

    @property
    def headline(self) -> str:
        """The first line of the reason."""
        return (self.reason.splitlines() or [""])[0]


def explain(cell: PlannedCell, ended: Ended, log_size_before: int) -> Failure:
    """Why an attempt that has ended is no success, from its back end, its state and what it added to its log."""
    code, text = ended.exit_code, _added(cell, log_size_before)
    error = _error(cell)
    if ended.cancelled:
        return Failure(ended.reason or "cancelled", passing=False)
    if ended.lost:
        return Failure(ended.reason or "the connection to its machine was lost", passing=True)
    if (number := ended_by_signal(code)) is not None:
        hint = " (out of memory?)" if number == signal.SIGKILL else ""
        known = error if error and number == signal.SIGTERM else None
        return Failure(ended.reason or known or f"its process was killed by signal {number}{hint}", passing=True)
    said = _said(text)
    if code == FolderHeld.exit_code:
        return Failure(said or "another process has its folder", passing=True, held=True)
    if code == TimeLimitTooShort.exit_code:
        return Failure(said or "its time limit came before anything was kept", passing=False)
    end = "\n".join(text.splitlines()[-5:])
    reason = error or ended.reason or said or end or f"its process ended with exit code {code}"
    if code == LostProcess.exit_code:
        return Failure(reason, passing=True)
    if code == UserError.exit_code:
        return Failure(reason, passing=False)
    # What the run itself says counts before what else is in the log: ranks that only lost the failed one complain there too.
    words = error or text
    return Failure(reason, passing=_PASSING.search(words) is not None and _LASTING.search(words) is None)


def ended_by_signal(exit_code: int | None) -> int | None:
    """The signal n that an exit code tells of: −n by multiprocessing, 128 + n by shells, 256 − n by DeepSpeed's launcher."""
    if exit_code is None:
        return None
    for number in (-exit_code, exit_code - 128, 256 - exit_code):
        if 0 < number < 32:
            return number
    return None


@dataclass
class Retries:
    """What is tried again, and how often it was."""

    limit: int
    """Further attempts of a run that gets no further."""
    pause: float
    """Seconds before the first of them."""
    _failures: dict[str, int] = field(default_factory=dict)
    """Cell id → failures in a row without a new checkpoint."""
    _reached: dict[str, int] = field(default_factory=dict)
    """Cell id → step of the latest checkpoint when it last failed."""

    def pause_after(self, cell: PlannedCell, failure: Failure) -> float | None:
        """Seconds until the run is to be tried again; None if it is not."""
        step = latest_step(cell)
        if step > self._reached.get(cell.id, 0):
            self._failures.pop(cell.id, None)
        self._reached[cell.id] = step
        count = self._failures[cell.id] = self._failures.get(cell.id, 0) + 1
        if not failure.passing or count > self.limit:
            return None
        return min(LONGEST_PAUSE, self.pause * 2 ** (count - 1))

    def count(self, cell: PlannedCell) -> int:
        """Failures of the cell in a row."""
        return self._failures.get(cell.id, 0)


def latest_step(cell: PlannedCell) -> int:
    """Step of the latest checkpoint in the run folder, 0 without one."""
    found = RunFolder(cell.folder).checkpoints()
    return int(found[-1].name.removeprefix("step-")) if found else 0


def read_state(cell: PlannedCell) -> RunState | None:
    """The state of a cell's folder; None where there is none that can be read: its own run will fail and say why."""
    try:
        return RunFolder.open(cell.folder).state if (cell.folder / "state.json").is_file() else None
    except UserError:
        return None


def log_size(cell: PlannedCell) -> int:
    """Bytes of the cell's log."""
    try:
        return (cell.folder / "log").stat().st_size
    except OSError:
        return 0


def _error(cell: PlannedCell) -> str | None:
    state = read_state(cell)
    return state.error if state is not None and state.status in ("failed", "interrupted") else None


def _said(text: str) -> str | None:
    """The last error that a process wrote down as one of ours; the launcher's own lines may come after it."""
    return next((found[1] for found in reversed(list(_SAID.finditer(text)))), None)


def _added(cell: PlannedCell, before: int) -> str:
    try:
        with (cell.folder / "log").open("rb") as file:
            file.seek(max(before, log_size(cell) - _LOG_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
