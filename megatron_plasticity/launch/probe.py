"""What one machine says about itself before a launch: `python -m megatron_plasticity.launch.probe`, a question on its standard
input, a line of JSON on its standard output. Nothing heavy is imported: it answers in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import megatron_plasticity

PACKAGES = ("torch", "deepspeed", "transformers")
MARK = "megatron-plasticity-probe "
"""Begins the line of the answer; a login script may print lines of its own."""


@dataclass(frozen=True)
class Question:
    """What to look for."""

    inputs: list[str] = field(default_factory=list)
    """Files and folders that the run reads."""
    output: str = "."
    """Folder that the run writes to; it may not exist yet."""
    token: str | None = None
    """File that was just written there."""
    port: int | None = None
    """Port to try; only the first machine is asked."""


@dataclass(frozen=True)
class Gpu:
    name: str
    total: int
    """Bytes."""
    used: int
    """Bytes in use by whatever runs there now."""


@dataclass(frozen=True)
class Findings:
    """What a machine answers."""

    python: str
    versions: dict[str, str]
    """Of our package and of those that a run rests on."""
    code: str
    """SHA-256 of our package's files."""
    time: float
    """Unix seconds at the end of the probe."""
    gpus: list[Gpu]
    cores: int
    addresses: list[str]
    """The one that we were reached by, if that is known, then all others."""
    inputs: dict[str, str | None]
    """Path → a digest of what is there, None where nothing is."""
    sees_token: bool
    can_write: bool
    free: int
    """Bytes on the output's disk that we may use."""
    port_problem: str | None

    @classmethod
    def read(cls, output: str) -> Findings | None:
        """The answer in what a probe printed; None if there is none."""
        line = next((line for line in output.splitlines() if line.startswith(MARK)), None)
        if line is None:
            return None
        answer = json.loads(line.removeprefix(MARK))
        return cls(**{**answer, "gpus": [Gpu(**gpu) for gpu in answer["gpus"]]})


def probe(question: Question) -> Findings:
    """Look around on this machine."""
    output = _existing(Path(question.output))
    return Findings(
        python=platform.python_version(),
        versions={"megatron-plasticity": megatron_plasticity.__version__, **{name: _version(name) for name in PACKAGES}},
        code=code_hash(),
        gpus=_gpus(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        addresses=_addresses(),
        inputs={path: digest(Path(path)) for path in question.inputs},
        sees_token=question.token is not None and Path(question.token).is_file(),
        can_write=os.access(output, os.W_OK | os.X_OK),
        free=shutil.disk_usage(output).free,
        port_problem=None if question.port is None else _port_problem(question.port),
        time=time.time(),
    )


def code_hash() -> str:
    """SHA-256 of the names and contents of this package's files."""
    root = Path(megatron_plasticity.__file__).parent
    total = hashlib.sha256()
    for file in sorted(file for file in root.rglob("*") if file.is_file() and "__pycache__" not in file.parts):
        total.update(f"{file.relative_to(root)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def digest(path: Path) -> str | None:
    """A digest of the names and sizes of a folder's files, or of a file's size: enough to tell a shared folder from a stale copy.
    None where nothing can be read."""
    try:
        files: Sequence[Path] = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        listing = [f"{file.name} {file.stat().st_size}" for file in files]
    except OSError:
        return None
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()[:12]


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _gpus() -> list[Gpu]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if answer.returncode:
        return []
    rows = [line.rsplit(",", 2) for line in answer.stdout.splitlines() if line.strip()]
    return [Gpu(name.strip(), _mebibytes(total), _mebibytes(used)) for name, total, used in rows]


def _mebibytes(text: str) -> int:
    """nvidia-smi says `[N/A]` for what a device does not tell."""
    return int(text) * 2**20 if text.strip().isdecimal() else 0


def _addresses() -> list[str]:
    """By sshd's account the one that we were reached by, then those that `hostname -I` lists; without loopback."""
    reached = os.environ.get("SSH_CONNECTION", "").split()[2:3]
    listed: list[str] = []
    with suppress(OSError, subprocess.TimeoutExpired):
        listed = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=10).stdout.split()
    found = dict.fromkeys([*reached, *listed])
    return [address for address in found if not address.startswith("127.") and address != "::1"]


def _port_problem(port: int) -> str | None:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            trial.bind(("", port))
        except OSError as error:
            return error.strerror or str(error)
    return None


if __name__ == "__main__":
    print(MARK + json.dumps(asdict(probe(Question(**json.loads(sys.stdin.read()))))))
