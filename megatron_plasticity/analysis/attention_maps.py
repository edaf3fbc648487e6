"""What attention does: maps of every head, recomputed from the recorded queries and keys, and what they look like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_plasticity.capture.recorder import Recorder
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.attention import attention_weights
from megatron_plasticity.models.transformer import Transformer

_LONGEST_EXAMPLE = 32
_EXAMPLE_DIGITS = 4


class Decoder(Protocol):
    """The part of a tokenizer that turns ids into text."""

    def decode(self, ids: list[int]) -> str: ...


@torch.no_grad()
def attention_maps(model: Transformer, tokens: Tensor, tokenizer: Decoder | None = None) -> dict[str, Any]:
    """Attention of every head on `tokens` [B, S] (S ≥ 2, on the model's device), recomputed from the recorded q and k.

    `{"map_tokens": S, "layers": [{"entropy", "sink", "previous_token"}], "example_maps": [{"layer", "head", "tokens",
    "weights"}]}`, see `map_statistics`. The examples are the same heads for every model of a shape, so that models can be laid
    side by side: the first and the middle head of the first, middle and last layer, on the first tokens of the first sequence.
    """
    config = model.config
    recorded = Recorder(model, ["layers.*.attn.q", "layers.*.attn.k"]).record(tokens)
    shown = min(tokens.shape[1], _LONGEST_EXAMPLE)
    ids = tokens[0, :shown].tolist()
    texts = [str(token) if tokenizer is None else tokenizer.decode([token]) for token in ids]
    example_layers = sorted({0, config.layers // 2, config.layers - 1})
    example_heads = sorted({0, config.query_heads // 2})
    layers, examples = [], []
    for layer in range(config.layers):
        # Taken out one by one: a layer's maps are much larger than its q and k.
        weights = attention_weights(recorded.pop(f"layers.{layer}.attn.q"), recorded.pop(f"layers.{layer}.attn.k"))
        if not weights.isfinite().all():
            raise UserError(f"attention in layer {layer} is not finite: the model's weights have diverged")
        layers.append(map_statistics(weights))
        if layer in example_layers:
            for head in example_heads:
                # Rows of a causal softmax up to `shown` have no weight beyond it: the corner is itself a map.
                corner = weights[0, head, :shown, :shown].double().tolist()
                rounded = [[round(weight, _EXAMPLE_DIGITS) for weight in row] for row in corner]
                examples.append({"layer": layer, "head": head, "tokens": texts, "weights": rounded})
    return {"map_tokens": tokens.shape[1], "layers": layers, "example_maps": examples}


def with_maps(spectra: Mapping[str, Any], maps: Mapping[str, Any]) -> dict[str, Any]:
    """`results.json` of an `attention` run: what `spectra` and `attention_maps` return, layer by layer beside each other."""
    layers = [{**entry, "maps": found} for entry, found in zip(spectra["layers"], maps["layers"], strict=True)]
    return {**spectra, **maps, "layers": layers}


def map_statistics(weights: Tensor) -> dict[str, list[float]]:
    """What attention A [B, heads, S, S] (rows: queries) looks like; lists over heads, means over sequences and queries.

    `entropy` −Σ_j A_ij·ln A_ij in nats, over all queries (query 0's is 0; Zhai et al., 2303.06296); `sink` A_i0, the mass on the
    first token, over queries i ≥ 1, since query 0 has no choice (Xiao et al., 2309.17453); `previous_token` A_i,i−1 over queries
    i ≥ 1 (Olsson et al., 2209.11895); for query 1 both are the same entry.
    """
    weights = weights.double()
    previous = weights.diagonal(offset=-1, dim1=2, dim2=3)
    return {
        "entropy": torch.special.entr(weights).sum(dim=3).mean(dim=(0, 2)).tolist(),
        "sink": weights[:, :, 1:, 0].mean(dim=(0, 2)).tolist(),
        "previous_token": previous.mean(dim=(0, 2)).tolist(),
    }
