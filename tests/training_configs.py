"""Configs of training runs that take a few seconds (fixtures, loaded by tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_plasticity.config.load import check_config, merge
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig

MODEL = {
    "family": "llama2",
    "layers": 2,
    "hidden_size": 32,
    "mlp_hidden_size": 48,
    "query_heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "vocab_size": 300,
    "context_length": 32,
}


@pytest.fixture
def pretrain_config(tiny_corpus: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Makes a config of 12 steps; keyword `changes` is a tree merged over it."""

    def make(changes: dict[str, Any] | None = None) -> PretrainConfig:
        tree = {
            "name": "small",
            "output": str(tmp_path / "runs"),
            "model": MODEL,
            "data": {"folder": str(tiny_corpus), "held_out_sequences": 6},
            "optimizer": {"learning_rate": 0.005, "weight_decay": 0.1},
            "batch": {"global_batch_size": 4, "micro_batch_size": 4},
            "engine": {"zero_stage": 0, "precision": "fp32"},
            "steps": 12,
            "evaluate_every_steps": 4,
            "checkpoint": {"every_steps": 5},
            "logging": {"every_steps": 1, "norms_every_steps": 6, "mlflow": False},
            "device": "cpu",
        }
        return check_config(PretrainConfig, merge(tree, changes or {}), "test")

    return make


@pytest.fixture
def finetune_config(tmp_path: Path) -> Callable[..., FinetuneConfig]:
    """Makes a config that fine-tunes the run folder `base` on a few examples of one task."""

    def make(base: Path, changes: dict[str, Any] | None = None) -> FinetuneConfig:
        tree = {
            "name": "small-arithmetic",
            "output": str(tmp_path / "runs"),
            "base": str(base),
            "task": {"name": "arithmetic", "train_examples": 16},
            "optimizer": {"learning_rate": 0.001, "weight_decay": 0.0, "betas": [0.9, 0.999]},
            "batch": {"global_batch_size": 4, "micro_batch_size": 2},
            "engine": {"zero_stage": 0, "precision": "fp32"},
            "epochs": 2,
            "max_length": 32,
            "logging": {"every_steps": 1, "norms_every_steps": 0, "mlflow": False},
            "device": "cpu",
        }
        return check_config(FinetuneConfig, merge(tree, changes or {}), "test")

    return make
