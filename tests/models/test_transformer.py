from __future__ import annotations

import copy

import pytest
import torch

from megatron_plasticity.models.transformer import Transformer
from tests.reference_loss import reference_loss

FAMILIES = pytest.mark.parametrize("family", ["llama2", "olmo2"])
BACKENDS = pytest.mark.parametrize("backend", ["sdpa", "eager"])


@FAMILIES
def test_last_position_only_is_the_last_of_all(make_config, make_model, family: str) -> None:
    model = make_model(make_config(family=family))
    tokens = torch.randint(61, (2, 9))
    torch.testing.assert_close(model(tokens, positions="last"), model(tokens)[:, -1:])


@BACKENDS
def test_no_token_sees_a_later_one(make_config, make_model, backend: str) -> None:
    model = make_model(make_config(), backend)
    tokens = torch.randint(61, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 61
    difference = (model(tokens) - model(changed)).abs().amax(dim=-1)[0]
    assert difference[:7].eq(0).all()
    assert difference[7:].gt(1e-4).all()


@FAMILIES
@pytest.mark.parametrize("tied", [False, True])
def test_activation_checkpointing_changes_memory_and_no_gradient(make_config, make_model, family: str, tied: bool) -> None:
    plain = make_model(make_config(family=family, tied_embeddings=tied))
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing = True
    calls = []
    checkpointed.layers[0].mlp.post.register_forward_hook(lambda *_: calls.append(1))
    tokens = torch.randint(61, (2, 13))
    for model in (plain, checkpointed):
        loss = reference_loss(model(tokens[:, :-1]), tokens[:, 1:])
        (loss.cross_entropy.mean() + 1e-2 * loss.log_partition.square().mean()).backward()
    assert len(calls) == 2  # once forward, once again in the backward pass
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        assert torch.equal(parameter.grad, checkpointed.get_parameter(name).grad), name


@FAMILIES
def test_every_hook_point_is_a_module_that_sees_what_its_name_says(make_config, make_model, family: str) -> None:
    model = make_model(make_config(family=family))
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.__setitem__(name, output))
    tokens = torch.randint(61, (2, 9))
    logits = model(tokens)
    layer = {
        "resid_pre": (2, 9, 32), "resid_mid": (2, 9, 32), "resid_post": (2, 9, 32),
        "attn.q": (2, 4, 9, 8), "attn.k": (2, 2, 9, 8), "attn.v": (2, 2, 9, 8), "attn.z": (2, 9, 32), "attn.out": (2, 9, 32),
        "mlp.pre": (2, 9, 72), "mlp.gate": (2, 9, 72), "mlp.post": (2, 9, 72), "mlp.out": (2, 9, 32),
    }  # fmt: skip
    shapes = {"embed": (2, 9, 32), "final_norm": (2, 9, 32), "head": (2, 9, 61)}
    shapes |= {f"layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    assert {name: tuple(seen[name].shape) for name in shapes} == shapes

    assert torch.equal(seen["head"], logits)
    assert torch.equal(seen["embed"], model.embed.weight[tokens])
    assert torch.equal(seen["layers.0.resid_pre"], seen["embed"])
    assert torch.equal(seen["layers.1.resid_pre"], seen["layers.0.resid_post"])
    for i, block in enumerate(model.layers):
        at = {name: seen[f"layers.{i}.{name}"] for name in layer}
        assert torch.equal(at["mlp.gate"], torch.nn.functional.silu(at["mlp.pre"]))
        assert torch.equal(block.mlp.down_proj(at["mlp.post"]), at["mlp.out"])
        assert torch.equal(block.attn.out_proj(at["attn.z"]), at["attn.out"])
        attention, mlp = at["attn.out"], at["mlp.out"]
        if family == "olmo2":  # what is added is normed; what is named is not
            attention, mlp = block.attn_norm(attention), block.mlp_norm(mlp)
        assert torch.equal(at["resid_mid"], at["resid_pre"] + attention)
        assert torch.equal(at["resid_post"], at["resid_mid"] + mlp)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            at["attn.q"], at["attn.k"], at["attn.v"], is_causal=True, enable_gqa=True
        )
        assert torch.equal(mixed.transpose(1, 2).flatten(2), at["attn.z"])


def test_positions_turn_q_and_k_and_not_v(make_config, make_model) -> None:
    model = make_model(make_config())
    seen: dict[str, torch.Tensor] = {}
    for name in ("q", "k", "v"):
        model.get_submodule(f"layers.0.attn.{name}").register_forward_hook(
            lambda _m, _i, out, name=name: seen.__setitem__(name, out)
        )
    model(torch.full((1, 5), 9))  # the same token at five positions
    assert not torch.allclose(seen["q"][:, :, 0], seen["q"][:, :, 3], atol=1e-4)
    assert torch.allclose(seen["v"][:, :, 0], seen["v"][:, :, 3])
    # A rotation keeps lengths, and scores depend on distance only.
    torch.testing.assert_close(seen["k"].norm(dim=-1), seen["k"][:, :, :1].norm(dim=-1).expand(-1, -1, 5))
    scores = seen["q"][0, 0] @ seen["k"][0, 0].T
    torch.testing.assert_close(scores.diagonal(1), scores.diagonal(1)[:1].expand(4))
    torch.testing.assert_close(scores.diagonal(-2), scores.diagonal(-2)[:1].expand(3))


def test_the_rotary_table_survives_a_change_of_dtype_and_an_evaluation_first(make_config, make_model) -> None:
    model = make_model(make_config())
    tokens = torch.randint(61, (1, 40))  # longer than context_length: the table grows
    with torch.inference_mode():
        before = model(tokens)
    model(tokens).sum().backward()  # fails if the table were an inference tensor
    assert torch.equal(model(tokens), before)
    model.bfloat16()
    cos, sin = model.rotary.at(40, tokens.device)
    assert cos.dtype == sin.dtype == torch.float32
    logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), before, rtol=0.1, atol=0.1)


def test_a_tied_model_has_one_matrix_and_both_gradients_reach_it(make_config, make_model) -> None:
    model = make_model(make_config(tied_embeddings=True))
    assert "head.weight" not in model.state_dict()
    reference_loss(model(torch.tensor([[3, 4]])), torch.tensor([[4, 5]])).cross_entropy.sum().backward()
    assert model.embed.weight.grad is not None
    assert model.embed.weight.grad.any(dim=1).all()


def test_construction_draws_no_random_numbers(make_config) -> None:
    state = torch.get_rng_state()
    Transformer(make_config())
    assert torch.equal(torch.get_rng_state(), state)
