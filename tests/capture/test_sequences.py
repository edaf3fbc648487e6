from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_plasticity.capture.sequences import CapturedSequences
from megatron_plasticity.errors import UserError

IDS = [[5, 6, 7], [8], [9, 10]]


def test_sequences_are_padded_and_positions_say_what_is_kept() -> None:
    sequences = CapturedSequences.of(IDS, [range(1, 3), range(1), range(1, 2)])
    assert sequences.tokens.tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]
    assert sequences.lengths.tolist() == [3, 1, 2]
    assert sequences.positions.tolist() == [[1, 2], [0, -1], [1, -1]]
    assert [len(tokens) for tokens, _ in sequences.batches(2)] == [2, 1]


@pytest.mark.parametrize(("ids", "kept"), [([], []), ([[1], []], [range(1), range(1)]), ([[1]], [range(0)])])
def test_a_sequence_without_tokens_or_positions_is_refused(ids: list[list[int]], kept: list[range]) -> None:
    with pytest.raises(ValueError, match="expected sequences"):
        CapturedSequences.of(ids, kept)


def test_a_folder_keeps_to_its_sequences(tmp_path: Path) -> None:
    sequences = CapturedSequences.of(IDS, [range(1)] * 3)
    for _ in range(2):
        sequences.save(tmp_path)
    assert CapturedSequences.load(tmp_path).sha256 == sequences.sha256
    for other in (CapturedSequences.of(IDS[:2], [range(1)] * 2), CapturedSequences.of(IDS, [range(1), range(1), range(2)])):
        with pytest.raises(UserError, match="other sequences or positions"):
            other.save(tmp_path)


def test_a_missing_or_truncated_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sequences.safetensors: is missing"):
        CapturedSequences.load(tmp_path)
    CapturedSequences.of(IDS, [range(1)] * 3).save(tmp_path)
    path = tmp_path / "sequences.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"sequences.safetensors: truncated or damaged"):
        CapturedSequences.load(tmp_path)


def test_hash_sees_tokens_lengths_and_positions() -> None:
    hashes = {CapturedSequences.of(ids, kept).sha256 for ids, kept in (
        ([[1, 0]], [range(1)]), ([[1, 2]], [range(1)]), ([[1, 0]], [range(1, 2)]), ([[1, 0, 0]], [range(1)]),
    )}  # fmt: skip
    assert len(hashes) == 4
    assert torch.equal(CapturedSequences.of([[1]], [range(1)]).positions, torch.tensor([[0]]))
