"""The machine without its GPUs: cores, memory, disks, limits, network (Linux)."""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import shutil
import socket
import struct
import tempfile
from pathlib import Path

from megatron_plasticity.launch.doctor.facts import (
    Disk,
    InfinibandPort,
    Interface,
    Limits,
    Memory,
    Network,
    Processor,
    SharedMemory,
)
from megatron_plasticity.launch.doctor.probing import within
from megatron_plasticity.tracking.process import usable_cores

_SYS = Path("/sys")
_PROC = Path("/proc")
_SHARED_MEMORY = Path("/dev/shm")
_DEEPSPEED_LEAK = "deepspeed_allreduce_buffer*"
_UNLIMITED = 1 << 60  # control groups of version 1 say "no limit" by a number near 2^63
_SIOCGIFADDR = 0x8915  # netdevice(7)
_NAME_SECONDS = 1.5


def processor() -> Processor:
    """Cores, and how many of them this process may use."""
    names = [line for line in _read(_PROC / "cpuinfo").splitlines() if line.startswith("model name")]
    return Processor(
        name=names[0].partition(":")[2].strip() if names else platform.machine(),
        logical=os.cpu_count() or 1,
        usable=usable_cores(),
        quota=_cpu_quota(),
    )


def memory() -> Memory:
    """Memory of the machine, and of the control group that this process is in."""
    lines = (line.split() for line in _read(_PROC / "meminfo").splitlines())
    kibibytes = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
    limit, used = _memory_limit()
    return Memory(kibibytes["MemTotal"] * 1024, kibibytes["MemAvailable"] * 1024, limit, used)


def _cpu_quota() -> float | None:
    """Cores' worth of time that the control groups above this process allow: the least of them."""
    quotas = []
    for folder in control_groups("cpu"):
        maximum = _read(folder / "cpu.max").split()  # version 2: "200000 100000", or "max 100000"
        if not maximum:
            maximum = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(maximum) == 2 and maximum[0].isdigit() and maximum[1].isdigit():  # version 1 says -1 for no limit
            quotas.append(int(maximum[0]) / int(maximum[1]))
    return min(quotas, default=None)


def _memory_limit() -> tuple[int | None, int | None]:
    """The smallest limit of the control groups above this process, and what is used of it."""
    limits = []
    for folder in control_groups("memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            text = _read(folder / limit).strip()
            if text.isdigit() and int(text) < _UNLIMITED:
                limits.append((int(text), int(_read(folder / used).strip() or 0)))
    return min(limits, default=(None, None))


def control_groups(controller: str) -> list[Path]:
    """Folders of the control groups of this process, its own first, up to the root of what it can see (cgroups(7))."""
    mounts = {}
    for line in _read(_PROC / "self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        if kind == "cgroup2":
            mounts[""] = Path(fields.split()[4])
        elif kind == "cgroup" and controller in options.split(","):
            mounts[controller] = Path(fields.split()[4])
    found = []
    for line in _read(_PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        root = mounts.get("" if not controllers else controller if controller in controllers.split(",") else "-")
        if root is None:
            continue
        folder = root / path.strip("/")
        # In a container the path may be that of the host, and not be there: what can be seen then is the root.
        found += [place for place in (folder, *folder.parents) if place.is_relative_to(root) and place.is_dir()]
    return found


def disks() -> tuple[Disk, ...]:
    """Where runs are written by default, and where temporary files go."""
    here = Path.cwd()
    return tuple(_disk(purpose, path) for purpose, path in (("working folder", here), ("temporary", Path(tempfile.gettempdir()))))


def _disk(purpose: str, path: Path) -> Disk:
    usage = shutil.disk_usage(path)
    return Disk(purpose, str(path), usage.total, usage.free, os.access(path, os.W_OK | os.X_OK))


def shared_memory() -> SharedMemory:
    """/dev/shm, through which the processes of a machine exchange data, and what DeepSpeed has left in it."""
    usage = shutil.disk_usage(_SHARED_MEMORY)
    leaked = [path.stat().st_size for path in _SHARED_MEMORY.glob(_DEEPSPEED_LEAK)]
    return SharedMemory(usage.total, usage.free, len(leaked), sum(leaked))


def limits() -> Limits:
    """Of this process; those that it starts inherit them."""
    soft, hard = (_or_none(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    return Limits(soft, hard, _or_none(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]))


def _or_none(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def network() -> Network:
    """The host's name and address, its interfaces, and InfiniBand or RoCE ports."""
    host = socket.gethostname()
    try:
        address = within(_NAME_SECONDS, lambda: socket.gethostbyname(host))
    except (OSError, TimeoutError):
        address = None
    interfaces = tuple(
        Interface(name, _address(name), _read(_SYS / "class/net" / name / "operstate").strip() in ("up", "unknown"))
        for _, name in socket.if_nameindex()
    )
    ports = sorted((_SYS / "class/infiniband").glob("*/ports/*"))
    return Network(host, address, interfaces, tuple(_infiniband(port) for port in ports))


def _address(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:  # it has none
            return None
    return socket.inet_ntoa(answer[20:24])


def _infiniband(port: Path) -> InfinibandPort:
    state = _read(port / "state").partition(":")[2].strip()  # "4: ACTIVE"
    rate = _read(port / "rate").partition("(")[0].strip()  # "400 Gb/sec (4X NDR)"
    return InfinibandPort(port.parent.parent.name, int(port.name), state, rate)


def _read(path: Path) -> str:
    """The text of a file of the kernel; empty if it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
