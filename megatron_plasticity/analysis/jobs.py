"""The analyses, each from its config to its run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megatron_plasticity.analysis.attention import spectra
from megatron_plasticity.analysis.attention_figure import write_attention_figure
from megatron_plasticity.analysis.attention_maps import attention_maps, with_maps
from megatron_plasticity.analysis.features import run_features
from megatron_plasticity.analysis.features_figure import write_features_figure
from megatron_plasticity.analysis.overfitting import run_overfitting
from megatron_plasticity.analysis.probes import run_probes
from megatron_plasticity.analysis.text_sequences import text_sequences
from megatron_plasticity.analysis.training_dynamics import training_dynamics
from megatron_plasticity.analysis.truncation import ranks_to_try, run_truncation
from megatron_plasticity.analysis.truncation_checkpoint import write_truncated
from megatron_plasticity.analysis.truncation_figure import write_truncation_figure
from megatron_plasticity.config.analysis import (
    AttentionConfig,
    FeaturesConfig,
    OverfittingConfig,
    ProbesConfig,
    TruncationConfig,
)
from megatron_plasticity.config.files import text_hash
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.ledger import read_ledger
from megatron_plasticity.data.prepare import HELD_OUT
from megatron_plasticity.data.probe_sets import labelled_sets, probe_inputs
from megatron_plasticity.data.stream import corpus_hash, training_blocks
from megatron_plasticity.data.token_store import TokenStore
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.sizes import parameter_shapes
from megatron_plasticity.parallel.grid import resolve_device
from megatron_plasticity.tracking.metrics import read_metrics
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


def features(config: FeaturesConfig, progress: Progress) -> RunFolder:
    """Dormant units, ranks and norms of the model at `config.run`, and the sizes of its training steps where they are known.

    `features.svg` in the run folder shows them.
    """
    # scipy, 35 MB to install, which no other analysis needs: missing, it is missed before any work starts.
    from megatron_plasticity.analysis.weight_norms import weight_norms

    inputs = {} if config.text is None else {"text": text_hash(config.text)}

    def work(trained: TrainedModel, folder: RunFolder, show: Progress) -> Mapping[str, Any]:
        checkpoint = trained.checkpoint
        with _sequences(trained, config.text) as reader:
            found = run_features(checkpoint.build_model(resolve_device("auto")), reader, config, show)
        weights = weight_norms(checkpoint.tensors(), checkpoint.model, show)
        results = {**found, "weights": weights, "training": _training(trained)}
        write_features_figure(results, folder.path / "features.svg")
        return results

    return run_on_model("features", config, work, progress, inputs)


def truncation(config: TruncationConfig, progress: Progress) -> RunFolder:
    """Loss of the model at `config.run` with truncated heads; with `write` the run folder is that of the truncated model."""
    inputs = {} if config.text is None else {"text": text_hash(config.text)}

    def work(trained: TrainedModel, folder: RunFolder, show: Progress) -> Mapping[str, Any]:
        checkpoint = trained.checkpoint
        ranks_to_try(config, checkpoint.model.head_dim)  # refuses a rank before anything is read
        with _sequences(trained, config.text) as reader:
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


def _sequences(trained: TrainedModel, text: Path | None) -> AbstractContextManager[BlockReader]:
    """Held-out sequences of the model's pretraining, or those of a text."""
    if text is None:
        return contextlib.nullcontext(_reader(_pretraining(trained), HELD_OUT))
    return text_sequences(text, trained.tokenizer(), trained.checkpoint.model)


def _training(trained: TrainedModel) -> dict[str, Any] | None:
    """Sizes of the steps that led to this checkpoint; None for a model that was not trained here, or whose run is not done."""
    config, step = trained.run.config, trained.checkpoint.step
    if isinstance(config, PretrainConfig):
        total = config.total_steps
    elif isinstance(config, FinetuneConfig) and trained.run.is_done:
        total = int(trained.run.results["steps"])
    else:
        return None
    rows = [row for row in read_metrics(trained.run.metrics_path) if row["step"] <= step]
    return training_dynamics(config, total, rows, parameter_shapes(trained.checkpoint.model))


def _reader(pretraining: PretrainConfig, split: str) -> BlockReader:
    return BlockReader(TokenStore(pretraining.data.folder / split), pretraining.model.context_length)


def _map_tokens(pretraining: PretrainConfig, config: AttentionConfig) -> Tensor:
    """The first held-out sequences, cut to the length of the maps: int64 [sequences, length]."""
    reader = _reader(pretraining, HELD_OUT)
    tokens, _ = reader.batch(np.arange(min(config.map_sequences, len(reader))))
    return tokens[:, : config.map_length]
