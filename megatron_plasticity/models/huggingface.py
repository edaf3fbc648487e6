"""Interchange with Hugging Face: tensor names and config.json of LlamaForCausalLM and Olmo2ForCausalLM.

Only names change, never a value: both sides rotate halves in RoPE, so query and key rows keep their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megatron_plasticity.config.model import Family, ModelConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.sizes import parameter_shapes

_ARCHITECTURES: dict[Family, tuple[str, str]] = {"llama2": ("llama", "LlamaForCausalLM"), "olmo2": ("olmo2", "Olmo2ForCausalLM")}

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OUTSIDE_BLOCKS = {"embed.weight": _EMBEDDING, "final_norm.weight": "model.norm.weight", "head.weight": _HEAD}
_INSIDE_BLOCKS = {
    "attn.q_proj.weight": "self_attn.q_proj.weight",
    "attn.k_proj.weight": "self_attn.k_proj.weight",
    "attn.v_proj.weight": "self_attn.v_proj.weight",
    "attn.out_proj.weight": "self_attn.o_proj.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}
_NORMS: dict[Family, dict[str, str]] = {
    "llama2": {"attn_norm.weight": "input_layernorm.weight", "mlp_norm.weight": "post_attention_layernorm.weight"},
    "olmo2": {"attn_norm.weight": "post_attention_layernorm.weight", "mlp_norm.weight": "post_feedforward_layernorm.weight"},
}
# Keys of config.json that must be absent, null or false: code of the repository's own, and what neither family has.
_UNSUPPORTED = ("auto_map", "quantization_config", "attention_bias", "mlp_bias", "sliding_window", "clip_qkv")
# Where config.json may state RoPE's settings. transformers takes the first of them that is there, and a `rope_theta` in it counts
# before one beside it.
_ROPE = ("rope_scaling", "rope_parameters")
_ROTARY_BUFFER = ".rotary_emb.inv_freq"  # old Llama files carry this table, which follows from rope_theta


def huggingface_names(config: ModelConfig) -> dict[str, str]:
    """Canonical name → Hugging Face name of every parameter."""
    inside = _INSIDE_BLOCKS | _NORMS[config.family]

    def translate(name: str) -> str:
        if name in _OUTSIDE_BLOCKS:
            return _OUTSIDE_BLOCKS[name]
        _, layer, rest = name.split(".", 2)
        return f"model.layers.{layer}.{inside[rest]}"

    return {name: translate(name) for name in parameter_shapes(config)}


def to_huggingface(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state under Hugging Face's names; the tensors are the same objects. Tied models have no `lm_head.weight`."""
    _check(_shapes(state), parameter_shapes(config), "the model's state")
    return {theirs: state[ours] for ours, theirs in huggingface_names(config).items()}


def from_huggingface(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A Hugging Face state under our names; the tensors are the same objects.

    Raises UserError listing every tensor that is missing, that this architecture does not have (biases among them), or whose
    shape disagrees with the config. A tied model may repeat its embedding as `lm_head.weight`; it must be equal.
    """
    names = matching_names(_shapes(state), config)
    check_tied_head(state, config)
    return {ours: state[theirs] for ours, theirs in names.items()}


def matching_names(found: Mapping[str, tuple[int, ...]], config: ModelConfig) -> dict[str, str]:
    """Canonical name → Hugging Face name of every parameter, once the names and shapes that a Hugging Face model has are known to
    fit the config. Raises UserError as `from_huggingface` does."""
    names = huggingface_names(config)
    repeated = {_HEAD} if config.tied_embeddings else set()
    found = {name: shape for name, shape in found.items() if not name.endswith(_ROTARY_BUFFER) and name not in repeated}
    _check(found, {names[ours]: shape for ours, shape in parameter_shapes(config).items()}, "the Hugging Face state")
    return names


def check_tied_head(state: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Raise UserError where a tied model's `lm_head.weight` is there and differs from its embedding."""
    if not config.tied_embeddings or _HEAD not in state or _EMBEDDING not in state:
        return
    if not torch.equal(state[_HEAD], state[_EMBEDDING]):
        raise UserError(
            "the config ties the embeddings, but lm_head.weight differs from model.embed_tokens.weight; "
            "set tied_embeddings: false to keep both"
        )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _check(found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    unknown = [name for name in found if name not in shapes]
    missing = [name for name in shapes if name not in found]
    wrong = [
        f"{name} is {found[name]}, expected {shape}" for name, shape in shapes.items() if name in found and found[name] != shape
    ]
    biases = [name for name in unknown if name.endswith(".bias")]
    problems = [
        _listing("biases, which neither family has", biases),
        _listing("unknown tensors", [name for name in unknown if name not in biases]),
        _listing("missing tensors", missing),
        _listing("wrong shapes", wrong),
    ]
    if any(problems):
        raise UserError(f"{what} does not fit the model config:\n" + "\n".join(problem for problem in problems if problem))


def _listing(title: str, items: Iterable[str], limit: int = 12) -> str:
    """One line naming the items; a whole model's worth of names helps nobody, so it stops after `limit`."""
    items = list(items)
    if not items:
        return ""
    rest = f", and {len(items) - limit} more" if len(items) > limit else ""
    return f"  {title} ({len(items)}): {', '.join(items[:limit])}{rest}"


def huggingface_config(config: ModelConfig) -> dict[str, Any]:
    """Contents of config.json, as transformers reads it; the caller adds `dtype` and sets the special ids of its tokenizer."""
    model_type, architecture = _ARCHITECTURES[config.family]
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        # None rather than absent: transformers' defaults are ids of other tokenizers.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if config.family == "llama2":
        values["mlp_bias"] = False
    return values


def model_config_from_huggingface(values: Mapping[str, Any]) -> ModelConfig:
    """The model config that a config.json describes, with RoPE as `rope_theta` or, in transformers 5, as `rope_parameters`.

    Raises UserError listing the keys that ask for what our models do not have: another architecture, code of its own, quantised
    weights, biases, another activation, RoPE that is scaled or covers a part of the head, attention within a window.
    """
    families: dict[Any, Family] = {model_type: family for family, (model_type, _) in _ARCHITECTURES.items()}
    model_type = values.get("model_type")
    if model_type not in families:
        raise UserError(f"model_type {model_type!r} is not supported; expected one of {', '.join(families)}")
    rope = {key: values[key] for key in _ROPE if values.get(key)}
    for key, stated in rope.items():
        if not isinstance(stated, Mapping):
            raise UserError(f"config.json: {key}={stated!r} is no mapping of RoPE's settings")
    unsupported = [f"{key}={values[key]!r}" for key in _UNSUPPORTED if values.get(key)]
    if values.get("hidden_act", "silu") != "silu":
        unsupported.append(f"hidden_act={values['hidden_act']!r}")
    for key, stated in rope.items():
        if {stated.get("rope_type") or "default", stated.get("type") or "default"} != {"default"}:
            unsupported.append(f"RoPE scaling, {key}={stated!r}")
        elif any(isinstance(value, Mapping) for value in stated.values()):
            unsupported.append(f"RoPE that differs between layers, {key}={stated!r}")
    shares = {stated.get("partial_rotary_factor") or 1.0 for stated in (values, *rope.values())}
    unsupported += [f"partial_rotary_factor={share!r}" for share in shares - {1.0}]
    if set(values.get("layer_types") or ()) - {"full_attention"}:
        unsupported.append(f"layer_types={sorted(set(values['layer_types']))!r}")
    if unsupported:
        raise UserError(f"config.json asks for what a {model_type} model here does not have: {'; '.join(unsupported)}")
    try:
        return ModelConfig(**_model_fields(values, families[model_type], next(iter(rope.values()), {})))
    except KeyError as error:
        raise UserError(f"config.json lacks the key {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'shape'}: {item['msg']}" for item in error.errors())
        raise UserError(f"config.json describes a model that cannot be built: {problems}") from error


def _model_fields(values: Mapping[str, Any], family: Family, rope: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "family": family,
        "layers": values["num_hidden_layers"],
        "hidden_size": values["hidden_size"],
        "mlp_hidden_size": values["intermediate_size"],
        "query_heads": values["num_attention_heads"],
        "kv_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
        "head_dim": values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
        "vocab_size": values["vocab_size"],
        "context_length": values["max_position_embeddings"],
        "tied_embeddings": values.get("tie_word_embeddings", False),
        # transformers' own defaults for a key that is absent
        "norm_eps": values.get("rms_norm_eps", 1e-6 if family == "llama2" else 1e-5),
        "rope_theta": rope.get("rope_theta") or values.get("rope_theta") or 10_000.0,
    }
