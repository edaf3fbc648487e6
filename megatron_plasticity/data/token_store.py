"""Token files in Megatron's `.bin`/`.idx` format, readable by Megatron-LM, gpt-neox and nanotron.

`<prefix>.bin` is the ids of all documents end to end. `<prefix>.idx`, little-endian: magic `MMIDIDX\\0\\0`, u64 version 1, u8
number type, u64 number of sequences n, u64 number of document boundaries, int32 sequence lengths [n], int64 byte offsets [n],
int64 document boundaries (indexes of sequences, from 0 to n). What is written here has one sequence per document.
"""

from __future__ import annotations

import os
import struct
import tempfile
from array import array
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


def token_dtype(vocab_size: int) -> np.dtype:
    """Number type of a store's ids: uint16 below 65,500 ids, else int32."""
    return _CODES[8] if vocab_size < _UINT16_BELOW else _CODES[4]


def store_files(prefix: Path) -> tuple[Path, Path]:
    """`<prefix>.bin` and `<prefix>.idx`; a dot inside the prefix is kept."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


class TokenStoreWriter:
    """Writes a store document by document. Both files appear under their names when `close` ends well, the `.idx` last.

    As a context manager it closes at the end of the block, and discards everything when the block raises.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix = prefix
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._lengths = array("i")
        self._tokens = 0
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = _temporary_file(store_files(prefix)[0])

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return self._tokens

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document. Raises ValueError when it is empty or holds an id outside [0, vocab_size)."""
        values = np.asarray(ids, dtype=np.int64)
        if values.ndim != 1 or not values.size:
            raise ValueError(f"a document must be a non-empty list of ids, got shape {values.shape}")
        lowest, highest = int(values.min()), int(values.max())
        if lowest < 0 or highest >= self._vocab_size:
            raise ValueError(f"ids must lie in [0, {self._vocab_size}), got {lowest if lowest < 0 else highest}")
        self._bin.write(values.astype(self._dtype).tobytes())
        self._lengths.append(values.size)
        self._tokens += values.size

    def close(self) -> None:
        """Write the index and put both files in place. Raises ValueError when no document was added."""
        if not self._lengths:
            self.discard()
            raise ValueError(f"the token store {self._prefix} got no documents")
        bin_path, idx_path = store_files(self._prefix)
        idx = _temporary_file(idx_path)
        try:
            self._write_index(idx)
            for file in (self._bin, idx):
                file.flush()
                os.fsync(file.fileno())
                file.close()
                os.chmod(file.name, 0o644)  # temporary files are private; a corpus is for sharing
            # An old index never describes new tokens, not even for a moment.
            idx_path.unlink(missing_ok=True)
            os.replace(self._bin.name, bin_path)
            os.replace(idx.name, idx_path)
            fsync_folder(bin_path.parent)
        except BaseException:
            _remove_file(idx)
            self.discard()
            raise

    def discard(self) -> None:
        """Leave nothing behind."""
        _remove_file(self._bin)

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _write_index(self, file: BinaryIO) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.intc).astype("<i4")
        count = len(lengths)
        offsets = np.zeros(count, dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        code = next(code for code, dtype in _CODES.items() if dtype == self._dtype)
        file.write(_HEADER.pack(_MAGIC, _VERSION, code, count, count + 1))
        file.write(lengths.tobytes())
        file.write((offsets * self._dtype.itemsize).astype("<i8").tobytes())
        file.write(np.arange(count + 1, dtype="<i8").tobytes())


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
        index = np.memmap(idx_path, mode="r", dtype=np.uint8)
        self._lengths = _part(index, _HEADER.size, "<i4", sequences)
        self._offsets = _part(index, _HEADER.size + 4 * sequences, "<i8", sequences)
        self._boundaries = _part(index, _HEADER.size + 12 * sequences, "<i8", boundaries)
        expected = int(self._offsets[-1]) + int(self._lengths[-1]) * self._dtype.itemsize
        if (size := bin_path.stat().st_size) != expected:
            raise _damaged(bin_path, f"has {size:,} bytes, but {idx_path.name} announces {expected:,}")
        if not size:
            raise _damaged(bin_path, "holds no tokens")
        self._stream = np.memmap(bin_path, mode="r", dtype=self._dtype)

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

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, int64. Raises IndexError outside [0, documents)."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} lies outside {self.prefix}, which holds {self.documents} documents")
        first, last = int(self._boundaries[index]), int(self._boundaries[index + 1])
        if first == last:
            return np.empty(0, dtype=np.int64)
        start = int(self._offsets[first]) // self._dtype.itemsize
        return self.read(start, int(self._lengths[first:last].sum(dtype=np.int64)))

    def check(self, vocab_size: int) -> None:
        """Read everything and raise UserError unless the index is consistent and every id is below `vocab_size`."""
        _, idx_path = store_files(self.prefix)
        ends = np.cumsum(self._lengths, dtype=np.int64) * self._dtype.itemsize
        contiguous = self._offsets[0] == 0 and np.array_equal(self._offsets[1:], ends[:-1])
        if not contiguous or np.any(self._lengths < 0):
            raise _damaged(idx_path, "its documents do not lie end to end")
        if self._boundaries[0] != 0 or self._boundaries[-1] != len(self._lengths) or np.any(np.diff(self._boundaries) < 0):
            raise _damaged(idx_path, "its document boundaries are out of order")
        for start in range(0, self.tokens, 1 << 24):
            piece = self._stream[start : start + (1 << 24)]
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
