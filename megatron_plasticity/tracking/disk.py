"""Errors of the disk, said plainly."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_plasticity.errors import UserError

# Not every library that writes for us raises OSError: safetensors keeps the kernel's text, torch and SQLite have their own.
# ("unexpected pos" is how torch.save ends after a write that fell short.)
_FULL = (
    "No space left on device",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing",
    "unexpected pos",
    "database or disk is full",
)


@contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn "disk full" and "not allowed to write" inside the block into a UserError that names `path`; other errors pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        explanation = _explain(error)
        if explanation is None:
            raise
        raise UserError(f"{path}: {explanation}") from error


def _explain(error: Exception) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in _FULL):
        return "the disk is full, or your quota is used up. What was complete is kept: make room and run the same command again."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "writing is not allowed there. Choose another `output`, or change the permissions."
    if number in (errno.ENOTDIR, errno.EEXIST):
        return "this folder cannot be made, because a file is in its place. Move the file, or choose another `output`."
    return None
