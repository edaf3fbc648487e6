"""The files are Megatron's: against the layout as documented, and against megatron-core itself where it is installed."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_plasticity.data.token_store import TokenStore, TokenStoreWriter

DOCUMENTS = [[1, 2, 3], [499], [5, 6, 7, 8], list(range(300))]

each_vocabulary = pytest.mark.parametrize("vocab_size", [500, 65_499, 65_500, 100_278])


def write(prefix: Path, vocab_size: int) -> None:
    with TokenStoreWriter(prefix, vocab_size) as writer:
        writer.add_document(DOCUMENTS[0])
        rest = np.concatenate([np.array(document) for document in DOCUMENTS[1:]])
        writer.add_documents(rest.astype("<i4"), np.array([len(document) for document in DOCUMENTS[1:]]))


@each_vocabulary
def test_the_index_field_by_field(tmp_path: Path, vocab_size: int) -> None:
    """Written out by hand from the description of the format, so that a mistake in our reader cannot hide one in our writer."""
    write(tmp_path / "s", vocab_size)
    raw = (tmp_path / "s.idx").read_bytes()
    size, code = (2, 8) if vocab_size < 65_500 else (4, 4)
    assert raw[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<QBQQ", raw, 9) == (1, code, 4, 5)
    assert struct.unpack_from("<4i", raw, 34) == (3, 1, 4, 300)
    assert struct.unpack_from("<4q", raw, 34 + 16) == (0, 3 * size, 4 * size, 8 * size)
    assert struct.unpack_from("<5q", raw, 34 + 16 + 32) == (0, 1, 2, 3, 4)
    assert len(raw) == 34 + 16 + 32 + 40
    tokens = [token for document in DOCUMENTS for token in document]
    assert (tmp_path / "s.bin").read_bytes() == struct.pack(f"<308{'H' if size == 2 else 'i'}", *tokens)


def test_an_index_in_pieces_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "whole", 500)
    monkeypatch.setattr("megatron_plasticity.data.token_store._PIECE", 3)
    write(tmp_path / "pieces", 500)
    assert (tmp_path / "whole.idx").read_bytes() == (tmp_path / "pieces.idx").read_bytes()
    TokenStore(tmp_path / "pieces").check(500)


@pytest.mark.parametrize(("ids", "lengths"), [([1, 2], [3]), ([1, 2], [2, 0]), ([1, 500], [2]), ([-1, 2], [2]), ([], [0])])
def test_documents_end_to_end_that_cannot_be_stored(tmp_path: Path, ids: list[int], lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="must"), TokenStoreWriter(tmp_path / "s", 500) as writer:
        writer.add_documents(np.array(ids, dtype=np.int64), np.array(lengths))
    assert list(tmp_path.iterdir()) == []


@each_vocabulary
def test_megatron_core_reads_ours(tmp_path: Path, vocab_size: int) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    write(tmp_path / "s", vocab_size)
    theirs = indexed_dataset.IndexedDataset(str(tmp_path / "s"))
    assert len(theirs) == 4
    assert [theirs[index].tolist() for index in range(4)] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert theirs[0].dtype == TokenStore(tmp_path / "s").dtype


@each_vocabulary
def test_we_read_megatron_cores(tmp_path: Path, vocab_size: int) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    dtype = indexed_dataset.DType.optimal_dtype(vocab_size)
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "s.bin"), dtype=dtype)
    for document in DOCUMENTS[:2]:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.add_document(torch.tensor(DOCUMENTS[2] + DOCUMENTS[3]), [4, 300])  # one document of two sequences
    builder.finalize(str(tmp_path / "s.idx"))
    ours = TokenStore(tmp_path / "s")
    assert [ours.document(index).tolist() for index in range(3)] == [*DOCUMENTS[:2], DOCUMENTS[2] + DOCUMENTS[3]]
    ours.check(vocab_size)
    write(tmp_path / "t", vocab_size)
    assert (tmp_path / "t.bin").read_bytes() == (tmp_path / "s.bin").read_bytes()
