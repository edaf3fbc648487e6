"""What one machine says about itself before a launch: `python -m megatron_plasticity.launch.probe`, a question on its standard
input, a line of JSON on its standard output. Nothing heavy is imported: it answers in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
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
from megatron_plasticity.config.files import sha256_files
from megatron_plasticity.launch.doctor.software import ONLY_FOR_METRICS, declared_lines
from megatron_plasticity.tracking.process import usable_cores

PACKAGES = ("torch", "deepspeed", "transformers")
"""Shown where all is well."""
_KERNELS = ("flash-attn", "flash-attn-3", "flash-attn-4", "triton", "liger-kernel", "transformer-engine", "apex")
MARK = "megatron-plasticity-probe "
"""Begins the answer; a login script may print lines of its own."""
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_LARGEST_MANIFEST = 2**20
_SECONDS_TO_APPEAR = 5.0


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
    """Of our package, of those that it declares (`missing` if a necessary one is absent), and of kernels that are there."""
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
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES, if it is set."""
    driver: str = ""
    """Of NVIDIA; empty without."""

    @classmethod
    def read(cls, output: str) -> Findings | None:
        """The answer in what a probe printed; None if there is none."""
        _, mark, rest = output.partition(MARK)  # what was printed before may not have ended its line
        if not mark:
            return None
        answer = json.loads(rest.partition("\n")[0])
        return cls(**{**answer, "gpus": [Gpu(**gpu) for gpu in answer["gpus"]]})


def probe(question: Question) -> Findings:
    """Look around on this machine."""
    output = _existing(Path(question.output))
    gpus, driver = _gpus()
    return Findings(
        python=platform.python_version(),
        versions=_versions(),
        code=code_hash(),
        gpus=gpus,
        cores=usable_cores(),
        addresses=_addresses(),
        inputs={path: digest(Path(path)) for path in question.inputs},
        sees_token=question.token is not None and _appears(Path(question.token)),
        can_write=os.access(output, os.W_OK | os.X_OK),
        free=shutil.disk_usage(output).free,
        port_problem=None if question.port is None else _port_problem(question.port),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        driver=driver,
        time=time.time(),
    )


def code_hash() -> str:
    """SHA-256 of the names and contents of this package's files."""
    root = Path(megatron_plasticity.__file__).parent
    files = sorted(file for file in root.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return sha256_files((file.relative_to(root), file) for file in files)


def digest(path: Path) -> str | None:
    """A digest of the names and sizes of a folder's files, or of a file's size, and of what small JSON files say, of which a
    corpus and a model have one with hashes of the large ones: enough to tell a shared folder from a stale copy. None where
    nothing can be read."""
    try:
        files: Sequence[Path] = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        listing = [f"{file.name} {file.stat().st_size}" for file in files]
        listing += [
            hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files
            if file.suffix == ".json" and file.stat().st_size < _LARGEST_MANIFEST
        ]
    except OSError:
        return None
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()[:12]


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _appears(file: Path) -> bool:
    """Whether the file is there; a network file system may have remembered its folder without it for a few seconds."""
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not file.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
        with suppress(OSError):
            next(file.parent.iterdir(), None)  # makes NFS look again
    return True


def _versions() -> dict[str, str]:
    found = {"megatron-plasticity": megatron_plasticity.__version__}
    lines: Sequence[tuple[str, str | None]] = ()
    with suppress(PackageNotFoundError):
        lines, _ = declared_lines(Path(megatron_plasticity.__file__).resolve().parent)
    declared = {_NAME.match(line)[0]: extra for line, extra in lines}  # type: ignore[index]  # a requirement begins with a name
    needed = {name: extra is None and name not in ONLY_FOR_METRICS for name, extra in declared.items()}
    for name, is_needed in {**dict.fromkeys(PACKAGES, True), **needed}.items():
        if (installed := _version(name)) is not None or is_needed:
            found[name] = installed or "missing"
    return found | {name: installed for name in _KERNELS if (installed := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> tuple[list[Gpu], str]:
    """The GPUs and NVIDIA's driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return [], ""
    rows = [row for line in answer.stdout.splitlines() if len(row := line.rsplit(",", 3)) == 4]
    if answer.returncode or not rows:
        return [], ""
    return [Gpu(name.strip(), _mebibytes(total), _mebibytes(used)) for name, total, used, _ in rows], rows[0][3].strip()


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
