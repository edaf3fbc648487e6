"""What the tests of the tracking room share: a small config, and an MLflow store that is migrated once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_plasticity.config.training import PretrainConfig

CONFIG: dict[str, Any] = {
    "name": "wd0.5",
    "model": {
        "family": "llama2",
        "layers": 2,
        "hidden_size": 32,
        "mlp_hidden_size": 64,
        "query_heads": 2,
        "kv_heads": 1,
        "head_dim": 16,
        "vocab_size": 300,
        "context_length": 32,
    },
    "data": {"folder": "data/tiny"},
    "steps": 30,
    "optimizer": {"learning_rate": "3e-4", "weight_decay": 0.5},
    "batch": {"global_batch_size": 4, "micro_batch_size": 2},
}


@pytest.fixture
def make_config() -> Callable[..., PretrainConfig]:
    """A small pretraining config; keywords replace its top-level keys."""
    return lambda **changes: PretrainConfig.model_validate(CONFIG | changes)


@pytest.fixture(scope="session")
def template_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty, migrated store; to be copied."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(template_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose default store `mlflow.db` is there and empty: making one costs 9 s, copying one nothing."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(template_store, folder / "mlflow.db")
    return folder
