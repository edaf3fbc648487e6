"""The page: facts, problems and tips as text, at most `WIDTH` columns wide."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_plasticity.launch.doctor.facts import FORMAT, Facts, Requirement
from megatron_plasticity.launch.doctor.findings import gloo_interface, is_taken, nccl_interfaces, problems, shown_size, tips
from megatron_plasticity.launch.doctor.kernels import kernel_rows

WIDTH = 110
_LABEL = 15
_BUILD_SECONDS = {"fused_adam": 49, "cpu_adam": 75, "deepspeed_shm_comm": 45}
"""Measured on two cores."""


def page(facts: Facts, seconds: float | None = None) -> Iterator[str]:
    """Lines for a person. `seconds` is how long the examination took."""
    wrong, advice = problems(facts), tips(facts)
    took = "" if seconds is None else f", examined in {seconds:.1f} s"
    yield f"megatron-plasticity on {facts.network.host if facts.network else 'this machine'}{took}"
    if wrong:
        yield f"training cannot work here as it should: {len(wrong)} problem{'s' * (len(wrong) > 1)}"
        for problem in wrong:
            yield from _item("✗", problem)
    else:
        yield f"training can work here, {_where(facts)}"
    for heading, lines in (
        ("versions", _versions(facts)),
        ("devices", _devices(facts)),
        ("kernels", _kernels(facts)),
        ("built at first use", _ops(facts)),
        ("optional", _optional(facts)),
        ("environment", _environment(facts)),
    ):
        yield f"── {heading} {'─' * (WIDTH - 4 - len(heading))}"
        yield from lines
    for name, reason in facts.undetermined.items():
        yield from _line(name.replace("_", " "), f"could not be determined: {reason}")
    if advice:
        yield f"── tips {'─' * (WIDTH - 8)}"
        for number, tip in enumerate(advice, 1):
            yield from _item(f"{number}.", tip)


def document(facts: Facts) -> dict[str, Any]:
    """The same for a program: the facts, and what is said about them. Keys stay as they are within a `format`."""
    return {
        "format": FORMAT,
        "problems": problems(facts),
        "tips": tips(facts),
        "facts": dataclasses.asdict(facts),
    }


def _where(facts: Facts) -> str:
    assert facts.torch is not None, "torch is there where there is no problem"
    if not facts.torch.gpus:
        return "on the CPU"
    bf16 = all(gpu.bf16 for gpu in facts.torch.gpus)
    number = len(facts.torch.gpus)
    return f"on {number} GPU{'s' * (number > 1)}, in {'bf16 or fp32' if bf16 else 'fp32'}"


def _versions(facts: Facts) -> Iterator[str]:
    software, torch, compilers = facts.software, facts.torch, facts.compilers
    if software is not None:
        yield from _line("Python", f"{software.python}, {software.executable}")
        commit = f", commit {software.commit}{' with changes' if software.changed else ''}" if software.commit else ""
        yield from _line("project", f"{software.project} in {software.location}{commit}")
        needed = [requirement for requirement in software.requirements if requirement.extra is None]
        yield from _line("packages", ", ".join(map(_package, needed)), longest=4)
    if torch is not None:
        build = "a build for CPUs"
        if torch.cuda is not None:
            build = f"built for CUDA {torch.cuda}, cuDNN {_cudnn(torch.cudnn)}, NCCL {torch.nccl or 'no'}"
        yield from _line("torch", f"{torch.version}, {build}; imported in {torch.import_seconds:.1f} s")
    if facts.nvidia is not None and (facts.nvidia.driver or facts.nvidia.problem):
        yield from _line("NVIDIA driver", facts.nvidia.driver or f"does not answer: {facts.nvidia.problem}")
    if compilers is not None:
        nvcc = f"nvcc {compilers.nvcc}" if compilers.nvcc else "no nvcc"
        ninja = f"ninja {compilers.ninja}" if compilers.ninja else "no ninja"
        yield from _line("compilers", f"{compilers.cxx or 'no C++ compiler'}; {nvcc}; {ninja}")


def _package(requirement: Requirement) -> str:
    if requirement.installed is None:
        return f"{requirement.name} MISSING"
    return f"{requirement.name} {requirement.installed}{'' if requirement.fits else f' (NOT {requirement.specifier})'}"


def _cudnn(version: int | None) -> str:
    return "no" if version is None else f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _devices(facts: Facts) -> Iterator[str]:
    yield from _gpus(facts)
    if facts.processor is not None:
        cpu = facts.processor
        quota = f", of which the control group allows {cpu.quota:g} cores' time" if cpu.quota else ""
        threads = f"; torch starts {facts.torch.threads} threads" if facts.torch else ""
        yield from _line("processor", f"{cpu.name}: {cpu.usable} of {cpu.logical} cores{quota}{threads}")
    if facts.memory is not None:
        memory = facts.memory
        limit = ""
        if memory.limit is not None and memory.limit < memory.total:
            limit = (
                f"; the control group allows {shown_size(memory.limit)}, of which {shown_size(memory.limit_used or 0)} are used"
            )
        yield from _line("memory", f"{shown_size(memory.available)} available of {shown_size(memory.total)}{limit}")
    places = []
    for disk in facts.disks or ():
        note = "" if disk.writable else ", not writable"
        places.append(f"{disk.path} ({disk.purpose}) {shown_size(disk.free)}{note}")
    if facts.shared_memory is not None:
        places.append(f"/dev/shm {shown_size(facts.shared_memory.free)}")
    if places:
        yield from _line("free space", "; ".join(places))
    if facts.limits is not None:
        locked = facts.limits.locked_memory
        shown = "unlimited" if locked is None else shown_size(locked)
        yield from _line("limits", f"{facts.limits.open_files or 'unlimited'} open files, locked memory {shown}")
    yield from _network(facts)


def _gpus(facts: Facts) -> Iterator[str]:
    torch, nvidia = facts.torch, facts.nvidia
    if torch is not None and torch.gpus:
        kinds = Counter((gpu.name, gpu.memory, gpu.capability, gpu.bf16) for gpu in torch.gpus)
        for (name, memory, (major, minor), bf16), number in kinds.items():
            yield from _line(
                "GPUs",
                f"{number} × {name}, {shown_size(memory)}, compute capability {major}.{minor}, {'bf16' if bf16 else 'no bf16'}",
            )
    elif nvidia is not None and nvidia.pci_devices:
        yield from _line("GPUs", f"{nvidia.pci_devices} of NVIDIA, none of which torch can use")
    else:
        yield from _line("GPUs", "none")
    if nvidia is not None and nvidia.gpus:
        used = [f"GPU {gpu.index} {gpu.used_mib / 1024:.1f} GiB" for gpu in nvidia.gpus if is_taken(gpu)]
        links = f"; connected by {', '.join(nvidia.links)}" if nvidia.links else ""
        mig = "; MIG is on" if any(gpu.mig for gpu in nvidia.gpus) else ""
        yield from _line("", f"in use by others: {', '.join(used) or 'nothing'}{links}{mig}")


def _network(facts: Facts) -> Iterator[str]:
    if facts.network is None:
        return
    network = facts.network
    shown = [f"{i.name} {i.address or 'without address'}" for i in network.interfaces if i.up and i.name != "lo"]
    nccl = facts.variable("NCCL_SOCKET_IFNAME") or ", ".join(nccl_interfaces(network)) or "none"
    gloo = facts.variable("GLOO_SOCKET_IFNAME") or gloo_interface(network) or "none (its name leads nowhere)"
    yield from _line("network", f"{', '.join(shown) or 'lo only'}; over sockets NCCL would use {nccl}, gloo {gloo}")
    if network.infiniband:
        ports = Counter(f"{port.state.lower()}, {port.rate}" for port in network.infiniband)
        yield from _line("InfiniBand", "; ".join(f"{number} × {kind}" for kind, number in ports.items()))


def _kernels(facts: Facts) -> Iterator[str]:
    if facts.kernels is None:
        return
    yield f"as training chooses them on {facts.kernels.device} in {facts.kernels.precision}; found, and used or used instead:"
    rows = [*kernel_rows(facts)]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    second = min(second, 34)
    for row in rows:
        start = f"{row.kernel:{first}}  {row.found:{second}}  "
        yield from textwrap.wrap(row.used, WIDTH, initial_indent=start, subsequent_indent=" " * (first + second + 4))


def _ops(facts: Facts) -> Iterator[str]:
    if facts.ops is None:
        return
    yield from _line("by our settings", "nothing: AdamW is torch's, and DeepSpeed's shared-memory op of CPUs is switched off")
    times = ", ".join(f"{name} {seconds} s" for name, seconds in _BUILD_SECONDS.items())
    yield from _line("not needed", f"{times} (to build, on two cores), unless optimizer.implementation is deepspeed")
    yield from _line(
        "by raw settings",
        f"async_io for NVMe offloading, quantizer for ZeRO++: in {facts.ops.folder}; what can be built here: {_buildable(facts)}",
    )
    built = (*facts.ops.prebuilt, *facts.ops.in_folder)
    if built:
        yield from _line("built already", ", ".join(built))


def _buildable(facts: Facts) -> str:
    """Of operations in C++ and in CUDA."""
    compilers, torch = facts.compilers, facts.torch
    if compilers is None or compilers.cxx is None:
        return "nothing (no C++ compiler)"
    if torch is None or torch.cuda is None:
        return "C++"
    if compilers.nvcc is None:
        return "C++, but not CUDA (no nvcc)"
    same = compilers.nvcc.partition(".")[0] == torch.cuda.partition(".")[0]
    return "C++ and CUDA" if same else f"C++, but not CUDA (nvcc {compilers.nvcc}, torch for CUDA {torch.cuda})"


def _optional(facts: Facts) -> Iterator[str]:
    if facts.software is not None:
        extras = [requirement for requirement in facts.software.requirements if requirement.extra is not None]
        there = [f"{needed.name} {needed.installed}" for needed in extras if needed.installed]
        absent = [needed.name for needed in extras if not needed.installed]
        if facts.parts is not None:
            there += [f"{program.name} {program.found}" for program in facts.parts.packages if program.found]
            absent += [program.name for program in facts.parts.packages if not program.found]
        yield from _line("packages", f"{', '.join(there) or 'none'}; absent: {', '.join(absent) or 'none'}")
    if facts.parts is not None:
        there = [program.name for program in facts.parts.commands if program.found]
        absent = [program.name for program in facts.parts.commands if not program.found]
        yield from _line("commands", f"{', '.join(there) or 'none'}; absent: {', '.join(absent) or 'none'}")
        yield from _line("hub cache", f"{facts.parts.hub_cache}{', offline' if facts.parts.hub_offline else ''}")
    if facts.sandbox is not None:
        yield from _line("sandbox", facts.sandbox.problem or "programs that a model wrote can be confined and run")
    if facts.tracking is not None:
        uri, problem = facts.tracking.uri, facts.tracking.problem
        answer = f"does not answer as it should: {problem}" if problem else "answers"
        yield from _line("MLflow", f"{uri} {answer}" if uri else "a file in the output folder (MLFLOW_TRACKING_URI is not set)")
    if facts.prepared is not None:
        yield from _line("corpora", ", ".join(facts.prepared.corpora) or "none prepared in data/")
        yield from _line("tasks", ", ".join(facts.prepared.tasks) or "none prepared in data/tasks/ (procedural ones need none)")


def _environment(facts: Facts) -> Iterator[str]:
    if facts.environment is None:
        return
    shown = [f"{name}={value}" for name, value in facts.environment.shown.items()]
    yield from _line("variables", ", ".join(shown) or "none that matter", longest=4)
    if facts.environment.hidden:
        yield from _line("values hidden", ", ".join(facts.environment.hidden), longest=2)


def _line(label: str, text: str, longest: int = 3) -> Iterator[str]:
    """A labelled text; what does not fit into `longest` lines is cut, and is in the JSON."""
    wrapper = textwrap.TextWrapper(
        WIDTH,
        initial_indent=f"{label:{_LABEL}}  ",
        subsequent_indent=" " * (_LABEL + 2),
        max_lines=longest,
        placeholder=" …",
        break_on_hyphens=False,
    )
    yield from wrapper.wrap(text)


def _item(mark: str, text: str) -> Sequence[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{mark} ", subsequent_indent=" " * (len(mark) + 1), break_on_hyphens=False)
