"""A truncated model on disk: a checkpoint in the folder of its `truncation` run, read like that of any training run."""

from __future__ import annotations

import shutil

from megatron_plasticity.analysis.truncation import truncated_tensors
from megatron_plasticity.config.analysis import AttentionProduct
from megatron_plasticity.data.prepare import TOKENIZER_FILE
from megatron_plasticity.models.checkpoint import WEIGHTS, save_checkpoint
from megatron_plasticity.tracking.disk import explain_disk_errors
from megatron_plasticity.tracking.progress import Progress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.tracking.trained_model import TrainedModel


def write_truncated(trained: TrainedModel, folder: RunFolder, target: AttentionProduct, rank: int, progress: Progress) -> str:
    """Write the model with each head's `target` cut to `rank`, and its tokenizer, into the run folder; returns the checkpoint's
    place there. One shard of the file is in memory at a time."""
    checkpoint = trained.checkpoint
    place = f"checkpoints/step-{checkpoint.step}"
    trainer = {"step": checkpoint.step, "truncated_from": trained.identity, "target": target, "rank": rank}
    tensors = truncated_tensors(checkpoint.tensors(), checkpoint.model, target, rank, progress)
    with explain_disk_errors(folder.path):
        save_checkpoint(folder.path / place, checkpoint.model, trainer, {WEIGHTS: tensors})
        shutil.copyfile(trained.tokenizer_path, folder.path / TOKENIZER_FILE)
    return place
