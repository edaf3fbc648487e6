"""Blocks of equal length cut from a token store: what one training or held-out sequence is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from megatron_plasticity.data.token_store import TokenStore
from megatron_plasticity.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class BlockReader:
    """The concatenated documents of a store, cut into blocks of S + 1 tokens as in the paper (2,049 for S = 2,048).

    Block i is tokens [i·(S+1), (i+1)·(S+1)); its first S tokens are a sequence's inputs and its last S the targets, so no token
    is the target of two blocks. The rest at the end of the store, shorter than a block, is left out. Documents are not masked
    from one another.
    """

    def __init__(self, store: TokenStore, sequence_length: int) -> None:
        """Raises UserError when the store is shorter than one block."""
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be positive, got {sequence_length}")
        self.store = store
        self.sequence_length = sequence_length
        self._rows = store.blocks(sequence_length + 1)
        self._blocks = len(self._rows)
        if not self._blocks:
            raise UserError(
                f"{store.prefix}: holds {store.tokens:,} tokens, fewer than one block of sequence length {sequence_length} + 1; "
                "prepare a larger corpus or shorten model.context_length"
            )

    def __len__(self) -> int:
        return self._blocks

    def read(self, block: int) -> np.ndarray:
        """Tokens of one block: int64 [S + 1]. Raises IndexError outside [0, len(reader))."""
        return self.tokens(np.array([block]))[0]

    def tokens(self, blocks: np.ndarray) -> np.ndarray:
        """Tokens of the given blocks, in their order: int64 [B, S + 1]. Raises IndexError if one is outside [0, len(reader))."""
        for block in (blocks.min(initial=0), blocks.max(initial=0)):
            if not 0 <= block < self._blocks:
                raise IndexError(f"block {block} lies outside {self.store.prefix}, which holds {self._blocks} blocks")
        return self._rows[blocks].astype(np.int64)

    def locate(self, block: int) -> tuple[TokenStore, int]:
        """The store that a block is read from, and the block's first token there."""
        return self.store, block * (self.sequence_length + 1)

    def batch(self, blocks: Iterable[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the given blocks, in their order: two int64 tensors [B, S]; targets are inputs shifted by one."""
        import torch  # here, since a study is planned without it

        tokens = torch.from_numpy(self.tokens(np.fromiter(blocks, dtype=np.int64)))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
