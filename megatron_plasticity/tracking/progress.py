"""How far a piece of work is: one small protocol, a line or a bar on the terminal, and a heartbeat in the run folder."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

from megatron_plasticity.tracking.run_folder import SECONDS_BETWEEN_UPDATES, RunFolder

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Progress(Protocol):
    """Told by the work, as often as it likes, how far it is."""

    def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
        """`done` of `total` `unit`s ("steps", "questions") are finished.

        `info` is shown beside it: `tokens_per_second` takes the place of the rate in units, anything else is shown by its name.
        A smaller `done`, another `total` or another `unit` begins a new phase with a clock of its own.
        """
        ...


class NoProgress:
    """Says nothing."""

    def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
        pass


class Both:
    """Passes every update on to each of several."""

    def __init__(self, *parts: Progress) -> None:
        self.parts = parts

    def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
        for part in self.parts:
            part.update(done, total, unit, **info)


class FolderProgress:
    """Writes progress and heartbeat into `state.json` of a run folder, about once a second."""

    def __init__(self, run_folder: RunFolder, clock: Callable[[], float] = time.monotonic) -> None:
        self.run_folder = run_folder
        self._clock = clock
        self._told_at = -math.inf

    def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
        # The folder drops what comes too often itself, but has to read its state for that: not at every token that is sampled.
        now = self._clock()
        if done < total and now - self._told_at < SECONDS_BETWEEN_UPDATES:
            return
        self._told_at = now
        self.run_folder.update_progress(done, total, unit, **info)


class ConsoleProgress:
    """A bar on a terminal; elsewhere (a log file, a pipe) a plain line every `interval` seconds and at the end of each phase.

    Both tell the rate and the time left, which is the rest divided by the mean rate since the phase began in this process
    (so a resumed run does not count what it did not do). Close it, or use it in a `with` statement.
    """

    def __init__(
        self,
        description: str,
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._description = description
        self._stream = sys.stderr if stream is None else stream
        self._interval = interval
        self._clock = clock
        self._phase: tuple[str, float] | None = None
        self._last_done = 0.0
        self._first_done = 0.0
        self._began = 0.0
        self._printed_at = 0.0
        self._pending: str | None = None
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
        now = self._clock()
        new_phase = self._phase != (unit, total) or done < self._last_done
        if new_phase:
            self._phase, self._first_done, self._began, self._printed_at = (unit, total), done, now, now
        self._last_done = done
        details = self._details(now - self._began, done, total, unit, info)
        if self._stream.isatty():
            self._show_bar(done, total, unit, details, new_phase)
        else:
            self._show_line(now, done, total, f"{self._description}: {_amount(done)}/{_amount(total)} {unit}", details)

    def close(self) -> None:
        """Leave the terminal as it should be; print the last plain line that the interval held back. Twice is fine."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._pending is not None:
            print(self._pending, file=self._stream, flush=True)
            self._pending = None

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _details(self, elapsed: float, done: float, total: float, unit: str, info: dict[str, float | str]) -> str:
        rate = (done - self._first_done) / elapsed if elapsed > 0 else 0.0
        parts = []
        if "tokens_per_second" in info:
            parts.append(f"{_amount(float(info['tokens_per_second']))} tokens/s")
        elif rate > 0:
            parts.append(f"{_amount(rate)} {unit}/s")
        parts += [f"{name} {_amount(value)}" for name, value in info.items() if name != "tokens_per_second"]
        if rate > 0 and done < total:
            parts.append(f"{format_duration((total - done) / rate)} left")
        elif done >= total and elapsed > 0:
            parts.append(f"took {format_duration(elapsed)}")
        return ", ".join(parts)

    def _show_line(self, now: float, done: float, total: float, head: str, details: str) -> None:
        line = f"{head}, {details}" if details else head
        if done >= total or now - self._printed_at >= self._interval:
            print(line, file=self._stream, flush=True)
            self._printed_at, self._pending = now, None
        else:
            self._pending = line

    def _show_bar(self, done: float, total: float, unit: str, details: str, new_phase: bool) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        if self._bar is None:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[amount]}"),
                TextColumn("[dim]{task.fields[details]}"),
                console=Console(file=self._stream),
            )
            self._bar.start()
        amount, details = f"{_amount(done)}/{_amount(total)} {unit}", escape(details)
        if new_phase or self._task is None:
            self._task = self._bar.add_task(escape(self._description), total=total, amount=amount, details=details)
        self._bar.update(self._task, completed=done, amount=amount, details=details)


def format_duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _amount(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if value == int(value) if abs(value) < 1e15 else False:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
