"""The order of samples: a bijection in every epoch, a pure function of seed and index, and the same for ever."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from megatron_plasticity.data.order import SampleOrder


@pytest.mark.parametrize("number_of_blocks", [1, 2, 3, 5, 16, 17, 63, 64, 65, 1000, 4096, 100_003])
def test_every_epoch_is_a_bijection(number_of_blocks: int) -> None:
    order = SampleOrder(number_of_blocks, seed=42)
    for epoch in (0, 1, 7):
        blocks = order.blocks(epoch * number_of_blocks, (epoch + 1) * number_of_blocks)
        assert np.array_equal(np.sort(blocks), np.arange(number_of_blocks))


def test_epochs_and_seeds_have_permutations_of_their_own() -> None:
    number = 1000
    first, second = SampleOrder(number, 0).blocks(0, number), SampleOrder(number, 0).blocks(number, 2 * number)
    other = SampleOrder(number, 1).blocks(0, number)
    for one, two in ((first, second), (first, other), (first, np.arange(number))):
        assert np.mean(one == two) < 0.01  # a random permutation has one fixed point on average


def test_any_partition_gives_the_same_order() -> None:
    order = SampleOrder(97, seed=3)
    whole = order.blocks(0, 400)
    for world_size in (1, 2, 3, 8):
        per_rank = [[order.block(sample) for sample in range(rank, 400, world_size)] for rank in range(world_size)]
        together = np.empty(400, dtype=np.int64)
        for rank, blocks in enumerate(per_rank):
            together[rank::world_size] = blocks
        assert np.array_equal(together, whole)
    pieces = [order.blocks(start, stop) for start, stop in ((0, 1), (1, 96), (96, 98), (98, 98), (98, 400))]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_the_order_of_past_runs_stays() -> None:
    # A change here silently changes what every past run is said to have consumed: raise RESULTS_VERSION with it.
    assert SampleOrder(1000, 42).blocks(0, 8).tolist() == [734, 360, 340, 642, 160, 143, 183, 126]
    assert SampleOrder(1000, 42).blocks(998, 1004).tolist() == [820, 596, 483, 960, 84, 303]


def test_positions_are_uniform() -> None:
    number, seeds = 5, 4000
    counts = np.zeros((number, number))
    for seed in range(seeds):
        counts[np.arange(number), SampleOrder(number, seed).blocks(0, number)] += 1
    expected = seeds / number
    chi_square = ((counts - expected) ** 2 / expected).sum() * (number - 1) / number  # rows and columns both sum to `seeds`
    assert chi_square < 39.3  # 99.9th percentile at (5 − 1)² = 16 degrees of freedom


def test_neighbours_are_not_correlated() -> None:
    blocks = SampleOrder(50_000, 42).blocks(0, 50_000).astype(float)
    assert abs(np.corrcoef(blocks[:-1], blocks[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(blocks, np.arange(50_000))[0, 1]) < 0.02


def test_memory_does_not_grow_with_the_store() -> None:
    tracemalloc.start()
    blocks = SampleOrder(10**12, 42).blocks(5 * 10**11, 5 * 10**11 + 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(blocks.tolist())) == 1000
    assert blocks.min() >= 0
    assert blocks.max() < 10**12
    assert peak < 1_000_000


def test_impossible_requests() -> None:
    with pytest.raises(ValueError, match="number_of_blocks"):
        SampleOrder(0, 42)
    for start, stop in ((-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="start"):
            SampleOrder(10, 42).blocks(start, stop)
