"""A trained model on disk, as fine-tuning, evaluation and analysis read it: a checkpoint, the run that it belongs to, its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_plasticity.data.prepare import TOKENIZER_FILE
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.models.checkpoint import CheckpointFolder, open_checkpoint
from megatron_plasticity.tracking.run_folder import RunFolder


@dataclass(frozen=True)
class TrainedModel:
    checkpoint: CheckpointFolder
    run: RunFolder

    @classmethod
    def open(cls, path: Path) -> TrainedModel:
        """The model at a run folder (its latest checkpoint) or at one of its checkpoint folders. Raises UserError if it cannot be used."""
        checkpoint = open_checkpoint(path)
        return cls(checkpoint, RunFolder.containing(checkpoint.path))

    @property
    def tokenizer_path(self) -> Path:
        """Every training run keeps a copy of its tokenizer, so a model can be used without its corpus."""
        return self.run.path / TOKENIZER_FILE

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_path)

    @property
    def identity(self) -> str:
        """What enters the hash of a run that reads this model."""
        return model_identity(self.run.hash, self.checkpoint.step)


def model_identity(run_hash: str, step: int) -> str:
    """Names the weights of a run after `step` steps; known before they exist, so a whole study can be hashed in advance."""
    return f"{run_hash}@{step}"
