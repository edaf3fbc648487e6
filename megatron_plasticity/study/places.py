"""Places for runs on the machines of a hostfile: slots for the ranks of a run, on one machine or on whole machines together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.hostfile import Host


@dataclass(frozen=True)
class Place:
    """Where one run at a time is carried out: slots of one machine, or all slots of several."""

    hosts: tuple[Host, ...]

    @property
    def name(self) -> str:
        """For a person: `node1:0-3`, `node1–node4`."""
        first, last = self.hosts[0], self.hosts[-1]
        if first is not last:
            return f"{first.name}–{last.name}"
        slots = str(first.slots[0]) if len(first.slots) == 1 else f"{first.slots[0]}-{first.slots[-1]}"
        return f"{first.name}:{slots}"


def places_of(hosts: Sequence[Host], processes: int, origin: object) -> list[Place]:
    """The places of `processes` slots that these machines hold; what is left over stays idle.

    Raises UserError if there is none.
    """
    places = [*_places_on_one(hosts, processes), *_places_on_several(hosts, processes)]
    if not places:
        sizes = ", ".join(f"{host.name} has {len(host.slots)}" for host in hosts)
        raise UserError(
            f"{origin}: no place for a run of resources.processes_per_run={processes}: it takes slots of one machine, or whole "
            f"machines with equal numbers of slots; {sizes}"
        )
    return places


def _places_on_one(hosts: Sequence[Host], processes: int) -> Iterator[Place]:
    for host in hosts:
        for first in range(0, len(host.slots) - processes + 1, processes):
            yield Place((Host(host.name, host.slots[first : first + processes]),))


def _places_on_several(hosts: Sequence[Host], processes: int) -> Iterator[Place]:
    def size(host: Host) -> int:
        return len(host.slots)

    for slots, alike in itertools.groupby(sorted(hosts, key=size, reverse=True), key=size):
        together = list(alike)
        if processes > slots and processes % slots == 0:
            count = processes // slots
            for first in range(0, len(together) - count + 1, count):
                yield Place(tuple(together[first : first + count]))
