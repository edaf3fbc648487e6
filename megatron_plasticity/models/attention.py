"""Causal attention with grouped queries, on the fastest backend that fits.

Shapes throughout: query [B, query_heads, S, head_dim], key and value [B, kv_heads, T, head_dim], where T is S, or the width
of the cache that is read; query head h reads key/value head h // (query_heads / kv_heads). Scores are scaled by head_dim^-1/2.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_plasticity.config.training import AttentionBackend
from megatron_plasticity.errors import UserError

Segments = tuple[int, ...]
"""Lengths of texts that follow one another in each row, S in all; each is attended to by itself, causally."""

SDPA_KERNELS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
"""PyTorch's own kernels, each by the name that leaves it no other choice; `sdpa` leaves it the choice."""


@dataclass(frozen=True)
class FlashPackage:
    """A FlashAttention package, the GPUs that it is for, and those on which it is worth preferring to PyTorch's own kernels."""

    name: AttentionBackend
    module: str
    distribution: str
    capability: tuple[int, int]
    """Least and greatest major compute capability on which it runs."""
    preferred: tuple[int, int]
    """The same, on which `auto` takes it."""
    head_dim_multiple: int = 8
    head_dim_limit: int = 256
    versions: tuple[str, str] | None = None
    """First and last version whose interface we know; None where any will do."""


# The order is that of `auto`. On Hopper PyTorch's SDPA runs cuDNN attention, which is faster than FlashAttention-2: only later
# versions go before it there. FlashAttention-4's backward pass compiles for head dimensions that are multiples of 32 alone.
FLASH_PACKAGES = (
    FlashPackage("flash-attention-3", "flash_attn_interface", "flash-attn-3", (9, 9), (9, 9)),
    FlashPackage("flash-attention-4", "flash_attn.cute", "flash-attn-4", (9, 10), (9, 10), 32, 128, ("4.0.0b5", "4.0.0b18")),
    FlashPackage("flash-attention-2", "flash_attn", "flash-attn", (8, 12), (8, 8)),
)

_loaded: dict[str, Callable[..., Tensor] | str] = {}
"""`flash_attn_func` of the packages that were asked for, or why it cannot be had. A plain dict: torch.compile sees through it."""


def check_backend(backend: str) -> None:
    """Refuse a name that is no backend."""
    if backend not in get_args(AttentionBackend):
        raise UserError(f"unknown attention backend {backend!r}; choose one of {', '.join(get_args(AttentionBackend))}")


def resolved_backend(backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    """What `auto` stands for in training: the first FlashAttention package that fits, else `sdpa`; other names stay.

    It never ends at `eager`, which is there to be compared with. Input that needs a mask tensor goes through SDPA even where a
    FlashAttention package was chosen. Which kernel SDPA takes, `attention_choice.py` finds out.
    """
    check_backend(backend)
    if backend != "auto":
        return backend
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        for package in FLASH_PACKAGES:
            least, greatest = package.preferred
            if least <= major <= greatest and flash_misfit(package, device, dtype, head_dim) is None:
                return package.name
    return "sdpa"


def flash_misfit(package: FlashPackage, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a FlashAttention package cannot be used, as the end of a sentence about it; None if it can."""
    least, greatest = package.capability
    if device.type != "cuda":
        return f"runs on CUDA, and the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return "computes in bf16 and fp16, and the model is in fp32"
    if head_dim % package.head_dim_multiple or head_dim > package.head_dim_limit:
        multiples = f"multiples of {package.head_dim_multiple} up to {package.head_dim_limit}"
        return f"takes head dimensions that are {multiples}, not {head_dim}"
    major, minor = torch.cuda.get_device_capability(device)
    if not least <= major <= greatest:
        which = f"{least}.x" if least == greatest else f"{least}.x to {greatest}.x"
        return f"is for compute capability {which}, and this GPU has {major}.{minor}"
    if torch.are_deterministic_algorithms_enabled():
        return "has a backward pass that is not deterministic, which torch is told to be"
    function = _flash_function(package.name)
    return function if isinstance(function, str) else None


def cache_mask(positions: Tensor, width: int) -> Tensor:
    """Boolean mask [B, 1, S, width], True where a query may look, for queries at `positions` [B, S] of their rows of a cache:
    column t of the cache holds token t of the row, and what lies in the columns behind is no token of it."""
    return (torch.arange(width, device=positions.device) <= positions[:, :, None])[:, None]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Segments | None, backend: AttentionBackend) -> Tensor:
    """Attention output [B, query_heads, S, head_dim]. Without a mask it is causal, and S = T."""
    if isinstance(mask, tuple):
        return _segment_by_segment(query, key, value, mask, backend)
    if backend == "eager":
        return _eager(query, key, value, mask)
    if mask is not None:
        return _masked(query, key, value, mask)
    name = resolved_backend(backend, query.device, query.dtype, query.shape[-1])
    if name == "sdpa":
        return _sdpa(query, key, value)
    if name in SDPA_KERNELS:
        if name == "sdpa-efficient":  # which not every version of torch has for grouped heads
            key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
        with sdpa_kernel(SDPA_KERNELS[name]):
            return _sdpa(query, key, value)
    return _flash(name, query, key, value)


def _segment_by_segment(query: Tensor, key: Tensor, value: Tensor, segments: Segments, backend: AttentionBackend) -> Tensor:
    """This takes the kernels of plain causal attention, which a mask tensor would keep out of reach, and computes no score
    between segments."""
    pieces = zip(*(tensor.split(segments, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([attend(q, k, v, None, backend) for q, k, v in pieces], dim=2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Never a mask tensor for plain causal attention: with one, the fast kernels are out of reach, and cuDNN's backward pass is
    wrong for some lengths (pytorch#196678)."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """With a boolean mask [B, 1, S, T], True where a query may look."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1 or query.shape[2] > 1:
        # cuDNN's backward pass gives NaN with a mask tensor for some lengths (pytorch#196678); nothing else of ours has one.
        differentiated = query.is_cuda and torch.is_grad_enabled() and query.requires_grad
        others = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(others) if differentiated else contextlib.nullcontext():
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=groups > 1)
    # Decoding token by token: query heads that share a key head become queries of one head, so that each key is read once.
    grouped = query.reshape(query.shape[0], -1, groups, query.shape[3])
    return F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask).reshape(query.shape)


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention probabilities [B, query_heads, S, T] in fp32; without a mask causal, and S = T."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    weights = attention_weights(query, key, mask).to(value.dtype)
    return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


def _flash(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlashAttention's layout is [B, S, heads, head_dim]; it reads grouped heads as they are."""
    function = _flash_function(name)
    if isinstance(function, str):
        raise UserError(f"attention backend {name} {function}")
    output = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=True)
    return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)


def _flash_function(name: str) -> Callable[..., Tensor] | str:
    """The package's `flash_attn_func`, or why it cannot be had, as the end of a sentence about the package."""
    if name not in _loaded:
        _loaded[name] = _load(next(package for package in FLASH_PACKAGES if package.name == name))
    return _loaded[name]


def _load(package: FlashPackage) -> Callable[..., Tensor] | str:
    try:
        function = importlib.import_module(package.module).flash_attn_func
    except ModuleNotFoundError as error:
        return f"is not installed ({error})"
    except Exception as error:  # one that was built for another torch or CUDA may raise anything
        return f"does not load: {error}"
    if package.versions is None:
        return function
    first, last = package.versions
    try:
        version = importlib.metadata.version(package.distribution)
        if not Version(first) <= Version(version) <= Version(last):
            return f"is known in versions {first} to {last}, and {version} is installed"
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return f"is known in versions {first} to {last}, and the installed one does not say which it is"
    # Its kernels are generated by Python code, which torch.compile cannot trace.
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]
