"""What a layer's features say about plasticity: dormant units, effective ranks, norms.

Of each layer, over all positions of some sequences:

- units of the MLP (silu(gate)·up, the hook point `mlp.post`) and heads of attention (`attn.z`) that are *dormant*: whose mean
  magnitude is at most τ times the mean over the layer's units, or heads (Sokar et al., "The dormant neuron phenomenon in deep
  reinforcement learning", 2302.12902, definition 3.1; of heads it is our own);
- *ranks* of the feature matrix Φ [positions, d] of the residual stream after the layer (`resid_post`), and after the final norm;
- L2 *norms* of those features.

Ranks are functions of Φ's singular values, whose squares are the eigenvalues of ΦᵀΦ. That d×d matrix is accumulated batch by
batch in float64, so Φ itself is never held. An eigenvalue is lost below 10⁻¹⁶ of the largest, a singular value below 10⁻⁸, which
is less than the rounding of the features themselves, in fp32.

The sources define both ranks for Φ as it is, so it is not centred. But the residual stream of a language model has a large mean,
which then is the first singular direction; what varies from token to token is the rank of Φ without its column means. Both are
given. docs/features.md says more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_plasticity.analysis.attention import one_thread, pseudo_rank, spectrum_measures
from megatron_plasticity.capture.statistics import StreamingStatistics
from megatron_plasticity.config.analysis import FeaturesRecipe
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.tracking.progress import Progress

_ROWS = 4096
"""Positions that are taken into a matrix of second moments at once: their float64 copy stays small."""

Observer = Callable[[Tensor], None]
"""Looks at what a hook point returns: [B, S, width]."""


def run_features(model: Transformer, reader: BlockReader, recipe: FeaturesRecipe, progress: Progress) -> dict[str, Any]:
    """Dormant units, ranks and norms of every layer.

    `{"layers": [{"dormant_units": {τ: share}, "dormant_heads": {τ: share}, **features}], "final_norm": features, "summary": means
    over layers, "sequences", "positions", "hidden_size"}`, where features are what `feature_measures` gives.

    Args:
        model: on the device to compute on; in evaluation mode.
        reader: sequences, of which `recipe.sequences` are drawn uniformly, or all if there are fewer.

    Raises:
        UserError: fewer positions than features, which bounds every rank from the side of the data; too little memory for one
            matrix; or activations that are not finite.
    """
    config = model.config
    generator = np.random.default_rng(recipe.seed)
    blocks = np.sort(generator.choice(len(reader), size=min(recipe.sequences, len(reader)), replace=False))
    positions = len(blocks) * reader.sequence_length
    if positions < config.hidden_size:
        raise UserError(
            f"features: {len(blocks)} sequences have {positions:,} positions, fewer than the {config.hidden_size:,} features of "
            f"this model, so that no rank could show how many of them it uses; raise `sequences` ({len(reader):,} are there), or "
            "give a longer text"
        )
    passes = _passes(config, recipe.memory_mib)
    activity = _Activity(config)
    spectra: dict[str, dict[str, Any]] = {}
    done, total = 0, len(passes) * len(blocks)
    for points in passes:
        streams = {point: StreamingStatistics() for point in points}
        observers = _residual_observers(model, streams) | (activity.observers if not spectra else {})
        with observing(model, observers), torch.no_grad():
            for start in range(0, len(blocks), recipe.batch_size):
                tokens, _ = reader.batch(blocks[start : start + recipe.batch_size])
                model(tokens.to(next(model.parameters()).device), positions="last")
                progress.update(done := done + len(tokens), total, "sequences")
        spectra |= {point: feature_measures(stream, recipe.srank_delta, point) for point, stream in streams.items()}

    thresholds = recipe.dormant_thresholds
    layers = [
        {
            "dormant_units": dormant_shares(activity.units[layer], thresholds),
            "dormant_heads": dormant_shares(activity.heads[layer], thresholds),
            **spectra[f"layers.{layer}.resid_post"],
        }
        for layer in range(config.layers)
    ]
    return {
        "layers": layers,
        "final_norm": spectra["final_norm"],
        "summary": _means(layers),
        "sequences": len(blocks),
        "positions": positions,
        "hidden_size": config.hidden_size,
    }


def dormant_shares(magnitudes: Tensor, thresholds: Sequence[float]) -> dict[str, float]:
    """τ → share of units whose magnitude is at most τ times the mean of all: of `magnitudes` [units], not negative.

    Source: Sokar et al. (2302.12902), definition 3.1: s_i = E|h_i| / mean_k E|h_k|, dormant if s_i ≤ τ. Of a layer that is
    silent altogether every unit is dormant.
    """
    mean = magnitudes.mean()
    return {f"{threshold:g}": float((magnitudes <= threshold * mean).double().mean()) for threshold in thresholds}


def feature_measures(stream: StreamingStatistics, delta: float, name: str = "features") -> dict[str, Any]:
    """Ranks and norms of the features in `stream`, which kept covariances.

    `{"norm": {"mean", "deviation"} of the rows' L2 norms, "uncentred": ranks of Φ, "centred": ranks of Φ without its column
    means}`; see `feature_ranks`. Raises UserError, which calls the features `name`, if they are not finite.
    """
    found = stream.result
    tensors = stream.tensors()
    products, mean = tensors["products"], tensors["mean"]
    if not products.isfinite().all():
        raise UserError(f"{name} is not finite on some tokens: the weights have diverged, so the features have no rank")
    moments = {"uncentred": products + found.count * mean[:, None] * mean, "centred": products}
    with one_thread() if products.device.type == "cpu" else nullcontext():
        ranks = {kind: feature_ranks(_singular_values(moment), delta) for kind, moment in moments.items()}
    return {"norm": {"mean": float(found.norm_mean), "deviation": float(found.norm_deviation)}, **ranks}


def feature_ranks(singular_values: Tensor, delta: float) -> dict[str, float]:
    """Three ranks of a matrix with singular values σ [r], descending; 0 for a zero matrix.

    `entropy_rank` exp(−Σ p·ln p) with p = σ/Σσ (Roy and Vetterli, "The effective rank", EUSIPCO 2007); `srank`, the least k with
    σ_1 + … + σ_k ≥ (1 − δ)·Σσ (Kumar et al., "Implicit under-parameterization inhibits data-efficient deep reinforcement
    learning", 2010.14498); `stable_rank` Σσ²/σ_1² (Rudelson and Vershynin, J. ACM 54, 2007).
    """
    measures = spectrum_measures(singular_values[None], ())
    return {
        "entropy_rank": measures["entropy_rank"][0],
        "srank": int(pseudo_rank(singular_values, 1 - delta)),
        "stable_rank": measures["stable_rank"][0],
    }


@contextmanager
def observing(model: nn.Module, observers: dict[str, Observer]) -> Iterator[None]:
    """Show what each hook point returns to its observer while the block runs; nothing is kept and nothing is changed."""

    def hook(observer: Observer) -> Callable[[nn.Module, Any, Tensor], None]:
        def look(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            observer(output.detach())

        return look

    handles = [model.get_submodule(point).register_forward_hook(hook(observer)) for point, observer in observers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Activity:
    """Magnitudes of the units and heads of every layer, summed over positions in float64."""

    def __init__(self, config: ModelConfig) -> None:
        self._heads = config.query_heads
        self.units: dict[int, Tensor] = {}
        """Layer → Σ|h| [mlp_hidden_size]."""
        self.heads: dict[int, Tensor] = {}
        """Layer → Σ‖z‖ [query_heads]."""
        self.observers: dict[str, Observer] = {}
        for layer in range(config.layers):
            self.observers[f"layers.{layer}.mlp.post"] = self._unit_observer(layer)
            self.observers[f"layers.{layer}.attn.z"] = self._head_observer(layer)

    def _unit_observer(self, layer: int) -> Observer:
        def add(hidden: Tensor) -> None:
            self.units[layer] = self.units.get(layer, 0) + hidden.abs().sum(dim=(0, 1), dtype=torch.float64)

        return add

    def _head_observer(self, layer: int) -> Observer:
        def add(mixed: Tensor) -> None:
            norms = mixed.unflatten(-1, (self._heads, -1)).norm(dim=-1)
            self.heads[layer] = self.heads.get(layer, 0) + norms.sum(dim=(0, 1), dtype=torch.float64)

        return add


def _residual_observers(model: Transformer, streams: dict[str, StreamingStatistics]) -> dict[str, Observer]:
    """Observers that fill the streams of `layers.*.resid_post` and `final_norm`.

    The final norm is applied here: the model, asked for its last position only, applies it to no other, and so spares the logits
    of all positions.
    """
    last = f"layers.{model.config.layers - 1}.resid_post"

    def observer(point: str) -> Observer:
        def add(residual: Tensor) -> None:
            for rows in residual.flatten(0, 1).split(_ROWS):
                if point in streams:
                    streams[point].add(rows)
                if point == last and "final_norm" in streams:
                    streams["final_norm"].add(model.final_norm(rows))

        return add

    watched = dict.fromkeys(last if point == "final_norm" else point for point in streams)
    return {point: observer(point) for point in watched}


def _passes(config: ModelConfig, memory_mib: int) -> list[list[str]]:
    """The points whose ranks are asked for, cut into groups whose matrices fit into memory together."""
    points = [*(f"layers.{layer}.resid_post" for layer in range(config.layers)), "final_norm"]
    # While a batch is merged there are its own products and the new sum beside the matrix of the point.
    room = memory_mib * 2**20 // (8 * config.hidden_size**2) - 2
    if room < 1:
        needed = -(-3 * 8 * config.hidden_size**2 // 2**20)
        raise UserError(
            f"memory_mib={memory_mib}: the second moments of {config.hidden_size:,} features need {needed:,} MiB for one layer "
            "at a time"
        )
    return [points[start : start + room] for start in range(0, len(points), room)]


def _singular_values(moment: Tensor) -> Tensor:
    """σ, descending, of a matrix Φ with ΦᵀΦ = `moment` [d, d]. Eigenvalues that rounding makes negative are zero."""
    return torch.linalg.eigvalsh(moment).clamp(min=0).sqrt().flip(0).cpu()


def _means(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the layers of everything that a layer has."""

    def mean(entries: list[Any]) -> Any:
        if isinstance(entries[0], dict):
            return {key: mean([entry[key] for entry in entries]) for key in entries[0]}
        return sum(entries) / len(entries)

    return mean(list(layers))
