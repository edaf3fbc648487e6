"""Losses by document: a sequence of pretraining cuts through documents, and what a model may have memorised is a document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_plasticity.analysis.bootstrap import interval, resampled_means
from megatron_plasticity.data.blocks import BlockReader

SHORTEST = 16
"""Targets that a document must have in the sequences drawn: of fewer a mean says little, and there are many such ends."""
EXAMPLES = 5


class DocumentLosses:
    """Sums the losses of tokens by the document that each is of, over the blocks of one reader."""

    def __init__(self, reader: BlockReader) -> None:
        self._reader = reader
        self._sums: dict[tuple[Path, int], float] = {}
        self._counts: dict[tuple[Path, int], int] = {}

    def add(self, block: int, losses: np.ndarray) -> None:
        """The losses of a block's targets, [S], which are its tokens but the first."""
        store, start = self._reader.locate(block)
        first = start + 1
        for index in store.documents_at(first, len(losses)):
            begin = max(store.document_start(index), first) - first
            end = len(losses) if index + 1 == store.documents else min(store.document_start(index + 1) - first, len(losses))
            if end > begin:
                key = store.prefix, index
                self._sums[key] = self._sums.get(key, 0.0) + float(losses[begin:end].sum())
                self._counts[key] = self._counts.get(key, 0) + end - begin

    def means(self) -> dict[tuple[Path, int], float]:
        """(store, document) → mean loss in nats per token, of the documents with `SHORTEST` targets or more."""
        return {key: self._sums[key] / count for key, count in self._counts.items() if count >= SHORTEST}

    def tokens(self, key: tuple[Path, int]) -> int:
        """Targets of a document in the blocks added."""
        return self._counts[key]


def document_gap(seen: DocumentLosses, held_out: DocumentLosses, resamples: int, seed: int) -> dict[str, Any] | None:
    """mean(held out) − mean(seen) where each document counts once, however many of its tokens were drawn.

    Returns `gap` ({"value", "low", "high"}), `seen_loss` and `held_out_loss` in nats per token, `seen_documents`,
    `held_out_documents` and `best_known`; None if a side has fewer than two documents. The unit of the bootstrap is the document:
    neither several sequences of a long one nor many short ones within a sequence count as independent of each other.
    `best_known` are the seen documents with the least loss: store, number of the document, targets, loss. They are to be read,
    which tells what was memorised from what is easy.

    Source: our own; the claim that it examines is that of Han et al. (2602.11137).
    """
    sides = seen.means(), held_out.means()
    if min(map(len, sides)) < 2:
        return None
    losses = [np.array(list(side.values())) for side in sides]
    generator = np.random.default_rng(seed)
    means = [resampled_means(side, resamples, generator) for side in losses]
    least = sorted(sides[0], key=lambda key: sides[0][key])[:EXAMPLES]
    return {
        "gap": interval(float(losses[1].mean() - losses[0].mean()), means[1] - means[0]),
        "seen_documents": len(losses[0]),
        "held_out_documents": len(losses[1]),
        "seen_loss": float(losses[0].mean()),
        "held_out_loss": float(losses[1].mean()),
        "best_known": [
            {"store": str(key[0]), "document": key[1], "targets": seen.tokens(key), "loss": sides[0][key]} for key in least
        ],
    }
