"""What every test needs: a quiet, single-threaded, offline environment, and a corpus small enough to be made in a second."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch, DeepSpeed or MLflow are imported by any test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from megatron_plasticity.config.data import CorpusConfig, PythonTextConfig, ReasoningTextConfig, TokenizerConfig

# A tracking server of the person who runs the tests must not receive them.
for variable in [name for name in os.environ if name.startswith("MLFLOW_TRACKING")]:
    del os.environ[variable]

pytest_plugins = ["tests.commands", "tests.training_configs"]

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of some 40,000 tokens with a vocabulary of 300."""
    from megatron_plasticity.data.prepare import prepare

    config = CorpusConfig(
        name="tiny",
        output=tmp_path_factory.mktemp("corpus"),
        python_text=PythonTextConfig(megabytes=0.04),
        reasoning_text=ReasoningTextConfig(documents=200),
        tokenizer=TokenizerConfig(vocab_size=300),
        held_out_fraction=0.1,
    )
    return prepare(config)
