"""What all candidates of `train_gpu.py` have in common, and by what it and they understand each other. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import command

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import TrainingRecipe

CLIP, WEIGHT_DECAY, BETAS = 1.0, 0.1, (0.9, 0.95)

OUT_OF_MEMORY, UNAVAILABLE = 20, 21
"""Exit codes of a candidate that does not fit, and of one that cannot run here; its last line says why."""


@dataclass(frozen=True)
class Setting:
    """Of a comparison; only the micro-batch may differ between candidates, where it does not fit all of them."""

    model: dict[str, Any]
    """Fields of a ModelConfig."""
    device: str
    precision: str
    micro_batch: int
    """Sequences of a forward pass."""
    batch: int
    """Sequences of a step."""
    warm_up: int
    steps: int
    """Timed ones, after those of the warm-up."""
    learning_rate: float
    weights: str
    """File of the initial weights."""
    matmul_seconds: float

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.model_validate(self.model)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.config.context_length

    def recipe(self, compile: bool) -> TrainingRecipe:
        """Ours. In fp32 at stage 0: one process has nothing to partition, and stage 1 would only add copies."""
        optimizer = {"learning_rate": self.learning_rate, "betas": BETAS, "weight_decay": WEIGHT_DECAY, "gradient_clip": CLIP}
        zero_stage = 1 if self.precision == "bf16" else 0
        return TrainingRecipe.model_validate(
            {
                "optimizer": optimizer,
                "batch": {"global_batch_size": self.batch, "micro_batch_size": self.micro_batch},
                "engine": {"zero_stage": zero_stage, "precision": self.precision, "compile": compile},
                "device": self.device,
            }
        )


if __name__ == "__main__":
    command.no_command("train_cpu.py")
