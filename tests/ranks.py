"""Runs a function on several ranks over gloo, cheaply enough to be used casually.

Ranks are forked from a server that has imported torch and DeepSpeed, as the study runner's workers are. A rank that fails ends
the others, and its traceback is what the test shows.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_plasticity.launch.command import free_port
from megatron_plasticity.launch.workers import start_worker, worker_context


def run_on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any, log: Path, seconds: float = 120.0) -> list[Any]:
    """`function(*arguments)` on every rank, in processes that see the launcher's variables; the return values in order of rank.

    `function` must be importable (at module level); its arguments and results travel between processes.
    """
    context = _context()
    pipes = [context.Pipe() for _ in range(ranks)]
    processes = _start(ranks, _report, [(writer, function, arguments) for _, writer in pipes], log)
    readers = [reader for reader, _ in pipes]
    for _, writer in pipes:
        writer.close()
    try:
        return _gather(readers, time.monotonic() + seconds, log)
    finally:
        for process in processes:
            process.kill()
            process.join()


def start_ranks(ranks: int, function: Callable[..., Any], *arguments: Any, log: Path) -> list[BaseProcess]:
    """`function(*arguments)` on every rank; the processes, for tests that kill some of them."""
    return _start(ranks, function, [arguments] * ranks, log)


def _context() -> BaseContext:
    return worker_context(["megatron_plasticity.training.pretrain", "megatron_plasticity.training.finetune"], cuda=False)


def _start(ranks: int, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], log: Path) -> list[BaseProcess]:
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start_worker(
            _context(),
            function,
            arguments[rank],
            name=f"rank-{rank}",
            log=log,
            threads=1,
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]


def _report(writer: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        writer.send((True, function(*arguments)))
    except BaseException:
        writer.send((False, traceback.format_exc()))
        raise
    with suppress(EOFError):
        writer.recv()  # tensors travel in this process's shared memory, so it must outlive their arrival


def _gather(readers: list[Connection], deadline: float, log: Path) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        for rank, reader in enumerate(readers):
            if rank in results or not reader.poll(0.05):
                continue
            try:
                worked, value = reader.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died; log:\n{log.read_text()[-3000:]}") from None
            assert worked, f"rank {rank}:\n{value}"
            results[rank] = value
            reader.send("received")
        assert time.monotonic() < deadline, (
            f"ranks {sorted(set(range(len(readers))) - set(results))} hang; log:\n{log.read_text()[-3000:]}"
        )
    return [results[rank] for rank in range(len(readers))]
