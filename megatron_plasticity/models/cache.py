"""Keys and values of the tokens that a model has already read, for decoding one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_plasticity.config.model import ModelConfig


class KeyValueCache:
    """Preallocated keys (after RoPE) and values of every layer, for inference only (the writes are in place).

    `length` counts the columns filled so far, padding included. `padding` is the number of leading columns of each row that hold
    no token; `Transformer.forward` stores it here with the first tokens, and uses it for the tokens that follow.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.layers, batch, config.kv_heads, max_length, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0
        self.padding: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens' key and value [B, kv_heads, S, head_dim] behind the old ones; return those of all tokens so far.

        The columns become part of the cache for good with `advance`, once every layer has written its own.
        """
        stop = self.length + key.shape[2]
        if stop > self.max_length or key.shape[0] != self.batch:
            raise ValueError(
                f"the cache holds {self.batch} rows of {self.max_length} tokens; "
                f"{key.shape[0]} rows up to token {stop} do not fit"
            )
        self.keys[layer, :, :, self.length : stop] = key
        self.values[layer, :, :, self.length : stop] = value
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more columns as filled."""
        self.length += tokens

    def select(self, rows: Tensor) -> None:
        """Keep the rows `rows` (int64), in that order: drops finished rows, reorders, or repeats a row for several samples."""
        self.keys = self.keys.index_select(1, rows)
        self.values = self.values.index_select(1, rows)
        if self.padding is not None:
            self.padding = self.padding.index_select(0, rows)
