"""A pretraining run, from its config to its results."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np

from megatron_plasticity.capture.sequences import CapturedSequences
from megatron_plasticity.config.analysis import CaptureConfig
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.ledger import Ledger, draw_consumed_blocks, write_ledger
from megatron_plasticity.data.prepare import TOKENIZER_FILE
from megatron_plasticity.data.stream import corpus_hash, ledger_of, sample_order, training_blocks
from megatron_plasticity.data.token_store import TokenStore
from megatron_plasticity.data.tokenizer import Tokenizer, check_tokenizer_fits
from megatron_plasticity.evaluation.capture_sequences import choose_sequences
from megatron_plasticity.models.attention_choice import choose_attention
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.sizes import parameter_count
from megatron_plasticity.models.transformer import local_model
from megatron_plasticity.optim.adamw import check_adamw
from megatron_plasticity.parallel.grid import ProcessGrid, process_grid, resolve_device
from megatron_plasticity.tracking.progress import Both, FolderProgress, NoProgress, Progress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.training.activations import capture_inputs, capturing
from megatron_plasticity.training.batches import PretrainBatches
from megatron_plasticity.training.callbacks import LossEvaluation
from megatron_plasticity.training.losses import mean_cross_entropy
from megatron_plasticity.training.preflight import check_compiler, check_pretraining
from megatron_plasticity.training.session import TrainingSession, held, training_session


def pretrain_folder(config: PretrainConfig) -> RunFolder:
    """The run folder of this config, made if it is not there. Raises UserError if the corpus is not prepared."""
    inputs = {"corpus": corpus_hash(config.data), **capture_inputs(config.capture)}
    return RunFolder.create(config.output, "pretrain", config.name, config, inputs)


def pretrain(config: PretrainConfig, progress: Progress) -> RunFolder:
    """Train (or go on training, or do nothing if it is done) the model that `config` describes; returns its run folder.

    Every rank of the launch calls it. Raises ConfigError for a config that cannot work, before the run folder is made, and
    Interrupted after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    check_pretraining(config)
    device = resolve_device(config.device)
    check_compiler(config.engine, device)
    with process_grid(device, config.parallel) as grid:
        # These raise before a folder is made, and touch the GPU, which the grid has set up.
        choose_attention(config.engine, config.model, config.parallel.tensor, grid.device)
        check_adamw(config, grid.device)
        if grid.is_main:
            pretrain_folder(config)
        grid.barrier()
        folder = pretrain_folder(config)
        if not folder.is_done:
            with held(folder, grid):
                _pretrain(config, folder, grid, progress)
        return folder


def _pretrain(config: PretrainConfig, folder: RunFolder, grid: ProcessGrid, progress: Progress) -> None:
    corpus = config.data.folder
    store_sha256 = corpus_hash(config.data)
    tokenizer = Tokenizer.load(corpus / TOKENIZER_FILE)
    check_tokenizer_fits(tokenizer, config.model)
    train_reader = training_blocks(config.data, config.model.context_length)
    held_out_reader = BlockReader(TokenStore(corpus / "held_out"), config.model.context_length)
    order = sample_order(config.data, train_reader)
    batches = PretrainBatches(train_reader, order, config.batch, grid, config.total_steps)
    data_identity = {"store": store_sha256, "seed": config.data.seed, "sequence_length": config.model.context_length}

    def ledger_at(step: int) -> Ledger:
        consumed = step * config.batch.global_batch_size
        return ledger_of(config.data, train_reader, store_sha256, consumed)

    model = local_model(config.model, grid)
    initialise(model, config.seed)
    with training_session(folder, "pretrain", config, model, config.weight_decay, batches, data_identity, grid) as session:
        held_out_blocks = np.arange(min(config.data.held_out_sequences, len(held_out_reader)))

        def evaluate(step: int) -> dict[str, float]:
            # As many sequences from what the run has consumed so far, a new draw for each step.
            seen = draw_consumed_blocks(ledger_at(step), store_sha256, len(held_out_blocks), config.seed + step)
            return {
                "held_out/loss": mean_cross_entropy(session.engine, held_out_reader, held_out_blocks),
                "seen/loss": mean_cross_entropy(session.engine, train_reader, seen),
            }

        evaluation = LossEvaluation(evaluate, config.total_steps, config.evaluate_every_steps, session.write_row, grid.is_main)

        def sequences(capture: CaptureConfig) -> CapturedSequences:
            return choose_sequences(capture, tokenizer, config.model.context_length, held_out=held_out_reader)

        if grid.is_main:
            session.announce()
            shutil.copyfile(corpus / TOKENIZER_FILE, folder.path / TOKENIZER_FILE)
        show = Both(progress, FolderProgress(folder)) if grid.is_main else NoProgress()
        with capturing(session, config.capture, sequences) as captures:
            session.run([evaluation, *captures], show)

        losses = evaluation.last or evaluate(config.total_steps)  # empty if only the results were missing
        if grid.is_main:
            write_ledger(folder.path, ledger_at(config.total_steps))
            folder.mark_done(_results(config, session, losses, len(held_out_blocks)))


def _results(config: PretrainConfig, session: TrainingSession, losses: dict[str, float], sequences: int) -> dict[str, Any]:
    count = parameter_count(config.model)
    return {
        **session.results(),
        "held_out_loss": losses["held_out/loss"],
        "held_out_sequences": sequences,
        "seen_loss": losses["seen/loss"],
        "tokens": config.total_steps * config.tokens_per_step,
        "parameters": {"total": count.total, "non_embedding": count.non_embedding},
    }
