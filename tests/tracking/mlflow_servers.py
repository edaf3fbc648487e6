"""A real `mlflow server`, the databases it can stand on, and a proxy before it that fails as networks and servers do."""

from __future__ import annotations

import contextlib
import http.client
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest

SECONDS_TO_START = 180.0

Fault = Literal["drop", "500", "hang", "late"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def mlflow_server(backend: str, artifacts: Path, log: Path) -> Iterator[int]:
    """Run `mlflow server` on the database `backend`, with artifacts through it; gives its port."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", backend, "--serve-artifacts", "--artifacts-destination", str(artifacts)]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # a second process, which we do not need
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            deadline = time.monotonic() + SECONDS_TO_START
            while not _is_healthy(port):
                assert process.poll() is None, f"mlflow server ended:\n{log.read_text()[-3000:]}"
                assert time.monotonic() < deadline, f"mlflow server did not start:\n{log.read_text()[-3000:]}"
                time.sleep(0.1)
            yield port
        finally:
            _end(process)


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(15)


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """Run a PostgreSQL of our own, on a free port of this machine only; gives the URI of its database. Skips the test where it
    is not installed."""
    binaries = {name: _postgres_binary(name) for name in ("initdb", "postgres")}
    if missing := [name for name, path in binaries.items() if path is None]:
        pytest.skip(f"PostgreSQL is not installed: no {' and no '.join(missing)}")
    pytest.importorskip("psycopg2", reason="the server's driver for PostgreSQL is not installed (pip install psycopg2-binary)")
    prefix: list[str] = []
    owner = pwd.getpwuid(os.getuid())
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        owner = _another_user()
        prefix = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups", "--"]
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="postgresql-") as data, (folder / "pg.log").open("w") as log:
        os.chown(data, owner.pw_uid, owner.pw_gid)
        make = [*prefix, str(binaries["initdb"]), "-D", data, "-U", "mlflow", "--auth=trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(make, check=True, stdout=log, stderr=log, cwd="/")
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off", "-p", str(port)]
        process = subprocess.Popen([*prefix, str(binaries["postgres"]), "-D", data, *options], stdout=log, stderr=log, cwd="/")
        try:
            deadline = time.monotonic() + 60
            while not _accepts(port):
                assert process.poll() is None, (folder / "pg.log").read_text()
                assert time.monotonic() < deadline, "PostgreSQL did not start"
                time.sleep(0.05)
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # "fast shutdown"
            process.wait(30)


def _postgres_binary(name: str) -> Path | None:
    found = shutil.which(name)
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))  # where Debian puts them, off the PATH
    return Path(found) if found else versions[-1] if versions else None


def _another_user() -> pwd.struct_passwd:
    if shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL does not run as root, and setpriv, which would make another user of us, is not installed")
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    pytest.skip("PostgreSQL does not run as root, and there is no other user")


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    """Without the query."""
    authorization: str | None


class Proxy:
    """Stands before a server on a port of its own. It can be away, and fail as `fault` and `refuses` say."""

    def __init__(self, backend: int) -> None:
        self.backend, self.port = backend, free_port()
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        """What is to go wrong: `drop` and `500` lose the answer to a request that arrived; `hang` never answers and passes
        nothing on; `late` passes it on when `release` is set, and answers nobody."""
        self.refuses: Callable[[Request], int | None] = lambda request: None
        """A status such as 401, and nothing is passed on."""
        self.release = threading.Event()
        self.requests: list[Request] = []
        self.faults: list[Request] = []
        self._late: list[threading.Thread] = []
        self._server: ThreadingHTTPServer | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        """Accept connections; twice is fine."""
        if self._server is None:
            proxy = self

            class Handler(BaseHTTPRequestHandler):
                def handle_one_request(self) -> None:
                    self.close_connection = True  # so that a server that goes away is noticed by the next request
                    self.raw_requestline = self.rfile.readline(65537)
                    if self.raw_requestline and self.parse_request():
                        proxy._handle(self)

                def log_message(self, format: str, *arguments: object) -> None:
                    pass

            self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
            self._server.daemon_threads = True
            threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections; twice is fine."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def close(self) -> None:
        self.release.set()
        self.down()

    def wait_for_late_requests(self) -> None:
        """Let the requests through that were held back, and wait until the server has dealt with them."""
        self.release.set()
        for thread in self._late:
            thread.join(30)

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        request = Request(handler.command, handler.path.partition("?")[0], handler.headers.get("Authorization"))
        self.requests.append(request)
        if status := self.refuses(request):
            # As badly as can be: it says the secret that it was told.
            return self._answer(handler, status, f"no entry with {request.authorization}".encode(), "text/plain")
        fault = self.fault(request)
        if fault is not None:
            self.faults.append(request)
        if fault == "hang":
            self.release.wait(60)
            return None
        if fault == "late":
            self._late.append(threading.current_thread())
            self.release.wait(60)
        status, content, kind = self._pass_on(handler, body)
        if fault is None:
            self._answer(handler, status, content, kind)
        elif fault == "500":
            self._answer(handler, 500, b"the database is busy", "text/plain")
        return None

    def _pass_on(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.backend, timeout=60)
        headers = {k: v for k, v in handler.headers.items() if k.lower() not in ("host", "connection", "accept-encoding")}
        connection.request(handler.command, handler.path, body=body, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content, answer.headers.get("Content-Type", "application/json")

    def _answer(self, handler: BaseHTTPRequestHandler, status: int, content: bytes, kind: str) -> None:
        with contextlib.suppress(OSError):  # the client may be gone
            handler.send_response(status)
            handler.send_header("Content-Type", kind)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)
