"""Worker processes that start in a tenth of a second.

Importing torch and DeepSpeed takes four seconds, and a study has a hundred short runs. Without CUDA the workers are forked from a
server process that has imported everything and touched nothing; with CUDA, which does not survive a fork, they are spawned.
Each worker does one job and ends, so a crash, a leak or a setting of one run cannot reach another.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_plasticity.errors import UserError, ending_the_process
from megatron_plasticity.training.signals import SIGNALS, raise_interrupted_on_signals

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def worker_context(preload: Sequence[str], cuda: bool) -> BaseContext:
    """How workers start. `preload` are the modules that the fork server imports."""
    if cuda:
        return multiprocessing.get_context("spawn")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported, in the server
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload, "megatron_plasticity.launch.preload"])
    return context


def start_worker(
    context: BaseContext,
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    name: str,
    log: Path,
    threads: int,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Run `target(*arguments)` in a process of its own, its output appended to `log`.

    Exit code: 0; that of a UserError, whose text goes to the log; 1 for anything else, with the traceback in the log.
    SIGTERM raises Interrupted inside the job, unless the job listens to signals itself. A worker ends itself when its parent is
    gone. Raises UserError if there is no process to start it.
    """
    process = context.Process(  # type: ignore[attr-defined]
        target=_work, args=(target, arguments, str(log), threads, dict(environment or {})), name=name
    )
    # A Ctrl-C in the terminal reaches the fork server, and a worker until it has a process group of its own: both start deaf. The
    # resource tracker is there before, since starting it would unblock the signals.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process.start()
    except EOFError:
        raise UserError(
            f"{name}: could not be started: the process that starts workers was killed; if memory is short, lower resources.slots"
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def _work(target: Callable[..., Any], arguments: tuple[Any, ...], log: str, threads: int, environment: dict[str, str]) -> None:
    # A Ctrl-C in the terminal reaches the whole process group: only the parent should hear it, and decide.
    os.setpgrp()
    _redirect_output(log)
    for variable in _LAUNCHER_VARIABLES:  # a study that itself runs under a launcher: its workers are processes of their own
        os.environ.pop(variable, None)
    os.environ.update(environment, OMP_NUM_THREADS=str(threads))
    raise_interrupted_on_signals()
    _end_with_parent()
    import torch

    torch.set_num_threads(threads)
    try:
        with ending_the_process():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            target(*arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _redirect_output(log: str) -> None:
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        with suppress(ProcessLookupError):
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
