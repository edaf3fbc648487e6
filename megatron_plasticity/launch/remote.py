"""Runs a small module of ours on several machines at once, over ssh or, for a launch on this machine alone, directly."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SSH_SECONDS = 10
"""How long a connection may take."""
# pdsh's ssh notices a dead machine by these, and asks for no password; without the first two it would wait for hours.
SSH_OPTIONS = (
    *("-o", "ServerAliveInterval=10"),
    *("-o", "ServerAliveCountMax=3"),
    *("-o", f"ConnectTimeout={SSH_SECONDS}"),
    *("-o", "BatchMode=yes"),
)
SSH_ARGUMENTS = "PDSH_SSH_ARGS_APPEND"
"""pdsh's variable for more arguments of ssh, such as a port or a config file; our own calls of ssh take them too."""


@dataclass(frozen=True)
class Answer:
    """How a module ended on a machine."""

    host: str
    exit_code: int | None
    """None if it took too long."""
    output: str
    errors: str
    at: float
    """Unix seconds of this machine when it ended."""

    @property
    def ended_well(self) -> bool:
        return self.exit_code == 0

    @property
    def complaint(self) -> str:
        """Its last words, or that there were none."""
        if self.exit_code is None:
            return "did not answer in time"
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        return lines[-1] if lines else f"ended with exit code {self.exit_code}"


def on_hosts(
    hosts: Sequence[str], module: str, arguments: Sequence[str] = (), *, given: str = "", seconds: float, over_ssh: bool
) -> list[Answer]:
    """Run `python -m MODULE ARGUMENTS` on every host, with `given` on its standard input, for at most `seconds`.

    On each host the same Python runs in the same folder as here, as under DeepSpeed's launcher.
    """

    def ask(host: str) -> Answer:
        command = _over_ssh(host, module, arguments) if over_ssh else [sys.executable, "-m", module, *arguments]
        try:
            ended = subprocess.run(command, input=given, capture_output=True, text=True, timeout=seconds, errors="replace")
        except subprocess.TimeoutExpired:
            return Answer(host, None, "", "", time.time())
        except OSError as error:  # no ssh here
            return Answer(host, 127, "", f"{command[0]}: {error.strerror}", time.time())
        return Answer(host, ended.returncode, ended.stdout, ended.stderr, time.time())

    with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
        return list(pool.map(ask, hosts))


def _over_ssh(host: str, module: str, arguments: Sequence[str]) -> list[str]:
    here = str(Path.cwd())
    search = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    program = shlex.join([sys.executable, "-m", module, *arguments])
    remote = f"cd {shlex.quote(here)} && PYTHONPATH={shlex.quote(search)} exec {program}"
    return ["ssh", *SSH_OPTIONS, *shlex.split(os.environ.get(SSH_ARGUMENTS, "")), host, remote]
