"""The machines of a launch: a hostfile as DeepSpeed and MPI read it, and which of its machines and slots are used."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_plasticity.errors import UserError

_LINE = re.compile(r"(?P<name>[^\s:@,]+)\s+slots=(?P<slots>[1-9]\d*)")


@dataclass(frozen=True)
class Host:
    """One machine and the slots (indexes of its GPUs; on a machine without, places for processes) that are used of it."""

    name: str
    slots: tuple[int, ...]


def process_count(hosts: Sequence[Host]) -> int:
    return sum(len(host.slots) for host in hosts)


def read_hostfile(path: Path) -> list[Host]:
    """The machines in the order of the file, which is the order of ranks. Raises UserError with every line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot read this hostfile: {reason}; it lists a machine per line: node1 slots=8") from None
    hosts: list[Host] = []
    problems = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if (match := _LINE.fullmatch(text)) is None:
            problems.append(f"line {number}: {text!r}: {_what_is_wrong(text)}")
        elif match["name"] in [host.name for host in hosts]:
            problems.append(f"line {number}: {match['name']} is there already; give each machine one line with all its slots")
        else:
            hosts.append(Host(match["name"], tuple(range(int(match["slots"])))))
    if not hosts and not problems:
        problems.append("it names no machine; expected lines such as: node1 slots=8")
    if problems:
        raise UserError("\n  ".join([f"{path}: this hostfile cannot be used", *problems]))
    return hosts


def _what_is_wrong(text: str) -> str:
    """Of a line that DeepSpeed does not take, although MPI may."""
    name, *rest = text.split()
    if "@" in name:
        host = name.partition("@")[2]
        return f"user names belong into ~/.ssh/config (`Host {host}`, `User {name.partition('@')[0]}`); write: {host} slots=8"
    if any(word.startswith(("max_slots", "max-slots")) for word in rest):
        return f"max_slots is for MPI alone; write: {' '.join([name, *(w for w in rest if w.startswith('slots='))])}"
    return "expected a name and its number of GPUs, such as: node1 slots=8"


def chosen(hosts: Sequence[Host], include: str | None, exclude: str | None) -> list[Host]:
    """Those of the hosts and slots that DeepSpeed takes for `--include` or `--exclude`: NAME[:SLOT,SLOT…], joined by `@`.

    Raises UserError, with all problems, for both at once, for a host or slot that is not there, and if nothing is left.
    """
    if include and exclude:
        raise UserError("--include and --exclude: state one of the two")
    text = include or exclude
    if not text:
        return list(hosts)
    option = "--include" if include else "--exclude"
    named = _parse(text, hosts, option)
    if include:
        left = [Host(host.name, named[host.name]) for host in hosts if host.name in named]
    else:
        left = [Host(h.name, tuple(slot for slot in h.slots if slot not in named.get(h.name, ()))) for h in hosts]
    left = [host for host in left if host.slots]
    if not left:
        raise UserError(f"{option} {text}: leaves no machine")
    return left


def _parse(text: str, hosts: Sequence[Host], option: str) -> dict[str, tuple[int, ...]]:
    known = {host.name: host.slots for host in hosts}
    named: dict[str, tuple[int, ...]] = {}
    problems = []
    for part in text.split("@"):
        name, colon, slots = part.partition(":")
        if name not in known:
            problems.append(f"{name!r} is not in the hostfile, which has {', '.join(known)}")
            continue
        if not colon:
            named[name] = known[name]
            continue
        wanted = slots.split(",")
        if wrong := [slot for slot in wanted if not slot.isdecimal() or int(slot) not in known[name]]:
            problems.append(f"{name} has no slot {', '.join(wrong)}, only 0 to {known[name][-1]}")
            continue
        named[name] = tuple(sorted({*named.get(name, ()), *(int(slot) for slot in wanted)}))
    if problems:
        raise UserError("\n  ".join([f"{option} {text}: expected NAME[:SLOT,SLOT…], several joined by @", *problems]))
    return named
