"""The ledger: an interval of samples, the blocks it stands for, and the store it belongs to."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_plasticity.data.ledger import (
    Ledger,
    consumed_blocks,
    decile_bounds,
    draw_consumed_blocks,
    read_ledger,
    write_ledger,
)
from megatron_plasticity.data.order import SampleOrder
from megatron_plasticity.errors import UserError

LEDGER = Ledger(seed=42, sequence_length=16, number_of_blocks=1000, store_sha256="ab" * 32, consumed_samples=333)
HASH = LEDGER.store_sha256


def test_round_trip(tmp_path: Path) -> None:
    write_ledger(tmp_path, LEDGER)
    write_ledger(tmp_path, replace(LEDGER, consumed_samples=400))
    assert read_ledger(tmp_path) == replace(LEDGER, consumed_samples=400)
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.json"]


def test_consumed_blocks_are_what_training_read() -> None:
    read_in_steps = [block for step in range(37) for block in SampleOrder(1000, 42).blocks(step * 9, step * 9 + 9)]
    assert consumed_blocks(LEDGER, HASH).tolist() == read_in_steps


def test_deciles_partition_the_consumed_blocks() -> None:
    deciles = [consumed_blocks(LEDGER, HASH, decile) for decile in range(10)]
    assert np.array_equal(np.concatenate(deciles), consumed_blocks(LEDGER, HASH))
    assert {len(decile) for decile in deciles} == {33, 34}
    assert decile_bounds(LEDGER)[[0, -1]].tolist() == [0, 333]
    with pytest.raises(ValueError, match="decile"):
        consumed_blocks(LEDGER, HASH, 10)


def test_later_epochs_add_no_block() -> None:
    blocks = consumed_blocks(replace(LEDGER, consumed_samples=2500), HASH)
    assert sorted(blocks.tolist()) == list(range(1000))


def test_draws_are_different_blocks_that_were_consumed() -> None:
    drawn = draw_consumed_blocks(LEDGER, HASH, 100, seed=1)
    assert len(set(drawn.tolist())) == 100
    assert set(drawn.tolist()) <= set(consumed_blocks(LEDGER, HASH).tolist())
    assert np.array_equal(drawn, draw_consumed_blocks(LEDGER, HASH, 100, seed=1))
    assert not np.array_equal(drawn, draw_consumed_blocks(LEDGER, HASH, 100, seed=2))
    in_decile = draw_consumed_blocks(LEDGER, HASH, 20, seed=1, decile=9)
    assert set(in_decile.tolist()) <= set(consumed_blocks(LEDGER, HASH, 9).tolist())


def test_draws_are_uniform_over_the_interval() -> None:
    blocks = consumed_blocks(LEDGER, HASH)
    position = {int(block): index for index, block in enumerate(blocks)}
    positions = [position[int(block)] for seed in range(40) for block in draw_consumed_blocks(LEDGER, HASH, 50, seed)]
    counts, _ = np.histogram(positions, bins=np.linspace(0, 333, 10))
    assert counts.min() > 170  # expected 222 of 2,000 in each ninth
    assert counts.max() < 275


def test_asking_for_more_than_there_is_gives_all() -> None:
    assert np.array_equal(draw_consumed_blocks(LEDGER, HASH, 10**6, seed=1), consumed_blocks(LEDGER, HASH))
    empty = replace(LEDGER, consumed_samples=0)
    assert draw_consumed_blocks(empty, HASH, 5, seed=1).tolist() == []


def test_another_store_is_refused() -> None:
    for use in (lambda: consumed_blocks(LEDGER, "cd" * 32), lambda: draw_consumed_blocks(LEDGER, "cd" * 32, 5, seed=1)):
        with pytest.raises(UserError, match=r"abababababab.*data\.folder holds cdcdcdcdcdcd"):
            use()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("seed"), "keys"),
        (lambda values: values.update(extra=1), "keys"),
        (lambda values: values.update(seed="42"), "whole number"),
        (lambda values: values.update(consumed_samples=True), "whole number"),
        (lambda values: values.update(consumed_samples=-1), "out of range"),
        (lambda values: values.update(number_of_blocks=0), "out of range"),
    ],
)
def test_damaged_ledgers(tmp_path: Path, change: Any, message: str) -> None:
    values = asdict(LEDGER)
    change(values)
    (tmp_path / "ledger.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        read_ledger(tmp_path)


def test_files_that_are_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ledger\.json: no such file"):
        read_ledger(tmp_path)
    for content in ("{", "[1]", "3"):
        (tmp_path / "ledger.json").write_text(content)
        with pytest.raises(UserError, match=r"ledger\.json"):
            read_ledger(tmp_path)
