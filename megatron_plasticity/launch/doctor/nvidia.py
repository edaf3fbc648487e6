"""What the NVIDIA driver says: GPUs, the memory that is in use on them, and how they are connected."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megatron_plasticity.launch.doctor.facts import DriverGpu, Nvidia
from megatron_plasticity.launch.doctor.probing import one_line, output_of

_FIELDS = ("index", "name", "memory.total", "memory.used", "mig.mode.current", "compute_mode", "driver_version")
_SECONDS = 20.0  # the driver of a machine with eight GPUs that nobody uses takes seconds to wake up
_NVIDIA_VENDOR = "0x10de"
_DISPLAY_CLASS = "0x03"
_LINK = re.compile(r"NV\d+|PIX|PXB|PHB|NODE|SYS")


def nvidia() -> Nvidia:
    """What there is of NVIDIA; a machine without it has no problem."""
    devices = _devices()
    if shutil.which("nvidia-smi") is None:
        return Nvidia(devices, None, "the command nvidia-smi is not on PATH" if devices else None, (), ())
    try:
        listed = output_of(["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"], _SECONDS)
        gpus, driver = parse_gpus(listed)
    except (OSError, ValueError) as error:
        return Nvidia(devices, None, one_line(error) if devices else None, (), ())
    try:
        links = parse_links(output_of(["nvidia-smi", "topo", "-m"], _SECONDS)) if len(gpus) > 1 else ()
    except OSError:
        links = ()
    return Nvidia(max(devices, len(gpus)), driver, None, gpus, links)


def _devices() -> int:
    """GPUs that the kernel or a container shows, whether the driver works or not."""
    on_bus = 0
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = ((device / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
        except OSError:
            continue
        on_bus += vendor == _NVIDIA_VENDOR and kind.startswith(_DISPLAY_CLASS)
    return max(on_bus, len(list(Path("/dev").glob("nvidia[0-9]*"))))


def parse_gpus(listed: str) -> tuple[tuple[DriverGpu, ...], str | None]:
    """GPUs and the driver's version, from `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`. Raises ValueError if it is
    not that."""
    gpus, driver = [], None
    for line in listed.strip().splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_FIELDS):
            raise ValueError(f"nvidia-smi says {line!r}")
        index, name, total, used, mig, mode, driver = values
        gpus.append(DriverGpu(int(index), name, _mebibytes(total), _mebibytes(used), mig == "Enabled", mode != "Default"))
    return tuple(gpus), driver


def _mebibytes(value: str) -> int:
    return int(value) if value.isdigit() else 0  # "[N/A]" where memory is the host's, or belongs to MIG slices


def parse_links(matrix: str) -> tuple[str, ...]:
    """The kinds of connection between different GPUs, from `nvidia-smi topo -m`."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", matrix)  # the heading is underlined
    rows = [words for line in text.splitlines() if (words := line.split()) and re.fullmatch(r"GPU\d+", words[0])]
    gpus = [words for words in rows if not words[1].startswith("GPU")]  # without the heading
    kinds = {cell for row in gpus for cell in row[1 : 1 + len(gpus)] if _LINK.fullmatch(cell)}
    return tuple(sorted(kinds))
