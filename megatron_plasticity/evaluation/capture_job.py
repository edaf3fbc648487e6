"""Recording the activations of a finished model, from the config to the run folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_plasticity.capture.dump import recorder_of, write_dump
from megatron_plasticity.capture.manifest import ACTIVATIONS_FOLDER, model_identity
from megatron_plasticity.capture.recipe import check_recipe, memory_bytes
from megatron_plasticity.capture.sequences import CapturedSequences
from megatron_plasticity.capture.store import ActivationStore
from megatron_plasticity.capture.writer import ActivationWriter
from megatron_plasticity.config.analysis import ModelCaptureConfig
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.prepare import HELD_OUT
from megatron_plasticity.data.token_store import TokenStore
from megatron_plasticity.evaluation.capture_sequences import choose_sequences, sequence_inputs
from megatron_plasticity.parallel.grid import resolve_device
from megatron_plasticity.tracking.progress import Progress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.tracking.trained_model import TrainedModel, run_on_model


def capture(config: ModelCaptureConfig, progress: Progress) -> RunFolder:
    """Dump activations of the model at `config.run` (or do nothing if that is done) into `activations/` of the run folder."""
    device = resolve_device(config.device)

    def work(trained: TrainedModel, folder: RunFolder, show: Progress) -> Mapping[str, Any]:
        check_recipe(config, trained.checkpoint.model)
        sequences = _sequences(config, trained)
        model = trained.checkpoint.build_model(device)
        recorder = recorder_of(config, model.bfloat16() if config.precision == "bf16" else model)
        target, step = folder.path / ACTIVATIONS_FOLDER, trained.checkpoint.step

        def batches() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            done = 0
            for tokens, kept in sequences.batches(config.batch_size):
                yield recorder.record(tokens.to(device), kept=kept), kept
                done += len(tokens)
                show.update(done, len(sequences), "sequences")

        groups = trained.checkpoint.trainer.get("decay_groups", {})  # an imported model has none
        identity = model_identity(trained.run.hash, trained.checkpoint.model, groups.get("weight_decay"))
        with ActivationWriter(target, identity, memory_bytes=memory_bytes(config)) as writer:
            sequences.save(target)
            with torch.no_grad():
                write_dump(writer, step, config, batches())
        store = ActivationStore(target)
        return {
            "step": step,
            "sequences": len(sequences),
            "positions": int((sequences.positions >= 0).sum()),
            "sequences_sha256": sequences.sha256,
            "shapes": {point: list(store.array(step, point).shape) for point in store.points(step)},
            "statistics": store.points_with_statistics(step),
            "bytes": sum(file.stat().st_size for file in target.rglob("*") if file.is_file()),
        }

    return run_on_model("capture", config, work, progress, sequence_inputs(config))


def _sequences(config: ModelCaptureConfig, trained: TrainedModel) -> CapturedSequences:
    run, tokenizer, length = trained.run.config, trained.tokenizer(), trained.checkpoint.model.context_length
    if isinstance(run, FinetuneConfig):
        return choose_sequences(config, tokenizer, length, task=run.task, template=run.template)
    held_out = None
    if isinstance(run, PretrainConfig) and config.texts is None and config.task is None:
        held_out = BlockReader(TokenStore(run.data.folder / HELD_OUT), run.model.context_length)
    return choose_sequences(config, tokenizer, length, held_out)
