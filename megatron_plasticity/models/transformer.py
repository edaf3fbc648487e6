"""One decoder-only transformer for both families: RMSNorm, rotary grouped-query attention, SwiGLU, no biases, no dropout.

Many sub-modules are `nn.Identity`: they are the hook points, and a hook point's name is its module path (`layers.3.attn.q`), so
that `model.get_submodule(name).register_forward_hook(…)` is all that capturing an activation takes.

A `Transformer` is the whole model, or a pipeline stage of it; each rank holds the whole of its matrices, or its tensor-parallel
part. Names are the same in every case.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.models.attention import AttentionBackend, Segments, attend, cache_mask, check_backend
from megatron_plasticity.models.cache import CacheView
from megatron_plasticity.models.families import FAMILIES
from megatron_plasticity.models.partition import Sharding, sharding, stage_layers
from megatron_plasticity.models.rotary import RotaryTable, rotate
from megatron_plasticity.parallel.grid import ProcessGrid
from megatron_plasticity.parallel.tensor import (
    SINGLE,
    HeadParallelRMSNorm,
    RMSNorm,
    TensorRanks,
    VocabularyParallelEmbedding,
    column_parallel,
    combine,
)


class Linear(nn.Linear):
    """A linear map without bias, whose weights `initialise` or a checkpoint will fill."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Leave the memory as it is: drawing weights twice would cost time and disturb the global random state."""


def _project(x: Tensor, linears: tuple[Linear, ...], copies: tuple[int, ...], ranks: TensorRanks) -> tuple[Tensor, ...]:
    """Each linear map of x, whose outputs are split over the ranks."""
    if ranks.size == 1:
        return tuple(linear(x) for linear in linears)
    return column_parallel(x, [linear.weight for linear in linears], copies, ranks)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, backend: AttentionBackend, ranks: TensorRanks) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.backend: AttentionBackend = backend
        self.ranks = ranks
        # With more ranks than key/value heads, several ranks in a row hold each of them.
        kv_parts = min(ranks.size, config.kv_heads)
        self.kv_copies = ranks.size // kv_parts
        query_width, kv_width = config.query_heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_width // ranks.size)
        self.k_proj = Linear(config.hidden_size, kv_width // kv_parts)
        self.v_proj = Linear(config.hidden_size, kv_width // kv_parts)
        self.out_proj = Linear(query_width // ranks.size, config.hidden_size)
        normed = FAMILIES[config.family].qk_norm
        self.q_norm = HeadParallelRMSNorm(query_width, config.norm_eps, ranks, ranks.size) if normed else None
        self.k_norm = HeadParallelRMSNorm(kv_width, config.norm_eps, ranks, kv_parts) if normed else None
        self.q, self.k, self.v, self.z, self.out = (nn.Identity() for _ in range(5))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | Segments | None, cache: CacheView | None) -> Tensor:
        copies = (1, self.kv_copies, self.kv_copies)
        query, key, value = _project(x, (self.q_proj, self.k_proj, self.v_proj), copies, self.ranks)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = self.q(rotate(self._heads(query), cos, sin).transpose(1, 2))
        key = self.k(rotate(self._heads(key), cos, sin).transpose(1, 2))
        value = self.v(self._heads(value).transpose(1, 2))
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        mixed = attend(query, key, value, mask, self.backend)
        return self.out(combine(self.out_proj(self.z(mixed.transpose(1, 2).flatten(2))), self.ranks))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, heads * head_dim] → [B, S, heads, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2002.05202)."""

    def __init__(self, config: ModelConfig, ranks: TensorRanks) -> None:
        super().__init__()
        self.ranks = ranks
        width = config.mlp_hidden_size // ranks.size
        self.gate_proj = Linear(config.hidden_size, width)
        self.up_proj = Linear(config.hidden_size, width)
        self.down_proj = Linear(width, config.hidden_size)
        self.pre, self.gate, self.post, self.out = nn.Identity(), nn.SiLU(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = _project(x, (self.gate_proj, self.up_proj), (1, 1), self.ranks)
        return self.out(combine(self.down_proj(self.post(self.gate(self.pre(gate)) * up)), self.ranks))


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream; the family says where the norms sit."""

    def __init__(self, config: ModelConfig, layer: int, backend: AttentionBackend, ranks: TensorRanks) -> None:
        super().__init__()
        self.norm_placement = FAMILIES[config.family].norm_placement
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps, ranks)
        self.attn = Attention(config, layer, backend, ranks)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, ranks)
        self.mlp = SwiGLU(config, ranks)
        self.resid_pre, self.resid_mid, self.resid_post = (nn.Identity() for _ in range(3))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | Segments | None, cache: CacheView | None) -> Tensor:
        x = self.resid_pre(x)
        if self.norm_placement == "input":
            x = self.resid_mid(x + self.attn(self.attn_norm(x), cos, sin, mask, cache))
            return self.resid_post(x + self.mlp(self.mlp_norm(x)))
        x = self.resid_mid(x + self.attn_norm(self.attn(x, cos, sin, mask, cache)))
        return self.resid_post(x + self.mlp_norm(self.mlp(x)))


HeadResult = Callable[[Tensor, Tensor, TensorRanks], Any]
"""What is made of a hidden state [B, S, d] (or this rank's positions) and this rank's part of the head's matrix."""


class Head(nn.Module):
    """Hidden state → logits (under tensor parallelism of this rank's part of the vocabulary), with a matrix of its own, or with
    the token embedding's if they are tied."""

    def __init__(self, config: ModelConfig, ranks: TensorRanks) -> None:
        super().__init__()
        self.ranks = ranks
        rows = config.vocab_size // ranks.size
        self.weight = None if config.tied_embeddings else nn.Parameter(torch.empty(rows, config.hidden_size))

    def matrix(self, weight: Tensor | None) -> Tensor:
        """`weight`, or else the head's own."""
        weight = self.weight if weight is None else weight
        assert weight is not None, "tied embeddings put the token embedding on the head's stage too"
        return weight

    def forward(self, x: Tensor, weight: Tensor | None = None, result: HeadResult | None = None) -> Any:
        """Logits of x, or what `result` makes of x and the matrix. It must do so in here: ZeRO 3 has the matrix only while this
        runs. `weight` goes before the head's own."""
        weight = self.matrix(weight)
        if result is not None:
            return result(x, weight, self.ranks)
        return F.linear(x, weight) if self.ranks.size == 1 else column_parallel(x, (weight,), (1,), self.ranks)[0]


class Transformer(nn.Module):
    """The language model. Its weights are not initialised: follow with `initialise(model, seed)` or `load_whole(weights)`.

    It can be built under `torch.device("meta")`. `activation_checkpointing` recomputes each block in the backward pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention_backend: AttentionBackend = "auto",
        ranks: TensorRanks = SINGLE,
        layers: range | None = None,
    ) -> None:
        """With `layers`, the pipeline stage that holds these: the first one embeds tokens, the last one ends in logits."""
        super().__init__()
        check_backend(attention_backend)
        layers = range(config.layers) if layers is None else layers
        self.config = config
        self.ranks = ranks
        self.activation_checkpointing = False
        self.is_first_stage, self.is_last_stage = layers.start == 0, layers.stop == config.layers
        if self.is_first_stage or (self.is_last_stage and config.tied_embeddings):
            self.embed = VocabularyParallelEmbedding(config.vocab_size, config.hidden_size, ranks)
        self.layers = nn.ModuleList()
        for layer in layers:
            self.layers.add_module(str(layer), Block(config, layer, attention_backend, ranks))
        if self.is_last_stage:
            self.final_norm = RMSNorm(config.hidden_size, config.norm_eps, ranks)
            self.head = Head(config, ranks)
        self.rotary = RotaryTable(config.head_dim, config.rope_theta, config.context_length)
        if ranks.size > 1:
            for name, parameter in self.named_parameters():
                # DeepSpeed's sign that a parameter counts in the gradient norm beside those of the first rank.
                parameter.tensor_model_parallel = self.sharding(name).is_first_copy(ranks.rank)  # type: ignore[attr-defined]

    def use_attention(self, backend: AttentionBackend) -> None:
        """Let all blocks attend by this backend from now on."""
        check_backend(backend)
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def compile_blocks(self) -> None:
        """Compile each block when it first runs. Hooks inside a compiled block are not called (see `as_written`)."""
        for block in self.layers:
            block.compile()

    @contextlib.contextmanager
    def as_written(self) -> Iterator[None]:
        """Run blocks without compilation inside the block, so that hooks see everything."""
        if not any(block._compiled_call_impl is not None for block in self.layers):
            yield  # setting a stance imports the compiler, which takes seconds
            return
        with torch.compiler.set_stance("force_eager"):
            yield

    def sharding(self, name: str) -> Sharding:
        """How the parameter of this name is cut over the tensor-parallel ranks."""
        return sharding(name, self.config, self.ranks.size)

    @torch.no_grad()
    def load_whole(self, weights: Mapping[str, Tensor]) -> None:
        """Take this rank's part of each parameter that is not frozen from whole tensors by name."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(self.sharding(name).take(weights[name], self.ranks.rank))

    def forward(
        self,
        tokens: Tensor,
        cache: CacheView | None = None,
        positions: Literal["all", "last"] = "all",
        segments: Segments | None = None,
    ) -> Tensor:
        """Logits [B, S, vocab_size] of tokens [B, S] (int64); [B, 1, vocab_size] with positions "last".

        With a cache each row's tokens continue those that the row of the cache holds, and are added to it.

        With `segments`, each row is so many texts of these lengths, S in all, and each text's logits are those that it has in a
        row of its own.

        A pipeline stage after the first takes the residual stream [B, S, d] instead of tokens, and one before the last returns
        it. With sequence parallelism it has this rank's positions only, [B, S / ranks.size, d]; under tensor parallelism logits
        are those of this rank's part of the vocabulary.
        """
        x = self.hidden(tokens, cache, positions, segments)
        return self.head(x, self.tied_weight) if self.is_last_stage else x

    @property
    def tied_weight(self) -> Tensor | None:
        """What the head uses if it has no matrix of its own."""
        return self.embed.weight if self.config.tied_embeddings else None

    def hidden(
        self,
        tokens: Tensor,
        cache: CacheView | None = None,
        positions: Literal["all", "last"] = "all",
        segments: Segments | None = None,
    ) -> Tensor:
        """What the head reads [B, S, d], or before the last stage the residual stream; arguments as of `forward`."""
        if segments is not None:
            cos, sin = self.rotary.restarting(segments, tokens.device)
            mask = segments
        elif cache is not None:
            cos, sin = self.rotary.at(cache.width, tokens.device, cache.positions)
            mask = cache_mask(cache.positions, cache.width)
        else:
            split = self.ranks.size if self.ranks.sequence and not self.is_first_stage else 1
            cos, sin = self.rotary.at(tokens.shape[1] * split, tokens.device)
            mask = None
        recompute = self.activation_checkpointing and cache is None and torch.is_grad_enabled()
        x = self.embed(tokens) if self.is_first_stage else tokens
        for block in self.layers:
            if recompute:  # nothing in a block is random, so its random state need not be kept
                x = checkpoint(block, x, cos, sin, mask, None, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin, mask, cache)
        if not self.is_last_stage:
            return x
        if positions == "last":
            assert not self.ranks.sequence, "the last position lies on one rank"
            x = x[:, -1:]
        return self.final_norm(x)


def local_model(config: ModelConfig, grid: ProcessGrid) -> Transformer:
    """This process's part of the model under the layout of `grid`: its pipeline stage, cut over the tensor-parallel ranks."""
    return Transformer(config, ranks=grid.tensor, layers=stage_layers(config, grid.parallel)[grid.stage])
