"""Token files in Megatron's `.bin`/`.idx` format, readable by Megatron-LM, gpt-neox and nanotron.

`<prefix>.bin` is the ids of all documents end to end. `<prefix>.idx`, little-endian: magic `MMIDIDX\\0\\0`, u64 version 1, u8
number type, u64 number of sequences n, u64 number of document boundaries, int32 sequence lengths [n], int64 byte offsets [n],
int64 document boundaries (indexes of sequences, from 0 to n). What is written here has one sequence per document.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megatron_plasticity.config.files import fsync_folder
from megatron_plasticity.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
# Megatron's codes of number types; the two that token ids are written in.
_CODES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
# Megatron's own threshold, a little below 65,536.
_UINT16_BELOW = 65_500
_LENGTH = np.dtype("<i4")
# Numbers of an index, or ids, that are held in memory at a time.
_PIECE = 1 << 22


def token_dtype(vocab_size: int) -> np.dtype:
    """Number type of a store's ids: uint16 below 65,500 ids, else int32."""
    return _CODES[8] if vocab_size < _UINT16_BELOW else _CODES[4]


def store_files(prefix: Path) -> tuple[Path, Path]:
    """`<prefix>.bin` and `<prefix>.idx`; a dot inside the prefix is kept."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


class TokenStoreWriter:
    """Writes a store document by document. Both files appear under their names when `close` ends well, the `.idx` last.

    As a context manager it closes at the end of the block, and discards everything when the block raises. Memory does not grow
    with the number of documents: their lengths go into the index at once, and what is computed from them is added on closing.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix = prefix
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._documents = 0
        self._tokens = 0
        bin_path, idx_path = store_files(prefix)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = _temporary_file(bin_path)
        self._idx = _temporary_file(idx_path)
        self._idx.write(bytes(_HEADER.size))  # what the header says is known on closing

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return self._documents

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return self._tokens

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document. Raises ValueError when it is empty or holds an id outside [0, vocab_size)."""
        values = np.asarray(ids, dtype=np.int64)
        if values.ndim != 1 or not values.size:
            raise ValueError(f"a document must be a non-empty list of ids, got shape {values.shape}")
        self.add_documents(values, np.array([values.size]))

    def add_documents(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents that lie end to end: `ids` [sum of lengths], `lengths` [documents], both of whole numbers.

        Raises ValueError when the lengths do not fill `ids`, when one is not positive, or when an id is outside [0, vocab_size).
        """
        if lengths.size == 0 and ids.size == 0:
            return
        if lengths.sum(dtype=np.int64) != ids.size or lengths.min() < 1:
            raise ValueError(f"lengths must be positive and sum to the number of ids, {ids.size}; got {lengths.sum()}")
        lowest, highest = (0 if ids.dtype.kind == "u" else int(ids.min())), int(ids.max())
        if lowest < 0 or highest >= self._vocab_size:
            raise ValueError(f"ids must lie in [0, {self._vocab_size}), got {lowest if lowest < 0 else highest}")
        self._bin.write(np.ascontiguousarray(ids, dtype=self._dtype).data)
        self._idx.write(lengths.astype(_LENGTH).tobytes())
        self._documents += lengths.size
        self._tokens += ids.size

    def close(self) -> None:
        """Write the index and put both files in place. Raises ValueError when no document was added."""
        if not self._documents:
            self.discard()
            raise ValueError(f"the token store {self._prefix} got no documents")
        bin_path, idx_path = store_files(self._prefix)
        try:
            self._write_index()
            for file in (self._bin, self._idx):
                file.flush()
                os.fsync(file.fileno())
                file.close()
                os.chmod(file.name, 0o644)  # temporary files are private; a corpus is for sharing
            # An old index never describes new tokens, not even for a moment.
            idx_path.unlink(missing_ok=True)
            os.replace(self._bin.name, bin_path)
            os.replace(self._idx.name, idx_path)
            fsync_folder(bin_path.parent)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Leave nothing behind."""
        for file in (self._bin, self._idx):
            _remove_file(file)

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _write_index(self) -> None:
        """Complete the index, whose lengths are there already, piece by piece."""
        self._idx.flush()
        lengths = np.memmap(self._idx.name, mode="r", dtype=_LENGTH, offset=_HEADER.size, shape=(self._documents,))
        offset = 0
        for start in range(0, self._documents, _PIECE):
            ends = offset + np.cumsum(lengths[start : start + _PIECE], dtype=np.int64) * self._dtype.itemsize
            self._idx.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
            offset = int(ends[-1])
        for start in range(0, self._documents + 1, _PIECE):
            self._idx.write(np.arange(start, min(start + _PIECE, self._documents + 1), dtype="<i8").tobytes())
        code = next(code for code, dtype in _CODES.items() if dtype == self._dtype)
        self._idx.seek(0)
        self._idx.write(_HEADER.pack(_MAGIC, _VERSION, code, self._documents, self._documents + 1))


class TokenStore:
    """A store opened for reading: memory-mapped, so that opening it costs nothing and its pages are shared between processes."""

    def __init__(self, prefix: Path) -> None:
        """Raises UserError when a file is missing, is not a store, or is shorter or longer than its index says."""
        self.prefix = prefix
        bin_path, idx_path = store_files(prefix)
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise UserError(f"{path}: no such file; a token store is a pair of files {bin_path.name} and {idx_path.name}")
        self._dtype, sequences, boundaries = _read_header(idx_path)
        expected = _HEADER.size + 12 * sequences + 8 * boundaries
        if (size := idx_path.stat().st_size) != expected:
            raise _damaged(idx_path, f"has {size:,} bytes, but its header announces {expected:,}")
        if sequences < 1 or boundaries < 2:
            raise _damaged(idx_path, "holds no documents")
        index = np.memmap(idx_path, mode="r", dtype=np.uint8).view(np.ndarray)
        self._lengths = _part(index, _HEADER.size, "<i4", sequences)
        self._offsets = _part(index, _HEADER.size + 4 * sequences, "<i8", sequences)
        self._boundaries = _part(index, _HEADER.size + 12 * sequences, "<i8", boundaries)
        expected = int(self._offsets[-1]) + int(self._lengths[-1]) * self._dtype.itemsize
        if (size := bin_path.stat().st_size) != expected:
            raise _damaged(bin_path, f"has {size:,} bytes, but {idx_path.name} announces {expected:,}")
        if not size:
            raise _damaged(bin_path, "holds no tokens")
        # As a plain array: each slice of a memmap object costs several times the reading of a block.
        self._stream = np.memmap(bin_path, mode="r", dtype=self._dtype).view(np.ndarray)

    @property
    def dtype(self) -> np.dtype:
        """Number type on disk."""
        return self._dtype

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self._boundaries) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens of all documents together."""
        return len(self._stream)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start, …, start + length − 1 of the concatenated documents, int64. Raises IndexError outside the stream."""
        if start < 0 or length < 0 or start + length > self.tokens:
            raise IndexError(f"tokens [{start}, {start + length}) lie outside {self.prefix}, which holds {self.tokens} tokens")
        return self._stream[start : start + length].astype(np.int64)

    def blocks(self, length: int) -> np.ndarray:
        """The stream in rows of `length` tokens, without the rest: [tokens // length, length], memory-mapped, in `dtype`."""
        count = self.tokens // length
        return self._stream[: count * length].reshape(count, length)

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, int64. Raises IndexError outside [0, documents)."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} lies outside {self.prefix}, which holds {self.documents} documents")
        first, last = int(self._boundaries[index]), int(self._boundaries[index + 1])
        if first == last:
            return np.empty(0, dtype=np.int64)
        start = int(self._offsets[first]) // self._dtype.itemsize
        return self.read(start, int(self._lengths[first:last].sum(dtype=np.int64)))

    def documents_at(self, start: int, length: int) -> range:
        """The documents that tokens [start, start + length) come from, by number. Raises IndexError outside the stream."""
        if start < 0 or length < 1 or start + length > self.tokens:
            raise IndexError(f"tokens [{start}, {start + length}) lie outside {self.prefix}, which holds {self.tokens} tokens")
        first, last = (self._document_of(token) for token in (start, start + length - 1))
        return range(first, last + 1)

    def document_start(self, index: int) -> int:
        """Token at which a document begins. Raises IndexError outside [0, documents)."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} lies outside {self.prefix}, which holds {self.documents} documents")
        sequence = int(self._boundaries[index])
        return self.tokens if sequence == len(self._offsets) else int(self._offsets[sequence]) // self._dtype.itemsize

    def _document_of(self, token: int) -> int:
        # Of sequences or documents that begin at the same token, all but the last are empty.
        sequence = int(np.searchsorted(self._offsets, token * self._dtype.itemsize, side="right")) - 1
        return int(np.searchsorted(self._boundaries, sequence, side="right")) - 1

    def check(self, vocab_size: int) -> None:
        """Read everything and raise UserError unless the index is consistent and every id is below `vocab_size`."""
        _, idx_path = store_files(self.prefix)
        offset = 0
        for start in range(0, len(self._lengths), _PIECE):
            lengths = self._lengths[start : start + _PIECE]
            ends = offset + np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
            offsets = self._offsets[start : start + _PIECE]
            if np.any(lengths < 0) or offsets[0] != offset or not np.array_equal(offsets[1:], ends[:-1]):
                raise _damaged(idx_path, "its documents do not lie end to end")
            offset = int(ends[-1])
        if self._boundaries[0] != 0 or self._boundaries[-1] != len(self._lengths):
            raise _damaged(idx_path, "its document boundaries are out of order")
        for start in range(0, self.documents, _PIECE):
            if np.any(np.diff(self._boundaries[start : start + _PIECE + 1]) < 0):
                raise _damaged(idx_path, "its document boundaries are out of order")
        for start in range(0, self.tokens, _PIECE):
            piece = self._stream[start : start + _PIECE]
            if int(piece.min()) < 0 or int(piece.max()) >= vocab_size:
                raise _damaged(store_files(self.prefix)[0], f"holds ids outside [0, {vocab_size})")


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if not header.startswith(_MAGIC):
        raise UserError(f"{path}: not the index of a Megatron token store (it does not begin with MMIDIDX)")
    if len(header) < _HEADER.size:
        raise _damaged(path, "ends inside its header")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != _VERSION:
        raise UserError(f"{path}: version {version} of the index format; only version {_VERSION} is known")
    if code not in _CODES:
        raise UserError(f"{path}: number type {code}; token ids are uint16 (8) or int32 (4)")
    return _CODES[code], sequences, boundaries


def _part(index: np.ndarray, start: int, dtype: str, count: int) -> np.ndarray:
    return np.frombuffer(index, dtype=dtype, count=count, offset=start)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged or incomplete: {what}. Delete the corpus folder and prepare it again.")


def _temporary_file(path: Path) -> BinaryIO:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    return Path(name).open("wb")  # unlike a file opened by its descriptor, it knows its name


def _remove_file(file: BinaryIO) -> None:
    with suppress(OSError):  # closing writes what is buffered, which a full disk refuses; it is to be removed anyway
        file.close()
    Path(file.name).unlink(missing_ok=True)
