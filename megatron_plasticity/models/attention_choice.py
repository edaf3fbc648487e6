"""Which attention kernel a training run gets, and why not a faster one; torch itself is asked which of its kernels it takes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import AttentionBackend, EngineConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.attention import FLASH_PACKAGES, SDPA_KERNELS, flash_misfit, resolved_backend

LEAST_CUDNN = 91501
"""cuDNN before 9.15.1 computes wrong gradients for lengths that are no multiple of 128 (pytorch#169849)."""
_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "FlashAttention-2 of torch",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient kernel of torch",
    SDPBackend.MATH: "math kernel of torch",
    SDPBackend.OVERRIDEABLE: "kernel of the device",
}
_POSITIONS = 256


@dataclass(frozen=True)
class AttentionChoice:
    """The kernels of a run's attention, forward and backward."""

    backend: AttentionBackend
    """What `attend` is told; never `auto`."""
    kernel: str
    """What then runs, for a person: `flash-attention-3`, `cuDNN (sdpa)`."""
    slow: str | None = None
    """Why it is slower than it could be, and what to do; None where it is not."""


def choose_attention(engine: EngineConfig, model: ModelConfig, tensor_ranks: int, device: torch.device) -> AttentionChoice:
    """What `engine.attention` comes to for each process's heads on `device`.

    Raises UserError, saying why, for a backend that is asked for by name and does not fit.
    """
    wanted = engine.attention
    dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    for package in FLASH_PACKAGES:
        if wanted == package.name and (misfit := flash_misfit(package, device, dtype, model.head_dim)) is not None:
            raise UserError(f"engine.attention: {wanted} {misfit}; use engine.attention: auto")
    backend = resolved_backend(wanted, device, dtype, model.head_dim)
    if backend != "sdpa" and backend not in SDPA_KERNELS:
        return AttentionChoice(backend, backend)

    heads = _Heads(model.query_heads // tensor_ranks, max(1, model.kv_heads // tensor_ranks), model.head_dim, device, dtype)
    kernel, reasons = heads.kernel_of(backend)
    if kernel == SDPBackend.CUDNN_ATTENTION and not _cudnn_is_right():
        if wanted == "sdpa-cudnn":
            raise UserError(f"engine.attention: sdpa-cudnn {_old_cudnn()}")
        for backend in ("sdpa-flash", "sdpa-efficient", "sdpa-math"):
            kernel, reasons = heads.kernel_of(backend)
            if kernel is not None:
                break
    if kernel is None:
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise UserError(
            f"engine.attention: {wanted} does not fit {device.type}, {engine.precision}, head dimension {model.head_dim} and "
            f"{heads.query}/{heads.kv} heads{why}; use engine.attention: auto"
        )
    if wanted in ("auto", "sdpa") and device.type == "cuda":
        if kernel == SDPBackend.MATH and heads.kv < heads.query:
            # Not every version of torch has a kernel for grouped heads in fp32; repeating them makes it fit.
            repeated, _ = heads.kernel_of("sdpa-efficient")
            if repeated is not None:
                backend, kernel = "sdpa-efficient", repeated
        return AttentionChoice(backend, f"{_NAMES[kernel]} (sdpa)", heads.why_slow(kernel))
    name = "fused kernel for CPUs" if device.type == "cpu" and kernel == SDPBackend.FLASH_ATTENTION else _NAMES[kernel]
    return AttentionChoice(backend, f"{name} ({backend})")


@dataclass(frozen=True)
class _Heads:
    """The heads of one process, as torch is asked about them."""

    query: int
    kv: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype

    def kernel_of(self, backend: AttentionBackend) -> tuple[SDPBackend | None, list[str]]:
        """The kernel of PyTorch's that runs, or None with torch's reasons."""
        if backend == "sdpa-efficient":  # `attend` repeats grouped heads for it
            self = replace(self, kv=self.query)
        only = SDPA_KERNELS.get(backend)
        with sdpa_kernel(only) if only is not None else contextlib.nullcontext(), _said() as said:
            try:
                query, key, value = self._tensors()
                grouped = self.kv < self.query
                chosen = torch._fused_sdp_choice(query, key, value, None, 0.0, True, enable_gqa=grouped)  # pyright: ignore
                return SDPBackend(chosen), []
            except RuntimeError:  # no kernel is left; on CUDA torch warns of each why it is out
                return None, _reasons(said)

    def why_slow(self, kernel: SDPBackend) -> str | None:
        """On CUDA: why no faster kernel runs, where one could be expected to."""
        half, major = self.dtype != torch.float32, torch.cuda.get_device_capability(self.device)[0]
        if kernel == SDPBackend.MATH:
            return (
                "attention runs on torch's math kernel, which writes all scores to memory"
                f"{self._why_not(can_use_flash_attention)}. {_advice(half)}"
            )
        if half and major >= 8 and kernel == SDPBackend.EFFICIENT_ATTENTION:
            return (
                "attention runs on torch's memory-efficient kernel, which is slower than FlashAttention"
                f"{self._why_not(can_use_flash_attention)}. {_advice(half)}"
            )
        if half and major in (9, 10) and kernel == SDPBackend.FLASH_ATTENTION:
            why = self._why_not(can_use_cudnn_attention) if _cudnn_is_right() else f": it {_old_cudnn()}"
            return f"attention runs on FlashAttention-2, 1.2 to 1.7 times slower on this GPU than cuDNN's{why}"
        return None

    def _why_not(self, can_use: Callable[[SDPAParams, bool], bool]) -> str:
        """What torch says against a kernel."""
        with _said() as said:
            query, key, value = self._tensors()
            can_use(SDPAParams(query, key, value, None, 0.0, True, self.kv < self.query), True)
        reasons = _reasons(said)
        return f": {'; '.join(reasons)}" if reasons else ""

    def _tensors(self) -> list[Tensor]:
        """In the memory layout that the model has them in, and with gradients: not every kernel has a backward pass for all."""
        heads = (self.query, self.kv, self.kv)
        made = (torch.empty(1, _POSITIONS, n, self.head_dim, device=self.device, dtype=self.dtype) for n in heads)
        return [tensor.requires_grad_().transpose(1, 2) for tensor in made]


@contextlib.contextmanager
def _said() -> Iterator[list[warnings.WarningMessage]]:
    """Warnings of the block, which torch gives as its reasons."""
    with warnings.catch_warnings(record=True) as said, torch.enable_grad():
        warnings.simplefilter("always")
        yield said


def _reasons(said: list[warnings.WarningMessage]) -> list[str]:
    texts = (str(warning.message).split(" (Triggered internally")[0].strip().rstrip(".") for warning in said)
    return [text for text in dict.fromkeys(texts) if not text.endswith("not used because:")]


def _cudnn_is_right() -> bool:
    return (torch.backends.cudnn.version() or 0) >= LEAST_CUDNN


def _old_cudnn() -> str:
    return (
        "needs cuDNN 9.15.1 or later (wrong gradients before it, pytorch#169849), and torch has found "
        f"{torch.backends.cudnn.version()}; an older one on LD_LIBRARY_PATH goes before torch's own, so unset that, or take a "
        "newer build of torch"
    )


def _advice(half: bool) -> str:
    if not half:
        return "engine.precision: bf16 has faster kernels"
    return "A head dimension that is a multiple of 8, up to 256, has faster kernels; `megatron-plasticity doctor` says more"
