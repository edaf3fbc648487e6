"""The attention matrices W_QK and W_VP of every head: their singular values, as ranks and norms.

Per head, W_QK = W_Kᵀ·W_Q, whose entry between two states is their attention score before rotary embedding and scaling, and W_VP =
W_P·W_V, what the head adds to the residual stream for a state that it attends to. Both are d×d of rank at most head_dim. Weight
decay on the factors acts on them like a nuclear norm (Kobayashi, Akram and von Oswald, "Weight decay induces low-rank attention
layers", 2410.23819). Rotary embedding and, unless folded in, the gains of a QK-norm are left out; the QK-norm's division by the
root mean square depends on the input and always is. docs/attention.md says more.

Everything is computed on the CPU in float64 from four tensors of a few layers at a time, so a model need not fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from megatron_plasticity.analysis.head_statistics import SUMMARY_THRESHOLD
from megatron_plasticity.config.analysis import AttentionProduct, AttentionRecipe
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.families import FAMILIES
from megatron_plasticity.tracking.progress import Progress

Result = TypeVar("Result")

# A layer of a model of 4 billion parameters takes 0.2 GB while it is worked on, and the directions of its heads 0.7 GB.
_LAYERS_AT_ONCE = 4
# A share that is reached exactly, such as 19 of 20 equal values at 0.95, must not be missed by a rounding error.
_SLACK = 1e-12


def spectra(
    weights: Mapping[str, Tensor], config: ModelConfig, recipe: AttentionRecipe, progress: Progress | None = None
) -> dict[str, Any]:
    """Singular values of every head's W_QK and W_VP, as ranks and norms.

    `{"layers": [{"qk": measures, "vp": measures}], "mean_spectrum": {"qk": [layer][k], "vp": …}, "head_dim", "fold_qk_norm",
    "summary": {"qk_pseudo_rank", "vp_pseudo_rank"}}`; with `fold_qk_norm: both`, "qk_folded" beside "qk" throughout. Measures are
    lists over heads (see `spectrum_measures`). The mean spectrum is σ_k / σ_1, mean over the heads that are not zero. The summary
    is the mean over heads, then layers, of the pseudo-rank at 0.95 of Σσ.

    Args:
        weights: tensors by canonical name, looked up by several threads; each is looked up once and not kept.

    Raises:
        UserError: a weight is missing or not finite, or `fold_qk_norm` is asked of a family without a QK-norm.
    """
    if recipe.fold_qk_norm and not FAMILIES[config.family].qk_norm:
        raise UserError(
            f"fold_qk_norm: the family {config.family} has no QK-norm whose gains could be folded in; set it to false"
        )
    layers: list[dict[str, Any]] = []
    mean_spectrum: dict[str, list[list[float]]] = {}
    pseudo_ranks: dict[str, list[float]] = {}

    def singular_values(layer: int) -> dict[str, Tensor]:
        return layer_singular_values(weights, config, layer, recipe.fold_qk_norm)

    for products in each_layer(singular_values, config.layers, progress):
        entry = {}
        for name, values in products.items():
            entry[name] = spectrum_measures(values, recipe.thresholds)
            mean_spectrum.setdefault(name, []).append(_mean_spectrum(values))
            pseudo_ranks.setdefault(name, []).append(float(pseudo_rank(values, SUMMARY_THRESHOLD).double().mean()))
        layers.append(entry)
    return {
        "layers": layers,
        "mean_spectrum": mean_spectrum,
        "head_dim": config.head_dim,
        "fold_qk_norm": recipe.fold_qk_norm,
        "summary": {f"{name}_pseudo_rank": sum(ranks) / len(ranks) for name, ranks in pseudo_ranks.items()},
    }


def layer_singular_values(
    weights: Mapping[str, Tensor], config: ModelConfig, layer: int, fold_qk_norm: bool | Literal["both"] = False
) -> dict[str, Tensor]:
    """Singular values of each query head's W_QK ("qk") and W_VP ("vp"), descending: float64 [query_heads, head_dim].

    `fold_qk_norm` multiplies the rows of W_Q and W_K by the gains of the QK-norm, diag(g)·W; "both" gives W_QK without them as
    "qk" and with them as "qk_folded".
    """
    found: dict[str, Tensor] = {}
    query, key = (triangle(factor) for factor in thin_factors(weights, config, layer, "qk"))
    if fold_qk_norm is not True:
        found["qk"] = core_singular_values(query, key)
    if fold_qk_norm:
        query_gains, key_gains = qk_norm_gains(weights, config, layer)
        # (Q·R)·diag(g) = Q·(R·diag(g)), and R·diag(g) is a triangle still: the factorisation need not be done again.
        folded = core_singular_values(query * query_gains, key * key_gains)
        found["qk_folded" if fold_qk_norm == "both" else "qk"] = folded
    found["vp"] = core_singular_values(*(triangle(factor) for factor in thin_factors(weights, config, layer, "vp")))
    return found


def thin_factors(
    weights: Mapping[str, Tensor], config: ModelConfig, layer: int, product: AttentionProduct
) -> tuple[Tensor, Tensor]:
    """Factors A [query_heads, d, head_dim] and B [kv_heads, d, head_dim] of a layer: A·Bᵀ is W_QKᵀ or W_VP of a head.

    A is the query head's own (W_Qᵀ, or W_P), B that of its key/value group (W_Kᵀ, or W_Vᵀ).
    """
    own, shared = {"qk": ("q_proj", "k_proj"), "vp": ("out_proj", "v_proj")}[product]
    own_weight, shared_weight = (_weight(weights, f"layers.{layer}.attn.{name}.weight") for name in (own, shared))
    return split_heads(own_weight if product == "qk" else own_weight.T, config.head_dim), split_heads(
        shared_weight, config.head_dim
    )


def qk_norm_gains(weights: Mapping[str, Tensor], config: ModelConfig, layer: int) -> tuple[Tensor, Tensor]:
    """Gains of the QK-norm as factors of the columns of A and B of `thin_factors`: [query_heads, 1, head_dim] and
    [kv_heads, 1, head_dim]; ones for a family without it."""
    if not FAMILIES[config.family].qk_norm:
        return torch.ones(1, 1, 1), torch.ones(1, 1, 1)
    query, key = (
        _weight(weights, f"layers.{layer}.attn.{name}.weight").view(-1, 1, config.head_dim) for name in ("q_norm", "k_norm")
    )
    return query, key


def split_heads(weight: Tensor, head_dim: int) -> Tensor:
    """[heads * head_dim, d] → [heads, d, head_dim]."""
    return weight.unflatten(0, (-1, head_dim)).transpose(1, 2)


def join_heads(factors: Tensor) -> Tensor:
    """[heads, d, head_dim] → [heads * head_dim, d]."""
    return factors.transpose(1, 2).flatten(0, 1)


def triangle(factors: Tensor) -> Tensor:
    """R [heads, head_dim, head_dim], float64, of the QR decomposition of thin factors [heads, d, head_dim]."""
    # Head by head, since the float64 copy of one fits into the cache: that takes two thirds of the time of all at once.
    return torch.stack([torch.linalg.qr(factor.double(), mode="r").R for factor in factors])


def core_singular_values(own: Tensor, shared: Tensor) -> Tensor:
    """Singular values of A·Bᵀ of each query head, descending, from the triangles of A [query_heads, r, r] and B [kv_heads, r, r].

    With A = Q_A·R_A and B = Q_B·R_B, A·Bᵀ = Q_A·(R_A·R_Bᵀ)·Q_Bᵀ, so they are those of the small core R_A·R_Bᵀ; the d×d product is
    never formed (Golub and Van Loan, Matrix Computations, 4th ed., chapters 5.2 and 8.6). B of a group is factorised once for
    all of its query heads.
    """
    return torch.linalg.svdvals(core(own, shared))


def core(own: Tensor, shared: Tensor) -> Tensor:
    """R_A·R_Bᵀ of each query head and its group: [query_heads, r, r]."""
    return own @ shared.repeat_interleave(own.shape[0] // shared.shape[0], dim=0).mT


@contextmanager
def one_thread() -> Iterator[int]:
    """Let torch compute with one thread inside the block; yields the number that it had.

    LAPACK takes the heads one by one, and a head is so small that threads mostly wait for one another: with two on a machine
    that is also busy otherwise, a factorisation took up to forty times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def each_layer(work: Callable[[int], Result], layers: int, progress: Progress | None = None) -> Iterator[Result]:
    """`work(layer)` of every layer, in order, several layers side by side with a thread for each."""
    with one_thread() as threads, ThreadPoolExecutor(min(threads, _LAYERS_AT_ONCE)) as pool:
        for done, result in enumerate(pool.map(work, range(layers)), start=1):
            if progress is not None:
                progress.update(done, layers, "layers")
            yield result


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


def _weight(weights: Mapping[str, Tensor], name: str) -> Tensor:
    try:
        weight = weights[name].detach().cpu()
    except KeyError as error:
        raise UserError(f"the model has no weight {name}, which the attention analysis needs") from error
    # NaN and infinity are extremes too; to ask of each number whether it is finite takes half as long as the QR decompositions.
    if not all(extreme.isfinite() for extreme in weight.aminmax()):
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
