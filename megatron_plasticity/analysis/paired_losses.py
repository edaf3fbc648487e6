"""Losses of the λ of a grid on the very same sequences: differences between λ, and how often each λ has the lowest loss.

Texts differ far more in difficulty than models do in loss. So the sequences are resampled once for all λ: what makes a text hard
cancels in the difference of two λ, which is therefore known much better than the interval of either suggests.

The intervals are over sequences alone. They say nothing of other seeds of pretraining.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_plasticity.analysis.bootstrap import choices, interval, resampled_means


@dataclass(frozen=True)
class SequenceLosses:
    """What one model loses on each sequence, in nats per token, and which sequences they are."""

    seen: Sequence[float]
    held_out: Sequence[float]
    seen_blocks: tuple[int, ...]
    """Block of each seen sequence in the store; the same for every λ that can be compared."""
    held_out_blocks: tuple[int, ...]


@dataclass(frozen=True)
class ResampledLosses:
    """Held-out loss and train–validation gap of the λ that were measured on the same sequences, in nats per token."""

    weight_decays: tuple[float, ...]
    """Ascending."""
    left_out: tuple[float, ...]
    """λ that were measured on other sequences."""
    sequences: int
    held_out_sequences: int
    held_out: np.ndarray
    """[λ]"""
    gap: np.ndarray
    """[λ]"""
    resampled_held_out: np.ndarray
    """[resamples, λ]; a resample's sequences are the same for every λ."""
    resampled_gap: np.ndarray
    """[resamples, λ]"""


def resample_losses(losses: Mapping[float, SequenceLosses], resamples: int = 1000, seed: int = 42) -> ResampledLosses | None:
    """The largest set of λ that were measured on the same sequences, resampled together; None for fewer than two λ."""
    sequences = Counter((item.seen_blocks, item.held_out_blocks) for item in losses.values())
    if not sequences:
        return None
    blocks = sequences.most_common(1)[0][0]
    shared = sorted(decay for decay, item in losses.items() if (item.seen_blocks, item.held_out_blocks) == blocks)
    if len(shared) < 2:
        return None
    seen = np.column_stack([losses[decay].seen for decay in shared]).astype(float)
    held_out = np.column_stack([losses[decay].held_out for decay in shared]).astype(float)
    generator = np.random.default_rng(abs(seed))
    held_out_means = resampled_means(held_out, resamples, generator)
    gap_means = held_out_means - resampled_means(seen, resamples, generator)
    return ResampledLosses(
        weight_decays=tuple(shared),
        left_out=tuple(sorted(set(losses) - set(shared))),
        sequences=len(blocks[0]),
        held_out_sequences=len(blocks[1]),
        held_out=held_out.mean(axis=0),
        gap=held_out.mean(axis=0) - seen.mean(axis=0),
        resampled_held_out=held_out_means,
        resampled_gap=gap_means,
    )


def paired_losses(losses: Mapping[float, SequenceLosses], resamples: int = 1000, seed: int = 42) -> dict[str, Any] | None:
    """Paired comparison over λ of held-out loss and of the train–validation gap; None for fewer than two λ.

    `{"weight_decays", "left_out", "sequences", "held_out_sequences", "neighbours": [{"weight_decays": [smaller, larger], "gap":
    interval, "held_out_loss": interval}], "lowest_held_out_loss": see `choices`}`. A difference is the larger λ's value minus the
    smaller's, in nats per token. Only λ measured on the same sequences are compared: the largest such set; the others are
    `left_out`.
    """
    found = resample_losses(losses, resamples, seed)
    if found is None:
        return None
    shared, held_out_means, gap_means = found.weight_decays, found.resampled_held_out, found.resampled_gap
    loss, gap = found.held_out, found.gap
    lowest = held_out_means == held_out_means.min(axis=1, keepdims=True)
    return {
        "weight_decays": list(shared),
        "left_out": list(found.left_out),
        "sequences": found.sequences,
        "held_out_sequences": found.held_out_sequences,
        "neighbours": [
            {
                "weight_decays": [shared[one], shared[other]],
                "gap": interval(gap[other] - gap[one], gap_means[:, other] - gap_means[:, one]),
                "held_out_loss": interval(loss[other] - loss[one], held_out_means[:, other] - held_out_means[:, one]),
            }
            for one, other in pairwise(range(len(shared)))
        ],
        "lowest_held_out_loss": choices(shared, lowest),
    }
