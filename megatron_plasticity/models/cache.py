"""Keys and values of the tokens that a model has already read, for decoding without reading them again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_plasticity.config.model import ModelConfig


class KeyValueCache:
    """Preallocated keys (after RoPE) and values of every layer, for inference only (the writes are in place).

    Each row is a sequence of its own: token t of a row lies in column t. How many tokens a row holds is the caller's to know, who
    says it for each pass (`view`); whatever lies behind them is never looked at, so a row is emptied by counting from 0 again.
    Shapes never change, which is what `torch.compile` wants.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        width: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.layers, rows, config.kv_heads, width, config.head_dim)
        # Zeros, not empty memory: a column that is masked out counts with weight 0, but 0 times NaN would be NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def rows(self) -> int:
        return self.keys.shape[1]

    @property
    def width(self) -> int:
        return self.keys.shape[3]

    @property
    def bytes(self) -> int:
        """Memory of keys and values together."""
        return self.keys.nbytes + self.values.nbytes

    def view(self, past: Tensor, length: int = 1, width: int | None = None) -> CacheView:
        """The first rows of the cache for a pass that reads `length` tokens in each.

        `past` [B] (int64) is the number of tokens that each row holds already. The pass sees the first `width` columns (default:
        all), which must hold past and new tokens of every row.
        """
        positions = past[:, None] + torch.arange(length, device=past.device)
        keys, values = (store[:, : len(past), :, :width] for store in (self.keys, self.values))
        return CacheView(keys, values, positions)

    def copy_row(self, row: int, source: KeyValueCache, source_row: int, length: int) -> None:
        """Make the first `length` tokens of `row` those of `source_row` of `source`, which may be this cache itself."""
        self.keys[:, row, :, :length] = source.keys[:, source_row, :, :length]
        self.values[:, row, :, :length] = source.values[:, source_row, :, :length]


@dataclass(frozen=True)
class CacheView:
    """What one pass through the model writes and reads: B rows of a cache, `width` columns of them."""

    keys: Tensor
    """[layers, B, kv_heads, width, head_dim]"""
    values: Tensor
    """[layers, B, kv_heads, width, head_dim]"""
    positions: Tensor
    """[B, S] (int64): place in its row, and so column, of each new token."""

    @property
    def width(self) -> int:
        return self.keys.shape[3]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens' key and value [B, kv_heads, S, head_dim]; return those of all columns, which only the mask of
        `attention.cache_mask` makes sense of. Raises IndexError (on a CPU) for tokens that do not fit the width."""
        rows = torch.arange(len(self.positions), device=self.positions.device)[:, None]
        self.keys[layer][rows, :, self.positions] = key.transpose(1, 2)
        self.values[layer][rows, :, self.positions] = value.transpose(1, 2)
        return self.keys[layer], self.values[layer]
