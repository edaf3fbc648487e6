"""Causal attention with grouped queries, on the fastest backend that fits.

Shapes throughout: query [B, query_heads, S, head_dim], key and value [B, kv_heads, T, head_dim], where T is S, or the width
of the cache that is read; query head h reads key/value head h // (query_heads / kv_heads). Scores are scaled by head_dim^-1/2.
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
Segments = tuple[int, ...]
"""Lengths of texts that follow one another in each row, S in all; each is attended to by itself, causally."""


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
    is there to be compared with. Input that needs a mask tensor goes through SDPA even where a
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
        # Never a mask tensor for plain causal attention: with one, the fast kernels are out of reach, and cuDNN's backward pass
        # is wrong for some lengths (pytorch#196678).
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    flash = _flash_function(name)
    assert flash is not None  # resolved_backend names a package only if it imports
    return _flash(flash, query, key, value)


def _segment_by_segment(query: Tensor, key: Tensor, value: Tensor, segments: Segments, backend: AttentionBackend) -> Tensor:
    """This takes the kernels of plain causal attention, which a mask tensor would keep out of reach, and computes no score
    between segments."""
    pieces = zip(*(tensor.split(segments, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([attend(q, k, v, None, backend) for q, k, v in pieces], dim=2)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """With a boolean mask [B, 1, S, T], True where a query may look."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1 or query.shape[2] > 1:
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
