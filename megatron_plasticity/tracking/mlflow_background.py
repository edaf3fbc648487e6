"""Mirroring while the work goes on, by a daemon thread that can only ever warn, and afterwards, with some patience."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from megatron_plasticity.tracking.mlflow_store import StoreError, without_credentials

SECONDS_BETWEEN_SYNCS = 5.0
LONGEST_PAUSE_SECONDS = 60.0
# A run can be over before a new SQLite store is: making one takes 9 s on an idle core.
FINAL_SYNC_SECONDS = 60.0
# Where MLflow has failed already, the end of the work waits for it only as long as it answers within this time.
SECONDS_FOR_AN_ANSWER = 3.0
_ATTEMPTS = 4
_SECONDS_BETWEEN_ATTEMPTS = 2.0

_log = logging.getLogger(__name__)


class Mirror(Protocol):
    """What runs in the background; see `MlflowMirror.sync`."""

    answers: int
    """Grows with what the server has answered."""

    def sync(self, folder: Path, over: bool = True) -> None: ...


@contextmanager
def mirror_in_background(
    mirror: Mirror,
    folder: Path,
    *,
    interval: float = SECONDS_BETWEEN_SYNCS,
    final_seconds: float = FINAL_SYNC_SECONDS,
    warn: Callable[[str], None] = _log.warning,
) -> Iterator[None]:
    """Keep MLflow up to date with a study or run folder during the block, and bring it the rest at the end.

    Syncs every `interval` seconds, less often while that fails. The last sync may take `final_seconds`, and if MLflow had failed
    before, only while it answers; the block's own end, or error, waits no longer. No failure of MLflow reaches the block: it is
    said once, through `warn`.
    """
    worker = _Worker(mirror, folder, interval, warn)
    thread = threading.Thread(target=worker.run, name="mlflow-mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        worker.stop.set()
        _wait_for(thread, worker, final_seconds)
        if thread.is_alive():
            worker.complain(f"it took more than {final_seconds:g} s to send the rest")


def sync_patiently(mirror: Mirror, folder: Path, attempts: int = _ATTEMPTS, pause: float = _SECONDS_BETWEEN_ATTEMPTS) -> None:
    """Sync once, going on where it stopped after an error of the store, `attempts` times in all, `pause` seconds apart.

    Raises the last StoreError, or at once what is no error of the store.
    """
    for attempt in range(1, attempts + 1):
        try:
            return mirror.sync(folder)
        except StoreError:
            if attempt == attempts:
                raise
            time.sleep(pause)


def _wait_for(thread: threading.Thread, worker: _Worker, final_seconds: float) -> None:
    began = answered = time.monotonic()
    answers = worker.mirror.answers
    while thread.is_alive():
        now = time.monotonic()
        if worker.mirror.answers != answers:
            answers, answered = worker.mirror.answers, now
        patience = final_seconds - (now - began)
        if worker.failing:
            patience = min(patience, SECONDS_FOR_AN_ANSWER - (now - answered))
        if patience <= 0:
            return
        thread.join(min(patience, 0.1))


class _Worker:
    def __init__(self, mirror: Mirror, folder: Path, interval: float, warn: Callable[[str], None]) -> None:
        self.stop = threading.Event()
        self.failing = False
        """Whether the store was not to be had at the last attempt."""
        self.mirror = mirror
        self._folder = folder
        self._interval = interval
        self._warn = warn
        self._warned = False

    def run(self) -> None:
        pause = self._interval
        while not self.stop.wait(pause):
            worked = self._try_to_sync(over=False)
            pause = self._interval if worked else min(2 * pause, LONGEST_PAUSE_SECONDS)
        self._try_to_sync(over=True)

    def complain(self, reason: str) -> None:
        """Warn, unless that was done before."""
        if not self._warned:
            self._warned = True
            self._warn(
                f"MLflow does not get a copy of everything for now: {without_credentials(reason)}\n"
                f"Nothing is lost: `megatron-plasticity mlflow sync {self._folder}` completes it from the run folders."
            )

    def _try_to_sync(self, over: bool) -> bool:
        # Whatever goes wrong here, a defect of ours included, must not stop hours of training.
        try:
            self.mirror.sync(self._folder, over)
        except Exception as error:
            self.failing = isinstance(error, StoreError)
            self.complain(str(error) or type(error).__name__)
            return False
        self.failing = False
        return True
