"""math-verify in processes of its own.

math-verify (the `eval` extra) limits its time with `signal.alarm`, which works in a main thread only and cannot stop a
computation inside C code; sympy can also eat all memory on an expression such as 9^{9^9}. So each comparison runs in a worker
process that is killed and replaced when it passes the time limit; the comparison then counts as "not equal".
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

TIME_LIMIT_SECONDS = 4.0
"""The paper's limit for one comparison."""
START_LIMIT_SECONDS = 120.0
SECONDS_ALONE = 1.0
"""So long the first worker is alone: a further one takes as long to import math-verify, and most comparisons milliseconds."""
_MEMORY_LIMIT_BYTES = 2 * 1024**3

Pair = tuple[str, str]


def math_verify_installed() -> bool:
    """Whether the `eval` extra is there."""
    return importlib.util.find_spec("math_verify") is not None


def math_verify_equal(a: str, b: str) -> bool:
    """Whether math-verify finds two LaTeX expressions equal in either direction. No time limit: call it in a worker."""
    # Dollar signs mark the whole span as mathematics; bare text such as "50\%" would lose its percent sign.
    return _verified(*(f"${text.strip().strip('$').rstrip('.,;:!? ')}$" for text in (a, b)))


def bare_math_verify_equal(a: str, b: str) -> bool:
    r"""The same of texts as they stand, as the paper's harness asks it: without dollar signs little but numbers is read."""
    return _verified(a, b)


def _verified(a: str, b: str) -> bool:
    from math_verify import verify

    first, second = _parse(a), _parse(b)
    return bool(verify(first, second, timeout_seconds=None) or verify(second, first, timeout_seconds=None))


@lru_cache(maxsize=4096)
def _parse(text: str) -> list:
    from math_verify import parse

    return parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


class MathPool:
    """Workers that compare pairs of expressions, each pair within its own time limit. The first worker starts at the first use,
    the others when there is enough to do for them."""

    def __init__(
        self,
        workers: int = 1,
        time_limit: float = TIME_LIMIT_SECONDS,
        compare: Callable[[str, str], bool] = math_verify_equal,
    ) -> None:
        self._time_limit = time_limit
        self._compare = compare
        self._size = workers
        self._workers: list[_Worker] = []
        self._endless: set[str] = set()

    def equal_all(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether each pair is equal; False where the comparison fails, dies, or passes the time limit.

        Of a pair that takes too long each text is compared with itself next. One that takes too long at that as well is not
        tried again, so that it costs its time once, and not once for each text that it is compared with.
        """
        results = [False] * len(pairs)
        waiting: deque[tuple[int | None, Pair]] = deque(enumerate(pairs))
        self._start_workers(min(1, len(pairs)))
        began = time.monotonic()
        while waiting or any(worker.item is not None for worker in self._workers):
            if time.monotonic() - began > SECONDS_ALONE and all(worker.item is None for worker in self._workers):
                self._start_workers(min(self._size, len(waiting)))
            for worker in self._workers:
                while worker.item is None and waiting:
                    number, pair = waiting.popleft()
                    if self._endless.isdisjoint(pair):
                        worker.submit((number, pair))
            busy = [worker for worker in self._workers if worker.item is not None]
            if not busy:
                continue
            remaining = min(worker.deadline for worker in busy) - time.monotonic()
            wait([worker.connection for worker in busy], timeout=max(0.0, remaining))
            for worker in busy:
                item, verdict = worker.item, worker.poll()
                if worker.item is not None or item is None:
                    continue
                number, pair = item
                if number is not None:
                    results[number] = bool(verdict)
                if verdict is None:
                    self._look_at(number, pair, waiting)
        return results

    def _start_workers(self, wanted: int) -> None:
        while len(self._workers) < wanted:
            self._workers.append(_Worker(self._compare, self._time_limit))

    def _look_at(self, number: int | None, pair: Pair, waiting: deque[tuple[int | None, Pair]]) -> None:
        """Find out which text of a pair that gave no verdict is to blame."""
        if number is None:
            self._endless.add(pair[0])
        else:
            waiting.extendleft((None, (text, text)) for text in set(pair) - self._endless)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()


class _Worker:
    """One process and the pair that it is working on."""

    def __init__(self, compare: Callable[[str, str], bool], time_limit: float) -> None:
        self._compare = compare
        self._time_limit = time_limit
        self.item: tuple[int | None, Pair] | None = None
        """The pair that it is working on, and its number if somebody asked for it."""
        self.deadline = 0.0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy this process's threads' locks
        self.connection, child = context.Pipe()
        self._process: SpawnProcess = context.Process(target=_serve, args=(child, self._compare), daemon=True)
        self._process.start()
        child.close()
        # The first message says that imports are done, so that the time limit measures comparisons alone.
        if not self.connection.poll(START_LIMIT_SECONDS):
            self.stop()
            raise TimeoutError(f"a math-verify worker did not start within {START_LIMIT_SECONDS:.0f} s")
        try:
            self.connection.recv()
        except EOFError as error:
            raise RuntimeError("a math-verify worker died while it started; its own message is above") from error

    def submit(self, item: tuple[int | None, Pair]) -> None:
        try:
            self.connection.send(item[1])
        except ConnectionError:  # it was killed while it had nothing to do
            self.stop()
            self._start()
            self.connection.send(item[1])
        self.item = item
        self.deadline = time.monotonic() + self._time_limit

    def poll(self) -> bool | None:
        """The verdict on the current pair, which is then no longer its `item`. None while it is being worked on, and if there
        will be none: a late or dead process is replaced."""
        try:
            if self.connection.poll():
                verdict = bool(self.connection.recv())
                self.item = None
                return verdict
            if time.monotonic() < self.deadline:
                return None
        except (EOFError, ConnectionError):  # the process was killed, for example for its memory
            pass
        self.item = None
        self.stop()
        self._start()
        return None

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, compare: Callable[[str, str], bool]) -> None:
    """Body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    logging.disable(logging.CRITICAL)  # math-verify warns about every expression that it cannot read
    _limit_memory()
    if compare in (math_verify_equal, bare_math_verify_equal) and not compare("1", "1"):  # imports it, too
        raise RuntimeError("math-verify does not find 1 equal to 1: the installation does not work")
    connection.send(None)
    while True:
        try:
            a, b = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            verdict = compare(a, b)
        except Exception:  # any failure to read or compare model text means "not shown to be equal"
            verdict = False
        connection.send(verdict)


def _limit_memory() -> None:
    """Allow this much address space beyond what the imports took (Linux; elsewhere the time limit alone protects)."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return
    import resource

    limit = int(pages.read_text().split()[0]) * resource.getpagesize() + _MEMORY_LIMIT_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
