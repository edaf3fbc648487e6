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
import resource
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_plasticity.errors import Interrupted, LostProcess, UserError

_PACKAGE = Path(__file__).parents[1]
# Frames of these are a process that waits for others.
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
_LONGEST_MESSAGE = 64 * 1024
_LONGEST_REASON = 8000
_LONGEST_HELLO = 1024
_SECONDS_FOR_HELLO = 5.0
_MOST_NAMED = 8


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
    """None until it has said who it is: whoever finds the port can connect."""
    host: str = ""
    since: float = field(default_factory=time.monotonic)
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

    def receive(self, token: str) -> list[tuple[str, Any]] | None:
        """The messages that have arrived; None at the end of the connection. The first line must be `token`, rank and host.
        Raises ValueError for what is no message of ours."""
        try:
            arrived = self.connection.recv(_LONGEST_MESSAGE)
        except OSError:
            return None
        if not arrived:
            return None
        self.last_heard = time.monotonic()
        *lines, self.unread = (self.unread + arrived).split(b"\n")
        if len(self.unread) > (_LONGEST_HELLO if self.rank is None else _LONGEST_MESSAGE):
            raise ValueError("a message without end")
        if self.rank is None and lines:
            self._introduce(lines.pop(0), token)
        return [_message(line) for line in lines]

    def _introduce(self, line: bytes, token: str) -> None:
        said, rank, host = line[:_LONGEST_HELLO].decode("ascii").split(" ", 2)
        if not secrets.compare_digest(said, token):
            raise ValueError("not one of us")
        self.rank, self.host = int(rank), host


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
        self._reason, self._exit_code = "", LostProcess.exit_code
        """Why the job ends, and with what, once that is known."""
        self._last_progress = time.monotonic()
        self._has_left = False
        self._busy = 0
        self._watched = False
        self._asked_where: float | None = None
        self._next_sign = self._next_complaint = 0.0
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
        _allow_many_connections()
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
        connection.sendall(f"{token} {self.rank} {socket.gethostname()}\n".encode())
        self._peers.append(main)
        self._selector.register(connection, selectors.EVENT_READ, main)
        self._start()

    @contextlib.contextmanager
    def member(self) -> Iterator[None]:
        """Be one of the job inside the block. The others are told how it ended; see `explained` too."""
        try:
            with self.explained():
                yield
        except BaseException as error:
            self.beat()  # it ends by itself, with its own error
            if isinstance(error, Interrupted) and error.by_all:
                self._leave(None)
            elif isinstance(error, UserError):
                self._leave(str(error), error.exit_code)
            else:
                self._leave(f"{type(error).__name__}: {error}", 1)
            raise
        else:
            self._has_left = True
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
            raise LostProcess(self._reason, self._exit_code) from error

    def _leave(self, reason: str | None, exit_code: int = 0) -> None:
        for peer in tuple(self._peers):
            if reason is None:
                peer.send("bye")
            elif self.rank == 0:
                peer.send("end", [f"{self}: {reason[:_LONGEST_REASON]}", exit_code])
            else:
                peer.send("failed", [reason[:_LONGEST_REASON], exit_code])

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(2 * self._patience.between_signs)
        for connection in (self._listener, *(peer.connection for peer in tuple(self._peers))):
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
        while not self._closing.is_set():
            try:
                self._look()
            except Exception:  # a defect here must not silence this process, which the others would take for its death
                if not self._closing.is_set():
                    traceback.print_exc()
                    time.sleep(self._patience.between_signs)

    def _look(self) -> None:
        for key, _ in self._selector.select(min(0.5, self._patience.between_signs)):
            if key.data is None:
                self._accept()
            else:
                self._hear(key.data)
        now = time.monotonic()
        if now >= self._next_sign:
            self._next_sign = now + self._patience.between_signs
            for peer in self._peers:
                if peer.rank is not None:
                    peer.send("alive")
        self._look_for_silence(now)
        self._look_for_a_stall(now)
        waits = not (self._busy or self._has_left)
        if self._known.is_set() and waits and now - self._last_progress > self._patience.without_progress:
            self._end()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            self._selector.unregister(self._listener)
            print(f"warning: rank 0 cannot watch over more processes: {error}; raise `ulimit -n`", file=sys.stderr, flush=True)
            return
        connection.settimeout(self._patience.silence)
        peer = _Peer(connection, None)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _hear(self, peer: _Peer) -> None:
        try:
            messages = peer.receive(self._token)
            for kind, value in messages or ():
                self._understand(peer, kind, value)
        except (ValueError, TypeError, RecursionError):  # somebody who is not one of us knocked
            self._drop(peer)
            return
        if messages is None:
            self._drop(peer)
            if not peer.has_left and peer.rank is not None:
                self._lose(f"{peer} ended without a word (killed, or out of memory?)")

    def _understand(self, peer: _Peer, kind: str, value: Any) -> None:
        if kind == "bye":
            peer.has_left = True
        elif kind == "failed":
            peer.has_left = True
            self._lose(f"{peer}: {value[0]}", int(value[1]))
        elif kind == "end":
            self._lose(str(value[0]), int(value[1]))
        elif kind == "stalled":
            now = time.monotonic()
            if not self._busy and now - self._last_progress > self._patience.stall / 2:  # else it waits for us, who get on
                self._ask_where(now)
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
        for stranger in [peer for peer in self._peers if peer.rank is None and now - peer.since > _SECONDS_FOR_HELLO]:
            self._drop(stranger)
        for peer in [peer for peer in self._peers if now - peer.last_heard > self._patience.silence]:
            self._drop(peer)
            if not peer.has_left and peer.rank is not None:
                silent = self._patience.silence
                self._lose(f"{peer} has given no sign of life for {silent:g} s (its node or the network is down?)")

    def _look_for_a_stall(self, now: float) -> None:
        if self._asked_where is not None:
            waited = now - self._asked_where > self._patience.answers
            if waited or all(peer.where is not None for peer in self._members()):
                self._lose(self._stall_report())
                self._end()
        elif self._watched and not self._busy and now - self._last_progress > self._patience.stall and not self._known.is_set():
            if self.rank == 0:
                self._ask_where(now)
            elif now >= self._next_complaint:  # the main process asks and decides
                self._next_complaint = now + self._patience.between_signs
                for peer in self._peers:
                    peer.send("stalled")

    def _ask_where(self, now: float) -> None:
        if self._asked_where is None and not self._known.is_set():
            self._asked_where = now
            _dump_stacks()
            for peer in self._members():
                peer.send("where")

    def _members(self) -> list[_Peer]:
        return [peer for peer in self._peers if peer.rank is not None and not peer.has_left]

    def _stall_report(self) -> str:
        """Who hangs where; first those that do not wait for others, since the others wait for them."""
        groups: dict[tuple[bool, str], list[str]] = {}
        for who, where in [(str(self), _where()), *((str(peer), peer.where) for peer in self._members())]:
            key = (False, "says nothing") if where is None else (bool(where["waits"]), f"is in {where['where']}")
            groups.setdefault(key, []).append(who)
        lines = [f"no process has got on for {self._patience.stall / 60:g} minutes; the stack of each is in its log"]
        # Kernels run behind their launch: on a GPU each may seem busy, and those at another place than most are to be looked at.
        for (waits, place), ranks in sorted(groups.items(), key=lambda item: (item[0][0], len(item[1]))):
            more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
            doing = ", waiting for others" if waits else ""
            lines.append(f"  {', '.join(ranks[:_MOST_NAMED])}{more}: {place}{doing}")
        return "\n".join(lines)

    def _lose(self, reason: str, exit_code: int = LostProcess.exit_code) -> None:
        if self._known.is_set():
            return
        self._reason, self._exit_code = reason, exit_code
        self.beat()  # time to fail by itself, with its own words: the others' error is often this process's as well
        self._known.set()
        if self.rank == 0:
            for peer in self._members():
                peer.send("end", [reason[:_LONGEST_REASON], exit_code])

    def _end(self) -> None:
        """End this process, whose main thread is stuck in a collective that no exception can reach."""
        print(f"error (rank {self.rank}): {self._reason}", file=sys.stderr, flush=True)
        for note in self._at_end:
            with contextlib.suppress(Exception):
                note(self._reason)
        os._exit(self._exit_code)


def _allow_many_connections() -> None:
    """Let this process hold as many connections as the system lets it: the usual limit is 1024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))


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
            waits |= any(part in file for part in _COLLECTIVES)  # in any thread: autograd's may be the one
            if thread == threading.main_thread().ident and not found and Path(file).is_relative_to(_PACKAGE):
                where = f"{Path(file).relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
                found = True
            frame = frame.f_back
    return {"waits": waits, "where": where}
