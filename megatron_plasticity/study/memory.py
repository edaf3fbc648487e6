"""Whether a study's training fits its GPUs."""

from __future__ import annotations

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import FinetuneRecipe, TrainingRecipe
from megatron_plasticity.launch.memory import largest_stage, memory


def gibibytes_needed(recipe: TrainingRecipe, model: ModelConfig, processes: int) -> float:
    """Memory in GiB of the GPU that needs most, when a run has `processes` of them. Raises ConfigError if the layout or the batch
    does not go with so many."""
    if isinstance(recipe, FinetuneRecipe):
        model = model.model_copy(update={"context_length": recipe.max_length})
    stages = memory(model, recipe, recipe.parallel.data_parallel_size(processes))
    return largest_stage(stages).peak.total / 2**30
