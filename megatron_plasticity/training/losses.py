"""Mean loss over a fixed set of sequences, equal on every rank and for every number of ranks."""

from __future__ import annotations

import numpy as np
import torch

from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.models.loss import IGNORE
from megatron_plasticity.training.engine import TrainingEngine


def mean_cross_entropy(engine: TrainingEngine, reader: BlockReader, blocks: np.ndarray) -> float:
    """Mean cross-entropy in nats per token over `blocks` of `reader`: fp32 losses, summed in fp64 over all ranks. A collective.

    Ranks take turns in micro-batches. Under ZeRO-3 all must make as many forward passes, so the last ones may repeat a block
    without counting it.
    """
    grid, micro = engine.grid, engine.recipe.batch.micro_batch_size
    total = torch.zeros(2, dtype=torch.float64, device=grid.device)
    for start in range(grid.data_rank * micro, _padded(len(blocks), micro * grid.data_size), micro * grid.data_size):
        mine = blocks[start : start + micro]
        inputs, targets = reader.batch(mine if len(mine) else blocks[:1])
        if not len(mine):
            targets = torch.full_like(targets, IGNORE)
        losses = engine.token_losses(inputs.to(grid.device), targets.to(grid.device))
        total[0] += losses.cross_entropy.double().sum()
        total[1] += (targets != IGNORE).sum()
    total = grid.sum(total)
    return float(total[0] / total[1])


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
