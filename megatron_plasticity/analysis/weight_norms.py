"""Norms of a model's weights: Frobenius of every tensor, layer and class of parameters, and the spectral norm of every matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.sizes import parameter_class, parameter_shapes
from megatron_plasticity.tracking.progress import Progress

_DENSE = 256
"""A matrix with a side no longer than this is decomposed; of a longer one Lanczos iterations find the largest value."""
_TOLERANCE = 1e-5
"""Relative accuracy of σ² at which they stop."""


def weight_norms(weights: Mapping[str, Tensor], config: ModelConfig, progress: Progress) -> dict[str, Any]:
    """Norms of the weights, which are looked up one at a time and not kept.

    `{"classes": {class: {"frobenius", "root_mean_square"}}, "layers": [{"attn.q_proj": norms, …}], "others": {"embed": norms,
    …}}`, where norms are `{"frobenius", "spectral"}`, the latter for matrices. Raises UserError for a weight that is not finite.
    """
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    layers: list[dict[str, Any]] = [{} for _ in range(config.layers)]
    others: dict[str, Any] = {}
    shapes = parameter_shapes(config)
    for done, name in enumerate(shapes, start=1):
        weight = weights[name].detach().cpu()
        if not all(extreme.isfinite() for extreme in weight.aminmax()):
            raise UserError(f"{name} is not finite: the weights have diverged, so they have no norm")
        frobenius = float(weight.double().norm())
        norms = {"frobenius": frobenius}
        if weight.dim() == 2:
            norms["spectral"] = spectral_norm(weight)
        kind = parameter_class(name)
        squares[kind] = squares.get(kind, 0.0) + frobenius**2
        counts[kind] = counts.get(kind, 0) + weight.numel()
        place, short = others, name.removesuffix(".weight")
        if short.startswith("layers."):
            _, layer, short = short.split(".", 2)
            place = layers[int(layer)]
        place[short] = norms
        progress.update(done, len(shapes), "tensors")
    classes = {
        kind: {"frobenius": math.sqrt(square), "root_mean_square": math.sqrt(square / counts[kind])}
        for kind, square in squares.items()
    }
    return {"classes": classes, "layers": layers, "others": others}


def spectral_norm(matrix: Tensor) -> float:
    """The largest singular value of a matrix [m, n] on the CPU, to a relative 10⁻⁵."""
    if min(matrix.shape) <= _DENSE:
        return float(torch.linalg.matrix_norm(matrix.double(), 2))
    if not matrix.any():
        return 0.0  # from which no Lanczos iteration can start
    start = np.random.default_rng(0).normal(size=min(matrix.shape)).astype(np.float32)
    settings: dict[str, Any] = {"k": 1, "v0": start, "tol": _TOLERANCE, "return_singular_vectors": False}
    largest: Any = svds(matrix.float().numpy(), **settings)
    return float(largest[0])
