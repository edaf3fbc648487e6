"""Initial weights, each a pure function of (config, seed, parameter name).

So neither the order of modules, nor the device, nor a split of the model over ranks changes them: a rank that holds a part of a
parameter draws the whole and keeps its part.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.models.families import FAMILIES
from megatron_plasticity.models.sizes import parameter_shapes
from megatron_plasticity.models.transformer import Transformer

_TRUNCATED_STD = 0.02
_TRUNCATED_AT = 3.0  # standard deviations


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Draw all weights of `model` in place, in fp32 on the CPU, whatever its device, dtype and layout."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device and has no memory; call model.to_empty(device=…) first")
        parameter.copy_(model.sharding(name).take(initial_value(model.config, name, seed), model.ranks.rank))


def initial_value(config: ModelConfig, name: str, seed: int) -> Tensor:
    """The initial fp32 value of the parameter with this canonical name.

    Norm gains are 1. Matrices and embeddings, with d = hidden_size:
    `scaled_normal` (Llama, the paper's): N(0, 2/(5d)), but attention output and MLP down projection N(0, 1/(d·layers²));
    `truncated_normal` (OLMo-2): N(0, 0.02²) without what lies beyond three standard deviations.
    """
    shape = parameter_shapes(config)[name]
    if len(shape) == 1:
        return torch.ones(shape, device="cpu")
    generator = torch.Generator().manual_seed(parameter_seed(seed, name))
    weight = torch.empty(shape, device="cpu")
    if FAMILIES[config.family].initialisation == "truncated_normal":
        bound = _TRUNCATED_AT * _TRUNCATED_STD
        return nn.init.trunc_normal_(weight, std=_TRUNCATED_STD, a=-bound, b=bound, generator=generator)
    return weight.normal_(std=_scaled_std(config, name), generator=generator)


def _scaled_std(config: ModelConfig, name: str) -> float:
    if name.endswith(("attn.out_proj.weight", "mlp.down_proj.weight")):
        return 1.0 / (config.hidden_size**0.5 * config.layers)
    return (2.0 / (5.0 * config.hidden_size)) ** 0.5


def parameter_seed(seed: int, name: str) -> int:
    """63 bits that differ for every pair of seed and name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
