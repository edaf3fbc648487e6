"""A trained model on disk, as fine-tuning, evaluation and analysis read it: a checkpoint, its run, its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_plasticity.config.analysis import (
    AttentionConfig,
    FeaturesConfig,
    ModelCaptureConfig,
    OverfittingConfig,
    ProbesConfig,
    TruncationConfig,
)
from megatron_plasticity.config.evaluation import EvaluateConfig, HarnessConfig
from megatron_plasticity.config.interchange import ImportConfig
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.data.prepare import TOKENIZER_FILE
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.checkpoint import CheckpointFolder, open_checkpoint
from megatron_plasticity.parallel.grid import ProcessGrid
from megatron_plasticity.tracking.progress import Both, FolderProgress, NoProgress, Progress
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
            if (place := run.results.get("checkpoint")) is None:
                raise UserError(f"{path}: this {run.kind} run has made no model; name a run that has, or one of its checkpoints")
            path = path / place
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
        """The run that this model was pretrained in: its own, or that of the model that was fine-tuned or truncated to it.

        Raises UserError for a model that was pretrained elsewhere."""
        config = self.run.config
        if isinstance(config, FinetuneConfig):
            return TrainedModel.open(config.base).pretraining_run()
        if isinstance(config, TruncationConfig):
            return TrainedModel.open(config.run).pretraining_run()
        if isinstance(config, ImportConfig):
            raise UserError(
                f"{self.run.path}: was pretrained elsewhere, so its training data is not known here. The train–validation gap "
                "and attention maps need it; set `map_sequences: 0` for the spectra of the attention matrices alone. The loss of "
                "truncated heads and features are measured on any text: name one by `text`"
            )
        assert isinstance(config, PretrainConfig), "only runs of these kinds have checkpoints"
        return self.run


ModelReading = (
    EvaluateConfig
    | HarnessConfig
    | ModelCaptureConfig
    | ProbesConfig
    | AttentionConfig
    | TruncationConfig
    | OverfittingConfig
    | FeaturesConfig
)


def folder_on_model(kind: str, config: ModelReading, model: TrainedModel, inputs: Mapping[str, str] | None = None) -> RunFolder:
    """The run folder of work on `model`, made if it is not there; `inputs` are hashes of what it reads beside the model."""
    return RunFolder.create(config.output, kind, config.name, config, {"model": model.identity, **(inputs or {})})


def run_on_model(
    kind: str,
    config: ModelReading,
    work: Callable[[TrainedModel, RunFolder, Progress], Mapping[str, Any]],
    progress: Progress,
    inputs: Mapping[str, str] | None = None,
    grid: ProcessGrid | None = None,
) -> RunFolder:
    """Do `work` on the model at `config.run` in its own run folder, unless done before; its result becomes results.json.

    `inputs` are hashes of what it reads beside the model. With a `grid` every process of it calls this and takes part in the
    work; the run folder is the main process's.
    """
    trained = TrainedModel.open(config.run)
    is_main = grid is None or grid.is_main
    if is_main:
        folder_on_model(kind, config, trained, inputs)
    if grid is not None:
        grid.barrier()
    folder = folder_on_model(kind, config, trained, inputs)
    if folder.is_done:
        return folder
    if not is_main:
        work(trained, folder, NoProgress())
        return folder
    if grid is not None:
        grid.liveness.at_end(folder.mark_failed)
    with folder.running():
        folder.mark_done(work(trained, folder, Both(progress, FolderProgress(folder))))
    return folder
