"""How long a training run is, without anything that takes part in it."""

from __future__ import annotations

from megatron_plasticity.config.training import BatchConfig
from megatron_plasticity.errors import UserError


def finetuning_steps(examples: int, epochs: int, batch: BatchConfig) -> int:
    """Optimizer steps on so many usable examples. Raises UserError when all epochs together do not fill one global batch."""
    steps = examples * epochs // batch.global_batch_size
    if not steps:
        raise UserError(
            f"task.train_examples: {examples} usable examples times epochs={epochs} do not fill one batch of "
            f"batch.global_batch_size={batch.global_batch_size}; raise task.train_examples or epochs, or lower "
            "batch.global_batch_size"
        )
    return steps
