from __future__ import annotations

import json

import pytest
import torch

from megatron_plasticity.errors import UserError
from megatron_plasticity.models.huggingface import (
    from_huggingface,
    huggingface_config,
    huggingface_names,
    model_config_from_huggingface,
    to_huggingface,
)
from megatron_plasticity.models.transformer import Transformer

SHAPES = [
    pytest.param({"query_heads": 4, "kv_heads": 4, "head_dim": 8}, id="all-heads"),
    pytest.param({"query_heads": 4, "kv_heads": 2, "head_dim": 24, "mlp_hidden_size": 50}, id="grouped"),
    pytest.param({"query_heads": 3, "kv_heads": 1, "head_dim": 48, "layers": 3}, id="head-dim-48"),
]


def oracle(model: Transformer, backend: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**huggingface_config(model.config))
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation=backend).eval()
    keys = theirs.load_state_dict(to_huggingface(model.state_dict(), model.config), strict=False)
    assert keys.unexpected_keys == []
    assert keys.missing_keys == (["lm_head.weight"] if model.config.tied_embeddings else [])
    theirs.tie_weights()
    return theirs


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llama2", "olmo2"])
def test_logits_and_gradients_equal_transformers(make_config, make_model, family, shape, tied, backend) -> None:
    model = make_model(make_config(family=family, tied_embeddings=tied, **shape), backend)
    theirs = oracle(model, backend)
    tokens = torch.randint(61, (2, 31))
    ours_logits, their_logits = model(tokens), theirs(tokens).logits
    assert their_logits.std() > 0.05  # a comparison of numbers, not of zeros
    assert (ours_logits - their_logits).abs().max().item() < 1e-5
    ours_logits.square().mean().backward()
    their_logits.square().mean().backward()
    their_parameters = dict(theirs.named_parameters())
    for name, their_name in huggingface_names(model.config).items():
        gradient = model.get_parameter(name).grad
        torch.testing.assert_close(gradient, their_parameters[their_name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama2", "olmo2"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_round_trip_is_bit_identical(make_config, make_model, family: str, tied: bool) -> None:
    config = make_config(family=family, tied_embeddings=tied)
    state = make_model(config).bfloat16().state_dict()
    back = from_huggingface(to_huggingface(state, config), config)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) and back[name].dtype == state[name].dtype for name in state)


@pytest.mark.parametrize("family", ["llama2", "olmo2"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_config_survives_the_round_trip_in_both_spellings_of_rope(make_config, family: str, tied: bool) -> None:
    from transformers import AutoConfig

    config = make_config(family=family, tied_embeddings=tied, rope_theta=12_345.0, norm_eps=3e-6)
    ours = huggingface_config(config)
    assert model_config_from_huggingface(json.loads(json.dumps(ours))) == config
    theirs = AutoConfig.for_model(**ours).to_dict()
    assert "rope_parameters" in theirs
    assert model_config_from_huggingface(theirs) == config
    assert theirs["eos_token_id"] is None
    assert theirs["pad_token_id"] is None


def test_one_message_names_every_tensor_that_does_not_fit(make_config, make_model) -> None:
    config = make_config()
    state = to_huggingface(make_model(config).state_dict(), config)
    state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(72, 32)
    state["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(32, 32)
    del state["model.norm.weight"]
    with pytest.raises(UserError) as error:
        from_huggingface(state, config)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(" (")[0].strip() for line in lines] == [
        "biases, which neither family has", "unknown tensors", "missing tensors", "wrong shapes"
    ]  # fmt: skip
    assert "model.layers.0.self_attn.q_proj.bias" in lines[0]
    assert "model.layers.2.mlp.up_proj.weight" in lines[1]
    assert "model.norm.weight" in lines[2]
    assert "model.layers.1.self_attn.k_proj.weight is (32, 32), expected (16, 32)" in lines[3]


def test_a_long_list_of_names_is_cut(make_config) -> None:
    with pytest.raises(UserError, match=r"missing tensors \(21\): model.embed_tokens.weight, .*, and 9 more$"):
        from_huggingface({}, make_config())


def test_our_own_state_is_checked_on_the_way_out(make_config, make_model) -> None:
    olmo = make_model(make_config(family="olmo2")).state_dict()
    with pytest.raises(UserError, match=r"unknown tensors \(4\): layers.0.attn.q_norm.weight"):
        to_huggingface(olmo, make_config(family="llama2"))


def test_a_tied_model_may_repeat_its_embedding_but_not_contradict_it(make_config, make_model) -> None:
    config = make_config(tied_embeddings=True)
    state = to_huggingface(make_model(config).state_dict(), config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    assert "head.weight" not in from_huggingface(state, config)
    state["lm_head.weight"][3, 4] += 1
    with pytest.raises(UserError, match="tied_embeddings: false"):
        from_huggingface(state, config)


def test_rotary_tables_of_old_llama_files_are_passed_over(make_config, make_model) -> None:
    config = make_config()
    state = to_huggingface(make_model(config).state_dict(), config)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    assert len(from_huggingface(state, config)) == 21


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported; expected one of llama, olmo2"),
        ({"attention_bias": True, "hidden_act": "gelu"}, "attention_bias=True; hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "RoPE scaling"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling={"),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "llama3"}}, "rope_parameters={"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs between layers, rope_parameters="),
        ({"rope_parameters": "default"}, "rope_parameters='default' is no mapping"),
        ({"head_dim": 10}, r"query_heads \* head_dim = 4 \* 10 = 40 must equal hidden_size=32"),
    ],
)
def test_a_model_of_another_kind_is_refused(make_config, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_config_from_huggingface(huggingface_config(make_config()) | change)


@pytest.mark.parametrize(
    "stated",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": None},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 5e5}},
    ],
)
def test_rope_theta_is_the_one_that_transformers_takes(make_config, stated: dict) -> None:
    from transformers import AutoConfig

    values = huggingface_config(make_config(rope_theta=12_345.0)) | stated
    taken = AutoConfig.for_model(**json.loads(json.dumps(values))).rope_parameters["rope_theta"]
    assert model_config_from_huggingface(values).rope_theta == taken


def test_a_missing_key_is_named(make_config) -> None:
    values = huggingface_config(make_config())
    del values["num_hidden_layers"]
    with pytest.raises(UserError, match="lacks the key 'num_hidden_layers'"):
        model_config_from_huggingface(values)
