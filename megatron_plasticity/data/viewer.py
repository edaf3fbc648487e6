"""What a run saw at a step: the sequences, the documents they are cut from, and where one document ends and the next begins.

The order of samples knows nothing of ranks and micro-batches (`data/order.py`), so a step is found again from the run's config
and its corpus alone, whatever the layout was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_plasticity.config.data import DataConfig
from megatron_plasticity.data.stream import sample_order, training_blocks
from megatron_plasticity.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """A stretch of one document in a sequence."""

    document: int
    """Number of the document in its store."""
    offset: int
    """Token of the document at which the stretch begins; 0 if the document begins here."""
    tokens: np.ndarray
    """int64 [length]."""


@dataclass(frozen=True)
class Sample:
    """One sequence that a run saw: S + 1 tokens, of which the first S are inputs and the last S are targets."""

    index: int
    """Number of the sample in the run."""
    epoch: int
    """How often the sample's corpus had been read as a whole before."""
    store: Path
    """Prefix of the token store."""
    start: int
    """Token of the store at which the sequence begins."""
    pieces: tuple[Piece, ...]


def samples_of_step(
    data: DataConfig, sequence_length: int, batch_size: int, step: int, limit: int | None = None
) -> Iterator[Sample]:
    """The sequences of step `step` (1 for the first), in the order of the global batch; only the first `limit` if that is given.

    Raises UserError when the corpus is not there.
    """
    blocks = training_blocks(data, sequence_length)
    order = sample_order(data, blocks)
    first = (step - 1) * batch_size
    count = batch_size if limit is None else min(limit, batch_size)
    for index, block in enumerate(order.blocks(first, first + count), start=first):
        store, start = blocks.locate(int(block))
        length = sequence_length + 1
        pieces = []
        for document in store.documents_at(start, length):
            begins = store.document_start(document)
            ends = store.document_start(document + 1) if document + 1 < store.documents else store.tokens
            low, high = max(begins, start), min(ends, start + length)
            if high > low:
                pieces.append(Piece(document, low - begins, store.read(low, high - low)))
        yield Sample(index, order.epoch(index), store.prefix, start, tuple(pieces))


def page(samples: Iterator[Sample], tokenizer: Tokenizer, with_ids: bool) -> Iterator[str]:
    """Lines that show samples to a person: a heading for each, then each document's number, its stretch, and its text or ids."""
    for sample in samples:
        yield f"━━ sample {sample.index:,}, epoch {sample.epoch}, {sample.store} from token {sample.start:,}"
        for piece in sample.pieces:
            stretch = f"its tokens {piece.offset:,} to {piece.offset + len(piece.tokens) - 1:,}"
            complete = " and ends" if piece.tokens[-1] == tokenizer.end_of_text else ""
            begins = "begins" if piece.offset == 0 else "goes on"
            yield f"── document {piece.document:,} {begins}{complete}: {stretch}"
            yield tokenizer.decode(piece.tokens.tolist())
            if with_ids:
                yield " ".join(map(str, piece.tokens.tolist()))
