"""The token store: Megatron's bytes, round trips, and clear words about damaged files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_plasticity.data.token_store import TokenStore, TokenStoreWriter, token_dtype
from megatron_plasticity.errors import UserError

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8]]


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, vocab_size: int = 100) -> TokenStore:
    with TokenStoreWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
    return TokenStore(prefix)


def test_round_trip(tmp_path: Path) -> None:
    store = write(tmp_path / "train.v1")  # a dot in the prefix is not a suffix
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.v1.bin", "train.v1.idx"]
    assert (store.documents, store.tokens) == (3, 8)
    assert store.read(2, 4).tolist() == [3, 4, 5, 6]
    assert store.read(0, 8).dtype == np.int64
    assert store.read(8, 0).tolist() == []
    assert [store.document(index).tolist() for index in range(3)] == DOCUMENTS
    store.check(vocab_size=9)


def test_bytes_are_megatrons(tmp_path: Path) -> None:
    write(tmp_path / "s")
    assert (tmp_path / "s.bin").read_bytes() == struct.pack("<8H", 1, 2, 3, 4, 5, 6, 7, 8)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", 8) + struct.pack("<QQ", 3, 4)
    expected += struct.pack("<3i", 3, 1, 4) + struct.pack("<3q", 0, 6, 8) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "s.idx").read_bytes() == expected


def test_several_sequences_per_document_are_read(tmp_path: Path) -> None:
    (tmp_path / "s.bin").write_bytes(struct.pack("<5i", 9, 8, 7, 6, 70_000))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3)
    index += struct.pack("<3i", 2, 1, 2) + struct.pack("<3q", 0, 8, 12) + struct.pack("<3q", 0, 2, 3)
    (tmp_path / "s.idx").write_bytes(index)
    store = TokenStore(tmp_path / "s")
    assert [store.document(index).tolist() for index in range(store.documents)] == [[9, 8, 7], [6, 70_000]]


@pytest.mark.parametrize(("vocab_size", "size", "code"), [(65_499, 2, 8), (65_500, 4, 4), (100_278, 4, 4)])
def test_number_type_follows_the_vocabulary(tmp_path: Path, vocab_size: int, size: int, code: int) -> None:
    assert token_dtype(vocab_size).itemsize == size
    store = write(tmp_path / "s", [[0, vocab_size - 1]], vocab_size)
    assert store.read(0, 2).tolist() == [0, vocab_size - 1]
    assert (tmp_path / "s.idx").read_bytes()[17] == code


@pytest.mark.parametrize("ids", [[], [100], [-1], [[1, 2]]])
def test_documents_that_cannot_be_stored(tmp_path: Path, ids: list) -> None:
    with pytest.raises(ValueError, match="must"), TokenStoreWriter(tmp_path / "s", 100) as writer:
        writer.add_document([1])
        writer.add_document(ids)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_store(tmp_path: Path) -> None:
    write(tmp_path / "s")
    with pytest.raises(KeyboardInterrupt), TokenStoreWriter(tmp_path / "s", 100) as writer:
        writer.add_document([9])
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.bin", "s.idx"]
    assert TokenStore(tmp_path / "s").tokens == 8


def test_a_failure_while_closing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TokenStoreWriter, "_write_index", full_disk)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no documents"):
        write(tmp_path / "s", [])
    assert list(tmp_path.iterdir()) == []


def test_reading_outside(tmp_path: Path) -> None:
    store = write(tmp_path / "s")
    for start, length in ((-1, 2), (0, 9), (8, 1), (0, -1)):
        with pytest.raises(IndexError, match="8 tokens"):
            store.read(start, length)
    for index in (-1, 3):
        with pytest.raises(IndexError, match="3 documents"):
            store.document(index)


def damage(path: Path, start: int, replacement: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[start : start + len(replacement)] = replacement
    path.write_bytes(content)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s\.bin: no such file"):
        TokenStore(tmp_path / "s")
    write(tmp_path / "s")
    (tmp_path / "s.idx").unlink()
    with pytest.raises(UserError, match=r"s\.idx: no such file"):
        TokenStore(tmp_path / "s")


@pytest.mark.parametrize("file", ["s.bin", "s.idx"])
@pytest.mark.parametrize("change", [-1, 1])
def test_files_of_the_wrong_length(tmp_path: Path, file: str, change: int) -> None:
    write(tmp_path / "s")
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:change] if change < 0 else content + b"\0")
    with pytest.raises(UserError, match=rf"{file}: damaged.*bytes"):
        TokenStore(tmp_path / "s")


@pytest.mark.parametrize(
    ("start", "replacement", "message"),
    [
        (0, b"PARQUET", "not the index"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x06", "number type 6"),
        (18, struct.pack("<Q", 2**40), "announces"),
    ],
)
def test_bad_headers(tmp_path: Path, start: int, replacement: bytes, message: str) -> None:
    write(tmp_path / "s")
    damage(tmp_path / "s.idx", start, replacement)
    with pytest.raises(UserError, match=message):
        TokenStore(tmp_path / "s")


def test_an_index_cut_inside_its_header(tmp_path: Path) -> None:
    write(tmp_path / "s")
    (tmp_path / "s.idx").write_bytes((tmp_path / "s.idx").read_bytes()[:20])
    with pytest.raises(UserError, match="header"):
        TokenStore(tmp_path / "s")


@pytest.mark.parametrize(
    ("file", "start", "replacement", "message"),
    [
        ("s.idx", 34, struct.pack("<2i", 2, 2), "end to end"),
        ("s.idx", 34 + 12 + 24, struct.pack("<2q", 0, 9), "out of order"),
        ("s.bin", 4, struct.pack("<H", 100), "outside"),
    ],
)
def test_the_full_check_finds_what_opening_does_not(
    tmp_path: Path, file: str, start: int, replacement: bytes, message: str
) -> None:
    write(tmp_path / "s")
    damage(tmp_path / file, start, replacement)
    with pytest.raises(UserError, match=message):
        TokenStore(tmp_path / "s").check(vocab_size=100)
