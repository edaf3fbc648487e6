"""Shapes, parameter counts and FLOPs of a model, by arithmetic on its config: no tensor is made and torch is not imported."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.models.families import FAMILIES

TOKEN_EMBEDDING = "embed.weight"
HEAD = "head.weight"


@dataclass(frozen=True)
class ParameterCount:
    total: int
    """Every parameter; a tied embedding counts once."""
    non_embedding: int
    """`total` without the token embedding and without the output head."""


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of every parameter, in the order of `Transformer.named_parameters()`."""
    hidden, mlp = config.hidden_size, config.mlp_hidden_size
    query, kv = config.query_heads * config.head_dim, config.kv_heads * config.head_dim
    block: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,),
        "attn.q_proj.weight": (query, hidden),
        "attn.k_proj.weight": (kv, hidden),
        "attn.v_proj.weight": (kv, hidden),
        "attn.out_proj.weight": (hidden, query),
    }
    if FAMILIES[config.family].qk_norm:
        block |= {"attn.q_norm.weight": (query,), "attn.k_norm.weight": (kv,)}
    block |= {
        "mlp_norm.weight": (hidden,),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
    }
    shapes: dict[str, tuple[int, ...]] = {TOKEN_EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["final_norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def checkpoint_bytes(config: ModelConfig, weights_only: bool = False) -> int:
    """Bytes of a checkpoint: fp32 weights and AdamW's two moments. `weights_only`: without moments, or with those of adapters
    alone, which are too few to count."""
    return (4 if weights_only else 12) * parameter_count(config).total


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Number of parameters, in total and without embedding and head."""
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
    total = sum(sizes.values())
    return ParameterCount(total=total, non_embedding=total - sizes[TOKEN_EMBEDDING] - sizes.get(HEAD, 0))


def parameter_class(name: str) -> str:
    """Class of a parameter in norms per class: token_embedding, head, attention, mlp or norm."""
    if name in (TOKEN_EMBEDDING, HEAD):
        return "token_embedding" if name == TOKEN_EMBEDDING else "head"
    if "norm" in name:
        return "norm"
    return "attention" if ".attn." in name else "mlp"


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """FLOPs of a forward and backward pass per token of sequences of one length, see `training_flops`."""
    return training_flops(config, 1, sequence_length)


def training_flops(config: ModelConfig, tokens: int, squared_lengths: int) -> int:
    """FLOPs of a forward and backward pass: 6·N·tokens + 12·layers·hidden_size·Σ length² (PaLM, 2204.02311, appendix B).

    `squared_lengths` is the sum over sequences: each token attends over the length of its own. N counts the parameters that are
    multiplied with each token: all of them but the token embedding, which is a lookup; the head counts whether it is tied or
    not. Recomputation in activation checkpointing does not count, and attention counts in full although half of it is masked, so
    that figures compare with published ones.
    """
    multiplied = parameter_count(config).non_embedding + config.vocab_size * config.hidden_size
    return 6 * multiplied * tokens + 12 * config.layers * config.hidden_size * squared_lengths
