"""What a model loses on blocks of a store: by token and by sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_plasticity.models.loss import IGNORE, token_loss
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.tracking.progress import Progress


class Batches(Protocol):
    """What losses need of a reader."""

    def batch(self, blocks: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets of blocks, int64 [B, S]."""
        ...


@torch.no_grad()
def token_losses(
    model: Transformer, reader: Batches, blocks: np.ndarray, batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batch by batch the cross entropy in nats of each target, float64 [B, S], computed in fp32, and where there is a target.

    The model is in evaluation mode between the first and the last batch, and then as it was.
    """
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(blocks), batch_size):
            inputs, targets = reader.batch(blocks[start : start + batch_size])
            targets = targets.to(device)
            losses = token_loss(model(inputs.to(device)), targets).cross_entropy.double()
            yield losses.cpu().numpy(), (targets != IGNORE).cpu().numpy()
    finally:
        model.train(was_training)


def sequence_losses(
    model: Transformer,
    reader: Batches,
    blocks: np.ndarray,
    batch_size: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    done_before: int = 0,
    total: int | None = None,
) -> np.ndarray:
    """Mean cross entropy of each block in nats per token: float64 [len(blocks)]; token losses in fp32, their mean in fp64."""
    found: list[np.ndarray] = []
    done = done_before
    for losses, is_target in token_losses(model, reader, blocks, batch_size, device):
        found.append(mean_losses(losses, is_target))
        done += len(losses)
        if progress is not None:
            progress.update(done, len(blocks) if total is None else total, "sequences")
    return np.concatenate(found)


def mean_losses(losses: np.ndarray, is_target: np.ndarray) -> np.ndarray:
    """Mean over the targets of each sequence, [B], of what `token_losses` yields."""
    return np.where(is_target, losses, 0).sum(axis=1) / is_target.sum(axis=1)
