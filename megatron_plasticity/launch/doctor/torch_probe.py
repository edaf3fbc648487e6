"""Asks torch, and the code that training uses, what they do on this machine: in a process of its own.

CUDA can hang, and a package that was built for another torch can crash the interpreter. So this runs as
`python -m megatron_plasticity.launch.doctor.torch_probe`, and writes one line of JSON per section as soon as it knows it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from megatron_plasticity.launch.doctor.facts import AttentionKernel, FlashPackage, Kernels, Torch, TorchGpu
from megatron_plasticity.launch.doctor.probing import one_line, redacted
from megatron_plasticity.launch.doctor.software import apex_folder, is_nvidia_apex

if TYPE_CHECKING:
    import torch

HEAD_DIMS = (48, 64, 128)
"""Those of the paper's models."""
_ALL_HEAD_DIMS = range(8, 264, 8)
_POSITIONS = 256


def main() -> None:
    """Write `{"section": …, "value": …}` or `{"section": …, "failure": …}` lines to the standard output."""
    # Whatever libraries print goes to the errors, so that the lines stay alone.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for section, probe in (("torch", torch_facts), ("kernels", kernels)):
        _write(channel, section, probe)


def _write(channel: Any, section: str, probe: Callable[[], Any]) -> None:
    try:
        line = {"section": section, "value": dataclasses.asdict(probe())}
    except Exception as error:
        line = {"section": section, "failure": redacted(one_line(error))}
    channel.write(json.dumps(line) + "\n")
    channel.flush()


def torch_facts() -> Torch:
    """What was built into torch, and which GPUs it can use."""
    started = time.perf_counter()
    import torch
    import torch.distributed

    seconds = time.perf_counter() - started
    distributed = torch.distributed.is_available()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            available, gpus, error = torch.cuda.is_available(), tuple(_gpus()), None
        except Exception as raised:
            available, gpus, error = False, (), one_line(raised)
    said = (" ".join(str(warning.message).split()) for warning in caught)
    problem = error or next((text for text in said if "CUDA" in text), None)
    if not available and problem is None and torch.version.cuda is not None:
        problem = "torch sees no CUDA device"
    nccl = None
    if distributed and torch.distributed.is_nccl_available():
        nccl = "unknown version"
        with contextlib.suppress(Exception):
            from torch.cuda import nccl as library

            nccl = ".".join(map(str, library.version()))
    return Torch(
        version=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if torch.version.cuda else None,
        nccl=nccl,
        gloo=distributed and torch.distributed.is_gloo_available(),
        threads=torch.get_num_threads(),
        cuda_available=available,
        cuda_problem=None if available else problem,
        gpus=gpus,
        architectures=tuple(torch.cuda.get_arch_list()) if available else (),
        import_seconds=round(seconds, 2),
    )


def _gpus() -> Iterator[TorchGpu]:
    import torch

    if not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)  # makes no context, which would take memory on every GPU
        # By the hardware: torch also says yes where it would emulate bf16.
        yield TorchGpu(
            index,
            properties.name,
            (properties.major, properties.minor),
            properties.total_memory,
            properties.major >= 8,
        )


def kernels() -> Kernels:
    """What training's own code chooses for attention, norms and the optimizer, found by running it on small tensors."""
    import torch

    from megatron_plasticity.config.training import EngineConfig
    from megatron_plasticity.parallel.grid import resolve_device

    device = resolve_device("auto")
    precision = EngineConfig.model_fields["precision"].default
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    attention: tuple[AttentionKernel, ...] = ()
    problem = None
    try:
        attention = tuple(_attention(device, dtype, head_dim, grouped) for head_dim in HEAD_DIMS for grouped in (True, False))
    except Exception as error:
        problem = redacted(one_line(error))
    apex, apex_problem = _apex(device)
    return Kernels(
        device=str(device),
        precision=precision,
        attention=attention,
        attention_problem=problem,
        flash_packages=tuple(_flash_packages(device, dtype)),
        norm_fused=_norm_is_fused(device, dtype),
        optimizer_fused=_adamw_is_fused(device),
        apex=apex,
        apex_problem=apex_problem,
    )


def _attention(device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool) -> AttentionKernel:
    """What runs, by running it. Inputs need gradients, as in training: not every kernel has a backward pass for every shape."""
    import torch

    from megatron_plasticity.models.attention import attend, resolved_backend

    heads = (8, 1 if grouped else 8, 1 if grouped else 8)
    query, key, value = (torch.zeros(1, n, _POSITIONS, head_dim, device=device, dtype=dtype, requires_grad=True) for n in heads)
    attend(query, key, value, None, "auto")
    seen = _operations(lambda: attend(query, key, value, None, "auto"))
    fused = tuple(dict.fromkeys(name for name in seen if name.startswith("_scaled_dot_product_") and not name.endswith("_math")))
    return AttentionKernel(head_dim, grouped, resolved_backend("auto", device, dtype, head_dim), fused)


def _norm_is_fused(device: torch.device, dtype: torch.dtype) -> bool:
    import torch

    from megatron_plasticity.parallel.tensor import SINGLE, RMSNorm

    norm = RMSNorm(128, 1e-5, SINGLE).to(device=device, dtype=dtype)
    x = torch.zeros(4, 128, device=device, dtype=dtype, requires_grad=True)
    seen = _operations(lambda: norm(x))
    return "_fused_rms_norm" in seen and "rsqrt" not in seen  # the latter is what it falls apart into where there is no kernel


def _operations(call: Callable[[], object]) -> list[str]:
    """Names of torch's operations that run in a call, without `aten::`."""
    from torch.autograd.profiler import profile

    try:
        profiled = profile()
        with profiled:
            call()
        return [event.name.removeprefix("aten::") for event in profiled.function_events or ()]
    except Exception:  # the call itself has been tried before
        return ["_scaled_dot_product_unknown"]


@dataclasses.dataclass
class _AdamWAsIfMade:
    """Stands in for torch's, whose making imports torch's compiler, for one and a half seconds."""

    groups: Any
    lr: float
    betas: tuple[float, float]
    eps: float
    fused: bool = False


def _adamw_is_fused(device: torch.device) -> bool:
    import torch

    real = torch.optim.AdamW
    torch.optim.AdamW = _AdamWAsIfMade  # type: ignore[misc]
    try:
        return _adamw(device, "torch").fused
    finally:
        torch.optim.AdamW = real


def _adamw(device: torch.device, implementation: str) -> Any:
    import torch

    from megatron_plasticity.config.training import OptimizerConfig
    from megatron_plasticity.optim.adamw import make_adamw

    groups = [{"params": [torch.nn.Parameter(torch.zeros(8, device=device))], "weight_decay": 0.1}]
    config = OptimizerConfig.model_validate({"learning_rate": 1e-3, "weight_decay": 0.1, "implementation": implementation})
    return make_adamw(groups, config, device)


def _apex(device: torch.device) -> tuple[str | None, str | None]:
    """Version of NVIDIA apex, and why its optimizer cannot be used."""
    folder = apex_folder()
    if folder is None or not is_nvidia_apex(folder):
        return None, None
    version = _version("apex") or "unknown version"
    if device.type != "cuda":
        return version, "its kernels are for CUDA"
    try:
        _adamw(device, "apex")
    except Exception as error:  # a UserError of ours, or what apex raises without its CUDA extensions
        return version, one_line(error)
    return version, None


def _flash_packages(device: torch.device, dtype: torch.dtype) -> Iterator[FlashPackage]:
    from megatron_plasticity.models.attention import FLASH_PACKAGES, resolved_backend

    chosen = {head_dim: resolved_backend("auto", device, dtype, head_dim) for head_dim in _ALL_HEAD_DIMS}
    for package in FLASH_PACKAGES:
        name, module, distribution = package.name, package.module, package.distribution
        problem = None
        try:
            # Looking for a sub-module imports the package around it, which need not be there.
            there = importlib.util.find_spec(module) is not None
        except Exception as error:
            there, problem = _version(distribution) is not None, one_line(error)
        if there and problem is None:
            try:
                importlib.import_module(module)
            except Exception as error:
                problem = one_line(error)
        if there:
            head_dims = tuple(head_dim for head_dim, backend in chosen.items() if backend == name)
            yield FlashPackage(name, _version(distribution), problem, head_dims)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
