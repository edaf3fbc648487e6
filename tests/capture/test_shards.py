from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_plasticity.capture import shards
from megatron_plasticity.capture.shards import write_tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_the_library_reads_what_was_written_in_pieces(tmp_path: Path, dtype: torch.dtype) -> None:
    pieces = [torch.arange(12).reshape(2, 2, 3).to(dtype), torch.arange(100, 106).reshape(1, 2, 3).to(dtype)]
    across = torch.arange(6).reshape(2, 3).T.to(dtype)
    path = tmp_path / "new" / "shard.safetensors"
    write_tensors(path, {"states": pieces, "across": [across]}, {"point": "embed"})
    read = load_file(path)
    assert torch.equal(read["states"], torch.cat(pieces))
    assert torch.equal(read["across"], across)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"point": "embed"}


def test_tensors_begin_on_the_boundary_that_mapping_wants(tmp_path: Path) -> None:
    for length in range(8):
        path = tmp_path / f"{length}.safetensors"
        write_tensors(path, {"t" * (length + 1): [torch.zeros(3)]}, {})
        assert (path.stat().st_size - 12) % 8 == 0


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object, __: object) -> None:
        raise OSError("No space left on device")

    path = tmp_path / "shard.safetensors"
    write_tensors(path, {"t": [torch.zeros(3)]}, {})
    monkeypatch.setattr(shards.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_tensors(path, {"t": [torch.ones(3)]}, {})
    assert [file.name for file in tmp_path.iterdir()] == ["shard.safetensors"]
    assert load_file(path)["t"].sum() == 0
