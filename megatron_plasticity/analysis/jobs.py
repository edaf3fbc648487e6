"""The analyses, each from its config to its run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megatron_plasticity.analysis.attention import run_attention
from megatron_plasticity.analysis.overfitting import run_overfitting
from megatron_plasticity.analysis.probes import run_probes
from megatron_plasticity.config.analysis import AttentionConfig, OverfittingConfig, ProbesConfig
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.ledger import read_ledger
from megatron_plasticity.data.prepare import HELD_OUT
from megatron_plasticity.data.stream import corpus_hash, training_blocks
from megatron_plasticity.data.token_store import TokenStore
from megatron_plasticity.errors import UserError
from megatron_plasticity.parallel.grid import resolve_device
from megatron_plasticity.tracking.progress import Progress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.tracking.trained_model import TrainedModel, run_on_model


def probes(config: ProbesConfig, progress: Progress) -> RunFolder:
    """Linear probes of the model at `config.run`."""

    def work(trained: TrainedModel, folder: RunFolder, show: Progress) -> Mapping[str, Any]:
        device = resolve_device("auto")
        return run_probes(trained.checkpoint.build_model(device), trained.tokenizer(), config, device, show)

    return run_on_model("probes", config, work, progress)


def attention(config: AttentionConfig, progress: Progress) -> RunFolder:
    """Attention matrices and maps of the model at `config.run`; maps are of the first held-out sequences of its corpus."""

    def work(trained: TrainedModel, folder: RunFolder, show: Progress) -> Mapping[str, Any]:
        device = resolve_device("auto")
        tokens = torch.empty(0, 0, dtype=torch.int64)
        if config.map_sequences:
            reader = _reader(_pretraining(trained), HELD_OUT)
            tokens, _ = reader.batch(np.arange(min(config.map_sequences, len(reader))))
        return run_attention(trained.checkpoint.build_model(device), config, tokens.to(device), trained.tokenizer(), show)

    return run_on_model("attention", config, work, progress)


def overfitting(config: OverfittingConfig, progress: Progress) -> RunFolder:
    """Train–validation gap of the pretraining run at `config.run`."""

    def work(trained: TrainedModel, folder: RunFolder, show: Progress) -> Mapping[str, Any]:
        if trained.run.kind != "pretrain":
            raise UserError(f"{trained.run.path}: the gap is that of a pretraining run, and this is a {trained.run.kind} run")
        pretraining = _pretraining(trained)
        return run_overfitting(
            trained.checkpoint.build_model(device := resolve_device("auto")),
            seen=training_blocks(pretraining.data, pretraining.model.context_length),
            held_out=_reader(pretraining, HELD_OUT),
            ledger=read_ledger(trained.run.path),
            store_sha256=corpus_hash(pretraining.data),
            recipe=config,
            device=device,
            progress=show,
        )

    return run_on_model("overfitting", config, work, progress)


def _pretraining(trained: TrainedModel) -> PretrainConfig:
    config = trained.pretraining_run().config
    assert isinstance(config, PretrainConfig)
    return config


def _reader(pretraining: PretrainConfig, split: str) -> BlockReader:
    return BlockReader(TokenStore(pretraining.data.folder / split), pretraining.model.context_length)
