"""`doctor`: what it says about machines that are not at hand, what it finds on this one, and that it shows no secret."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from megatron_plasticity.launch.doctor import examine as examination
from megatron_plasticity.launch.doctor import host, software, surroundings, torch_probe
from megatron_plasticity.launch.doctor.examine import examine, parse_answers
from megatron_plasticity.launch.doctor.facts import (
    SECTIONS,
    DriverGpu,
    Environment,
    Facts,
    FlashPackage,
    InfinibandPort,
    Interface,
    Network,
    Nvidia,
    Requirement,
    Sandbox,
    SharedMemory,
    TorchGpu,
    Tracking,
)
from megatron_plasticity.launch.doctor.findings import MOST_TIPS, gloo_interface, nccl_interfaces, problems, tips
from megatron_plasticity.launch.doctor.kernels import kernel_rows
from megatron_plasticity.launch.doctor.nvidia import parse_gpus, parse_links
from megatron_plasticity.launch.doctor.page import WIDTH, page
from megatron_plasticity.models import attention as training_attention
from tests.commands import Run
from tests.launch.fabricated_machines import FLASH, GIB, LO, a100_node, attention, broken_cuda, h100_node, laptop

MOST_LINES = 60


def text(facts: Facts) -> str:
    return "\n".join(page(facts, 3.1))


def section(facts: Facts, name: str, **changes: Any) -> Facts:
    """The facts with some of one section changed."""
    return replace(facts, **{name: replace(getattr(facts, name), **changes)})


def with_variables(facts: Facts, **shown: str) -> Facts:
    return replace(facts, environment=Environment(shown, ()))


# --- machines ---


@pytest.mark.parametrize("machine", [laptop, h100_node, a100_node, broken_cuda])
def test_the_page_is_one_page(machine: Callable[[], Facts]) -> None:
    lines = text(machine()).splitlines()
    assert len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= WIDTH
    for heading in ("versions", "devices", "kernels", "built at first use", "optional", "environment"):
        assert any(line.startswith(f"── {heading} ─") for line in lines), heading


def test_a_hopper_node_needs_nothing() -> None:
    facts = h100_node()
    assert problems(facts) == []
    rows = {row.kernel: row for row in kernel_rows(facts)}
    assert rows["attention"] == ("attention", "cuDNN", "head dimension 48, 64, 128")
    assert rows["FlashAttention-2"].used == "not used: cuDNN is 1.2 to 1.7 times as fast"
    assert "86 to 99 %" in rows["FlashAttention-3"].used
    assert rows["AdamW"].found == "torch's, fused"
    shown = text(facts)
    assert "training can work here, on 8 GPUs, in bf16 or fp32" in shown
    assert "8 × NVIDIA H100 80GB HBM3, 80.0 GiB, compute capability 9.0, bf16" in shown
    assert "in use by others: nothing; connected by NV18" in shown
    assert "8 × active, 400 Gb/sec" in shown
    assert [tip for tip in tips(facts) if "Nothing to install for attention" in tip] == tips(facts)


def test_an_ampere_node_without_flash_attn_loses_nothing() -> None:
    facts = a100_node()
    rows = {row.kernel: row for row in kernel_rows(facts)}
    assert rows["attention"].found == "torch's FlashAttention-2"
    assert rows["FlashAttention-2"].used == "SDPA in its place: torch's kernel is FlashAttention-2 too"
    assert rows["FlashAttention-3"].used == "for Hopper only"
    assert not any("cuDNN" in tip for tip in tips(facts))
    used = section(
        facts,
        "kernels",
        attention=attention("", "flash-attention-2"),
        flash_packages=(FlashPackage("flash-attention-2", "2.8.3", None, tuple(range(8, 264, 8))),),
    )
    assert {row.kernel: row for row in kernel_rows(used)}["FlashAttention-2"] == (
        "FlashAttention-2",
        "2.8.3",
        "used, for head dimensions 8 to 256",
    )


def test_a_laptop_trains_on_its_cpu() -> None:
    shown = text(laptop())
    assert "training can work here, on the CPU" in shown
    assert "FlashAttention-2, -3, -4" in shown
    assert problems(laptop()) == []


def test_broken_cuda_is_a_problem_with_what_torch_says() -> None:
    facts = broken_cuda()
    (problem,) = problems(facts)
    assert "too old (found version 11040)" in problem
    assert "driver 580.65.06" in problem
    assert "device=cpu" in problem
    assert "1 problem" in text(facts)
    assert "8 of NVIDIA, none of which torch can use" in text(facts)


def test_what_only_metrics_need_is_no_problem() -> None:
    requirements = (Requirement("nvidia-ml-py", ">=12.535", None, False), Requirement("psutil", ">=6.0", None, False))
    assert problems(section(laptop(), "software", requirements=requirements)) == []
    (problem,) = problems(section(laptop(), "software", requirements=(Requirement("psutil", ">=6.0", "5.9", False),)))
    assert "psutil 5.9" in problem, "what is there has to fit"


def test_hidden_gpus_are_a_choice_and_no_problem() -> None:
    facts = with_variables(broken_cuda(), CUDA_VISIBLE_DEVICES="")
    assert problems(facts) == []
    assert "hides every GPU" in tips(facts)[0]


# --- problems ---


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (section(laptop(), "software", python="3.13.1", python_fits=False), ["Python 3.13.1", "<3.13,>=3.11"]),
        (
            section(
                laptop(),
                "software",
                requirements=(Requirement("mlflow", "<3.18", "3.18.0", False), Requirement("pydantic", ">=2.11", None, False)),
            ),
            ["mlflow 3.18.0 (declared: <3.18)", "pydantic is missing (declared: >=2.11)"],
        ),
        (
            replace(laptop(), torch=None, kernels=None, undetermined={"torch": "ImportError: libcudart.so.13"}),
            ["libcudart.so.13"],
        ),
        (section(laptop(), "torch", gloo=False), ["without gloo"]),
        (section(h100_node(), "torch", nccl=None), ["without NCCL"]),
        (
            section(h100_node(), "torch", gpus=(TorchGpu(0, "Old One", (7, 0), 16 * GIB, False),)),
            ["GPU 0, Old One", "compute capability 7.0", "sm_80"],
        ),
        (
            section(h100_node(), "kernels", attention=(), attention_problem="AcceleratorError: out of memory"),
            ["attention does not run on cuda:0", "out of memory"],
        ),
        (replace(laptop(), ops=None, undetermined={"ops": "DeepSpeed is not installed"}), ["DeepSpeed is not usable"]),
        (
            replace(laptop(), disks=(replace(laptop().disks[1], free=2**20, writable=False),)),  # type: ignore[index]
            ["TMPDIR", "1 MiB free"],
        ),
        (
            replace(laptop(), kernels=None, undetermined={"kernels": "AssertionError: odd"}),
            ["could not be tried: AssertionError"],
        ),
    ],
)
def test_what_is_broken_is_named(facts: Facts, words: list[str]) -> None:
    found = "\n".join(problems(facts))
    for word in words:
        assert word in found
    assert "✗" in text(facts)


@pytest.mark.parametrize(
    ("capability", "runs"), [((8, 0), True), ((8, 9), True), ((9, 0), True), ((12, 1), True), ((7, 5), False)]
)
def test_kernels_run_on_later_minors_and_later_ptx(capability: tuple[int, int], runs: bool) -> None:
    gpu = TorchGpu(0, "GPU", capability, 80 * GIB, True)
    facts = section(h100_node(), "torch", gpus=(gpu,), architectures=("sm_80", "sm_90a", "compute_120"))
    assert (problems(facts) == []) is runs


def test_a_gpu_of_a_later_major_version_needs_its_own_kernels() -> None:
    gpu = TorchGpu(0, "GPU", (10, 0), 80 * GIB, True)
    assert problems(section(h100_node(), "torch", gpus=(gpu,), architectures=("sm_80", "sm_90")))


# --- tips ---

FEW_CORES = replace(laptop().processor, usable=64, quota=2.0)  # type: ignore[type-var]
TAKEN = DriverGpu(3, "NVIDIA H100 80GB HBM3", 80 * 1024, 60 * 1024, False, False)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (replace(laptop(), nvidia=Nvidia(1, None, "no nvidia-smi", (), ())), ["the build for CPUs", "whl/cu130"]),
        (replace(laptop(), processor=FEW_CORES), ["8 threads on 2 usable cores", "OMP_NUM_THREADS=2"]),
        (
            section(h100_node(), "nvidia", gpus=(*h100_node().nvidia.gpus[:3], TAKEN)),  # type: ignore[union-attr]
            ["GPU 3 60 of 80 GiB", "CUDA_VISIBLE_DEVICES=0,1,2"],
        ),
        (section(h100_node(), "nvidia", gpus=(replace(TAKEN, used_mib=0, mig=True),)), ["MIG is on"]),
        (section(h100_node(), "nvidia", gpus=(replace(TAKEN, used_mib=0, exclusive=True),)), ["nvidia-smi -c 0"]),
        (section(h100_node(), "nvidia", links=("PHB", "SYS")), ["no NVLink", "parallel.tensor=1"]),
        (section(h100_node(), "torch", gpus=h100_node().torch.gpus[:2]), ["Of 8 GPUs torch sees 2"]),  # type: ignore[union-attr]
        (section(h100_node(), "torch", gpus=(TorchGpu(0, "V100", (7, 0), GIB, False),)), ["V100 has no bf16", "precision=fp32"]),
        (section(h100_node(), "kernels", attention=attention("")), ["no fused kernel for head dimension 48, 64, 128"]),
        (
            with_variables(section(h100_node(), "kernels", attention=attention(FLASH)), LD_LIBRARY_PATH="/usr/lib"),
            ["cuDNN attention", "LD_LIBRARY_PATH"],
        ),
        (
            section(
                section(h100_node(), "kernels", attention=attention(FLASH)),
                "torch",
                cudnn=91002,
            ),
            ["cuDNN 91002, which is older than 91500"],
        ),
        (
            section(
                h100_node(),
                "kernels",
                flash_packages=(FlashPackage("flash-attention-2", "2.8.3", "ImportError: undefined symbol", ()),),
            ),
            ["flash-attention-2 is installed and does not load (ImportError: undefined symbol)"],
        ),
        (replace(h100_node(), shared_memory=SharedMemory(64 * 2**20, 64 * 2**20, 0, 0)), ["--shm-size", "64 MiB"]),
        (
            replace(laptop(), shared_memory=SharedMemory(GIB, GIB, 340, 22 * GIB)),
            ["22.0 GiB in /dev/shm", "rm /dev/shm/deepspeed_"],
        ),
        (
            replace(h100_node(), disks=(replace(h100_node().disks[0], free=24 * GIB),)),  # type: ignore[index]
            ["one checkpoint of more than 2.1B parameters"],
        ),
        (replace(laptop(), disks=(replace(laptop().disks[0], writable=False),)), ["cannot be written to", "output="]),  # type: ignore[index]
        (section(h100_node(), "memory", limit=64 * GIB, limit_used=GIB), ["64.0 GiB of host memory for 8 GPUs"]),
        (section(h100_node(), "limits", open_files=1024), ["1024 files", "ulimit -n 65536"]),
        (section(h100_node(), "limits", locked_memory=64 * 1024), ["ulimit -l unlimited"]),
        (
            section(h100_node(), "network", infiniband=(InfinibandPort("mlx5_0", 1, "DOWN", "10 Gb/sec"),)),
            ["No port of mlx5_0 is active"],
        ),
        (
            section(
                h100_node(), "network", interfaces=(LO, Interface("eth0", "10.0.0.1", True), Interface("eth1", "10.1.0.1", True))
            ),
            ["eth0, eth1", "NCCL_SOCKET_IFNAME=eth0"],
        ),
        (
            section(h100_node(), "network", host_address="127.0.1.1"),
            ["the name node1 leads to 127.0.1.1", "GLOO_SOCKET_IFNAME=eth0"],
        ),
        (section(laptop(), "parts", foreign_apex="0.9.10dev"), ["pip uninstall apex"]),
        (replace(laptop(), tracking=Tracking("http://mlflow:5000", "refused")), ["http://mlflow:5000", "mlflow sync"]),
        (replace(laptop(), sandbox=Sandbox("no seccomp")), ["no seccomp"]),
        (section(laptop(), "prepared", damaged=("data/x",)), ["Damaged data: data/x"]),
        (
            section(laptop(), "software", requirements=(Requirement("peft", ">=0.17", "0.1", False, "lora"),)),
            ["peft 0.1 (declared: >=0.17)", ".[lora]"],
        ),
        (
            section(laptop(), "software", requirements=(Requirement("math-verify", ">=0.8", None, False, "eval"),)),
            ["Without math-verify"],
        ),
        (
            section(laptop(), "software", requirements=(Requirement("nvidia-ml-py", ">=12.535", None, False),)),
            ["Without nvidia-ml-py", "pip install nvidia-ml-py"],
        ),
        (section(laptop(), "parts", hub_offline=True), ["HF_HUB_OFFLINE"]),
        (with_variables(h100_node(), CUDA_LAUNCH_BLOCKING="1"), ["unset CUDA_LAUNCH_BLOCKING"]),
        (with_variables(h100_node(), NCCL_IB_DISABLE="1"), ["NCCL_IB_DISABLE=1"]),
        (with_variables(h100_node(), NVIDIA_TF32_OVERRIDE="0"), ["NVIDIA_TF32_OVERRIDE"]),
        (with_variables(laptop(), TORCH_DISTRIBUTED_DEBUG="DETAIL"), ["TORCH_DISTRIBUTED_DEBUG"]),
        (laptop(), ["OMP_NUM_THREADS to 8 divided by their number"]),
    ],
)
def test_a_tip_comes_from_a_finding(facts: Facts, words: list[str]) -> None:
    found = [tip for tip in tips(facts) if all(word in tip for word in words)]
    assert len(found) == 1, tips(facts)
    # On the machine without the finding the tip is not given.
    ordinary = h100_node() if facts.torch is not None and facts.torch.gpus else with_variables(laptop(), OMP_NUM_THREADS="4")
    assert found[0] not in tips(ordinary)
    assert max(map(len, text(facts).splitlines())) <= WIDTH


def test_tips_are_few_and_the_weightiest_come_first() -> None:
    facts = with_variables(h100_node(), CUDA_LAUNCH_BLOCKING="1", NCCL_P2P_DISABLE="1", NVIDIA_TF32_OVERRIDE="0")
    facts = section(facts, "processor", quota=4.0)
    facts = section(facts, "network", host_address=None)
    facts = section(facts, "parts", foreign_apex="0.9.10dev", hub_offline=True)
    facts = section(facts, "limits", open_files=256, locked_memory=65536)
    facts = replace(facts, shared_memory=SharedMemory(2**26, 2**26, 3, 2**20), sandbox=Sandbox("no seccomp"))
    found = tips(facts)
    assert len(found) == MOST_TIPS
    assert "OMP_NUM_THREADS=4" in found[0]
    assert "CUDA_LAUNCH_BLOCKING" in found[1]
    assert not any("Nothing to install" in tip for tip in found)
    assert len(text(facts).splitlines()) <= MOST_LINES + MOST_TIPS


# --- what could not be determined ---


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("machine", [laptop, h100_node])
def test_a_missing_section_is_a_line_and_no_crash(machine: Callable[[], Facts], name: str) -> None:
    facts = replace(machine(), **{name: None}, undetermined={name: "OSError: odd"})
    shown = text(facts)
    assert re.search(rf"^{name.replace('_', ' ')} +could not be determined: OSError: odd", shown, re.M)
    assert bool(problems(facts)) == (name in ("software", "torch", "kernels", "ops"))
    tips(facts)


def test_nothing_at_all_can_be_said() -> None:
    facts = Facts(undetermined=dict.fromkeys(SECTIONS, "nobody knows"))
    assert [problem.partition(":")[0] for problem in problems(facts)] == [
        "the installation could not be examined",
        "torch does not work",
        "DeepSpeed is not usable",
    ]
    assert tips(facts) == []
    assert text(facts).count("could not be determined") == len(SECTIONS)


def test_a_probe_that_fails_costs_its_own_section(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("surprise at https://user:hunter22@host")  # pragma: allowlist secret

    monkeypatch.setattr(examination, "_PROBES", {"limits": host.limits, "memory": fail})
    monkeypatch.setattr(examination, "_ask_torch", lambda _: ({}, {}))
    facts = examine()
    assert facts.limits is not None
    assert facts.undetermined == {"memory": "RuntimeError: surprise at https://host"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", r"libcudart\.so\.13: cannot open"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("import time; time.sleep(60)", r"no answer within 2 s"),
        ("import sys; sys.stderr.write('driver exploded'); sys.exit(3)", r"exit code 3 \(driver exploded\)"),
    ],
)
def test_a_torch_that_fails_crashes_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, reason: str) -> None:
    (tmp_path / "torch.py").write_text(body + "\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(examination, "_PROBES", {})
    facts = examine(torch_seconds=2.0 if "sleep" in body else 120.0)
    assert re.search(reason, facts.undetermined["torch"])
    assert any(re.search(reason, problem) for problem in problems(facts))


def test_a_half_made_installation_is_a_problem_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("packaging", "packaging.requirements", "packaging.specifiers", "pydantic", "huggingface_hub", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(examination, "_PROBES", {"software": software.software, "parts": software.parts})
    monkeypatch.setattr(examination, "_ask_torch", lambda _: parse_answers("", "it ended"))
    facts = examine()
    assert "packaging" in problems(facts)[0]
    assert "pydantic" in facts.undetermined["torch"]
    assert "could not be determined" in text(facts)


def test_cuda_that_fails_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise RuntimeError("CUDA error: system not yet initialized")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    found = torch_probe.torch_facts()
    assert (found.cuda_available, found.gpus) == (False, ())
    assert "system not yet initialized" in str(found.cuda_problem)


def test_an_answer_that_was_cut_off_is_missing() -> None:
    whole = json.dumps({"section": "torch", "failure": "odd"})
    found, failures = parse_answers(whole + '\n{"section": "kernels", "val', "it was killed")
    assert found == {}
    assert failures == {"torch": "odd", "kernels": "it was killed"}


# --- probes ---

GPU_LIST = """\
0, NVIDIA H100 80GB HBM3, 81559, 4, Disabled, Default, 580.65.06
1, NVIDIA H100 80GB HBM3, 81559, 61234, Enabled, Exclusive_Process, 580.65.06
2, NVIDIA GB10, [N/A], [N/A], [N/A], Default, 580.65.06
"""
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPXB\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tSYS\tNODE\t0-47\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tPIX\t48-95\t1\t\tN/A
NIC0\tPXB\tNODE\tPIX\t X \t\t\t\t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def test_gpus_of_the_driver() -> None:
    gpus, driver = parse_gpus(GPU_LIST)
    assert driver == "580.65.06"
    assert gpus[0] == DriverGpu(0, "NVIDIA H100 80GB HBM3", 81559, 4, False, False)
    assert (gpus[1].mig, gpus[1].exclusive, gpus[1].used_mib) == (True, True, 61234)
    assert gpus[2].memory_mib == 0
    with pytest.raises(ValueError, match="Unable to determine"):
        parse_gpus("Unable to determine the device handle for GPU0: Unknown Error\n")


def test_links_are_those_between_gpus() -> None:
    assert parse_links(TOPOLOGY) == ("NV18", "SYS")
    assert parse_links("something else") == ()


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["lo", "eth0"], ["eth0"]),
        (["lo", "eth0", "ib0", "ib1"], ["ib0", "ib1"]),
        (["lo", "docker0", "eth0", "veth1"], ["eth0", "veth1"]),
        (["lo", "docker0"], ["docker0"]),
        (["lo"], ["lo"]),
        ([], []),
    ],
)
def test_the_interfaces_of_nccl(names: list[str], chosen: list[str]) -> None:
    interfaces = [Interface(name, "10.0.0.1", True) for name in names]
    idle = (Interface("ib7", None, True), Interface("ib8", "10.0.0.2", False))
    assert nccl_interfaces(Network("a", None, (*interfaces, *idle), ())) == chosen


@pytest.mark.parametrize(("address", "chosen"), [("10.0.0.1", "eth0"), ("127.0.1.1", "lo"), ("10.9.9.9", None), (None, None)])
def test_the_interface_of_gloo(address: str | None, chosen: str | None) -> None:
    assert gloo_interface(Network("a", address, (LO, Interface("eth0", "10.0.0.1", True)), ())) == chosen


def fake_tree(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


@pytest.mark.parametrize(
    ("files", "membership", "mount", "quota", "limit"),
    [
        (
            {"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000", "a/b/memory.max": "max", "a/memory.max": "1073741824"},
            "0::/a/b",
            "1 1 0:1 / {root} rw - cgroup2 cgroup2 rw",
            4.0,
            GIB,
        ),
        (
            {
                "cpu.cfs_quota_us": "150000",
                "cpu.cfs_period_us": "100000",
                "memory.limit_in_bytes": "9223372036854771712",
                "memory.usage_in_bytes": "5",
            },
            "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1",  # the host's path, which a container does not see
            "1 1 0:1 / {root} rw - cgroup cgroup rw,cpu,cpuacct\n2 1 0:2 / {root} rw - cgroup cgroup rw,memory",
            1.5,
            None,
        ),
        (
            {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"},
            "1:cpu:/",
            "1 1 0:1 / {root} rw - cgroup c rw,cpu",
            None,
            None,
        ),
        ({}, "0::/", "", None, None),
    ],
)
def test_limits_of_control_groups(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    membership: str,
    mount: str,
    quota: float | None,
    limit: int | None,
) -> None:
    root = tmp_path / "cgroup"
    root.mkdir()
    fake_tree(root, files)
    fake_tree(
        tmp_path / "proc",
        {
            "self/cgroup": membership + "\n",
            "self/mountinfo": mount.format(root=root) + "\n" if mount else "",
            "meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n",
            "cpuinfo": "processor : 0\nmodel name : Some CPU\n",
        },
    )
    monkeypatch.setattr(host, "_PROC", tmp_path / "proc")
    assert host.processor().name == "Some CPU"
    assert host.processor().quota == quota
    assert host.memory().limit == limit
    assert host.memory().usable == (limit or 16 * GIB)


def test_what_deepspeed_left_in_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tree(tmp_path, {"deepspeed_allreduce_buffer_0_127.0.0.1_29500_1": "x" * 70, "sem.other": "y"})
    monkeypatch.setattr(host, "_SHARED_MEMORY", tmp_path)
    assert (host.shared_memory().leaked_files, host.shared_memory().leaked_bytes) == (1, 70)


def test_infiniband_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = "class/infiniband/mlx5_0/ports/1/"
    fake_tree(tmp_path, {port + "state": "4: ACTIVE\n", port + "rate": "400 Gb/sec (4X NDR)\n"})
    monkeypatch.setattr(host, "_SYS", tmp_path)
    assert host.network().infiniband == (InfinibandPort("mlx5_0", 1, "ACTIVE", "400 Gb/sec"),)


def test_only_nvidias_apex_is_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tree(tmp_path / "index", {"apex/__init__.py": "raise RuntimeError('imported')", "apex/interfaces/__init__.py": ""})
    fake_tree(
        tmp_path / "nvidia",
        {"apex/__init__.py": "", "apex/optimizers/fused_adam.py": "", "apex/multi_tensor_apply/__init__.py": ""},
    )
    assert software.is_nvidia_apex(tmp_path / "nvidia/apex")
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "index"))
    assert software.parts().foreign_apex == "unknown version"
    assert torch_probe._apex(torch.device("cpu")) == (None, None)


def test_requirements_name_what_does_not_fit() -> None:
    lines: list[tuple[str, str | None]] = [("torch<2.0", None), ("numpy>=1.0", None), ("no-such-package>=3", "gpu")]
    found = {requirement.name: requirement for requirement in software.requirements(lines)}
    assert [found[name].fits for name in ("torch", "numpy", "no-such-package")] == [False, True, False]
    assert found["no-such-package"].installed is None
    assert found["no-such-package"].extra == "gpu"


def test_an_installed_package_declares_what_its_checkout_does(tmp_path: Path) -> None:
    here, python = software.declared_lines(Path(software.megatron_plasticity.__file__).resolve().parent)
    elsewhere, declared_python = software.declared_lines(tmp_path / "site-packages" / "megatron_plasticity")
    assert {(line.partition(">")[0], extra) for line, extra in here} >= {("torch", None), ("peft", "lora")}
    assert {extra for _, extra in elsewhere} == {extra for _, extra in here}
    assert python
    assert declared_python


def test_an_operation_that_was_built_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tree(
        tmp_path,
        {
            "deepspeed/__init__.py": "raise RuntimeError('imported')",
            "deepspeed/git_version_info_installed.py": "version='1'\ninstalled_ops={'fused_adam': True, 'async_io': False}\n",
            "extensions/py311_cpu/cpu_adam/cpu_adam.so": "",
        },
    )
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    found = surroundings.ops()
    assert (found.prebuilt, found.not_built, found.in_folder) == (("fused_adam",), ("async_io",), ("cpu_adam",))


@pytest.fixture
def server() -> Iterator[str]:
    """Address of a web server that knows /health alone, and wants a password under /login."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert "Authorization" not in self.headers
            self.send_response({"/health": 200, "/login/health": 401}.get(self.path, 403))
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    running = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"127.0.0.1:{running.server_port}"
    running.shutdown()
    thread.join()
    running.server_close()


def test_a_tracking_server_is_asked_without_credentials(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"http://ada:hunter22@{server}"  # pragma: allowlist secret
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert surroundings.tracking() == Tracking(f"http://{server}", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{address}/elsewhere?token=hunter22")
    found = surroundings.tracking()
    assert found.uri == f"http://{server}/elsewhere"
    assert found.problem == "HTTP 403 from it, or from a proxy on the way"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{address}/login")
    assert surroundings.tracking().problem is None


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("http://127.0.0.1:9", "refused"),
        ("postgresql://ada:hunter22@127.0.0.1:9/mlflow", "refused"),  # pragma: allowlist secret
        ("sqlite:////no/such/folder/mlflow.db", "/no/such/folder"),
        ("./mlruns", "sqlite:///"),
        ("file:///tmp/mlruns", "sqlite:///"),
    ],
)
def test_a_tracking_store_that_does_not_answer(uri: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    found = surroundings.tracking()
    assert problem in str(found.problem)
    assert "hunter22" not in f"{found.uri}{found.problem}"


def test_an_unknown_kind_of_tracking_store_is_not_called_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks")
    with pytest.raises(LookupError, match="databricks"):
        surroundings.tracking()


def test_no_tracking_server_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert surroundings.tracking() == Tracking(None, None)


# --- kernels, asked of the code that training uses ---


def test_attention_is_that_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {row.kernel: row for row in kernel_rows(replace(laptop(), kernels=torch_probe.kernels()))}
    assert before["attention"].found == "torch's fused CPU kernel"
    assert before["RMSNorm"].found == "torch's, of several kernels"
    assert before["AdamW"].found == "torch's"

    def eager(query: Any, key: Any, value: Any, mask: Any, _: str) -> Any:
        return training_attention._eager(query, key, value, mask)

    monkeypatch.setattr(training_attention, "attend", eager)
    after = {row.kernel: row for row in kernel_rows(replace(laptop(), kernels=torch_probe.kernels()))}
    assert after["attention"].found.startswith("no fused kernel")


def test_the_optimizer_is_that_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros, real = torch.zeros, torch.optim.AdamW
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    assert torch_probe._adamw_is_fused(torch.device("cuda"))
    assert not torch_probe._adamw_is_fused(torch.device("cpu"))
    assert torch.optim.AdamW is real


def test_a_flash_package_is_used_where_training_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tree(
        tmp_path, {"flash_attn_interface.py": "def flash_attn_func(): ...\n", "flash_attn.py": "raise ImportError('symbol')\n"}
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(training_attention, "_loaded", {})
    try:
        found = {p.name: p for p in torch_probe._flash_packages(torch.device("cuda", 0), torch.bfloat16)}
    finally:
        for name in ("flash_attn_interface", "flash_attn"):
            sys.modules.pop(name, None)
    assert found["flash-attention-3"].head_dims == tuple(range(8, 264, 8))
    assert found["flash-attention-2"].head_dims == ()
    assert "symbol" in str(found["flash-attention-2"].problem)
    assert "flash-attention-4" not in found


def test_gpus_as_torch_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA V100", major=7, minor=0, total_memory=16 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])
    found = torch_probe.torch_facts()
    assert found.gpus == tuple(TorchGpu(index, "NVIDIA V100", (7, 0), 16 * GIB, False) for index in range(2))
    assert found.architectures == ("sm_80",)


# --- this machine ---

SECRETS = {
    "HF_TOKEN": "hf_planted0123456789abcdefghijklmnop",  # pragma: allowlist secret
    "MLFLOW_TRACKING_URI": "http://ada:plantedpassword1@127.0.0.1:9",  # pragma: allowlist secret
    "MLFLOW_TRACKING_TOKEN": "plantedtoken2",
    "AWS_SECRET_ACCESS_KEY": "plantedkey3",  # pragma: allowlist secret
    "NCCL_AUTH_TOKEN": "plantedtoken4",
    "DS_STRANGE": "planted5abcdefghijklmnopqrstuvw0123456789",  # pragma: allowlist secret
    "HF_HUB_STRANGE": "planted6",
    "NCCL_NET_PLUGIN": "https://ada:planted7@host/x",  # pragma: allowlist secret
    "OTHER_PASSWORD": "planted8",  # pragma: allowlist secret
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the real command says about this machine, in JSON, with secrets in its environment."""
    command = [sys.executable, "-m", "megatron_plasticity", "doctor", "--json"]
    environment = {**os.environ, **SECRETS, "NCCL_DEBUG": "WARN", "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(
        command, env=environment, cwd=tmp_path_factory.mktemp("cwd"), capture_output=True, text=True, timeout=250
    )
    assert ended.stderr == ""
    said = json.loads(ended.stdout)
    assert ended.returncode == (1 if said["problems"] else 0)
    return {"output": ended.stdout, **said}


def test_this_machine_can_train(here: dict[str, Any]) -> None:
    assert here["format"] == 1
    assert here["problems"] == []
    assert list(here["facts"]) == [*SECTIONS, "undetermined"]
    assert here["facts"]["undetermined"] == {}
    assert here["facts"]["torch"]["version"] == torch.__version__
    assert here["facts"]["processor"]["usable"] == len(os.sched_getaffinity(0))
    assert here["facts"]["kernels"]["attention"]


def test_planted_secrets_do_not_appear(here: dict[str, Any]) -> None:
    facts = TypeAdapter(Facts).validate_python(here["facts"])
    shown = text(facts)
    for output in (here["output"], shown):
        assert "plantedpassword" not in output
        assert not re.search(r"planted\w*\d", output)
        assert "NCCL_AUTH_TOKEN" in output
        assert "HF_TOKEN" in output
    assert facts.variable("NCCL_DEBUG") == "WARN"
    assert facts.variable("NCCL_NET_PLUGIN") == "https://host/x"
    assert facts.tracking is not None
    assert facts.tracking.uri == "http://127.0.0.1:9"
    assert "refused" in str(facts.tracking.problem)
    assert "OTHER_PASSWORD" not in here["output"]


@pytest.mark.parametrize(("machine", "code"), [(h100_node, 0), (broken_cuda, 1)])
def test_the_command_prints_the_page_and_says_by_its_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, machine: Callable[[], Facts], code: int
) -> None:
    monkeypatch.setattr(examination, "examine", machine)
    ended, out, err = run("doctor")
    assert (ended, err) == (code, "")
    assert out.splitlines()[1:] == text(machine()).splitlines()[1:]
    assert re.match(r"megatron-plasticity on node1, examined in 0\.\d s$", out.splitlines()[0])
    ended, out, _ = run("doctor", "--json")
    assert ended == code
    assert TypeAdapter(Facts).validate_python(json.loads(out)["facts"]) == machine()


def test_the_sections_are_documented(repository: Path) -> None:
    documented = (repository / "docs/doctor.md").read_text(encoding="utf-8")
    for name in (*SECTIONS, "undetermined"):
        assert f"`{name}`" in documented, name
