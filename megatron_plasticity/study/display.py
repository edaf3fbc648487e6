"""What a person sees while a study runs: one bar for the whole, one line for each run, and how long it will take."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from megatron_plasticity.errors import UserError
from megatron_plasticity.study.plan import PlannedCell, StudyPlan
from megatron_plasticity.study.retries import read_state
from megatron_plasticity.study.under_way import extrapolated, progress_text
from megatron_plasticity.tracking.progress import format_duration
from megatron_plasticity.tracking.run_folder import RunFolder, RunState

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

_SECONDS_BETWEEN_LINES = 20.0
_SHOWN = 20
"""Runs under way that are shown one by one."""


class StudyDisplay:
    """A live view on a terminal; elsewhere a line for each finished run and one every 20 s."""

    def __init__(self, plan: StudyPlan, already_done: Collection[str], stream: TextIO | None = None) -> None:
        self._plan = plan
        self._stream = sys.stderr if stream is None else stream
        self._live: Live | None = None
        self._seconds_of_kind: dict[str, list[float]] = defaultdict(list)
        self._last_line = time.monotonic()
        self._done_count, self._total = len(already_done), len(plan.cells)
        for cell in plan.cells:
            if cell.id in already_done:
                self._note_duration(cell)

    def __enter__(self) -> StudyDisplay:
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._stream), refresh_per_second=4)
            self._live.start()
        self._say(
            f"study {self._plan.config.name}: {self._total} runs, {self._done_count} of them done before; "
            f"folder {self._plan.folder}"
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def finished(self, cell: PlannedCell) -> None:
        self._done_count += 1
        self._note_duration(cell)
        seconds = self._seconds_of_kind[cell.kind]
        took = f" in {format_duration(seconds[-1])}" if seconds else ""
        self._say(f"[{self._done_count}/{self._total}] {cell.id} done{took}{_headline(cell)}")

    def failed(self, cell: PlannedCell, reason: str) -> None:
        self._say(f"{cell.id} FAILED: {reason}\n  log: {cell.folder / 'log'}")

    def waiting(self, cell: PlannedCell, headline: str, pause: float) -> None:
        """A run failed in a way that may pass."""
        self._say(f"{cell.id} failed: {headline}\n  it is tried again in {format_duration(pause)}; log: {cell.folder / 'log'}")

    def held(self, cell: PlannedCell, why: str) -> None:
        """A run waits for another process, which has its folder."""
        self._say(f"{cell.id} waits: {why}")

    def hung(self, cell: PlannedCell, minutes: float) -> None:
        """A run is ended since it gives no sign of life."""
        self._say(f"{cell.id} gave no sign of life for {minutes:g} minutes: it is ended; log: {cell.folder / 'log'}")

    def refresh(self, running: Sequence[PlannedCell], done: Collection[str], failed: Mapping[str, str]) -> None:
        states = [(cell, state) for cell in running if (state := read_state(cell)) is not None]
        left = self._seconds_left(states, running, done, failed)
        if self._live is not None:
            self._live.update(self._view(states, left))
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            parts = [f"{cell.id} {progress_text(state)}" for cell, state in states[:_SHOWN]]
            parts += [f"{len(states) - _SHOWN} more"] if len(states) > _SHOWN else []
            self._say(f"{self._done_count}/{self._total} runs{_left_text(left)}; now: {'; '.join(parts) or 'nothing yet'}")

    def _view(self, states: Sequence[tuple[PlannedCell, RunState]], left: float | None) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        share = self._done_count / max(1, self._total)
        table.add_row(
            "study", ProgressBar(total=1.0, completed=share, width=30), f"{self._done_count}/{self._total} runs{_left_text(left)}"
        )
        for cell, state in states[:_SHOWN]:
            progress = state.progress or {}
            bar = ProgressBar(
                total=max(1e-9, float(progress.get("total", 1))), completed=float(progress.get("done", 0)), width=30
            )
            table.add_row(f"  {cell.id}", bar, progress_text(state))
        if len(states) > _SHOWN:
            table.add_row(f"  and {len(states) - _SHOWN} more", "", "see `megatron-plasticity study status`")
        return Group(table)

    def _say(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def _note_duration(self, cell: PlannedCell) -> None:
        state = read_state(cell)
        if state is not None and state.started is not None and state.finished is not None:
            self._seconds_of_kind[cell.kind].append(state.finished - state.started)

    def _seconds_left(
        self,
        states: Sequence[tuple[PlannedCell, RunState]],
        running: Sequence[PlannedCell],
        done: Collection[str],
        failed: Mapping[str, str],
    ) -> float | None:
        """Work that is left, at the mean duration of each kind so far, over the slots in use; None until every kind left is known
        or can be guessed from a run that is under way."""
        if not running:
            return None
        progress = {cell.id: extrapolated(state) for cell, state in states}
        guesses = {kind: sum(seconds) / len(seconds) for kind, seconds in self._seconds_of_kind.items() if seconds}
        for cell, _ in states:
            total_left = progress[cell.id]
            if cell.kind not in guesses and total_left is not None:
                guesses[cell.kind] = total_left[0]
        work = 0.0
        for cell in self._plan.cells:
            if cell.id in done or cell.id in failed:
                continue
            estimate = progress.get(cell.id)
            if estimate is not None:
                work += estimate[1]
            elif cell.kind in guesses:
                work += guesses[cell.kind]
            elif "pretrain" in guesses:
                work += guesses["pretrain"] / 10  # a first guess, replaced as soon as one run of that kind has ended
            else:
                return None
        return work / len(running)


def _left_text(seconds: float | None) -> str:
    return "" if seconds is None else f", about {format_duration(seconds)} left"


def _headline(cell: PlannedCell) -> str:
    """The one number that a person waits for."""
    try:
        results = RunFolder.open(cell.folder).results
    except UserError:
        return ""
    if cell.kind == "pretrain":
        return f": held-out loss {results['held_out_loss']:.4f}"
    if cell.kind == "evaluate" and cell.task is not None:
        return f": {cell.task} {results['tasks'][cell.task]['metrics']['greedy']['value']:.0%} correct"
    return ""
