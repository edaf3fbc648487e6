from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_plasticity.config.model import Family, ModelConfig
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.transformer import Transformer


@pytest.fixture
def make_model() -> Callable[..., Transformer]:
    def make(family: Family = "llama2", vocab_size: int = 64, kv_heads: int = 2, seed: int = 3) -> Transformer:
        config = ModelConfig(
            family=family, layers=3, hidden_size=48, mlp_hidden_size=64, query_heads=4, kv_heads=kv_heads, head_dim=12,
            vocab_size=vocab_size, context_length=32,
        )  # type: ignore[call-arg]  # fmt: skip
        model = Transformer(config)
        initialise(model, seed)
        return model

    return make
