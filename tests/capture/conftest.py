from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.transformer import Transformer


@pytest.fixture(params=["llama2", "olmo2"])
def model(request: pytest.FixtureRequest) -> Transformer:
    config = ModelConfig(
        family=request.param, layers=2, hidden_size=32, mlp_hidden_size=48, query_heads=4, kv_heads=2, head_dim=8, vocab_size=50,
        context_length=16,
    )  # type: ignore[call-arg]  # fmt: skip
    model = Transformer(config)
    initialise(model, seed=3)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(50, (3, 10), generator=torch.Generator().manual_seed(0))
