from __future__ import annotations

import math

import pytest
import torch

from megatron_plasticity.models.initialisation import initial_value, initialise
from megatron_plasticity.models.transformer import Transformer


def wide(make_config, family: str, **changes):
    return make_config(family=family, layers=3, query_heads=8, head_dim=32, mlp_hidden_size=512, vocab_size=512, **changes)


def check_normal(weight: torch.Tensor, std: float) -> None:
    """Mean and standard deviation within five standard errors, and a normal's share beyond two deviations."""
    n = weight.numel()
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(n)
    assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * n)
    share = 0.0455
    assert abs((weight.abs() > 2 * std).float().mean().item() - share) < 5 * math.sqrt(share * (1 - share) / n)


def test_llama_draws_the_papers_two_widths(make_config) -> None:
    model = Transformer(wide(make_config, "llama2"))
    initialise(model, seed=1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
        elif "out_proj" in name or "down_proj" in name:
            check_normal(parameter, 1 / (math.sqrt(256) * 3))
        else:
            check_normal(parameter, math.sqrt(2 / (5 * 256)))


def test_olmo_draws_a_normal_cut_at_three_deviations(make_config) -> None:
    model = Transformer(wide(make_config, "olmo2"))
    initialise(model, seed=1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        assert parameter.abs().max().item() <= 0.06
        # Cutting at 3σ leaves variance 1 - 2·3·φ(3)/(2Φ(3) - 1).
        cut_std = 0.02 * math.sqrt(1 - 6 * 0.00443185 / 0.9973002)
        assert abs(parameter.std().item() / cut_std - 1) < 5 / math.sqrt(2 * parameter.numel())
    assert model.embed.weight.abs().max().item() > 0.055  # cut there, not earlier


def test_a_parameter_depends_on_seed_and_name_only(make_config) -> None:
    config = make_config()
    torch.manual_seed(5)
    first, again, other = Transformer(config), Transformer(config), Transformer(config)
    initialise(first, seed=1)
    torch.manual_seed(6)
    again.layers[0], again.layers[1] = again.layers[1], again.layers[0]  # other modules in these places,
    again._modules = dict(reversed(again._modules.items()))  # and walked through in the opposite order
    assert [name for name, _ in again.named_parameters()] != [name for name, _ in first.named_parameters()]
    initialise(again, seed=1)
    initialise(other, seed=2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        assert torch.equal(value, initial_value(config, name, seed=1)), name
        if value.ndim == 2:
            assert not torch.equal(value, other.state_dict()[name]), name
    same_shape = ("layers.0.mlp.gate_proj.weight", "layers.1.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight")
    one, next_layer, next_matrix = (first.get_parameter(name) for name in same_shape)
    assert not torch.equal(one, next_layer)
    assert not torch.equal(one, next_matrix)


def test_the_draw_is_rounded_to_the_models_dtype_and_leaves_the_global_stream_alone(make_config) -> None:
    config = make_config()
    state = torch.get_rng_state()
    model = Transformer(config).bfloat16()
    initialise(model, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.embed.weight, initial_value(config, "embed.weight", 1).bfloat16())


def test_built_on_meta_then_materialised_it_is_the_same_model(make_config) -> None:
    config = make_config(family="olmo2")
    with torch.device("meta"):
        model = Transformer(config)
    with pytest.raises(ValueError, match="to_empty"):
        initialise(model, seed=1)
    model.to_empty(device="cpu")
    initialise(model, seed=1)
    direct = Transformer(config)
    initialise(direct, seed=1)
    tokens = torch.randint(config.vocab_size, (2, 9))
    assert torch.equal(model(tokens), direct(tokens))
