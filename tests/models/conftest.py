from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.transformer import Transformer

MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., Transformer]


@pytest.fixture(autouse=True)
def one_seed() -> Iterator[None]:
    """Every test draws from its own fixed random stream and leaves the global one as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def make_config() -> MakeConfig:
    def make(**changes: Any) -> ModelConfig:
        shape: dict[str, Any] = {
            "family": "llama2",
            "layers": 2,
            "mlp_hidden_size": 72,
            "query_heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "vocab_size": 61,
            "context_length": 32,
        } | changes
        shape.setdefault("hidden_size", shape["query_heads"] * shape["head_dim"])
        return ModelConfig(**shape)

    return make


@pytest.fixture
def make_model() -> MakeModel:
    def make(config: ModelConfig, backend: Any = "auto") -> Transformer:
        """A model far from initialisation: gains that are not 1, so that a misplaced norm shows."""
        model = Transformer(config, backend)
        initialise(model, seed=3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
        return model

    return make
