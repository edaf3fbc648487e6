"""Causal attention with grouped queries, on the fastest backend that fits.

Shapes throughout: query [B, query_heads, S, head_dim], key and value [B, kv_heads, T, head_dim], where T is S and the tokens in
the cache together; query head h reads key/value head h // (query_heads / kv_heads). Scores are scaled by head_dim^-1/2.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_plasticity.errors import UserError

AttentionBackend = Literal["auto", "sdpa", "eager"]


@dataclass(frozen=True)
class _FlashPackage:
    """A FlashAttention package, and the GPUs on which it is worth preferring to PyTorch's own kernels."""

    name: str
    module: str
    capability: tuple[int, int]
    """Least and greatest major compute capability."""
    head_dim_limit: int = 256


# On Hopper PyTorch's SDPA runs cuDNN attention, which is faster than FlashAttention-2: only version 3 goes before it there.
_FLASH_PACKAGES = (
    _FlashPackage("flash-attention-3", "flash_attn_interface", (9, 9)),
    _FlashPackage("flash-attention-2", "flash_attn", (8, 8)),
)


def check_backend(backend: str) -> None:
    """Refuse a name that is no backend."""
    if backend not in get_args(AttentionBackend):
        raise UserError(f"unknown attention backend {backend!r}; choose one of {', '.join(get_args(AttentionBackend))}")


def resolved_backend(backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Name of what really runs in training: `flash-attention-3`, `flash-attention-2`, `sdpa` or `eager`.

    `auto` is the first of these that fits the device, the number format and the head dimension; it never ends at `eager`, which
    is there to be compared with. Input that needs a mask tensor (see `attention_mask`) goes through SDPA even where a
    FlashAttention package was chosen.
    """
    check_backend(backend)
    if backend != "auto":
        return backend
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0:
        capability = torch.cuda.get_device_capability(device)[0]
        for package in _FLASH_PACKAGES:
            least, greatest = package.capability
            if least <= capability <= greatest and head_dim <= package.head_dim_limit and _flash_function(package.name):
                return package.name
    return "sdpa"


def attention_mask(length: int, past: int, padding: Tensor | None, device: torch.device) -> Tensor | None:
    """Boolean mask, True where a query may look: [B, 1, length, past + length] with padding, [length, past + length] without.

    None where no tensor is needed, since plain causal attention says it all: no padding, and nothing cached or a single query.
    A padding column looks at itself alone, so that no row of the softmax is empty; no token looks at padding.
    """
    if padding is None and (past == 0 or length == 1):
        return None
    keys = torch.arange(past + length, device=device)
    queries = keys[past:, None]
    causal = keys <= queries
    if padding is None:
        return causal
    real = keys >= padding.to(device)[:, None, None, None]
    return causal & (real | (keys == queries))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, backend: AttentionBackend) -> Tensor:
    """Attention output [B, query_heads, S, head_dim]. Without a mask: causal if S = T, and no restriction if S = 1."""
    name = resolved_backend(backend, query.device, query.dtype, query.shape[-1])
    if name == "eager":
        return _eager(query, key, value, mask)
    if name == "sdpa" or mask is not None:
        # Never a mask tensor for plain causal attention: with one, the fast kernels are out of reach, and cuDNN's backward pass
        # is wrong for some lengths (pytorch#196678).
        causal = mask is None and query.shape[2] > 1
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    flash = _flash_function(name)
    assert flash is not None  # resolved_backend names a package only if it imports
    return _flash(flash, query, key, value)


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention probabilities [B, query_heads, S, T] in fp32; without a mask as in `attend`."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32)


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    weights = attention_weights(query, key, mask).to(value.dtype)
    return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


def _flash(function: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlashAttention's layout is [B, S, heads, head_dim]; it reads grouped heads as they are."""
    output = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=True)
    return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)


@functools.cache
def _flash_function(name: str) -> Callable[..., Tensor] | None:
    """The package's `flash_attn_func`, or None if the package is not there or does not load (built for another torch)."""
    module = next(package.module for package in _FLASH_PACKAGES if package.name == name)
    try:
        return importlib.import_module(module).flash_attn_func
    except (ImportError, AttributeError, OSError):
        return None
