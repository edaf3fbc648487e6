"""The analyses, each from its config to its run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from megatron_plasticity.analysis.attention import spectra
from megatron_plasticity.analysis.attention_figure import write_attention_figure
from megatron_plasticity.analysis.attention_maps import attention_maps, with_maps
from megatron_plasticity.analysis.overfitting import run_overfitting
from megatron_plasticity.analysis.probes import run_probes
from megatron_plasticity.analysis.text_sequences import text_hash, text_sequences
from megatron_plasticity.analysis.truncation import ranks_to_try, run_truncation
from megatron_plasticity.analysis.truncation_checkpoint import write_truncated
from megatron_plasticity.analysis.truncation_figure import write_truncation_figure
from megatron_plasticity.config.analysis import AttentionConfig, OverfittingConfig, ProbesConfig, TruncationConfig
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.ledger import read_ledger
from megatron_plasticity.data.prepare import HELD_OUT
from megatron_plasticity.data.probe_sets import labelled_sets, probe_inputs
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
        model = trained.checkpoint.build_model(device)
        return run_probes(model, trained.tokenizer(), config, labelled_sets(config), device, show)

    return run_on_model("probes", config, work, progress, probe_inputs(config))


def attention(config: AttentionConfig, progress: Progress) -> RunFolder:
    """Attention matrices and maps of the model at `config.run`; maps are of the first held-out sequences of its corpus.

    Only maps need the whole model in memory. `attention.svg` in the run folder shows every head.
    """

    def work(trained: TrainedModel, folder: RunFolder, show: Progress) -> Mapping[str, Any]:
        tokens = _map_tokens(_pretraining(trained), config) if config.map_sequences else None
        checkpoint = trained.checkpoint
        results = spectra(checkpoint.tensors(), checkpoint.model, config, show)
        if tokens is not None:
            device = resolve_device("auto")
            maps = attention_maps(checkpoint.build_model(device), tokens.to(device), trained.tokenizer())
            results = with_maps(results, maps)
        write_attention_figure(results, folder.path / "attention.svg")
        return results

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


def truncation(config: TruncationConfig, progress: Progress) -> RunFolder:
    """Loss of the model at `config.run` with truncated heads; with `write` the run folder is that of the truncated model."""
    inputs = {} if config.text is None else {"text": text_hash(config.text)}

    def work(trained: TrainedModel, folder: RunFolder, show: Progress) -> Mapping[str, Any]:
        checkpoint = trained.checkpoint
        ranks_to_try(config, checkpoint.model.head_dim)  # refuses a rank before anything is read
        if config.text is None:
            sequences = contextlib.nullcontext(_reader(_pretraining(trained), HELD_OUT))
        else:
            sequences = text_sequences(config.text, trained.tokenizer(), checkpoint.model)
        with sequences as reader:
            model = checkpoint.build_model(resolve_device("auto"))
            results = run_truncation(model, checkpoint.tensors(), reader, config, show)
        write_truncation_figure(results, folder.path / "truncation.svg")
        if config.write:
            results["checkpoint"] = write_truncated(trained, folder, config.targets[0], config.ranks[0], show)
        return results

    return run_on_model("truncation", config, work, progress, inputs)


def _pretraining(trained: TrainedModel) -> PretrainConfig:
    config = trained.pretraining_run().config
    assert isinstance(config, PretrainConfig)
    return config


def _reader(pretraining: PretrainConfig, split: str) -> BlockReader:
    return BlockReader(TokenStore(pretraining.data.folder / split), pretraining.model.context_length)


def _map_tokens(pretraining: PretrainConfig, config: AttentionConfig) -> Tensor:
    """The first held-out sequences, cut to the length of the maps: int64 [sequences, length]."""
    reader = _reader(pretraining, HELD_OUT)
    tokens, _ = reader.batch(np.arange(min(config.map_sequences, len(reader))))
    return tokens[:, : config.map_length]
