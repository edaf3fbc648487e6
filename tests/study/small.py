"""A study that runs in some ten seconds: two values of λ, one task, every analysis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_plasticity.config.load import check_config, merge
from megatron_plasticity.config.study import StudyConfig

TREE: dict[str, Any] = {
    "name": "small",
    "corpus": {
        "name": "small",
        "python_text": {"megabytes": 0.04},
        "reasoning_text": {"documents": 200},
        "tokenizer": {"vocab_size": 300},
        "held_out_fraction": 0.1,
    },
    "base": {
        "model": {
            "family": "llama2",
            "layers": 2,
            "hidden_size": 32,
            "mlp_hidden_size": 48,
            "query_heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "vocab_size": 300,
            # Prompts of the task, at some three characters a token, must fit with their answers.
            "context_length": 160,
        },
        "steps": 6,
        "optimizer": {"learning_rate": 0.005},
        "batch": {"global_batch_size": 2, "micro_batch_size": 2},
        "data": {"held_out_sequences": 4},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "capture": {"sequences": 2},
        "checkpoint": {"every_steps": 2},
        "logging": {"every_steps": 1, "norms_every_steps": 3},
        "device": "cpu",
    },
    "axes": {"optimizer.weight_decay": [0.0, 1.0]},
    "tasks": [{"name": "arithmetic", "train_examples": 16, "test_examples": 5}],
    "finetune": {
        "optimizer": {"learning_rate": 0.001, "weight_decay": 0.0},
        "batch": {"global_batch_size": 8, "micro_batch_size": 8},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "epochs": 1,
        "max_length": 160,
        "device": "cpu",
    },
    "evaluate": {"samples": 2, "max_new_tokens": 8, "bootstrap_resamples": 20, "reward": {"kind": "length"}, "device": "cpu"},
    "analyses": {
        "probes": {"datasets": ["polarity"], "train_texts": 30, "test_texts": 20, "max_tokens": 32, "seeds": [0]},
        "attention": {"map_sequences": 1, "map_length": 16},
        "overfitting": {"sequences": 10, "bootstrap_resamples": 20},
        "features": {"sequences": 3},
        "truncation": {"sequences": 3, "ranks": [0, 2]},
    },
    "mlflow": False,
}


def small_tree(folder: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The study as plain data, with everything it writes under `folder`."""
    places = {"output": str(folder / "runs"), "corpus": {"output": str(folder / "data")}}
    return merge(merge(TREE, places), changes or {})


def small_study(folder: Path, changes: dict[str, Any] | None = None) -> StudyConfig:
    return check_config(StudyConfig, small_tree(folder, changes), "small study")
