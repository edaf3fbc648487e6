"""Losses by document: a sequence of pretraining cuts through documents, and what a model may have memorised is a document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_plasticity.analysis.bootstrap import interval, resampled_means
from megatron_plasticity.data.blocks import BlockReader

SHORTEST = 16
"""Targets that a document among the best known has at least: of fewer a mean says little."""
EXAMPLES = 5


class DocumentLosses:
    """Sums the losses of tokens by the document that each is of, over the blocks of one reader."""

    def __init__(self, reader: BlockReader) -> None:
        self._reader = reader
        self._found: dict[tuple[Path, int], list[float]] = {}

    def add(self, block: int, losses: np.ndarray) -> None:
        """The losses of a block's targets, [S], which are its tokens but the first."""
        store, start = self._reader.locate(block)
        first = start + 1
        for index in store.documents_at(first, len(losses)):
            begin = max(store.document_start(index), first) - first
            end = len(losses) if index + 1 == store.documents else min(store.document_start(index + 1) - first, len(losses))
            if end > begin:
                of_document = self._found.setdefault((store.prefix, index), [0.0, 0])
                of_document[0] += float(losses[begin:end].sum())
                of_document[1] += end - begin

    def sums(self) -> dict[tuple[Path, int], tuple[float, int]]:
        """(store, document) → sum of the losses of its targets in the blocks added, and their number."""
        return {key: (loss, int(targets)) for key, (loss, targets) in self._found.items()}


def document_gap(seen: DocumentLosses, held_out: DocumentLosses, resamples: int, seed: int) -> dict[str, Any] | None:
    """The gap in nats per token with documents as the unit of its interval, and the documents that the model knows best.

    Returns `gap` ({"value", "low", "high"}), `seen_documents`, `held_out_documents` and `best_known`; None if a side has fewer
    than two documents. The value is mean(held out) − mean(seen) over tokens; the interval draws whole documents with replacement
    on each side, so that several sequences of one document do not count as independent. Documents are not weighed alike: the
    draw of sequences meets long ones more often than short ones, the more so the fewer sequences are drawn, which is not the same
    on the two sides; a mean over documents would take that for a gap. `best_known` are the seen documents with the least mean
    loss among those with `SHORTEST` targets: store, number of the document, targets, loss. They are to be read, which tells what
    was memorised from what is easy.

    Source: our own; the claim that it examines is that of Han et al. (2602.11137). The ratio of resampled sums is the cluster
    bootstrap (Davison and Hinkley, Bootstrap Methods and their Application, 1997, 3.8).
    """
    sums = seen.sums()
    sides = [np.array(list(found.values()), dtype=np.float64) for found in (sums, held_out.sums())]
    if min(map(len, sides)) < 2:
        return None
    generator = np.random.default_rng(seed)
    resampled = [resampled_means(side, resamples, generator) for side in sides]
    means = [side[:, 0].sum() / side[:, 1].sum() for side in sides]
    ratios = [drawn[:, 0] / drawn[:, 1] for drawn in resampled]
    known = {key: loss / targets for key, (loss, targets) in sums.items() if targets >= SHORTEST}
    return {
        "gap": interval(float(means[1] - means[0]), ratios[1] - ratios[0]),
        "seen_documents": len(sides[0]),
        "held_out_documents": len(sides[1]),
        "best_known": [
            {"store": str(key[0]), "document": key[1], "targets": sums[key][1], "loss": known[key]}
            for key in sorted(known, key=known.__getitem__)[:EXAMPLES]
        ],
    }
