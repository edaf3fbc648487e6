"""One runner per study: `runner.json` in the study's folder says which one it is, and that it lives.

On one host, and on network file systems that share locks, a lock file settles it (`tracking/lock.py`). Where they do not, the
file decides: a runner rewrites it every few seconds, and a newcomer from another host watches it before it takes over. What is
watched is whether it changes, not when it says that it did, since clocks differ.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_plasticity.config.files import write_json_atomic
from megatron_plasticity.errors import FolderHeld, UserError
from megatron_plasticity.tracking.disk import explain_disk_errors
from megatron_plasticity.tracking.lock import file_lock
from megatron_plasticity.tracking.plain_types import read_json_object
from megatron_plasticity.tracking.process import host_name, is_alive, process_start

RUNNER_FILE = "runner.json"
SECONDS_BETWEEN_BEATS = 10.0
BEATS_UNTIL_GONE = 3


@dataclass
class Claim:
    """This process is the study's runner, until `lost` says otherwise."""

    path: Path
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.time)
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What else the file says, for `study status`."""
    lost: str | None = None
    """Which runner took the study over, in words."""
    _closed: threading.Event = field(default_factory=threading.Event)
    _writing: threading.Lock = field(default_factory=threading.Lock)

    def note(self, notes: Mapping[str, Any]) -> None:
        """Say something new in the file."""
        if notes != self.notes:
            self.notes = notes
            self.beat()

    def beat(self) -> None:
        """A sign of life. A file that another runner has written is left as it is, and this one has lost the study."""
        with self._writing:
            found = _read(self.path)
            if found.get("token", self.token) != self.token:
                self.lost = _named(found)
                return
            # A full disk must not end the study, whose runs say so themselves; nor a network that is slow for a moment.
            with contextlib.suppress(OSError):
                write_json_atomic(self.path, self._content())

    def _content(self) -> dict[str, Any]:
        return {
            "host": host_name(),
            "pid": os.getpid(),
            "process_start": process_start(os.getpid()),
            "token": self.token,
            "started": self.started,
            "heartbeat": time.time(),
            **self.notes,
        }

    def _keep_beating(self) -> None:
        while not self._closed.wait(SECONDS_BETWEEN_BEATS) and self.lost is None:
            self.beat()


@contextlib.contextmanager
def claimed(folder: Path, say: Callable[[str], None] = print) -> Iterator[Claim]:
    """Be the runner of the study in `folder` during the block.

    Raises FolderHeld that names the other one if there is one. To see whether the runner of another host still lives takes half a
    minute, which `say` is told of.
    """
    with file_lock(folder / "lock"):
        claim = Claim(folder / RUNNER_FILE)
        wait_for_a_silent_runner(folder, say)
        with explain_disk_errors(folder):
            claim.path.unlink(missing_ok=True)
            write_json_atomic(claim.path, claim._content())
        beating = threading.Thread(target=claim._keep_beating, name="runner-heartbeat", daemon=True)
        beating.start()
        try:
            yield claim
        finally:
            claim._closed.set()
            beating.join()
            if claim.lost is None and _read(claim.path).get("token") == claim.token:
                claim.path.unlink(missing_ok=True)


def living_runner(folder: Path) -> dict[str, Any] | None:
    """What `runner.json` says if there may be a runner: one of this host that lives, or one of another host, of which its last
    sign of life must tell."""
    found = _read(folder / RUNNER_FILE)
    if not found or (found.get("host") == host_name() and not is_alive(found.get("pid"), found.get("process_start"))):
        return None
    return found


def wait_for_a_silent_runner(folder: Path, say: Callable[[str], None]) -> None:
    """Return when the study in `folder` has no runner; one of another host that is silent for half a minute, which `say` is told
    of, is gone. Raises FolderHeld if there is one that lives."""
    path, found = folder / RUNNER_FILE, living_runner(folder)
    if found is None:
        return
    if found.get("host") != host_name():
        seconds = SECONDS_BETWEEN_BEATS * BEATS_UNTIL_GONE
        say(f"{path} names a runner, {_named(found)}; watching for {seconds:.0f} s whether it lives")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            now = _read(path)
            if now.get("heartbeat") != found.get("heartbeat"):
                break
            time.sleep(min(1.0, seconds / 10))
        else:
            return
        if not now:
            return  # it has ended well
    raise FolderHeld(f"{path.parent}: is being run by {_named(found)}. Wait for it to end, or stop it first.")


def _named(found: Mapping[str, Any]) -> str:
    return f"process {found.get('pid')} on {found.get('host')}"


def _read(path: Path) -> dict[str, Any]:
    """The file's content; nothing if there is none that can be read."""
    try:
        return read_json_object(path)
    except UserError:
        return {}
