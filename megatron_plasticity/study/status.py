"""How far a study is: read from `study.json`, `runner.json` and the state of every run, and nothing else, so that it is quick."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_plasticity.errors import UserError
from megatron_plasticity.study.backends.slurm_queue import read_submitted
from megatron_plasticity.study.claim import living_runner
from megatron_plasticity.study.under_way import extrapolated, progress_text
from megatron_plasticity.tracking.progress import format_duration
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.tracking.run_state import RunState

if TYPE_CHECKING:
    from rich.console import Group

SHOWN = 15
"""Runs of each sort that are listed without `--all`."""
COUNTED = ("done", "running", "queued", "retry", "waiting", "failed", "blocked")
"""What a run can be: done; under way; submitted to a queue; failed, to be tried again; to be started; failed for good; in need of
one that failed."""
_SECONDS_UNTIL_SILENT = 120.0
_WIDTH_OF_A_PIPE = 2000


@dataclass(frozen=True)
class CellStatus:
    """One run of the study."""

    id: str
    kind: str
    status: str
    """One of `COUNTED`."""
    folder: Path
    where: str | None = None
    """Machine or job."""
    attempts: int = 0
    progress: str | None = None
    """How far it is, in words."""
    share: float | None = None
    """The same, from 0 to 1."""
    seconds_left: float | None = None
    silent_for: float | None = None
    """Seconds since its last sign of life."""
    retry_at: float | None = None
    """Unix seconds."""
    reason: str | None = None
    """Why it failed, or does not go on."""
    needs: str | None = None
    """The run without which it cannot be started, where that one failed."""

    @property
    def headline(self) -> str:
        """First line of the reason."""
        return ((self.reason or "").splitlines() or [""])[0]


@dataclass(frozen=True)
class StudyStatus:
    name: str
    folder: Path
    cells: tuple[CellStatus, ...]
    runner: Mapping[str, Any] | None = field(default=None)
    """What `runner.json` says of a runner that may be alive."""

    @property
    def counts(self) -> dict[str, Counter[str]]:
        """Kind → how many runs of it are what, in the order of the study."""
        counts: dict[str, Counter[str]] = {}
        for cell in self.cells:
            counts.setdefault(cell.kind, Counter())[cell.status] += 1
        return counts

    @property
    def is_done(self) -> bool:
        return all(cell.status == "done" for cell in self.cells)

    def of(self, *statuses: str) -> list[CellStatus]:
        return [cell for cell in self.cells if cell.status in statuses]

    def to_json(self) -> dict[str, Any]:
        """Everything, with times in seconds and paths as text."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "runner": None
            if self.runner is None
            else {key: self.runner.get(key) for key in ("host", "pid", "started", "heartbeat")},
            "counts": {kind: dict(counts) for kind, counts in self.counts.items()},
            "cells": [{**vars(cell), "folder": str(cell.folder)} for cell in self.cells],
        }


def read_status(folder: Path) -> StudyStatus:
    """The state of the study in `folder` now. Raises UserError if there is none."""
    path = folder / "study.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a study folder: it has no study.json. Name the folder that `study run` printed.")
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        name, entries = str(study["name"]), study["cells"]
        runner = living_runner(folder)
        cells: dict[str, CellStatus] = {}
        noted = {"running": _submitted(folder, entries)} if runner is None else runner
        for entry in entries:
            cells[entry["id"]] = _cell(folder, entry, cells.get(entry["parent"] or ""), noted)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as a study ({type(error).__name__}: {error}). Run the study again to write it anew."
        ) from error
    return StudyStatus(name, folder, tuple(cells.values()), runner)


def _submitted(folder: Path, entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Run → its job in Slurm, as the runner left it there: jobs outlive their runner. Of runs that failed, nothing."""
    try:
        arrays = read_submitted(folder)
        jobs = {name: f"job {a['job']}_{index}" for a in arrays if a["job"] for index, name in enumerate(a["folders"])}
    except (UserError, KeyError, TypeError):
        return {}
    here = {entry["id"]: folder / entry["folder"] for entry in entries}
    return {id: f"{jobs[run.name]}, as it was submitted" for id, run in here.items() if run.name in jobs and not _failed(run)}


def _failed(run: Path) -> bool:
    with contextlib.suppress(UserError):
        return (run / "state.json").is_file() and RunState.read(run / "state.json").status == "failed"
    return True


def _cell(folder: Path, entry: Mapping[str, Any], parent: CellStatus | None, runner: Mapping[str, Any]) -> CellStatus:
    id, run = entry["id"], folder / entry["folder"]
    common = {"id": id, "kind": entry["kind"], "folder": run}
    try:
        state = RunFolder.open(run).state if (run / "state.json").is_file() else RunState()
    except UserError as error:
        return CellStatus(**common, status="failed", reason=str(error))
    common["attempts"] = state.attempts
    where = runner.get("running", {}).get(id)
    if state.status == "done":
        return CellStatus(**common, status="done")
    if state.status == "running":
        return CellStatus(**common, status="running", where=where or state.host, **_progress(state))
    if where is not None:
        return CellStatus(**common, status="queued", where=where)
    if (retry := runner.get("waiting", {}).get(id)) is not None:
        return CellStatus(**common, status="retry", retry_at=retry["until"], reason=retry["reason"])
    if state.status == "failed":
        return CellStatus(**common, status="failed", reason=state.error or "it does not say why")
    if parent is not None and parent.status in ("failed", "blocked"):
        return CellStatus(**common, status="blocked", reason=f"it needs {parent.id}", needs=parent.id)
    return CellStatus(**common, status="waiting", reason=state.error)


def _progress(state: RunState) -> dict[str, Any]:
    progress = state.progress or {}
    estimate = extrapolated(state)
    total = float(progress.get("total", 0))
    return {
        "progress": progress_text(state),
        "share": float(progress["done"]) / total if total else None,
        "seconds_left": estimate[1] if estimate else None,
        "silent_for": None if state.heartbeat is None else max(0.0, time.time() - state.heartbeat),
    }


# --- The page.


def status_page(status: StudyStatus, show_all: bool = False) -> Group:
    """What matters as tables: counts per kind, runs under way, runs that are tried again, failures; with `show_all` every run."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(_headline(status)), _counts(status)]
    limit = len(status.cells) if show_all else SHOWN
    if under_way := status.of("running", "queued"):
        parts += ["", _under_way(under_way, limit)]
    if waiting := status.of("retry"):
        parts += ["", _reasons("tried again", waiting, limit)]
    if failed := status.of("failed"):
        parts += ["", _reasons("failed", failed, limit)]
    if show_all and (others := status.of("done", "waiting", "blocked")):
        parts += ["", _others(others)]
    return Group(*parts)


def _headline(status: StudyStatus) -> str:
    done = len(status.of("done"))
    return f"study {status.name}: {done} of {len(status.cells)} runs done; {_runner(status)}"


def _runner(status: StudyStatus) -> str:
    runner = status.runner
    if runner is None and status.is_done:
        return "every run is done"
    if runner is None:
        verb = "run" if status.of("waiting", "running") else "retry"
        return f"no runner; `megatron-plasticity study {verb}` goes on"
    text = f"runner: process {runner.get('pid')} on {runner.get('host')}"
    with contextlib.suppress(KeyError, TypeError):
        silent = time.time() - runner["heartbeat"]
        if silent > _SECONDS_UNTIL_SILENT:
            return f"{text}, silent for {format_duration(silent)}"
    return text


def _counts(status: StudyStatus) -> Any:
    table = _table("kind", *COUNTED, numbers=len(COUNTED))
    for kind, counts in status.counts.items():
        table.add_row(kind, *(str(counts[what] or "·") for what in COUNTED))
    total = sum(status.counts.values(), Counter[str]())
    table.add_row("all", *(str(total[what] or "·") for what in COUNTED), style="bold")
    return table


def _under_way(cells: list[CellStatus], limit: int) -> Any:
    table = _table("under way", "where", "attempt", "progress", "last heard")
    # The slowest first: they decide when the study ends.
    for cell in sorted(cells, key=lambda cell: (cell.status != "running", -(cell.seconds_left or 0)))[:limit]:
        heard = "" if cell.silent_for is None else f"{format_duration(cell.silent_for)} ago"
        share = "" if cell.share is None else f"{cell.share:4.0%}  "
        attempt = str(cell.attempts) if cell.status == "running" else ""
        table.add_row(cell.id, cell.where or "", attempt, f"{share}{cell.progress or 'queued'}", heard)
    _more(table, len(cells) - limit)
    return table


def _reasons(title: str, cells: list[CellStatus], limit: int) -> Any:
    table = _table(title, "attempts", "reason")
    for cell in cells[:limit]:
        again = "" if cell.retry_at is None else f"in {format_duration(max(0.0, cell.retry_at - time.time()))}: "
        table.add_row(cell.id, str(cell.attempts), f"{again}{cell.headline}")
    _more(table, len(cells) - limit)
    return table


def _others(cells: list[CellStatus]) -> Any:
    table = _table("run", "state", "")
    for cell in cells:
        table.add_row(cell.id, cell.status, cell.headline)
    return table


def _more(table: Any, left: int) -> None:
    if left > 0:
        table.add_row(f"and {left} more: --all", *[""] * (len(table.columns) - 1))


def _table(*names: str, numbers: int = 0) -> Any:
    """A table without borders, so that a pipe gets plain columns; the last `numbers` columns are numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if index >= len(names) - numbers else "left", overflow="fold", no_wrap=index == 0)
    return table


def watch(folder: Path, show_all: bool, seconds: float) -> None:
    """Show the page anew every so often until every run is done; Ctrl-C ends it. In a pipe the pages follow one another."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with contextlib.suppress(KeyboardInterrupt):
        if not console.is_terminal:
            for status in _until_done(folder, seconds):
                show(status, show_all)
                print(flush=True)
            return
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
            for status in _until_done(folder, seconds):
                live.update(status_page(status, show_all), refresh=True)


def show(status: StudyStatus, show_all: bool) -> None:
    """Print the page once; into a pipe with one line per run, however long."""
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal:
        console.print(status_page(status, show_all))
        return
    wide = Console(highlight=False, width=_WIDTH_OF_A_PIPE, file=io.StringIO())
    with wide.capture() as captured:
        wide.print(status_page(status, show_all))
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _until_done(folder: Path, seconds: float) -> Iterator[StudyStatus]:
    while True:
        status = read_status(folder)
        yield status
        if status.is_done:
            return
        time.sleep(seconds)
