"""Putting the parts of all sources together: duplicates, shares, and the two stores of a corpus.

The training store holds the sources one after the other, each in the order of its shards; how a run mixes them is up to the order
of its samples. The held-out store is in the order of the documents' hashes, so that any number of its first sequences is a fair
sample of all sources. What comes out depends on the parts, not on who made them when.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_plasticity.config.data import CorpusConfig, SourceConfig
from megatron_plasticity.data.manifest import HELD_OUT, TRAIN
from megatron_plasticity.data.parts import Counts, Part
from megatron_plasticity.data.python_text import Progress
from megatron_plasticity.data.sources import SourceFile, hub_commit
from megatron_plasticity.data.token_store import TokenStoreWriter
from megatron_plasticity.errors import UserError

# Documents that are copied at a time, and digests that are sorted at a time: some 100 MB and 200 MB.
_DOCUMENTS_PER_PIECE = 8_192
_DIGESTS_PER_PASS = 1 << 22


@dataclass
class SourceParts:
    """A source, and as many of its parts, from the first on, as are finished."""

    config: SourceConfig
    files: list[SourceFile]
    """All files of the source, in the order of the shards."""
    parts: list[Part]
    files_of_part: list[int]
    """Number of files of each shard."""
    kept: list[np.ndarray] | None = None
    """Which training documents of each part are not duplicates: bool [documents]; None if all are kept."""
    used: int = 0
    """Number of parts, from the first on, that the corpus takes documents from."""
    train: Counts = field(default_factory=Counts)
    held_out: Counts = field(default_factory=Counts)
    last: tuple[int, int] | None = None
    """Part, and training document of it, copies counted, that the corpus takes last; None when it takes none."""
    first_document: int = 0
    """Number in the training store of the source's first document."""

    @property
    def available_tokens(self) -> int:
        """Training tokens of all finished parts, duplicates not counted."""
        return sum(self.tokens_of(index) for index in range(len(self.parts)))

    def tokens_of(self, index: int) -> int:
        if self.kept is None:
            return self.parts[index].info.splits[TRAIN].tokens
        return int(self.parts[index].lengths(TRAIN)[self.kept[index]].sum(dtype=np.int64))


def assemble(
    folder: Path, config: CorpusConfig, sources: Sequence[SourceParts], vocab_size: int, progress: Progress | None
) -> tuple[dict[str, Any], dict[str, dict[str, int]], list[str]]:
    """Write `train` and `held_out` into `folder`; returns the manifest's sources, its splits, and notes.

    Memory: one byte for each training document while duplicates are dropped, some 100 bytes for each held-out document, and a few
    hundred megabytes, whatever the size of the corpus. Raises UserError when a split would be empty.
    """
    if config.drop_duplicates:
        mark_duplicates(sources)
    quotas, notes = _quotas(config, sources)
    for source, quota in zip(sources, quotas, strict=True):
        source.used = _parts_for(source, quota)
    _write_train(folder / TRAIN, sources, quotas, vocab_size, progress)
    _write_held_out(folder / HELD_OUT, config, sources, quotas, vocab_size)
    splits = {TRAIN: Counts(), HELD_OUT: Counts()}
    for source in sources:
        splits[TRAIN] += source.train
        splits[HELD_OUT] += source.held_out
    counts = {split: vars(found) for split, found in splits.items()}
    return {source.config.name: _described(source) for source in sources}, counts, notes


def mark_duplicates(sources: Sequence[SourceParts]) -> None:
    """Set `kept` of every source: of training documents with the same text only the first one is kept.

    The digests are gone through once for each few million of them, in a range of values that differs from pass to pass; so memory
    stays the same, and twins are always in the same pass.
    """
    parts = [part for source in sources for part in source.parts]
    for source in sources:
        source.kept = [np.ones(part.info.splits[TRAIN].documents, dtype=bool) for part in source.parts]
    kept = [mask for source in sources if source.kept is not None for mask in source.kept]
    documents = sum(mask.size for mask in kept)
    passes = max(1, -(-documents // _DIGESTS_PER_PASS))
    # The low half is uniform; the high one is what the held-out split was chosen by.
    for number in range(passes):
        low, high = (2**64 * bound // passes for bound in (number, number + 1))
        found = [_digests_between(part.digests(TRAIN), low, high - 1) for part in parts]
        digests = np.concatenate([digests for _, digests in found])
        owners = np.repeat(np.arange(len(parts)), [len(digests) for _, digests in found])
        places = np.concatenate([places for places, _ in found])
        order = np.lexsort((digests["high"], digests["low"]))  # stable: of equal ones the first stays first
        ordered = digests[order]
        twins = order[1:][ordered[1:] == ordered[:-1]]
        for owner in np.unique(owners[twins]):
            kept[owner][places[twins[owners[twins] == owner]]] = False


_NATIVE = np.dtype([("high", np.uint64), ("low", np.uint64)])


def _digests_between(digests: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    values = digests["low"].astype(np.uint64)
    places = np.flatnonzero((values >= np.uint64(low)) & (values <= np.uint64(high)))
    return places, digests[places].astype(_NATIVE)


def _quotas(config: CorpusConfig, sources: Sequence[SourceParts]) -> tuple[list[int | None], list[str]]:
    """Training tokens to take of each source (None: all there are), and what falls short of the config."""
    weighted = all(source.config.weight is not None for source in sources)
    if not weighted and config.train_tokens is None:
        return [None] * len(sources), []
    weights = np.array([source.config.weight or 1.0 for source in sources])
    shares = weights / weights.sum()
    limits = [source.available_tokens / share for source, share in zip(sources, shares, strict=True)]
    scarcest = int(np.argmin(limits))
    total = min(limits[scarcest], float("inf") if config.train_tokens is None else config.train_tokens)
    notes = []
    if config.train_tokens is not None and total < config.train_tokens:
        name, available = sources[scarcest].config.name, sources[scarcest].available_tokens
        notes.append(
            f"sources: {name} has {available:,} training tokens, so that the corpus holds {int(total):,} of the "
            f"{config.train_tokens:,} asked for"
        )
    return [int(total * share) for share in shares], notes


def _parts_for(source: SourceParts, quota: int | None) -> int:
    if quota is None:
        return len(source.parts)
    tokens = 0
    for index in range(len(source.parts)):
        if tokens >= quota:
            return index
        tokens += source.tokens_of(index)
    return len(source.parts)


def _write_train(
    prefix: Path, sources: Sequence[SourceParts], quotas: Sequence[int | None], vocab_size: int, progress: Progress | None
) -> None:
    total = sum(source.available_tokens if quota is None else quota for source, quota in zip(sources, quotas, strict=True))
    if not total:
        raise UserError("sources: no document falls into the training split; ask for more text or lower held_out_fraction")
    with TokenStoreWriter(prefix, vocab_size) as writer:
        for source, quota in zip(sources, quotas, strict=True):
            source.first_document = writer.documents
            for index in range(source.used):
                kept = None if source.kept is None else source.kept[index]
                taken_here = 0
                for ids, lengths, sizes in _pieces(source.parts[index], kept):
                    count = lengths.size
                    if quota is not None:  # up to the document that reaches the quota
                        count = int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), quota - source.train.tokens)) + 1
                    taken = lengths[:count]
                    tokens = int(taken.sum(dtype=np.int64))
                    writer.add_documents(ids[:tokens], taken)
                    source.train += Counts(len(taken), tokens, int(sizes[:count].sum()))
                    taken_here += len(taken)
                    if progress is not None:
                        progress.update(min(writer.tokens, total), total, "tokens", stage="writing")
                    if quota is not None and source.train.tokens >= quota:
                        break
                if taken_here:
                    last = taken_here - 1 if kept is None else int(np.flatnonzero(kept)[taken_here - 1])
                    source.last = (index, last)


def _pieces(part: Part, kept: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, lengths, sizes) of some thousand training documents at a time, without those that are not kept."""
    all_ids, all_lengths, all_sizes = part.ids(TRAIN), part.lengths(TRAIN), part.sizes(TRAIN)
    start = 0
    for first in range(0, all_lengths.size, _DOCUMENTS_PER_PIECE):
        documents = slice(first, first + _DOCUMENTS_PER_PIECE)
        lengths, sizes = all_lengths[documents], all_sizes[documents]
        stop = start + int(lengths.sum(dtype=np.int64))
        ids = all_ids[start:stop]
        start = stop
        if kept is not None and not (mask := kept[documents]).all():
            ids, lengths, sizes = ids[np.repeat(mask, lengths)], lengths[mask], sizes[mask]
        if lengths.size:
            yield ids, lengths, sizes


def _write_held_out(
    prefix: Path, config: CorpusConfig, sources: Sequence[SourceParts], quotas: Sequence[int | None], vocab_size: int
) -> None:
    owners: list[tuple[SourceParts, Part]] = []
    digests, numbers, starts, lengths, sizes = [], [], [], [], []
    for source, quota in zip(sources, quotas, strict=True):
        for index, part in enumerate(source.parts[: source.used]):
            found, part_lengths = part.digests(HELD_OUT).astype(_NATIVE), part.lengths(HELD_OUT)
            chosen = np.arange(found.size)
            if quota is not None:
                # Of a source that is taken in part, those before its last training document: the same share of both splits,
                # wherever its shards end.
                part_of_last, last = source.last or (-1, -1)
                chosen = chosen[(index < part_of_last) | ((index == part_of_last) & (part.places() <= last))]
            ends = np.cumsum(part_lengths, dtype=np.int64)
            digests.append(found[chosen])
            numbers.append(np.full(chosen.size, len(owners)))
            starts.append((ends - part_lengths)[chosen])
            lengths.append(part_lengths[chosen])
            sizes.append(part.sizes(HELD_OUT)[chosen])
            owners.append((source, part))
    merged = np.concatenate(digests) if digests else np.empty(0, dtype=_NATIVE)
    order = np.lexsort((merged["high"], merged["low"]))
    if config.drop_duplicates and order.size:
        ordered = merged[order]
        order = order[np.concatenate([[True], ordered[1:] != ordered[:-1]])]
    if not order.size:
        raise UserError(
            f"sources: no document falls into the held_out split at held_out_fraction={config.held_out_fraction}; ask for more "
            "text or change held_out_fraction"
        )
    number, start, length, size = (np.concatenate(arrays) for arrays in (numbers, starts, lengths, sizes))
    with TokenStoreWriter(prefix, vocab_size) as writer:
        for index in order:
            source, part = owners[number[index]]
            writer.add_documents(part.ids(HELD_OUT)[start[index] : start[index] + length[index]], length[index : index + 1])
            source.held_out += Counts(1, int(length[index]), int(size[index]))


def _described(source: SourceParts) -> dict[str, Any]:
    """What the manifest tells about a source."""
    config, used = source.config, source.parts[: source.used]
    files = sum(source.files_of_part[: source.used])
    origin: dict[str, Any] = {"files": list(config.files)}
    if config.hub is not None:
        origin = {"hub": config.hub, "config": config.config, "revision": hub_commit(source.files), "split": config.split}
    duplicates = 0
    if source.kept is not None:
        duplicates = sum(int((~mask).sum()) for mask in source.kept[: source.used])
    return {
        **origin,
        "text": config.text,
        "licence": config.licence,
        "weight": config.weight,
        "files_read": files,
        "bytes_read": sum(file.bytes for file in source.files[:files]),
        "documents": source.train.documents + source.held_out.documents,
        "bytes": source.train.bytes + source.held_out.bytes,
        "empty_documents": sum(part.info.empty for part in used),
        "duplicate_documents": duplicates,
        "train": {**vars(source.train), "first_document": source.first_document},
        "held_out": vars(source.held_out),
    }
