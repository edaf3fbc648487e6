"""What a pretraining run reads, from its config: the blocks of its corpus or corpora, their order, and what identifies them."""

from __future__ import annotations

import hashlib
from typing import Any

from megatron_plasticity.config.data import DataConfig
from megatron_plasticity.data.blend import BlendedBlocks, BlendOrder
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.ledger import Ledger
from megatron_plasticity.data.manifest import TRAIN, read_manifest
from megatron_plasticity.data.order import SampleOrder
from megatron_plasticity.data.token_store import TokenStore
from megatron_plasticity.errors import UserError


def corpus_hash(data: DataConfig) -> str:
    """What identifies the text of a run: its corpus manifest's `sha256`; for a blend, the SHA-256 of those of all corpora.

    Raises UserError when a corpus is not prepared, is damaged, was made with another tokenizer than the first, or trains on what
    the first holds out.
    """
    manifest = read_manifest(data.folder)
    if not data.blend:
        return manifest["sha256"]
    hashes = [manifest["sha256"]]
    for corpus in data.blend:
        other = read_manifest(corpus.folder)
        if other["tokenizer"] != manifest["tokenizer"]:
            raise UserError(
                f"data.blend: {corpus.folder} was prepared with another tokenizer than {data.folder}, so its ids mean something "
                "else; prepare both with the same one"
            )
        # Which texts are held out follows from their hashes, so a larger share holds out all that a smaller one does.
        if (fraction := _held_out_fraction(other)) < (needed := _held_out_fraction(manifest)):
            raise UserError(
                f"data.blend: {corpus.folder} has held_out_fraction={fraction:g}, {data.folder} {needed:g}, so the run could "
                f"train on copies of its own held-out documents; prepare {corpus.folder} with at least {needed:g}"
            )
        hashes.append(other["sha256"])
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _held_out_fraction(manifest: dict[str, Any]) -> float:
    return float(manifest["config"]["held_out_fraction"])


def training_blocks(data: DataConfig, sequence_length: int) -> BlockReader:
    """The blocks of the training text. Raises UserError when a store is missing, damaged or shorter than a block."""
    folders = [data.folder, *(corpus.folder for corpus in data.blend)]
    readers = [BlockReader(TokenStore(folder / TRAIN), sequence_length) for folder in folders]
    return BlendedBlocks(readers) if data.blend else readers[0]


def sample_order(data: DataConfig, blocks: BlockReader) -> SampleOrder:
    """The order in which a run reads `training_blocks(data, …)`."""
    blend = _blend(data, blocks)
    return BlendOrder(blend, data.seed) if blend else SampleOrder(len(blocks), data.seed)


def ledger_of(data: DataConfig, blocks: BlockReader, store_sha256: str, consumed_samples: int) -> Ledger:
    """The ledger of a run that has consumed so many samples; `store_sha256` is its `corpus_hash`."""
    return Ledger(data.seed, blocks.sequence_length, len(blocks), store_sha256, consumed_samples, _blend(data, blocks))


def _blend(data: DataConfig, blocks: BlockReader) -> tuple[tuple[int, float], ...]:
    if not isinstance(blocks, BlendedBlocks):
        return ()
    others = [corpus.weight for corpus in data.blend]
    rest = 1 - sum(others)
    return tuple(zip((len(reader) for reader in blocks.readers), (round(rest, 12), *others), strict=True))
