"""Whether what a config asks to be kept can be kept: by its text alone, without a model and without torch."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_plasticity.capture.points import LOGITS, match_points, state_shape
from megatron_plasticity.config.analysis import ActivationsRecipe
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.errors import UserError


def check_recipe(recipe: ActivationsRecipe, model: ModelConfig) -> None:
    """Raise UserError for a hook point that does not exist, or covariances that do not fit into the memory bound."""
    points = match_points(model, recipe.points)
    if recipe.keep != "states" and recipe.covariance:
        check_memory(points, model, memory_bytes(recipe))


def check_memory(points: Iterable[str], config: ModelConfig, memory_bytes: int) -> None:
    """Raise UserError if the covariance matrices of these points, which are in memory all at once, exceed `memory_bytes`."""
    sizes = {}
    for point in points:
        if point != LOGITS:
            *heads, width = state_shape(point, config)
            sizes[point] = 8 * (heads[0] if heads else 1) * width**2
    if sum(sizes.values()) > memory_bytes:
        largest = max(sizes, key=sizes.__getitem__)
        raise UserError(
            f"the covariance matrices of {len(sizes)} hook points take {sum(sizes.values()) / 2**20:,.0f} MiB (the largest is "
            f"that of {largest!r}), and memory_mib is {memory_bytes // 2**20:,}; name fewer points, raise memory_mib, or set "
            "covariance: false"
        )


def memory_bytes(recipe: ActivationsRecipe) -> int:
    """Most memory for states that are not on disk yet, and for covariances."""
    return recipe.memory_mib << 20
