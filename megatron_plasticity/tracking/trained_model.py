"""A trained model on disk, as fine-tuning, evaluation and analysis read it: a checkpoint, its run, its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_plasticity.config.analysis import AttentionConfig, OverfittingConfig, ProbesConfig
from megatron_plasticity.config.evaluation import EvaluateConfig, HarnessConfig
from megatron_plasticity.config.interchange import ImportConfig
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.data.prepare import TOKENIZER_FILE
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.checkpoint import CheckpointFolder, open_checkpoint
from megatron_plasticity.tracking.progress import Both, FolderProgress, Progress
from megatron_plasticity.tracking.run_folder import RunFolder


@dataclass(frozen=True)
class TrainedModel:
    checkpoint: CheckpointFolder
    run: RunFolder

    @classmethod
    def open(cls, path: Path) -> TrainedModel:
        """The model at a run folder (its latest checkpoint) or checkpoint folder. Raises UserError if it cannot be used."""
        if (path / "state.json").is_file() and (run := RunFolder.open(path)).is_done:
            # Exactly what the run ended with: an earlier checkpoint in place of a damaged one would be another model.
            path = path / run.results["checkpoint"]
        checkpoint = open_checkpoint(path)
        return cls(checkpoint, RunFolder.containing(checkpoint.path))

    @property
    def identity(self) -> str:
        """What enters the hash of a run that reads this model: the run's hash, and the step unless it is the run's last.

        So the hash of everything that follows from a run is known before the run exists.
        """
        if self.run.is_done and self.run.results["checkpoint"] == f"checkpoints/{self.checkpoint.path.name}":
            return self.run.hash
        return f"{self.run.hash}@{self.checkpoint.step}"

    @property
    def tokenizer_path(self) -> Path:
        """Every training run keeps a copy of its tokenizer, so a model can be used without its corpus."""
        return self.run.path / TOKENIZER_FILE

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_path)

    def pretraining_run(self) -> RunFolder:
        """The run that this model was pretrained in: its own, or that of the model it was fine-tuned from.

        Raises UserError for a model that was pretrained elsewhere."""
        config = self.run.config
        if isinstance(config, FinetuneConfig):
            return TrainedModel.open(config.base).pretraining_run()
        if isinstance(config, ImportConfig):
            raise UserError(
                f"{self.run.path}: was pretrained elsewhere, so its training data is not known here. The train–validation gap "
                "and attention maps need it; set `map_sequences: 0` for the spectra of the attention matrices alone"
            )
        assert isinstance(config, PretrainConfig), "only training runs have checkpoints"
        return self.run


ModelReading = EvaluateConfig | HarnessConfig | ProbesConfig | AttentionConfig | OverfittingConfig


def run_on_model(
    kind: str,
    config: ModelReading,
    work: Callable[[TrainedModel, RunFolder, Progress], Mapping[str, Any]],
    progress: Progress,
    inputs: Mapping[str, str] | None = None,
) -> RunFolder:
    """Do `work` on the model at `config.run` in its own run folder, unless done before; its result becomes results.json.

    `inputs` are hashes of what it reads beside the model."""
    trained = TrainedModel.open(config.run)
    folder = RunFolder.create(config.output, kind, config.name, config, {"model": trained.identity, **(inputs or {})})
    if not folder.is_done:
        with folder.running():
            folder.mark_done(work(trained, folder, Both(progress, FolderProgress(folder))))
    return folder
