"""Attention seen from its weights (spectra of W_QK and W_VP) and from what it does (maps).

Per head, W_QK = W_Kᵀ·W_Q, whose entry between two states is their attention score before rotary embedding and scaling, and W_VP =
W_P·W_V, what the head adds to the residual stream for a state that it attends to. Both are d×d of rank at most head_dim. Weight
decay on the factors acts on them like a nuclear norm (Kobayashi, Akram and von Oswald, "Weight decay induces low-rank attention
layers", 2410.23819). Rotary embedding and, unless folded in, the gains of a QK-norm are left out; the QK-norm's division by the
root mean square depends on the input and always is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_plasticity.capture.recorder import Recorder
from megatron_plasticity.config.analysis import AttentionRecipe
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.attention import attention_weights
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.tracking.progress import Progress

SUMMARY_THRESHOLD = 0.95
_LONGEST_EXAMPLE = 32
_EXAMPLE_DIGITS = 4
# A share that is reached exactly, such as 19 of 20 equal values at 0.95, must not be missed by a rounding error.
_SLACK = 1e-12


class Decoder(Protocol):
    """The part of a tokenizer that turns ids into text."""

    def decode(self, ids: list[int]) -> str: ...


def run_attention(
    model: Transformer,
    recipe: AttentionRecipe,
    tokens: Tensor,
    tokenizer: Decoder | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`results.json` of an `attention` run: `spectra`, and unless `map_sequences` is 0 the maps of held-out `tokens` [B, S].

    The first `map_sequences` rows and `map_length` columns of `tokens` (on the model's device) are used.
    """
    results = spectra(dict(model.named_parameters()), model.config, recipe, progress)
    if recipe.map_sequences:
        maps = attention_maps(model, tokens[: recipe.map_sequences, : recipe.map_length], tokenizer)
        for layer, statistics in zip(results["layers"], maps["layers"], strict=True):
            layer["maps"] = statistics
        results["example_maps"] = maps["example_maps"]
        results["map_tokens"] = maps["map_tokens"]
    return results


def spectra(
    state: Mapping[str, Tensor], config: ModelConfig, recipe: AttentionRecipe, progress: Progress | None = None
) -> dict[str, Any]:
    """Singular values of every head's W_QK and W_VP, as ranks and norms.

    `{"layers": [{"qk": measures, "vp": measures}], "mean_spectrum": {"qk": [layer][k], "vp": …}, "head_dim", "fold_qk_norm",
    "summary": {"qk_pseudo_rank", "vp_pseudo_rank"}}`. Measures are lists over heads (see `spectrum_measures`). The mean spectrum
    is σ_k / σ_1, mean over the heads that are not zero. The summary is the mean over heads, then layers, of the pseudo-rank at
    0.95 of Σσ.

    Args:
        state: weights by canonical name.

    Raises:
        UserError: a weight is missing or not finite, or `fold_qk_norm` is asked of a family without a QK-norm.
    """
    layers: list[dict[str, Any]] = []
    mean_spectrum: dict[str, list[list[float]]] = {"qk": [], "vp": []}
    pseudo_ranks: dict[str, list[float]] = {"qk": [], "vp": []}
    for layer in range(config.layers):
        entry = {}
        for kind, values in zip(("qk", "vp"), layer_singular_values(state, config, layer, recipe.fold_qk_norm), strict=True):
            entry[kind] = spectrum_measures(values, recipe.thresholds)
            mean_spectrum[kind].append(_mean_spectrum(values))
            pseudo_ranks[kind].append(float(pseudo_rank(values, SUMMARY_THRESHOLD).double().mean()))
        layers.append(entry)
        if progress is not None:
            progress.update(layer + 1, config.layers, "layers")
    summary = {f"{kind}_pseudo_rank": sum(ranks) / len(ranks) for kind, ranks in pseudo_ranks.items()}
    return {
        "layers": layers,
        "mean_spectrum": mean_spectrum,
        "head_dim": config.head_dim,
        "fold_qk_norm": recipe.fold_qk_norm,
        "summary": summary,
    }


def layer_singular_values(
    state: Mapping[str, Tensor], config: ModelConfig, layer: int, fold_qk_norm: bool = False
) -> tuple[Tensor, Tensor]:
    """Singular values of W_QK and W_VP of each query head of a layer, descending: two float64 tensors [query_heads, head_dim].

    Each query head is paired with the key and value head of its group. `fold_qk_norm` multiplies the rows of W_Q and W_K by the
    gains of the QK-norm, diag(g)·W.
    """
    prefix = f"layers.{layer}.attn"
    query, key, value, output = (_weight(state, f"{prefix}.{name}.weight") for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
    if fold_qk_norm:
        if f"{prefix}.q_norm.weight" not in state:
            raise UserError(
                f"fold_qk_norm: the family {config.family} has no QK-norm whose gains could be folded in; set it to false"
            )
        query = query * _weight(state, f"{prefix}.q_norm.weight")[:, None]
        key = key * _weight(state, f"{prefix}.k_norm.weight")[:, None]
    group = config.query_heads // config.kv_heads

    def heads(weight: Tensor) -> Tensor:
        """[heads * head_dim, d] → [heads, d, head_dim]."""
        return weight.unflatten(0, (-1, config.head_dim)).transpose(1, 2)

    keys, values = (heads(weight).repeat_interleave(group, dim=0) for weight in (key, value))
    return product_singular_values(keys, heads(query)), product_singular_values(heads(output.T), values)


def product_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of A·Bᵀ for thin A and B [..., d, r], descending: [..., min(d, r)].

    With A = Q_A·R_A and B = Q_B·R_B, A·Bᵀ = Q_A·(R_A·R_Bᵀ)·Q_Bᵀ, so they are those of the small core R_A·R_Bᵀ; the d×d product is
    never formed (Golub and Van Loan, Matrix Computations, 4th ed., chapters 5.2 and 8.6).
    """
    left_core, right_core = (torch.linalg.qr(factor, mode="r").R for factor in (left, right))
    return torch.linalg.svdvals(left_core @ right_core.mT)


def pseudo_rank(singular_values: Tensor, threshold: float) -> Tensor:
    """Least k whose k largest values hold `threshold` of the sum: int64 [...] of values [..., r]; 0 for a zero matrix.

    Source: Kobayashi et al. (2410.23819); Han et al. (2602.11137) show it, as far as we can tell, at 0.95. Pass σ² for
    the share of the squared Frobenius norm.
    """
    cumulative = singular_values.cumsum(dim=-1)
    total = cumulative[..., -1:]
    short = cumulative < threshold * total * (1 - _SLACK)
    return (short.sum(dim=-1) + 1) * (total[..., 0] > 0)


def spectrum_measures(singular_values: Tensor, thresholds: Sequence[float]) -> dict[str, Any]:
    """Ranks and norms of matrices with singular values σ [heads, r], descending; each a list over heads.

    `pseudo_rank` and `pseudo_rank_squared`, {threshold: …}, of Σσ and of Σσ²; `nuclear` Σσ; `frobenius` √Σσ²; `stable_rank`
    Σσ²/σ_1² (Rudelson and Vershynin, J. ACM 54, 2007); `entropy_rank` exp(−Σ p·ln p) with p = σ/Σσ (Roy and Vetterli, "The
    effective rank", EUSIPCO 2007). All ranks of a zero matrix are 0.
    """
    squares = singular_values.square()
    nuclear, largest = singular_values.sum(dim=-1), singular_values[..., 0]
    nonzero = largest > 0
    shares = singular_values / nuclear.where(nonzero, torch.ones_like(nuclear))[..., None]
    stable = (singular_values / largest.where(nonzero, torch.ones_like(largest))[..., None]).square().sum(dim=-1)
    entropy_rank = torch.special.entr(shares).sum(dim=-1).exp() * nonzero
    return {
        "pseudo_rank": {_label(t): pseudo_rank(singular_values, t).tolist() for t in thresholds},
        "pseudo_rank_squared": {_label(t): pseudo_rank(squares, t).tolist() for t in thresholds},
        "nuclear": nuclear.tolist(),
        "frobenius": squares.sum(dim=-1).sqrt().tolist(),
        "stable_rank": stable.tolist(),
        "entropy_rank": entropy_rank.tolist(),
    }


@torch.no_grad()
def attention_maps(model: Transformer, tokens: Tensor, tokenizer: Decoder | None = None) -> dict[str, Any]:
    """Attention of every head on `tokens` [B, S], recomputed from the recorded q and k.

    `{"map_tokens": S, "layers": [{"entropy", "sink", "previous_token"}], "example_maps": [{"layer", "head", "tokens",
    "weights"}]}`, see `map_statistics`. The examples are the same heads for every model of a shape, so that models can be laid
    side by side: the first and the middle head of the first, middle and last layer, on the first tokens of the first sequence.
    """
    if tokens.shape[1] < 2:
        raise UserError("map_length: attention maps need sequences of 2 tokens or more")
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


def _weight(state: Mapping[str, Tensor], name: str) -> Tensor:
    try:
        weight = state[name].detach().cpu().double()
    except KeyError as error:
        raise UserError(f"the model has no weight {name}, which the attention analysis needs") from error
    if not weight.isfinite().all():
        raise UserError(f"{name} is not finite: the weights have diverged, so they have no spectrum")
    return weight


def _mean_spectrum(singular_values: Tensor) -> list[float]:
    nonzero = singular_values[singular_values[:, 0] > 0]
    if not len(nonzero):
        return [0.0] * singular_values.shape[1]
    return (nonzero / nonzero[:, :1]).mean(dim=0).tolist()


def _label(threshold: float) -> str:
    """`0.90`, `0.95`, but `0.999` in full."""
    short = f"{threshold:.2f}"
    return short if float(short) == threshold else repr(threshold)
