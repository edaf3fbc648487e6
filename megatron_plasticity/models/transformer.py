"""One decoder-only transformer for both families: RMSNorm, rotary grouped-query attention, SwiGLU, no biases, no dropout.

Many sub-modules are `nn.Identity`: they are the hook points, and a hook point's name is its module path (`layers.3.attn.q`), so
that `model.get_submodule(name).register_forward_hook(…)` is all that capturing an activation takes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.models.attention import AttentionBackend, attend, attention_mask, check_backend
from megatron_plasticity.models.cache import KeyValueCache
from megatron_plasticity.models.families import FAMILIES
from megatron_plasticity.models.rotary import RotaryTable, rotate


class Linear(nn.Linear):
    """A linear map without bias, whose weights `initialise` or a checkpoint will fill."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Leave the memory as it is: drawing weights twice would cost time and disturb the global random state."""


class Embedding(nn.Embedding):
    """A token embedding, whose weights `initialise` or a checkpoint will fill."""

    def reset_parameters(self) -> None:
        """As in `Linear`."""


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, backend: AttentionBackend) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.backend: AttentionBackend = backend
        query_width, kv_width = config.query_heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_width)
        self.k_proj = Linear(config.hidden_size, kv_width)
        self.v_proj = Linear(config.hidden_size, kv_width)
        self.out_proj = Linear(query_width, config.hidden_size)
        normed = FAMILIES[config.family].qk_norm
        self.q_norm = nn.RMSNorm(query_width, eps=config.norm_eps) if normed else None
        self.k_norm = nn.RMSNorm(kv_width, eps=config.norm_eps) if normed else None
        self.q, self.k, self.v, self.z, self.out = (nn.Identity() for _ in range(5))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = self.q(rotate(self._heads(query), cos, sin).transpose(1, 2))
        key = self.k(rotate(self._heads(key), cos, sin).transpose(1, 2))
        value = self.v(self._heads(value).transpose(1, 2))
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        mixed = attend(query, key, value, mask, self.backend)
        return self.out(self.out_proj(self.z(mixed.transpose(1, 2).flatten(2))))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, heads * head_dim] → [B, S, heads, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.mlp_hidden_size)
        self.up_proj = Linear(config.hidden_size, config.mlp_hidden_size)
        self.down_proj = Linear(config.mlp_hidden_size, config.hidden_size)
        self.pre, self.gate, self.post, self.out = nn.Identity(), nn.SiLU(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(self.pre(self.gate_proj(x)))
        return self.out(self.down_proj(self.post(gate * self.up_proj(x))))


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream; the family says where the norms sit."""

    def __init__(self, config: ModelConfig, layer: int, backend: AttentionBackend) -> None:
        super().__init__()
        self.norm_placement = FAMILIES[config.family].norm_placement
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(config, layer, backend)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config)
        self.resid_pre, self.resid_mid, self.resid_post = (nn.Identity() for _ in range(3))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        x = self.resid_pre(x)
        if self.norm_placement == "input":
            x = self.resid_mid(x + self.attn(self.attn_norm(x), cos, sin, mask, cache))
            return self.resid_post(x + self.mlp(self.mlp_norm(x)))
        x = self.resid_mid(x + self.attn_norm(self.attn(x, cos, sin, mask, cache)))
        return self.resid_post(x + self.mlp_norm(self.mlp(x)))


class Head(nn.Module):
    """Hidden state → logits, with a matrix of its own, or with the token embedding's if they are tied."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = None if config.tied_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return F.linear(x, embedding if self.weight is None else self.weight)


class Transformer(nn.Module):
    """The language model. Its weights are not initialised: follow with `initialise(model, seed)` or load a state.

    It can be built under `torch.device("meta")`. `activation_checkpointing` recomputes each block in the backward pass.
    """

    def __init__(self, config: ModelConfig, attention_backend: AttentionBackend = "auto") -> None:
        super().__init__()
        check_backend(attention_backend)
        self.config = config
        self.activation_checkpointing = False
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer, attention_backend) for layer in range(config.layers))
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = Head(config)
        self.rotary = RotaryTable(config.head_dim, config.rope_theta, config.context_length)

    def forward(
        self,
        tokens: Tensor,
        cache: KeyValueCache | None = None,
        padding: Tensor | None = None,
        positions: Literal["all", "last"] = "all",
    ) -> Tensor:
        """Logits [B, S, vocab_size] of tokens [B, S] (int64); [B, 1, vocab_size] with positions "last".

        With a cache the tokens continue those in it and are added to it. `padding` [B] (int64) is the number of leading columns
        of each row that hold no token: the other columns' logits are those of the unpadded row, those of padding columns mean
        nothing. With a cache it counts from the cache's first column and is remembered there: giving it once is enough.
        """
        past, length = (0 if cache is None else cache.length), tokens.shape[1]
        if cache is not None:
            cache.padding = padding = padding if padding is not None else cache.padding
        cos, sin = self.rotary.at(past, past + length, tokens.device, shift=padding)
        mask = attention_mask(length, past, padding, tokens.device)
        recompute = self.activation_checkpointing and cache is None and torch.is_grad_enabled()
        x = self.embed(tokens)
        for block in self.layers:
            if recompute:  # nothing in a block is random, so its random state need not be kept
                x = checkpoint(block, x, cos, sin, mask, None, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin, mask, cache)
        if cache is not None:
            cache.advance(length)
        if positions == "last":
            x = x[:, -1:]
        return self.head(self.final_norm(x), self.embed.weight)
