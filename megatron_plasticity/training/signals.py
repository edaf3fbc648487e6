"""Ctrl-C, SIGTERM and SIGUSR1 (by which Slurm tells that the time is nearly over): as a wish that the training loop grants at the
end of a step, and as an error everywhere else."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

from megatron_plasticity.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SECONDS_BEFORE_A_SECOND_CTRL_C = 3.0


class StopSignal:
    """Remembers the first of these signals inside a `with` block.

    A launcher passes one Ctrl-C on to its ranks as several signals, so more of them change nothing: only a person who presses
    Ctrl-C again, seconds later, gets what they would have got without us. What cannot wait is SIGKILL.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._before: dict[signal.Signals, signal.Handlers] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}  # type: ignore[misc]  # enum or callable
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._received_at > SECONDS_BEFORE_A_SECOND_CTRL_C:
            raise KeyboardInterrupt


def raise_interrupted_on_signals() -> None:
    """Let SIGTERM and SIGUSR1 unwind the stack like Ctrl-C does, so that temporary files go away and states are written."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}; run the same command again to go on", number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, interrupt)
