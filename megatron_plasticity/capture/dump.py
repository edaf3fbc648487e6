"""One dump as a config describes it: states, statistics, or both, from recorded batches to the writer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megatron_plasticity.capture.points import LOGIT_IDS, LOGIT_VALUES
from megatron_plasticity.capture.recipe import check_recipe
from megatron_plasticity.capture.recorder import Recorder
from megatron_plasticity.capture.statistics import StreamingStatistics, kept_states
from megatron_plasticity.capture.writer import ActivationWriter
from megatron_plasticity.config.analysis import ActivationsRecipe
from megatron_plasticity.models.transformer import Transformer


def recorder_of(recipe: ActivationsRecipe, model: Transformer) -> Recorder:
    """The recorder that `write_dump` wants. Raises UserError as `check_recipe`."""
    check_recipe(recipe, model.config)
    # Statistics are of what the model computed, not of its rounding to the format on disk.
    dtype = _dtype(recipe) if recipe.keep == "states" else torch.float32
    return Recorder(model, recipe.points, "last" if recipe.positions == "last" else "all", dtype, recipe.top_k)


def write_dump(
    writer: ActivationWriter, step: int, recipe: ActivationsRecipe, batches: Iterable[tuple[Mapping[str, Tensor], Tensor]]
) -> None:
    """Write the dump of `step` from pairs of what `recorder_of` recorded, by name, and the positions [B, K] that were kept.

    Logits' largest values and ids are few, and have no mean that says something: their states are always kept.
    """
    statistics: dict[str, StreamingStatistics] = {}
    with writer.dump(step):
        for activations, kept in batches:
            states = {}
            for name, tensor in activations.items():
                summarised = recipe.keep != "states" and name not in (LOGIT_VALUES, LOGIT_IDS)
                if summarised:
                    accumulator = statistics.setdefault(name, StreamingStatistics(recipe.covariance))
                    accumulator.add(kept_states(name, tensor, kept))
                if not summarised or recipe.keep == "both":
                    states[name] = tensor if name == LOGIT_IDS else tensor.to(_dtype(recipe))
            if states:
                writer.add(states)
        for name, accumulator in statistics.items():
            writer.add_statistics(name, accumulator.tensors())


def _dtype(recipe: ActivationsRecipe) -> torch.dtype:
    return getattr(torch, recipe.dtype)
