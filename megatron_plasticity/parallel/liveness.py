"""Whether the other processes of a launch still live and get on. A job whose process, node or network fails ends everywhere
within a minute and says why: launchers stop their own node only, and a collective waits for half an hour.

Beside the training, a thread of each process exchanges signs of life with the main process over a TCP connection of its own, so
that neither the length of a step nor the communication library matters. When a process is gone the others end as soon as they
make no progress. A process that lives and makes no progress, a hung collective, is found by its silence in `Liveness.beat`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_plasticity.errors import Interrupted, LostProcess, UserError

_PACKAGE = Path(__file__).parents[1]
# Frames of these are a process that waits for others.
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
_LONGEST_MESSAGE = 64 * 1024


@dataclass(frozen=True)
class Patience:
    """Seconds. Together less than a minute, but for `stall`."""

    between_signs: float = 2.0
    silence: float = 25.0
    """Without a sign of life for so long a process counts as gone."""
    without_progress: float = 10.0
    """After another is gone, a process ends when it has made no progress for so long."""
    answers: float = 5.0
    """How long the main process waits for the others to say where they hang."""
    stall: float = 1800.0
    """Without progress for so long, while all are there, a process counts as hung."""


@dataclass
class _Peer:
    """The other end of a connection: the main process for the others, each of the others for the main process."""

    connection: socket.socket
    rank: int | None
    """None until it has said who it is."""
    host: str = ""
    last_heard: float = field(default_factory=time.monotonic)
    has_left: bool = False
    unread: bytes = b""
    where: dict[str, Any] | None = None

    def __str__(self) -> str:
        return f"rank {self.rank}{f' on {self.host}' if self.host else ''}"

    def send(self, kind: str, value: Any = None) -> None:
        # What cannot be sent is noticed where this peer is heard, or rather is not.
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps([kind, value]).encode() + b"\n")

    def receive(self) -> list[tuple[str, Any]] | None:
        """The messages that have arrived; None at the end of the connection. Raises ValueError for what is no message."""
        try:
            arrived = self.connection.recv(_LONGEST_MESSAGE)
        except OSError:
            return None
        if not arrived:
            return None
        self.last_heard = time.monotonic()
        *lines, self.unread = (self.unread + arrived).split(b"\n")
        if len(self.unread) > _LONGEST_MESSAGE:
            raise ValueError("a message without end")
        return [_message(line) for line in lines]


class Liveness:
    """What a process knows of the others, and tells them of itself. Without others it does nothing."""

    def __init__(self, rank: int = 0, patience: Patience | None = None) -> None:
        self.rank = rank
        self._patience = patience or Patience()
        self._peers: list[_Peer] = []
        self._listener: socket.socket | None = None
        self._token = ""
        self._selector = selectors.DefaultSelector()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._known = threading.Event()
        self._reason = ""
        """Why the job ends, once that is known."""
        self._last_progress = time.monotonic()
        self._busy = 0
        self._watched = False
        self._asked_where: float | None = None
        self._at_end: list[Callable[[str], None]] = []

    # --- For the process's own work.

    def beat(self) -> None:
        """This process has got on with its work."""
        self._last_progress = time.monotonic()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Do not end the process inside the block, such as between the first and the last byte of a checkpoint, although
        others are gone."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            self.beat()

    @contextlib.contextmanager
    def exchanging(self) -> Iterator[None]:
        """Inside a `busy` block: inside this one the process waits for others after all."""
        before, self._busy = self._busy, 0
        self.beat()
        try:
            yield
        finally:
            self._busy = before

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside the block, a process that does not `beat` for `Patience.stall` seconds counts as hung."""
        self.beat()
        self._watched = True
        try:
            yield
        finally:
            self._watched = False

    def at_end(self, note: Callable[[str], None]) -> None:
        """Call `note(reason)` before this process is ended because of others."""
        self._at_end.append(note)

    # --- Connections.

    def listen(self) -> tuple[int, str]:
        """On the main process: the port to connect to, and the word that a connection begins with."""
        family = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
        self._listener = socket.create_server(("", 0), backlog=4096, **family)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._token = secrets.token_hex(16)
        self._start()
        return int(self._listener.getsockname()[1]), self._token

    def connect(self, address: str, port: int, token: str) -> None:
        """On the others. Without a connection the work goes on, and says that nobody watches over it."""
        try:
            connection = socket.create_connection((address, port), timeout=10.0)
        except OSError as error:
            print(
                f"warning: rank {self.rank} reaches no port of {address} but the launcher's ({error}): if a node is lost, that "
                "is noticed only when a collective times out",
                file=sys.stderr,
                flush=True,
            )
            return
        connection.settimeout(self._patience.silence)
        main = _Peer(connection, 0, address)
        main.send("hello", [token, self.rank, socket.gethostname()])
        self._peers.append(main)
        self._selector.register(connection, selectors.EVENT_READ, main)
        self._start()

    @contextlib.contextmanager
    def member(self) -> Iterator[None]:
        """Be one of the job inside the block. The others are told how it ended; see `explained` too."""
        try:
            with self.explained():
                yield
        except Interrupted:  # all have agreed to stop
            self._leave(None)
            raise
        except BaseException as error:
            self._leave(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
            raise
        else:
            self._leave(None)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Raises LostProcess, with the reason, in place of the errors by which a communication library notices inside the block
        that another process is gone."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            # Those who wait for a process that was killed fail at once: the reason is on its way.
            if self._thread is None or not self._known.wait(3.0):
                raise
            raise LostProcess(self._reason) from error

    def _leave(self, reason: str | None) -> None:
        for peer in self._peers:
            if reason is None:
                peer.send("bye")
            elif self.rank == 0:
                peer.send("end", f"{self}: {reason}")
            else:
                peer.send("failed", reason)

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(2 * self._patience.between_signs)
        for connection in (self._listener, *(peer.connection for peer in self._peers)):
            if connection is not None:
                connection.close()
        self._selector.close()

    def __str__(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"

    # --- The thread.

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        next_sign = 0.0
        while not self._closing.is_set():
            for key, _ in self._selector.select(min(0.5, self._patience.between_signs)):
                if key.data is None:
                    self._accept()
                else:
                    self._hear(key.data)
            now = time.monotonic()
            if now >= next_sign:
                next_sign = now + self._patience.between_signs
                for peer in self._peers:
                    peer.send("alive")
            self._look_for_silence(now)
            self._look_for_a_stall(now)
            if self._known.is_set() and not self._busy and now - self._last_progress > self._patience.without_progress:
                self._end()

    def _accept(self) -> None:
        assert self._listener is not None
        connection, _ = self._listener.accept()
        connection.settimeout(self._patience.silence)
        peer = _Peer(connection, None)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _hear(self, peer: _Peer) -> None:
        try:
            messages = peer.receive()
            for kind, value in messages or ():
                self._understand(peer, kind, value)
        except (ValueError, TypeError):  # somebody who is not one of us knocked
            self._drop(peer)
            return
        if messages is None:
            self._drop(peer)
            if not peer.has_left and peer.rank is not None:
                self._lose(f"{peer} ended without a word (killed, or out of memory?)")

    def _understand(self, peer: _Peer, kind: str, value: Any) -> None:
        if peer.rank is None:
            token, rank, host = value
            if kind != "hello" or not secrets.compare_digest(str(token), self._token):
                raise ValueError("not one of us")
            peer.rank, peer.host = int(rank), str(host)
        elif kind == "bye":
            peer.has_left = True
        elif kind == "failed":
            peer.has_left = True
            self._lose(f"{peer}: {value}")
        elif kind == "end":
            self._lose(str(value))
        elif kind == "stalled":
            self._ask_where(time.monotonic())
        elif kind == "where":
            _dump_stacks()
            peer.send("at", _where())
        elif kind == "at":
            peer.where = dict(value)

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        self._peers.remove(peer)

    def _look_for_silence(self, now: float) -> None:
        for peer in [peer for peer in self._peers if now - peer.last_heard > self._patience.silence]:
            self._drop(peer)
            if not peer.has_left and peer.rank is not None:
                silent = self._patience.silence
                self._lose(f"{peer} has given no sign of life for {silent:g} s (its node or the network is down?)")

    def _look_for_a_stall(self, now: float) -> None:
        if self._asked_where is not None:
            waited = now - self._asked_where > self._patience.answers
            if waited or all(peer.where is not None for peer in self._peers):
                self._lose(self._stall_report())
                self._end()
        elif self._watched and not self._busy and now - self._last_progress > self._patience.stall and not self._known.is_set():
            if self.rank == 0:
                self._ask_where(now)
            else:
                self._watched = False  # said once; the main process asks and decides
                for peer in self._peers:
                    peer.send("stalled")

    def _ask_where(self, now: float) -> None:
        if self._asked_where is None and not self._known.is_set():
            self._asked_where = now
            _dump_stacks()
            for peer in self._peers:
                peer.send("where")

    def _stall_report(self) -> str:
        """Who hangs where; first those that do not wait for others, since the others wait for them."""
        places = [(str(self), _where()), *((str(peer), peer.where) for peer in self._peers)]
        slow = [f"{who}, in {where['where']}" for who, where in places if where is not None and not where["waits"]]
        silent = [who for who, where in places if where is None]
        waiting = [f"{who}, in {where['where']}" for who, where in places if where is not None and where["waits"]]
        lines = [f"no process has got on for {self._patience.stall / 60:g} minutes; the stack of each is in its log"]
        for title, found in (("busy with something else", slow), ("says nothing", silent), ("waiting for others", waiting)):
            lines += [f"  {title}: {who}" for who in found[:8]]
            lines += [f"  {title}: {len(found) - 8} more"] if len(found) > 8 else []
        return "\n".join(lines)

    def _lose(self, reason: str) -> None:
        if self._known.is_set():
            return
        self._reason = reason
        self._known.set()
        if self.rank == 0:
            for peer in self._peers:
                if not peer.has_left:
                    peer.send("end", reason)

    def _end(self) -> None:
        """End this process, whose main thread is stuck in a collective that no exception can reach."""
        print(f"error (rank {self.rank}): {self._reason}", file=sys.stderr, flush=True)
        for note in self._at_end:
            with contextlib.suppress(Exception):
                note(self._reason)
        os._exit(LostProcess.exit_code)


def _message(line: bytes) -> tuple[str, Any]:
    kind, value = json.loads(line)
    return str(kind), value


def _dump_stacks() -> None:
    with contextlib.suppress(OSError, ValueError):
        faulthandler.dump_traceback(file=2, all_threads=True)


def _where() -> dict[str, Any]:
    """The innermost line of our code in the main thread, and whether any thread waits in a collective."""
    frames = sys._current_frames()
    waits, where = False, "code that is not ours"
    for thread, innermost in frames.items():
        if thread == threading.get_ident():
            continue
        frame = innermost
        found = False
        while frame is not None:
            file = frame.f_code.co_filename
            waits |= any(part in file for part in _COLLECTIVES)
            if thread == threading.main_thread().ident and not found and Path(file).is_relative_to(_PACKAGE):
                where = f"{Path(file).relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
                found = True
            frame = frame.f_back
    return {"waits": waits, "where": where}
