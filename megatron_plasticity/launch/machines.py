"""Where a launch runs: on the machines of a hostfile, or on this one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.hostfile import Host, chosen, process_count, read_hostfile

DEFAULT_PORT = 29500
"""DeepSpeed's and torch's own; firewalls are opened for it."""


@dataclass(frozen=True)
class Machines:
    """The machines with their slots, in the order of ranks."""

    hosts: tuple[Host, ...]
    hostfile: Path | None = None
    """None: this machine, without ssh."""
    include: str | None = None
    exclude: str | None = None
    address: str | None = None
    """Where ranks meet; None takes the address by which the first machine is reached."""
    port: int | None = None
    """None, for this machine alone, takes a free one."""
    hides_gpus: bool = False
    """Whether CUDA_VISIBLE_DEVICES leaves no GPU of this machine."""

    @classmethod
    def of_hostfile(
        cls,
        path: Path,
        include: str | None = None,
        exclude: str | None = None,
        address: str | None = None,
        port: int | None = None,
    ) -> Machines:
        """Raises UserError for a hostfile or a choice of machines that cannot be used."""
        return cls(tuple(chosen(read_hostfile(path), include, exclude)), path, include, exclude, address, port or DEFAULT_PORT)

    @classmethod
    def local(cls, processes: int, port: int | None = None, gpus: bool = True) -> Machines:
        """This machine, with the first of the GPUs that CUDA_VISIBLE_DEVICES leaves, unless the run is not for `gpus`.

        Raises UserError if that is no number of processes, or if it leaves some GPUs, and too few.
        """
        if processes < 1:
            raise UserError(f"--local {processes}: a number of processes is at least 1")
        visible = visible_devices(os.environ) if gpus else None
        if not visible:
            return cls((Host("localhost", tuple(range(processes))),), port=port, hides_gpus=visible is not None)
        if len(visible) < processes:
            raise UserError(
                f"--local {processes}: CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} leaves {len(visible)} of this "
                "machine's GPUs"
            )
        return cls((Host("localhost", visible[:processes]),), port=port)

    @property
    def over_ssh(self) -> bool:
        return self.hostfile is not None

    @property
    def names(self) -> list[str]:
        return [host.name for host in self.hosts]

    @property
    def processes(self) -> int:
        return process_count(self.hosts)


def visible_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """Indexes of the GPUs that CUDA_VISIBLE_DEVICES leaves, as CUDA reads it; None if it is not set.

    Raises UserError for names (UUIDs and parts of GPUs), which DeepSpeed's launcher does not take.
    """
    text = environment.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    found: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part.startswith("-"):  # for CUDA the end of the list
            break
        if not part.isdecimal():
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={text}: GPUs are needed by index here, such as 0,1, and {part!r} is a name; `nvidia-smi "
                "-L` lists indexes and names, and a part of a GPU (MIG) can only be used by a single process, without `launch`"
            )
        found.append(int(part))
    return tuple(dict.fromkeys(found))
