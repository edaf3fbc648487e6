"""Mean loss over a fixed set of sequences, equal on every rank and for every number of ranks."""

from __future__ import annotations

import numpy as np
import torch

from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.models.loss import IGNORE
from megatron_plasticity.training.engine import TrainingEngine


def mean_cross_entropy(engine: TrainingEngine, reader: BlockReader, blocks: np.ndarray) -> float:
    """Mean cross-entropy in nats per token over `blocks` of `reader`: fp32 losses, summed in fp64 over all ranks. A collective.

    Data-parallel ranks take turns in micro-batches. All make as many forward passes (ZeRO-3 gathers weights in them) of the same
    shape (pipeline stages agree on it), so the last ones may repeat a block without counting it.
    """
    grid, micro = engine.grid, engine.recipe.batch.micro_batch_size
    micro_batches = []
    targets_seen = 0
    for start in range(grid.data_rank * micro, _padded(len(blocks), micro * grid.data_size), micro * grid.data_size):
        mine = blocks[start : start + micro]
        inputs, targets = reader.batch(np.concatenate([mine, np.repeat(blocks[:1], micro - len(mine))]))
        targets[len(mine) :] = IGNORE
        targets_seen += int((targets != IGNORE).sum())
        micro_batches.append((inputs, targets))
    losses = engine.evaluate(micro_batches)
    total = grid.sum(torch.stack((losses, torch.full_like(losses, targets_seen if grid.reports_loss else 0))))
    return float(total[0] / total[1])


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
