"""A part: the tokenized documents of one shard, on disk until the corpus is put together.

    NNNNNN/
        train.ids, held_out.ids              ids of the documents end to end, each closed by an end-of-text id
        train.lengths, held_out.lengths      int32 tokens of each document
        train.bytes, held_out.bytes          int64 bytes of UTF-8 of each document's text
        train.digests, held_out.digests      the first 16 bytes of the SHA-256 of each document's text
        held_out.places                      int64 training documents that come before each held-out one
        part.json                            counts

A part depends on its shard, the tokenizer and the held-out share alone. It is written under another name and renamed, so a part
that is there is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from megatron_plasticity.config.files import fsync_folder, write_json_atomic
from megatron_plasticity.data.documents import is_held_out_digest
from megatron_plasticity.data.manifest import HELD_OUT, SPLITS, TRAIN
from megatron_plasticity.data.token_store import token_dtype
from megatron_plasticity.data.tokenizer import Tokenizer

PART_FILE = "part.json"
PART_FORMAT = 2
"""Raised when parts of an earlier version can no longer be used."""
_KINDS = ("ids", "lengths", "bytes", "digests")
DIGEST = np.dtype([("high", ">u8"), ("low", ">u8")])
"""128 bits of SHA-256: of 10^9 documents, two differing ones are taken for the same with a probability below 10^-20."""

# Texts are encoded so many at a time: enough to keep the tokenizer busy, little enough for the memory of many workers.
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 2_000_000


@dataclass
class Counts:
    """What one split of a part holds."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """Bytes of UTF-8 of the texts."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.documents + other.documents, self.tokens + other.tokens, self.bytes + other.bytes)


@dataclass
class PartInfo:
    """What `part.json` says."""

    empty: int = 0
    """Documents without a token, which are left out."""
    splits: dict[str, Counts] = field(default_factory=lambda: {split: Counts() for split in SPLITS})


class Part:
    """A finished part, opened for reading: memory-mapped."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self._folder, self._dtype = folder, dtype
        values = json.loads((folder / PART_FILE).read_text(encoding="utf-8"))
        self.info = PartInfo(values["empty"], {split: Counts(**values["splits"][split]) for split in SPLITS})

    def ids(self, split: str) -> np.ndarray:
        """[tokens] in the store's number type."""
        return _mapped(self._folder / f"{split}.ids", self._dtype)

    def lengths(self, split: str) -> np.ndarray:
        """int32 [documents]."""
        return _mapped(self._folder / f"{split}.lengths", np.dtype("<i4"))

    def sizes(self, split: str) -> np.ndarray:
        """int64 [documents]: bytes of UTF-8 of each text."""
        return _mapped(self._folder / f"{split}.bytes", np.dtype("<i8"))

    def digests(self, split: str) -> np.ndarray:
        """DIGEST [documents]."""
        return _mapped(self._folder / f"{split}.digests", DIGEST)

    def places(self) -> np.ndarray:
        """int64 [held-out documents]: how many training documents of the part come before each."""
        return _mapped(self._folder / f"{HELD_OUT}.places", np.dtype("<i8"))


def write_part(folder: Path, texts: Iterable[str], tokenizer: Tokenizer, held_out_fraction: float) -> Iterator[int]:
    """Tokenize documents into a part; yields the bytes of text of each batch once it is done. Nothing appears at `folder` before
    the iterator is exhausted."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an attempt that was killed
    unfinished.mkdir(parents=True)
    info = PartInfo()
    dtype = token_dtype(tokenizer.vocab_size)
    streams = {(split, kind): (unfinished / f"{split}.{kind}").open("wb") for split in SPLITS for kind in _KINDS}
    streams[HELD_OUT, "places"] = (unfinished / f"{HELD_OUT}.places").open("wb")
    try:
        for batch in _batches(texts):
            size = 0
            pieces: dict[str, list[tuple[list[int], bytes, int]]] = {split: [] for split in SPLITS}
            places: list[int] = []
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                raw = text.encode("utf-8")
                size += len(raw)
                if not ids:
                    info.empty += 1
                    continue
                ids.append(tokenizer.end_of_text)
                digest = hashlib.sha256(raw).digest()
                split = HELD_OUT if is_held_out_digest(digest, held_out_fraction) else TRAIN
                if split == HELD_OUT:
                    places.append(info.splits[TRAIN].documents + len(pieces[TRAIN]))
                pieces[split].append((ids, digest[: DIGEST.itemsize], len(raw)))
            streams[HELD_OUT, "places"].write(np.array(places, dtype="<i8").data)
            for split, found in pieces.items():
                if not found:
                    continue
                lengths = np.array([len(ids) for ids, _, _ in found], dtype="<i4")
                tokens = int(lengths.sum(dtype=np.int64))
                flat = np.fromiter((i for ids, _, _ in found for i in ids), dtype=dtype, count=tokens)
                streams[split, "ids"].write(flat.data)
                streams[split, "lengths"].write(lengths.data)
                sizes = np.array([raw for _, _, raw in found], dtype="<i8")
                streams[split, "bytes"].write(sizes.data)
                streams[split, "digests"].write(b"".join(digest for _, digest, _ in found))
                info.splits[split] += Counts(len(found), tokens, int(sizes.sum()))
            yield size
        for stream in streams.values():
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        for stream in streams.values():
            stream.close()
    write_json_atomic(unfinished / PART_FILE, asdict(info))
    os.replace(unfinished, folder)
    fsync_folder(folder.parent)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(_valid(text))
        characters += len(text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _valid(text: str) -> str:
    """Half a character, which JSON can spell and UTF-8 cannot, becomes a question mark."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="replace").decode("utf-8")
    return text


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, mode="r", dtype=dtype).view(np.ndarray)
