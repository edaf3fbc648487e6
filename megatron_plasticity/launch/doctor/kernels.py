"""The table of kernels: what was found, and what is used, or used in its place, and at what cost.

What is chosen was asked of the code that chooses (`torch_probe.py`). The comparisons are published measurements on an H100 or
H200, in bf16 at 2,048 tokens and more; docs/doctor.md has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron_plasticity.launch.doctor.facts import AttentionKernel, Facts, FlashPackage, Kernels

_OPERATIONS = {
    "_scaled_dot_product_cudnn_attention": "cuDNN",
    "_scaled_dot_product_flash_attention": "torch's FlashAttention-2",
    "_scaled_dot_product_efficient_attention": "torch's memory-efficient kernel",
    "_scaled_dot_product_flash_attention_for_cpu": "torch's fused CPU kernel",
    "_scaled_dot_product_fused_attention_overrideable": "a fused kernel of the device",
    "_scaled_dot_product_unknown": "SDPA, with an unknown kernel",
}
UNFUSED = "no fused kernel (scores are written to memory)"
# What a person may expect to be used: name, distribution, why it is not.
_NEVER_USED = (
    ("Triton", "triton", "nothing of ours is compiled"),
    ("Liger", "liger-kernel", "our cross entropy saves the same memory"),
    ("Transformer Engine", "transformer-engine", "FP8 would change the results"),
)


class Row(NamedTuple):
    kernel: str
    found: str
    used: str


def kernel_name(kernel: AttentionKernel) -> str:
    """What ran, as a person calls it."""
    if kernel.backend != "sdpa":
        return kernel.backend
    names = [_OPERATIONS.get(operation, operation) for operation in kernel.operations]
    return " and ".join(names) or UNFUSED


def attention_kernels(kernels: Kernels) -> dict[str, str]:
    """What runs → for which heads."""
    cases: dict[str, list[AttentionKernel]] = {}
    for kernel in kernels.attention:
        cases.setdefault(kernel_name(kernel), []).append(kernel)
    return {name: _heads(of_name, kernels.attention) for name, of_name in cases.items()}


def _heads(cases: list[AttentionKernel], every: tuple[AttentionKernel, ...]) -> str:
    """For which heads these cases are; how they are grouped is said only where it makes a difference."""
    by_grouping: dict[str, list[int]] = {}
    for head_dim in dict.fromkeys(case.head_dim for case in every):
        groupings = {case.grouped for case in cases if case.head_dim == head_dim}
        if groupings:
            alike = groupings == {case.grouped for case in every if case.head_dim == head_dim}
            which = "" if alike else " with grouped queries" if groupings == {True} else " without grouped queries"
            by_grouping.setdefault(which, []).append(head_dim)
    return "; ".join(f"head dimension {', '.join(map(str, dims))}{which}" for which, dims in by_grouping.items())


def kernel_rows(facts: Facts) -> Iterator[Row]:
    """One row per kernel that a person may look for. Needs `facts.kernels`."""
    kernels, parts = facts.kernels, facts.parts
    assert kernels is not None
    for what, heads in attention_kernels(kernels).items():
        yield Row("attention", what, heads)
    if kernels.attention_problem:
        yield Row("attention", "does not run", kernels.attention_problem)
    yield from _flash_rows(kernels, _major(facts))
    yield Row("RMSNorm", "torch's fused kernel" if kernels.norm_fused else "torch's, of several kernels", "always")
    yield Row("cross entropy", "our own", "fused with the head: never all logits of a micro-batch")
    yield Row("AdamW", f"torch's{', fused' if kernels.optimizer_fused else ''}", "always, unless another is asked for")
    yield Row("NVIDIA apex", _apex_found(facts), _use_of_apex(kernels))
    versions = {} if parts is None else {program.name: program.found for program in parts.packages}
    for name, distribution, why in _NEVER_USED:
        if versions.get(distribution):
            yield Row(name, str(versions[distribution]), f"not used: {why}")
    absent = {name: why for name, distribution, why in _NEVER_USED if not versions.get(distribution)}
    if absent:
        yield Row(", ".join(absent), "no", f"not used: {'; '.join(absent.values())}")


def _flash_rows(kernels: Kernels, major: int | None) -> Iterator[Row]:
    """Packages of which the same is to be said share a row."""
    packages = {package.name: package for package in kernels.flash_packages}
    said: dict[tuple[str, str], list[str]] = {}
    for version in ("2", "3", "4"):
        package = packages.get(f"flash-attention-{version}")
        said.setdefault((_found(package), _use_of_flash(version, package, kernels, major)), []).append(version)
    for (found, use), versions in said.items():
        yield Row(f"FlashAttention-{', -'.join(versions)}", found, use)


def _found(package: FlashPackage | None) -> str:
    if package is None:
        return "no"
    return f"{package.version or 'yes'}{', does not load' if package.problem else ''}"


def _use_of_flash(version: str, package: FlashPackage | None, kernels: Kernels, major: int | None) -> str:
    if package is not None and package.head_dims:
        least, greatest = package.head_dims[0], package.head_dims[-1]
        every = len(package.head_dims) == (greatest - least) // 8 + 1
        return f"used, for head dimensions {f'{least} to {greatest}' if every else ', '.join(map(str, package.head_dims))}"
    if major is None:
        return "for CUDA only"
    runs_cudnn = "cuDNN" in attention_kernels(kernels)
    if version == "4":
        if major not in (9, 10):
            return "for Hopper and Blackwell only"
        if package is None:
            return "cuDNN in its place: 1 to 3 % more are expected of it" if runs_cudnn else "would be used"
        return (
            "not used: it does not load" if package.problem else "not used: another goes before it, or the version does not fit"
        )
    if version == "3":
        if major != 9:
            return "for Hopper only"
        return "cuDNN in its place has 86 to 99 % of its speed" if runs_cudnn else "would be used"
    if major == 8:
        return "SDPA in its place: torch's kernel is FlashAttention-2 too" if package is None else "not used: it does not load"
    if major == 9:
        return "not used: cuDNN is 1.2 to 1.7 times as fast" if runs_cudnn else "not used on Hopper"
    return "not used on this GPU"


def _apex_found(facts: Facts) -> str:
    assert facts.kernels is not None
    if facts.parts is not None and facts.parts.foreign_apex is not None:
        return f"no ({facts.parts.foreign_apex} is not NVIDIA's)"
    return facts.kernels.apex or "no"


def _use_of_apex(kernels: Kernels) -> str:
    if kernels.apex is None:
        return "torch's AdamW computes the same"
    if kernels.apex_problem is not None:
        return f"cannot be used: {kernels.apex_problem}"
    return "with optimizer.implementation=apex"


def _major(facts: Facts) -> int | None:
    """Major compute capability of the GPU that was asked; None on a CPU."""
    if facts.kernels is None or not facts.kernels.device.startswith("cuda") or facts.torch is None or not facts.torch.gpus:
        return None
    return facts.torch.gpus[0].capability[0]
