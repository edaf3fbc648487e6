"""This host: its name, the cores that we may use, and whether the process that a file speaks of still lives on it."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def host_name() -> str:
    """Name of this machine, as written into `state.json`."""
    return socket.gethostname()


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_start(pid: int) -> int | None:
    """When the kernel started process `pid`, in clock ticks since boot; None where there is no /proc, or no such process.

    Field 22 of /proc/PID/stat (proc_pid_stat(5)). The second field, the command, may hold spaces and brackets, so that fields
    are counted from its last closing bracket.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    state, start = fields[0], int(fields[19])
    return None if state in "ZX" else start  # a zombie has ended; only its parent has not looked yet


def is_alive(pid: int | None, started: int | None) -> bool:
    """Whether process `pid` of this host lives and is the one that began at `started` (`process_start`, None if unknown)."""
    if pid is None:
        return False
    if Path("/proc/self/stat").exists():
        now = process_start(pid)
        return now is not None and started in (None, now)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, and belongs to someone else
    return True
