"""Looks at this machine: all probes side by side, each on its own, so that one that fails costs its own section only."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import typing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_plasticity.launch.doctor import host, nvidia, software, surroundings
from megatron_plasticity.launch.doctor.facts import SECTIONS, Facts
from megatron_plasticity.launch.doctor.probing import one_line, redacted

TORCH_SECONDS = 120.0
"""How long torch may take: two to four seconds where all is well, a minute from the disk of a busy cluster; a driver that hangs
never answers."""

_PROBES: dict[str, Callable[[], Any]] = {
    "software": software.software,
    "compilers": software.compilers,
    "processor": host.processor,
    "memory": host.memory,
    "disks": host.disks,
    "shared_memory": host.shared_memory,
    "limits": host.limits,
    "network": host.network,
    "nvidia": nvidia.nvidia,
    "ops": surroundings.ops,
    "parts": software.parts,
    "sandbox": surroundings.sandbox,
    "tracking": surroundings.tracking,
    "prepared": surroundings.prepared,
    "environment": surroundings.environment,
}
_ASKED_OF_TORCH = ("torch", "kernels")


def examine(torch_seconds: float = TORCH_SECONDS) -> Facts:
    """The facts about this machine. Raises nothing: what cannot be found out is in `undetermined`."""
    sections: dict[str, Any] = {}
    undetermined: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=6) as threads:
        asked_of_torch = threads.submit(_ask_torch, torch_seconds)  # first, since it takes longest
        waiting = {name: threads.submit(probe) for name, probe in _PROBES.items()}
        for name, future in waiting.items():
            try:
                sections[name] = future.result()
            except Exception as error:
                undetermined[name] = redacted(one_line(error))
        try:
            found, failures = asked_of_torch.result()
        except Exception as error:
            found, failures = {}, dict.fromkeys(_ASKED_OF_TORCH, redacted(one_line(error)))
    return Facts(**sections, **found, undetermined=_in_order(undetermined | failures))


def _in_order(undetermined: dict[str, str]) -> dict[str, str]:
    return {name: undetermined[name] for name in SECTIONS if name in undetermined}


def _ask_torch(seconds: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Sections that a process of its own gives, and why those that are missing are."""
    command = [sys.executable, "-m", "megatron_plasticity.launch.doctor.torch_probe"]
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=answers, stderr=errors)
        except OSError as error:
            return {}, dict.fromkeys(_ASKED_OF_TORCH, one_line(error))
        try:
            process.wait(seconds)
            ended = _ending(process.returncode)
        except subprocess.TimeoutExpired:
            process.kill()  # nobody waits for it: one that hangs inside the driver does not even die
            ended = f"no answer within {seconds:g} s"
        said = _read(errors).strip().splitlines()
        return parse_answers(_read(answers), f"{ended}{f' ({said[-1].strip()})' if said else ''}")


def _read(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _ending(code: int) -> str:
    if code < 0:
        return f"the process that asked torch was ended by {signal.Signals(-code).name}"
    return f"the process that asked torch ended with exit code {code}"


def parse_answers(lines: str, ended: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Sections and failures from what `torch_probe` has written; `ended` says what became of it before it wrote the rest."""
    from pydantic import TypeAdapter

    types = typing.get_type_hints(Facts)
    found: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for line in lines.splitlines():
        try:
            answer = json.loads(line)
            name = answer["section"]
            if "failure" in answer:
                failures[name] = answer["failure"]
            else:
                found[name] = TypeAdapter(types[name]).validate_python(answer["value"])
        except (ValueError, KeyError, TypeError):
            continue  # a line that was cut off; pydantic's error is a ValueError
    missing = [name for name in _ASKED_OF_TORCH if name not in found and name not in failures]
    return found, failures | dict.fromkeys(missing, redacted(ended))
