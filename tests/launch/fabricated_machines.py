"""Machines that are not at hand, as `doctor` would see them."""

from __future__ import annotations

from dataclasses import replace

from megatron_plasticity.launch.doctor.facts import (
    AttentionKernel,
    CompiledOps,
    Compilers,
    Disk,
    DriverGpu,
    Environment,
    Facts,
    InfinibandPort,
    Interface,
    Kernels,
    Limits,
    Memory,
    Network,
    Nvidia,
    Parts,
    Prepared,
    Processor,
    Program,
    Requirement,
    Sandbox,
    SharedMemory,
    Software,
    Torch,
    TorchGpu,
    Tracking,
)

GIB = 2**30
LO = Interface("lo", "127.0.0.1", True)
CUDNN = "_scaled_dot_product_cudnn_attention"
FLASH = "_scaled_dot_product_flash_attention"
CPU = "_scaled_dot_product_flash_attention_for_cpu"

_NEEDED = (
    ("torch", ">=2.11", "2.13.0"),
    ("deepspeed", "<0.20,>=0.19.8", "0.19.8"),
    ("transformers", ">=5.17", "5.23.0"),
    ("mlflow", "<3.18,>=3.17", "3.17.2"),
)
_EXTRA = (
    ("flash-attn", ">=2.8", None, "gpu"),
    ("math-verify", ">=0.8", "0.9.0", "eval"),
    ("peft", ">=0.17", "0.21.2", "lora"),
)


def attention(operation: str, backend: str = "sdpa") -> tuple[AttentionKernel, ...]:
    """The same kernel for all heads."""
    operations = (operation,) if operation else ()
    return tuple(AttentionKernel(dim, grouped, backend, operations) for dim in (48, 64, 128) for grouped in (True, False))


def laptop() -> Facts:
    """Eight cores, no GPU, nothing unusual."""
    requirements = [Requirement(name, specifier, version, True) for name, specifier, version in _NEEDED]
    requirements += [Requirement(name, spec, version, bool(version), extra) for name, spec, version, extra in _EXTRA]
    optional = ("vllm", "nvidia-ml-py", "psutil", "triton", "liger-kernel", "transformer-engine")
    return Facts(
        software=Software(
            "3.12.3", "<3.13,>=3.11", True, "/home/ada/p/.venv/bin/python", "0.1.0", "/home/ada/p/megatron_plasticity",
            "0123456789", False, tuple(requirements),
        ),
        compilers=Compilers("c++ (GCC) 13.2.0", None, None, "1.13.2"),
        processor=Processor("Some Laptop CPU", 8, 8, None),
        memory=Memory(16 * GIB, 12 * GIB, None, None),
        disks=(
            Disk("working folder", "/home/ada/p", 500 * GIB, 200 * GIB, True),
            Disk("temporary", "/tmp", 500 * GIB, 200 * GIB, True),
        ),
        shared_memory=SharedMemory(8 * GIB, 8 * GIB, 0, 0),
        limits=Limits(1024, 1048576, 8 * 2**20),
        network=Network("laptop", "192.168.1.5", (LO, Interface("wlan0", "192.168.1.5", True)), ()),
        nvidia=Nvidia(0, None, None, (), ()),
        torch=Torch("2.13.0+cpu", None, None, None, True, 8, False, None, (), (), 1.3),
        kernels=Kernels("cpu", "bf16", attention(CPU), None, (), False, False, None, None),
        ops=CompiledOps((), ("async_io", "cpu_adam", "fused_adam"), "/home/ada/.cache/torch_extensions", ()),
        parts=Parts(
            tuple(Program(name, "7.2.2" if name == "psutil" else None) for name in optional),
            (Program("deepspeed", "/home/ada/p/.venv/bin/deepspeed"), Program("ssh", "/usr/bin/ssh"), Program("srun", None)),
            None,
            "/home/ada/.cache/huggingface/hub",
            False,
        ),
        sandbox=Sandbox(None),
        tracking=Tracking(None, None),
        prepared=Prepared(("quickstart-0123456789 (105,975 tokens)",), ("gsm8k",), ()),
        environment=Environment({}, ()),
    )  # fmt: skip


def gpu_node(name: str, capability: tuple[int, int], gibibytes: int, operation: str) -> Facts:
    """Eight equal GPUs on NVLink, in a cluster with InfiniBand."""
    facts = laptop()
    assert facts.parts is not None
    gpus = tuple(TorchGpu(index, name, capability, gibibytes * GIB, True) for index in range(8))
    driver = tuple(DriverGpu(index, name, gibibytes * 1024, 4, False, False) for index in range(8))
    eth0 = Interface("eth0", "10.0.0.1", True)
    ports = tuple(InfinibandPort(f"mlx5_{index}", 1, "ACTIVE", "400 Gb/sec") for index in range(8))
    return replace(
        facts,
        compilers=Compilers("c++ (GCC) 13.2.0", "13.0", "/usr/local/cuda", "1.13.2"),
        processor=Processor("Some Server CPU", 224, 224, None),
        memory=Memory(2048 * GIB, 2000 * GIB, None, None),
        disks=(
            Disk("working folder", "/scratch/ada", 10000 * GIB, 6000 * GIB, True),
            Disk("temporary", "/tmp", 90 * GIB, 80 * GIB, True),
        ),
        shared_memory=SharedMemory(1024 * GIB, 1024 * GIB, 0, 0),
        limits=Limits(65536, 1048576, None),
        network=Network("node1", "10.0.0.1", (LO, eth0, Interface("docker0", "172.17.0.1", True)), ports),
        nvidia=Nvidia(8, "580.65.06", None, driver, ("NV18",)),
        torch=Torch(
            "2.13.0+cu130", "13.0", 91500, "2.28.9", True, 112, True, None, gpus, ("sm_80", "sm_90", "sm_100", "compute_120"), 2.6
        ),
        kernels=Kernels("cuda:0", "bf16", attention(operation), None, (), True, True, None, None),
        parts=replace(facts.parts, packages=(*facts.parts.packages[:3], Program("triton", "3.9.0"), *facts.parts.packages[4:])),
    )  # fmt: skip


def h100_node() -> Facts:
    return gpu_node("NVIDIA H100 80GB HBM3", (9, 0), 80, CUDNN)


def a100_node() -> Facts:
    """Without flash-attn."""
    return gpu_node("NVIDIA A100-SXM4-80GB", (8, 0), 80, FLASH)


def broken_cuda() -> Facts:
    """The H100 node with a driver that is too old for torch."""
    facts = h100_node()
    assert facts.torch is not None
    why = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)."
    torch = replace(facts.torch, cuda_available=False, cuda_problem=why, gpus=(), architectures=())
    return replace(facts, torch=torch, kernels=laptop().kernels)
