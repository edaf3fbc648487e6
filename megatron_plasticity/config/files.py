"""Writing files so that a reader sees the old content or the new one, never a part of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_plasticity.errors import UserError


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step; on any error the old file stays and no temporary file is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; results are for sharing
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON in one step; NaN and infinity are refused, since JSON has no name for them."""
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` when the block ends well, and disappears when it does not.

    An existing folder at `path` is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def point_link_at(folder: Path, name: str) -> bool:
    """Let the link `name` beside `folder` lead to it, in one step. False, with nothing changed, if that is no link's name."""
    link = folder.parent / name
    if link.exists() and not link.is_symlink():
        return False
    temporary = folder.parent / f".{name}.{os.getpid()}.tmp"
    temporary.symlink_to(folder.name, target_is_directory=True)
    os.replace(temporary, link)
    return True


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_files(files: Iterable[tuple[object, Path]]) -> str:
    """SHA-256 over the names given and the contents of the files, in their order."""
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(f"{name}:{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def text_hash(path: Path) -> str:
    """SHA-256 of a text file. Raises UserError if it cannot be read."""
    try:
        return sha256_file(path)
    except OSError as error:
        raise UserError(f"{path}: expected a text file, which cannot be read: {error.strerror}") from None
