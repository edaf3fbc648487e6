"""Losses on the same sequences, compared over λ."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_plasticity.analysis.paired_losses import SequenceLosses, paired_losses

SEQUENCES = tuple(range(60))


def losses(offset: float, gap: float, seed: int = 0, blocks: tuple[int, ...] = SEQUENCES) -> SequenceLosses:
    """Sequences of very different difficulty, on which a model loses `offset` more, and `gap` more on those held out."""
    hard = np.random.default_rng(5).normal(2, 1, (2, 60))
    noise = np.random.default_rng(seed).normal(0, 0.01, (2, 60))
    return SequenceLosses((hard[0] + offset + noise[0]).tolist(), (hard[1] + offset + gap + noise[1]).tolist(), blocks, blocks)


def test_difficulty_cancels_in_the_difference_of_two_weight_decays() -> None:
    found = paired_losses({1.0: losses(0.1, 0.0, 1), 0.0: losses(0.0, 0.3, 2)}, resamples=500)
    assert found is not None
    (pair,) = found["neighbours"]
    assert pair["weight_decays"] == [0.0, 1.0]
    assert pair["gap"]["value"] == pytest.approx(-0.3, abs=0.01)
    assert pair["held_out_loss"]["value"] == pytest.approx(-0.2, abs=0.01)
    # Unpaired, with texts that spread by 1 nat, the interval would be about 0.7 wide.
    assert pair["gap"]["high"] - pair["gap"]["low"] < 0.02
    assert pair["gap"]["low"] <= pair["gap"]["value"] <= pair["gap"]["high"]
    assert json.loads(json.dumps(found)) == found


def test_shares_count_in_how_many_resamples_a_weight_decay_is_lowest() -> None:
    found = paired_losses({0.0: losses(0.5, 0), 0.1: losses(0, 0, 3), 1.0: losses(0, 0, 4), 2.0: losses(0.5, 0)}, resamples=400)
    assert found is not None
    lowest = found["lowest_held_out_loss"]
    shares = {row["weight_decay"]: row["share"] for row in lowest["distribution"]}
    assert shares[0.0] == shares[2.0] == 0
    assert shares[0.1] + shares[1.0] == pytest.approx(1)
    assert 0.1 <= lowest["low"] <= lowest["high"] <= 1.0
    twins = paired_losses({0.1: losses(0, 0, 3), 1.0: losses(0, 0, 3)}, resamples=50)
    assert twins is not None
    assert [row["share"] for row in twins["lowest_held_out_loss"]["distribution"]] == [0.5, 0.5]


def test_only_the_same_sequences_are_compared() -> None:
    other = losses(0, 0, blocks=tuple(range(1, 61)))
    found = paired_losses({0.0: losses(0, 0), 0.5: other, 1.0: losses(0, 0, 1)}, resamples=20)
    assert found is not None
    assert (found["weight_decays"], found["left_out"]) == ([0.0, 1.0], [0.5])
    assert paired_losses({0.0: losses(0, 0), 0.5: other}, resamples=20) is None
    assert paired_losses({}) is None
