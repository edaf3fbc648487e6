"""Blocks: the concatenated stream cut at stride S + 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.token_store import TokenStore, TokenStoreWriter
from megatron_plasticity.errors import UserError


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    with TokenStoreWriter(tmp_path / "s", 100) as writer:
        for start, stop in ((0, 7), (7, 8), (8, 23)):
            writer.add_document(range(start, stop))
    return TokenStore(tmp_path / "s")


def test_blocks_cover_the_stream_once(store: TokenStore) -> None:
    reader = BlockReader(store, sequence_length=4)
    assert len(reader) == 4  # 23 tokens, blocks of 5, a rest of 3
    assert np.concatenate([reader.read(block) for block in range(4)]).tolist() == list(range(20))


def test_a_batch_keeps_the_order_asked_for(store: TokenStore) -> None:
    inputs, targets = BlockReader(store, sequence_length=4).batch(np.array([2, 0, 2]))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist() == [[10, 11, 12, 13], [0, 1, 2, 3], [10, 11, 12, 13]]
    assert targets.tolist() == [[11, 12, 13, 14], [1, 2, 3, 4], [11, 12, 13, 14]]


def test_limits(store: TokenStore) -> None:
    assert len(BlockReader(store, sequence_length=22)) == 1
    with pytest.raises(UserError, match=r"23 tokens.*sequence length 23.*context_length"):
        BlockReader(store, sequence_length=23)
    for block in (-1, 4):
        with pytest.raises(IndexError, match="4 blocks"):
            BlockReader(store, sequence_length=4).read(block)
    with pytest.raises(ValueError, match="positive"):
        BlockReader(store, sequence_length=0)
