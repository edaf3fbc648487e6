"""One process at a time: a lock that the kernel gives back however its holder ends."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_plasticity.errors import FolderHeld
from megatron_plasticity.tracking.disk import explain_disk_errors
from megatron_plasticity.tracking.process import host_name


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path` during the block; its text names the holder.

    Raises FolderHeld, naming that host and process, if another process (or another caller in this one) holds it. The file stays
    behind, since removing it would let two processes lock two files of one name. A file system without locks grants everything.
    """
    with explain_disk_errors(path.parent):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(descriptor, path)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {host_name()}\n".encode(), 0)
        try:
            yield
        finally:
            # Given back aloud: forked children that are still about hold copies of the descriptor, and with it of the lock.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 500, 0).decode(errors="replace").strip() or "another process"
        raise FolderHeld(f"{path.parent}: is being run by {holder}. Wait for it to end, or stop it first.") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
