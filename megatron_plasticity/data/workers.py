"""Tokenizing shards in parallel: what a worker process does, and how the shards are handed out.

Each worker takes one shard at a time and writes one part (`data/parts.py`). Parts do not depend on one another, so neither the
number of workers nor the order in which they finish can be seen in the corpus.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_plasticity.config.data import SourceConfig
from megatron_plasticity.data.parts import write_part
from megatron_plasticity.data.sources import documents
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError


@dataclass(frozen=True)
class Shard:
    """What a worker does at a time: a few files of one source, and where their part goes."""

    folder: Path
    source: SourceConfig
    paths: tuple[str, ...]
    bytes: int
    """Size of the files on disk."""


class _Stopped(Exception):
    """The parent has given up; nobody waits for this shard any more."""


class _Desk:
    """What a worker needs for every shard: the tokenizer, and two numbers that it shares with its parent."""

    def __init__(self, tokenizer_path: Path, held_out_fraction: float, done_bytes: Any, stop: Any) -> None:
        self._tokenizer = Tokenizer.load(tokenizer_path)
        self._held_out_fraction = held_out_fraction
        self._done_bytes, self._stop = done_bytes, stop

    def tokenize(self, shard: Shard) -> None:
        texts = (text for path in shard.paths for text in documents(path, shard.source))
        for size in write_part(shard.folder, texts, self._tokenizer, self._held_out_fraction):
            with self._done_bytes.get_lock():
                self._done_bytes.value += size
            if self._stop.value:
                raise _Stopped


class Workers:
    """Hands shards to worker processes. `done_bytes` counts the bytes of text that they have tokenized."""

    def __init__(self, submit: Callable[[Shard], concurrent.futures.Future[None]], done_bytes: Any) -> None:
        self.submit = submit
        self._done_bytes = done_bytes

    @property
    def done_bytes(self) -> int:
        return int(self._done_bytes.value)


@contextmanager
def worker_processes(count: int, tokenizer_path: Path, held_out_fraction: float) -> Iterator[Workers]:
    """`count` workers for the time of the block. When the block raises, they stop after the batch that they are at.

    Raises UserError when a worker dies, as one does that the system kills for its memory.
    """
    # Not forked: tokenizers, pyarrow and the network client have threads in the parent, which a fork would leave halfway.
    context = multiprocessing.get_context("spawn")
    done_bytes, stop = context.Value(ctypes.c_int64, 0), context.Value(ctypes.c_bool, False)
    arguments = (tokenizer_path, held_out_fraction, done_bytes, stop)
    with concurrent.futures.ProcessPoolExecutor(count, context, _start_worker, arguments) as pool:
        try:
            yield Workers(functools.partial(_submit, pool), done_bytes)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died, perhaps for want of memory: set `workers` lower and run the same command again; finished "
                "shards are kept"
            ) from error
        finally:
            stop.value = True
            pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: concurrent.futures.Executor, shard: Shard) -> concurrent.futures.Future[None]:
    # The pool may start a process now. It inherits the mask, so a Ctrl-C finds it deaf until it can say what to do about one.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.submit(_tokenize, shard)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


_desk: _Desk


def _start_worker(tokenizer_path: Path, held_out_fraction: float, done_bytes: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says what to do
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for each worker
    threading.Thread(target=_die_with_parent, daemon=True).start()
    global _desk
    _desk = _Desk(tokenizer_path, held_out_fraction, done_bytes, stop)


def _die_with_parent() -> None:
    """A parent that is killed cannot stop its workers, and one that goes on would be in the way of the next attempt."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tokenize(shard: Shard) -> None:
    _desk.tokenize(shard)
