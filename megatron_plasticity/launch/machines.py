"""Where a launch runs: on the machines of a hostfile, or on this one."""

from __future__ import annotations

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
    def local(cls, processes: int, port: int | None = None) -> Machines:
        """Raises UserError if that is no number of processes."""
        if processes < 1:
            raise UserError(f"--local {processes}: a number of processes is at least 1")
        return cls((Host("localhost", tuple(range(processes))),), port=port)

    @property
    def over_ssh(self) -> bool:
        return self.hostfile is not None

    @property
    def names(self) -> list[str]:
        return [host.name for host in self.hosts]

    @property
    def processes(self) -> int:
        return process_count(self.hosts)

    def host_of(self, rank: int) -> str:
        """Name of the machine of a rank."""
        return [host.name for host in self.hosts for _ in host.slots][rank]
