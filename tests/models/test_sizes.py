from __future__ import annotations

import pytest
import torch

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.models.sizes import ParameterCount, flops_per_token, parameter_count, parameter_shapes
from megatron_plasticity.models.transformer import Transformer


def llama(layers: int, hidden_size: int, mlp_hidden_size: int, head_dim: int) -> ModelConfig:
    shape = {"layers": layers, "hidden_size": hidden_size, "mlp_hidden_size": mlp_hidden_size, "head_dim": head_dim}
    family = {"family": "llama2", "query_heads": 32, "kv_heads": 4, "vocab_size": 32_000, "context_length": 2048}
    return ModelConfig.model_validate(family | shape)


OLMO_1B = ModelConfig.model_validate(
    {"family": "olmo2", "layers": 16, "hidden_size": 2048, "mlp_hidden_size": 8192, "query_heads": 16, "kv_heads": 16}
    | {"head_dim": 128, "vocab_size": 100_352, "context_length": 4096}
)


# The paper's table of models (2602.11137); OLMo-2-1B-20x and -140x share one architecture.
PAPER = [
    pytest.param(llama(20, 1536, 3216, 48), 500_921_856, 402_617_856, id="Llama-2-0.5B-20x"),
    pytest.param(llama(22, 2048, 4896, 64), 1_000_564_736, 869_492_736, id="Llama-2-1B-20x"),
    pytest.param(llama(28, 4096, 7792, 128), 4_000_288_768, 3_738_144_768, id="Llama-2-4B-20x"),
    pytest.param(OLMO_1B, 1_484_916_736, 1_073_874_944, id="OLMo-2-1B-20x"),
    pytest.param(OLMO_1B, 1_484_916_736, 1_073_874_944, id="OLMo-2-1B-140x"),
]


@pytest.mark.parametrize(("config", "total", "non_embedding"), PAPER)
def test_the_papers_models_are_counted_to_the_unit(config: ModelConfig, total: int, non_embedding: int) -> None:
    assert parameter_count(config) == ParameterCount(total, non_embedding)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == total


@pytest.mark.parametrize("family", ["llama2", "olmo2"])
@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_those_of_the_transformer_in_the_same_order(make_config, family: str, tied: bool) -> None:
    config = make_config(family=family, tied_embeddings=tied)
    real = [(name, tuple(parameter.shape)) for name, parameter in Transformer(config).named_parameters()]
    assert list(parameter_shapes(config).items()) == real
    assert ("head.weight" in dict(real)) is not tied


def test_tying_saves_one_embedding_and_leaves_the_rest(make_config) -> None:
    tied, untied = parameter_count(make_config(tied_embeddings=True)), parameter_count(make_config())
    assert untied.total - tied.total == 61 * 32
    assert untied.non_embedding == tied.non_embedding


def test_flops_count_the_head_once_and_the_lookup_never(make_config) -> None:
    config = make_config()
    attention = 12 * 2 * 32 * 16
    assert flops_per_token(config, 16) == 6 * (parameter_count(config).total - 61 * 32) + attention
    assert flops_per_token(make_config(tied_embeddings=True), 16) == flops_per_token(config, 16)
