"""Everything worth checking on a machine with one GPU, in one go and one table, in under eight minutes and without a network.

    python tools/gpu_check.py                          # all
    python tools/gpu_check.py --only attention loss    # some
    python tools/gpu_check.py --json check.json        # and the rows as JSON
    python tools/gpu_check.py --rehearse               # on a CPU, in small: tries the script itself, not the machine

Each section (`gpu_checks/`) runs in a process of its own with a time limit: one that crashes or hangs is a row FAILED,
and the others go on. Verdicts: ok; FAILED; SLOW (right, but a faster way is missed, and why); not here (what is not installed
or does not fit this GPU); noted (a figure without a limit); needs CUDA (a rehearsal cannot tell).
Exit code: 0, 1 if a row has failed, 2 for bad input.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # a worker that was forked does not know this folder

from gpu_checks.arithmetic import compiled_blocks, loss, optimizers
from gpu_checks.attention import attention
from gpu_checks.machine import FAILED, Gpu, Rehearsal, Row
from gpu_checks.runs import benches, environment, repeat, training
from gpu_checks.steps import layouts, ranks

from megatron_plasticity.launch.workers import start_worker, worker_context

SECTIONS: dict[str, Callable[[Gpu], Iterator[Row]]] = {
    "environment": environment,
    "attention": attention,
    "compiled": compiled_blocks,
    "loss": loss,
    "optimizers": optimizers,
    "layouts": layouts,
    "ranks": ranks,
    "training": training,
    "repeat": repeat,
    "benches": benches,
}
LIMITS: dict[str, float] = {
    "environment": 40,
    "attention": 100,
    "compiled": 70,
    "loss": 60,
    "optimizers": 130,
    "layouts": 130,
    "ranks": 130,
    "training": 80,
    "repeat": 60,
    "benches": 150,
}
"""Seconds that each may take at most; all together have less."""

PRELOAD = ["megatron_plasticity.training.pretrain", "megatron_plasticity.launch.doctor"]
# With workspaces of their own cuBLAS's products come out equal twice, which `repeat` is about.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TOKENIZERS_PARALLELISM": "false"}
REHEARSAL_PATIENCE = 6.0
"""By so much limits are longer in a rehearsal: its machine is small, and others may use it."""
_SECONDS_TO_END = 8.0
"""For a section and its benches to end by themselves."""
_WIDTHS = (44, 62, 20)
_MOST_CHARACTERS = 400


@dataclass(frozen=True)
class Timed:
    """A row, and where it comes from."""

    section: str
    seconds: float
    """Since the section began."""
    row: Row


def main(arguments: list[str] | None = None) -> int:
    """Run the sections and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="the same on a CPU, with tiny shapes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows here")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all sections together [8]")
    parsed = parser.parse_args(arguments)
    if parsed.minutes <= 0:
        parser.error(f"--minutes {parsed.minutes:g}: must be above 0")
    if parsed.json is not None and not parsed.json.resolve().parent.is_dir():
        parser.error(f"--json {parsed.json}: there is no folder {parsed.json.resolve().parent}")
    if not parsed.rehearse and (problem := _no_gpu()) is not None:
        parser.error(problem)
    names = [name for name in SECTIONS if parsed.only is None or name in parsed.only]
    patience = REHEARSAL_PATIENCE if parsed.rehearse else 1.0
    budget = 60 * parsed.minutes * patience
    limits = {name: LIMITS[name] * patience for name in names}
    what = "Rehearsal on a CPU" if parsed.rehearse else "Check of the GPU"
    minutes = min(budget, sum(limits.values())) / 60
    print(f"{what}: {len(names)} sections in at most {minutes:.1f} minutes\n")
    print(_line("check", "measured", "limit", "verdict"), flush=True)
    began = time.monotonic()
    found: list[Timed] = []
    processor = 0.0
    for name in names:
        seconds = min(limits[name], began + budget - time.monotonic())
        section = run_section(name, parsed.rehearse, seconds)
        while True:
            try:
                timed = next(section)
            except StopIteration as ended:
                processor += ended.value
                break
            print(_line(timed.row.check, timed.row.measured, timed.row.limit, timed.row.verdict), flush=True)
            found.append(timed)
    took = time.monotonic() - began
    verdicts = [timed.row.verdict for timed in found]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    print(f"\n{counts}; {took:.0f} s of {budget:.0f}, {processor:.0f} s of processor time")
    if parsed.rehearse:
        print("This was a rehearsal: it says nothing about any GPU.")
    if parsed.json is not None:
        rows = [{"section": timed.section, "seconds": round(timed.seconds, 2), **asdict(timed.row)} for timed in found]
        document = {
            "rehearsal": parsed.rehearse,
            "seconds": round(took, 1),
            "processor_seconds": round(processor, 1),
            "rows": rows,
        }
        parsed.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if FAILED in verdicts else 0


def run_section(
    name: str, rehearse: bool, seconds: float, work: Callable[[str, bool, Connection], None] | None = None
) -> Generator[Timed, None, float]:
    """Rows of a section as they come, then its seconds of processor time. One that ends before its end, or takes longer than
    `seconds`, has a last row FAILED. `work` is what its process does instead of `report`."""
    began = time.monotonic()

    def timed(row: Row) -> Timed:
        return Timed(name, time.monotonic() - began, row)

    if seconds <= 0:
        yield timed(Row(name, "not begun: the time for all sections is over", "", FAILED))
        return 0.0
    context = worker_context(PRELOAD, cuda=not rehearse)
    reader, writer = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        log = Path(folder) / "log"
        threads = 1 if rehearse else max(1, len(os.sched_getaffinity(0)) // 2)
        worker = start_worker(
            context, work or report, (name, rehearse, writer), name=name, log=log, threads=threads, environment=ENVIRONMENT
        )
        writer.close()
        ending = f"took longer than {seconds:.0f} s and was stopped"
        try:
            while reader.poll(max(0.0, began + seconds - time.monotonic())):
                said = reader.recv()
                if not isinstance(said, Row):
                    worker.join(10)
                    return said
                yield timed(said)
        except EOFError:
            worker.join(10)
            code = worker.exitcode or 0
            ending = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        finally:
            _end(worker.pid)
            worker.join()
        yield timed(Row(name, f"{ending}{_last_words(log)}", "", FAILED))
    return 0.0


def report(name: str, rehearse: bool, writer: Connection) -> None:
    """In the worker: the rows of a section, and after the last its seconds of processor time."""
    for row in SECTIONS[name](Rehearsal() if rehearse else Gpu()):
        writer.send(replace(row, measured=" ".join(row.measured.split())))
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    writer.send(sum(usage.ru_utime + usage.ru_stime for usage in used))


def _end(leader: int | None) -> None:
    """End a section and what it has started: its process leads a group, and benches start candidates in sessions of their own.
    It is asked first, so that they remove what they have written."""
    assert leader is not None, "it was started"
    started = _started_by(leader)
    for process in [process for process in started if process.pid == leader] or started:
        _send(process, signal.SIGTERM)
    limit = time.monotonic() + _SECONDS_TO_END
    while any(map(_runs, started)) and time.monotonic() < limit:
        time.sleep(0.05)
    while left := {process for process in (*started, *_started_by(leader)) if _runs(process)}:
        started = [*left, *(child for process in left for child in _descendants(process))]
        for process in started:
            _send(process, signal.SIGKILL)
        time.sleep(0.05)


def _started_by(leader: int) -> list[psutil.Process]:
    """The process, those of its group, which may outlive it, and their descendants."""
    found: dict[int, psutil.Process] = {}
    for pid in psutil.pids():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if leader in (pid, os.getpgid(pid)):
                process = psutil.Process(pid)
                found |= {one.pid: one for one in (process, *_descendants(process))}
    return [process for process in found.values() if _runs(process)]


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return f": {lines[-1].strip()[:300]}" if lines else ""


def _no_gpu() -> str | None:
    import torch

    if torch.cuda.is_available():
        return None
    return "torch sees no CUDA device (`megatron-plasticity doctor` says why); --rehearse tries this script without one"


def _line(*cells: str) -> str:
    """One line of the table, or several where a text is long."""
    columns = [textwrap.wrap(cell[:_MOST_CHARACTERS], width) for cell, width in zip(cells, _WIDTHS, strict=False)]
    columns.append([cells[-1]])
    lines = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(
        "  ".join(f"{part:{width}}" for part, width in zip(line, (*_WIDTHS, 0), strict=True)).rstrip() for line in lines
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that a section does not outlive this process
    sys.exit(main())
