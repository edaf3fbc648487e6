"""An intervention: cut W_QK or W_VP of every head to rank k, and see what that does to the loss.

That weight decay lowers the rank of W_QK while W_VP stays near full is an observation. It becomes a statement about what the
model needs by taking the rest away: if the small singular values of W_QK carried nothing, the loss would not notice. The best
approximation of rank k keeps the k largest singular values (Eckart and Young, Psychometrika 1, 1936). The control keeps k random
directions of the same subspace: what it costs to lose any head_dim − k of them.

Only the weight that is the query head's own is changed, since W_K and W_V are shared by a group of heads. In the notation of
`analysis/attention.py`, A·Bᵀ = D·S·Vᵀ; with the first k columns of D the best approximation of rank k is D_k·D_kᵀ·A·Bᵀ, so A
becomes D_k·D_kᵀ·A and B stays: W_Q reads k directions of the residual stream, or W_P writes k.

Rotary embedding turns keys against queries between W_K and W_Q: the scores of every distance have rank k at most, but best among
such is only the one at distance 0. The gains of a QK-norm are folded in. Its division by the root mean square, which spans all
heads, is not, and lifts what is left of the queries; so does, for W_VP, OLMo-2's norm on the output of attention. There a
truncation changes scale as well as rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_plasticity.analysis.attention import core, each_layer, join_heads, one_thread, qk_norm_gains, thin_factors, triangle
from megatron_plasticity.analysis.bootstrap import interval, resampled_means
from megatron_plasticity.analysis.losses import sequence_losses
from megatron_plasticity.config.analysis import AttentionProduct, TruncationRecipe
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.tracking.progress import Progress


@dataclass(frozen=True)
class Directions:
    """What the product of each head of a layer does in the residual stream, strongest first."""

    vectors: Tensor
    """Orthonormal columns [query_heads, d, head_dim]: what W_QK reads of the query's state, or what W_VP writes."""
    strengths: Tensor
    """‖vᵀ·A·Bᵀ‖ of each vector v: [query_heads, head_dim]. Of singular vectors the singular values."""

    def turned(self, generator: torch.Generator) -> Directions:
        """Random directions of the same subspaces.

        The columns of a Gaussian matrix, made orthonormal, are uniformly distributed (Stewart, SIAM J. Numer. Anal. 17, 1980).
        """
        heads, size = self.strengths.shape
        with one_thread():
            turn = torch.linalg.qr(torch.randn(heads, size, size, generator=generator, dtype=torch.float64)).Q
        strengths = (self.strengths[:, :, None] * turn.to(self.strengths)).norm(dim=1)
        return Directions(self.vectors @ turn.to(self.vectors), strengths)

    def to(self, device: torch.device, dtype: torch.dtype) -> Directions:
        return Directions(self.vectors.to(device, dtype), self.strengths.to(device, dtype))

    def lost(self, rank: int) -> float:
        """Relative Frobenius error ‖M − M_k‖/‖M‖ of the products if the first `rank` directions are kept; mean over heads."""
        energy = self.strengths.square()
        whole = energy.sum(dim=-1)
        share = energy[:, rank:].sum(dim=-1) / whole.where(whole > 0, torch.ones_like(whole))
        return float(share.sqrt().mean())


def directions(weights: Mapping[str, Tensor], config: ModelConfig, layer: int, target: AttentionProduct) -> Directions:
    """Left singular vectors and singular values of A·Bᵀ (see `thin_factors`) of each query head of a layer, float64, the gains of
    a QK-norm folded in. Raises UserError if a weight is missing or not finite."""
    own, shared = (factor.double() for factor in thin_factors(weights, config, layer, target))
    if target == "qk":
        own_gains, shared_gains = qk_norm_gains(weights, config, layer)
        own, shared = own * own_gains, shared * shared_gains
    basis, own_triangle = torch.linalg.qr(own)
    left, strengths, _ = torch.linalg.svd(core(own_triangle, triangle(shared)))
    return Directions(basis @ left, strengths)


def own_parameter(layer: int, target: AttentionProduct) -> str:
    """Name of the weight that a truncation changes."""
    return f"layers.{layer}.attn.{'q_proj' if target == 'qk' else 'out_proj'}.weight"


def truncated(weight: Tensor, vectors: Tensor, rank: int, target: AttentionProduct) -> Tensor:
    """W_Q, or W_P, of a layer [as stored] with each head's part projected on its first `rank` of `vectors`
    [query_heads, d, head_dim]. Gains act on the other side of W_Q, so the projection is the same with and without them."""
    rows = weight if target == "qk" else weight.T
    own = rows.unflatten(0, (vectors.shape[0], -1)).transpose(1, 2)
    kept = vectors[..., :rank]
    projected = join_heads(kept @ (kept.mT @ own))
    return projected if target == "qk" else projected.T


def truncated_tensors(
    weights: Mapping[str, Tensor], config: ModelConfig, target: AttentionProduct, rank: int, progress: Progress | None = None
) -> Iterator[tuple[str, Tensor]]:
    """All weights of the model whose heads are truncated, by name, fp32, one tensor at a time."""
    layer_of = {own_parameter(layer, target): layer for layer in range(config.layers)}
    for name in weights:
        if name not in layer_of:
            yield name, weights[name]
            continue
        with one_thread():
            vectors = directions(weights, config, layer_of[name], target).vectors
        yield name, truncated(weights[name].double(), vectors, rank, target).float()
        if progress is not None:
            progress.update(layer_of[name] + 1, config.layers, "layers written")


def ranks_to_try(recipe: TruncationRecipe, head_dim: int) -> tuple[int, ...]:
    """Ascending. Raises UserError for a rank beyond the head dimension."""
    if too_large := [rank for rank in recipe.ranks if rank > head_dim]:
        raise UserError(f"ranks: {too_large} exceed the head dimension of this model, {head_dim}, the most that a head can have")
    powers = (1 << power for power in range(head_dim.bit_length()))
    return tuple(sorted({*recipe.ranks})) or (0, *(rank for rank in powers if rank < head_dim))


class Heads:
    """The heads of a model on its device, to be truncated to one rank after another; untouched again after the block."""

    def __init__(self, model: Transformer, weights: Mapping[str, Tensor], target: AttentionProduct, progress: Progress) -> None:
        """`weights` are those of the model by name, in which the directions are computed."""
        parameters = dict(model.named_parameters())
        layers = range(model.config.layers)
        self._target: AttentionProduct = target
        self._parameters = [parameters[own_parameter(layer, target)] for layer in layers]
        self._originals = [parameter.detach().clone() for parameter in self._parameters]

        def found(layer: int) -> Directions:
            # In fp32, and not on the model's device: of a model of 4 billion parameters they take 2 GB.
            return directions(weights, model.config, layer, target).to(torch.device("cpu"), torch.float32)

        self._directions = list(each_layer(found, len(layers), progress))

    def __enter__(self) -> Heads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._replace(self._originals)

    def truncate(self, rank: int, control_seed: int | None = None) -> float:
        """Keep `rank` directions of every head: the strongest, or with a seed random ones, of which those of a smaller rank are
        a part. Returns the relative error of the products, mean over heads and layers (see `Directions.lost`)."""
        generator = None if control_seed is None else torch.Generator().manual_seed(control_seed)
        lost = []

        def weights() -> Iterator[Tensor]:
            for original, found in zip(self._originals, self._directions, strict=True):
                kept = found.to(original.device, original.dtype)
                if generator is not None:
                    kept = kept.turned(generator)
                lost.append(kept.lost(rank))
                yield truncated(original, kept.vectors, rank, self._target)

        self._replace(weights())
        return sum(lost) / len(lost)

    @torch.no_grad()
    def _replace(self, weights: Iterable[Tensor]) -> None:
        for parameter, weight in zip(self._parameters, weights, strict=True):
            parameter.copy_(weight)


def run_truncation(
    model: Transformer, weights: Mapping[str, Tensor], reader: BlockReader, recipe: TruncationRecipe, progress: Progress
) -> dict[str, Any]:
    """`results.json` of a `truncation` run; the model is as it was when this returns.

    `{"loss", "sequences", "head_dim", "targets": {target: {rank: {"truncated": outcome, "control": outcome, "control_excess":
    interval}}}}`, ranks as text, ascending, where an outcome is `{"loss", "increase": interval over the untouched model's loss,
    "product_error": relative Frobenius error ‖M − M_k‖/‖M‖ of the products, mean over heads, then layers}`.

    Losses are in nats per token; an interval is `{"value", "low", "high"}`, paired over the same sequences, and has no bounds
    where there is only one. A control is the mean over its seeds. `control_excess` is the control's loss minus the truncated
    model's. Without seeds both are absent.

    Args:
        model: with `weights`, on the device to compute on.
        weights: tensors by canonical name.
        reader: held-out sequences, of which `sequences` are drawn.

    Raises:
        UserError: a rank exceeds the head dimension, or a loss is not finite.
    """
    ranks = ranks_to_try(recipe, model.config.head_dim)
    generator = np.random.default_rng(recipe.seed)
    blocks = np.sort(generator.choice(len(reader), size=min(recipe.sequences, len(reader)), replace=False))
    device = next(model.parameters()).device
    passes = 1 + len(recipe.targets) * len(ranks) * (1 + len(recipe.control_seeds))
    passed = itertools.count()

    def losses() -> np.ndarray:
        done, total = next(passed) * len(blocks), passes * len(blocks)
        found = sequence_losses(model, reader, blocks, recipe.batch_size, device, progress, done, total)
        if not np.isfinite(found).all():
            raise UserError("the loss is not finite on some sequences: the weights have diverged, so there is nothing to compare")
        return found

    def compared(losses: np.ndarray, others: np.ndarray) -> dict[str, float]:
        difference = losses - others
        if len(difference) == 1:
            return {"value": float(difference[0])}
        # The same resamples for every comparison, whatever else the recipe asks for.
        resampled = resampled_means(difference, recipe.bootstrap_resamples, np.random.default_rng(recipe.seed))
        return interval(float(difference.mean()), resampled)

    untouched = losses()

    def outcome(losses: np.ndarray, product_error: float) -> dict[str, Any]:
        return {"loss": float(losses.mean()), "increase": compared(losses, untouched), "product_error": product_error}

    targets: dict[str, dict[str, Any]] = {}
    for target in recipe.targets:
        targets[target] = {}
        with Heads(model, weights, target, progress) as heads:
            for rank in ranks:
                error = heads.truncate(rank)
                kept = losses()
                entry: dict[str, Any] = {"truncated": outcome(kept, error)}
                if recipe.control_seeds:
                    errors, controls = zip(
                        *((heads.truncate(rank, seed), losses()) for seed in recipe.control_seeds), strict=True
                    )
                    control = np.mean(controls, axis=0)
                    entry["control"] = outcome(control, float(np.mean(errors)))
                    entry["control_excess"] = compared(control, kept)
                targets[target][str(rank)] = entry
    return {
        "loss": float(untouched.mean()),
        "sequences": len(blocks),
        "head_dim": model.config.head_dim,
        "targets": targets,
    }
