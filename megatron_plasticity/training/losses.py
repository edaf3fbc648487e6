"""Mean loss over a fixed set of sequences, equal on every rank and for every number of ranks."""

from __future__ import annotations

import numpy as np
import torch

from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.micro_batch import MicroBatch
from megatron_plasticity.models.loss import IGNORE
from megatron_plasticity.training.engine import TrainingEngine

# Micro-batches read at once: enough to fill a pipeline, few enough for the memory.
_AT_ONCE = 64


def mean_cross_entropy(engine: TrainingEngine, reader: BlockReader, blocks: np.ndarray) -> float:
    """Mean cross-entropy in nats per token over `blocks` of `reader`: fp32 losses, summed in fp64 over all ranks. A collective.

    Data-parallel ranks take turns in micro-batches. All make as many forward passes (ZeRO-3 gathers weights in them) of the same
    shape (pipeline stages agree on it), so the last ones may repeat a block without counting it.
    """
    grid, micro = engine.grid, engine.recipe.batch.micro_batch_size
    total = torch.zeros(2, dtype=torch.float64, device=grid.device)
    stride = micro * grid.data_size
    starts = range(grid.data_rank * micro, -(-len(blocks) // stride) * stride, stride)
    for first in range(0, len(starts), _AT_ONCE):
        micro_batches = [_micro_batch(reader, blocks, start, micro) for start in starts[first : first + _AT_ONCE]]
        total[0] += engine.evaluate(micro_batches)
        if grid.reports_loss:
            total[1] += sum(int((micro_batch.targets != IGNORE).sum()) for micro_batch in micro_batches)
    total = grid.sum(total)
    return float(total[0] / total[1])


def _micro_batch(reader: BlockReader, blocks: np.ndarray, start: int, size: int) -> MicroBatch:
    mine = blocks[start : start + size]
    inputs, targets = reader.batch(np.concatenate([mine, np.repeat(blocks[:1], size - len(mine))]))
    targets[len(mine) :] = IGNORE
    return MicroBatch(inputs, targets)
