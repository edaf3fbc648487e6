"""The support table: which settings go together. Checked when a config is read, printed by `plan`, tested row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.errors import ConfigError

if TYPE_CHECKING:
    from megatron_plasticity.config.training import TrainingRecipe

Problem = str


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    combination: str
    verdict: Literal["works", "refused", "adapted"]
    """`adapted`: it runs, as the reason says."""
    reason: str
    problem: Callable[[TrainingRecipe, ModelConfig | None], Problem | None] = lambda recipe, model: None
    """What is wrong with this config, for a row that is refused; None if the row does not concern it. The model is not known when
    a fine-tuning config is read, only when its base is opened."""


def _pipeline_with_partitioned_gradients(recipe: TrainingRecipe, model: ModelConfig | None) -> Problem | None:
    if recipe.parallel.pipeline > 1 and recipe.engine.zero_stage >= 2:
        return (
            f"engine.zero_stage={recipe.engine.zero_stage} does not go with parallel.pipeline={recipe.parallel.pipeline}: "
            "DeepSpeed's pipeline keeps whole gradients; use zero_stage 1, or pipeline 1 with tensor parallelism"
        )
    return None


def _apex_counts_steps_per_group(recipe: TrainingRecipe, model: ModelConfig | None) -> Problem | None:
    if recipe.optimizer.implementation == "apex" and recipe.engine.zero_stage == 3:
        return "optimizer.implementation: apex does not go with engine.zero_stage: 3; use torch, or a lower stage"
    return None


def _tensor_divides_the_model(recipe: TrainingRecipe, model: ModelConfig | None) -> Problem | None:
    tensor = recipe.parallel.tensor
    if model is None or tensor == 1:
        return None
    wrong = [
        f"{name}={size}"
        for name, size in (
            ("query_heads", model.query_heads),
            ("mlp_hidden_size", model.mlp_hidden_size),
            ("vocab_size", model.vocab_size),
        )
        if size % tensor
    ]
    if wrong:
        return (
            f"parallel.tensor={tensor} must divide the model's {', '.join(wrong)}; choose a smaller power of two, "
            "or pad the vocabulary"
        )
    return None


def _tensor_fits_the_kv_heads(recipe: TrainingRecipe, model: ModelConfig | None) -> Problem | None:
    tensor = recipe.parallel.tensor
    if model is None or tensor % model.kv_heads == 0 or model.kv_heads % tensor == 0:
        return None
    return f"parallel.tensor={tensor} must divide the model's kv_heads={model.kv_heads}, or be a multiple of it"


def _sequence_divides_the_context(recipe: TrainingRecipe, model: ModelConfig | None) -> Problem | None:
    if model is None or not recipe.parallel.sequence or model.context_length % recipe.parallel.tensor == 0:
        return None
    return (
        f"parallel.sequence splits the context over parallel.tensor={recipe.parallel.tensor} ranks, which must divide "
        f"context_length={model.context_length}"
    )


def _stages_fit_the_layers(recipe: TrainingRecipe, model: ModelConfig | None) -> Problem | None:
    parallel = recipe.parallel
    if model is None:
        return None
    if parallel.layers_per_stage is not None and sum(parallel.layers_per_stage) != model.layers:
        return (
            f"parallel.layers_per_stage={list(parallel.layers_per_stage)} adds up to {sum(parallel.layers_per_stage)}, "
            f"but the model has {model.layers} layers"
        )
    if parallel.pipeline > model.layers:
        return f"parallel.pipeline={parallel.pipeline} needs at least as many layers, and the model has {model.layers}"
    return None


def _packed_pipeline(recipe: TrainingRecipe, model: ModelConfig | None) -> Problem | None:
    if recipe.parallel.pipeline > 1 and getattr(recipe, "batching", None) == "packed":
        return (
            f"batching: packed does not go with parallel.pipeline={recipe.parallel.pipeline}; use batching: by_length, "
            "or pipeline 1 with tensor parallelism or ZeRO 3"
        )
    return None


def _adapters_of_parts(recipe: TrainingRecipe, model: ModelConfig | None) -> Problem | None:
    parallel = recipe.parallel
    if getattr(recipe, "lora", None) is not None and parallel.model_parallel_size > 1:
        return (
            f"lora does not go with parallel.tensor={parallel.tensor}, parallel.pipeline={parallel.pipeline}; use data "
            "parallelism with engine.zero_stage: 3, which splits the frozen weights over the ranks too"
        )
    return None


def _compiled_packed(recipe: TrainingRecipe, model: ModelConfig | None) -> Problem | None:
    if recipe.engine.compile and getattr(recipe, "batching", None) == "packed":
        return "engine.compile does not go with batching: packed; leave one of the two out"
    return None


def _compiled_adapters(recipe: TrainingRecipe, model: ModelConfig | None) -> Problem | None:
    if recipe.engine.compile and getattr(recipe, "lora", None) is not None:
        return "engine.compile does not go with lora; leave it out"
    return None


# Kernels that compute in bf16 and fp16 alone, so far as the config tells it; what the machine has is asked when a run starts.
_HALF_PRECISION_ATTENTION = ("flash-attention-4", "flash-attention-3", "flash-attention-2", "sdpa-cudnn")


def _half_precision_attention(recipe: TrainingRecipe, model: ModelConfig | None) -> Problem | None:
    if recipe.engine.precision == "fp32" and recipe.engine.attention in _HALF_PRECISION_ATTENTION:
        return f"engine.attention: {recipe.engine.attention} needs engine.precision: bf16; or use engine.attention: auto"
    return None


def _attention_on_a_cpu(recipe: TrainingRecipe, model: ModelConfig | None) -> Problem | None:
    if recipe.device == "cpu" and recipe.engine.attention in (*_HALF_PRECISION_ATTENTION, "sdpa-efficient"):
        return f"engine.attention: {recipe.engine.attention} runs on CUDA only, not on device: cpu; use engine.attention: auto"
    return None


SUPPORT: tuple[Row, ...] = (
    Row("ZeRO 0–3 × data parallelism, fp32 or bf16", "works", "equal to one process"),
    Row("ZeRO 0–3 × tensor parallelism, with or without sequence parallelism", "works", "equal to one process"),
    Row("pipeline × ZeRO 0 or 1 × tensor, sequence and data parallelism", "works", "equal to one process"),
    Row(
        "pipeline × ZeRO 2 or 3",
        "refused",
        "DeepSpeed's pipeline accumulates whole gradients",
        _pipeline_with_partitioned_gradients,
    ),
    Row("ZeRO 0 in bf16, or with a pipeline", "adapted", "runs as ZeRO 1: DeepSpeed's own stage 0 computes something else there"),
    Row(
        "tensor ranks that do not divide query heads, MLP width or vocabulary",
        "refused",
        "each rank holds whole heads and equal parts",
        _tensor_divides_the_model,
    ),
    Row(
        "more tensor ranks than key/value heads",
        "adapted",
        "each head is held by several ranks, which sum its gradient; the number of ranks must be a multiple of the heads",
    ),
    Row(
        "tensor ranks that neither divide the key/value heads nor are a multiple of them",
        "refused",
        "a rank's query heads would belong to heads of different ranks",
        _tensor_fits_the_kv_heads,
    ),
    Row(
        "sequence parallelism on a context that the tensor ranks do not divide",
        "refused",
        "each rank holds an equal part of the positions; fine-tuning batches are padded to fit",
        _sequence_divides_the_context,
    ),
    Row(
        "more stages than layers, or layers_per_stage that do not add up",
        "refused",
        "each stage holds at least one layer",
        _stages_fit_the_layers,
    ),
    Row("activation checkpointing, gradient accumulation, tied embeddings", "works", "with every layout above"),
    Row(
        "NVIDIA apex × ZeRO 3",
        "refused",
        "ZeRO 3 steps once per sub-group, and apex would count each as a step",
        _apex_counts_steps_per_group,
    ),
    Row(
        "DeepSpeed's AdamW × ZeRO 0–3 × every layout",
        "works",
        "it counts steps per tensor; differs from torch's in rounding only",
    ),
    Row(
        "fine-tuning batched as drawn or by length",
        "works",
        "with every layout above; by length only the order of summation differs",
    ),
    Row(
        "packed fine-tuning × ZeRO 0–3 × data, tensor and sequence parallelism",
        "works",
        "equal to unpacked: attention stays within each example, and positions restart with it",
    ),
    Row(
        "packed fine-tuning × pipeline",
        "refused",
        "DeepSpeed's stages hand on the residual stream alone, and later ones would not know where examples begin",
        _packed_pipeline,
    ),
    Row("LoRA × ZeRO 0–3 × data parallelism, with every batching", "works", "equal to one process"),
    Row(
        "LoRA × tensor parallelism or pipeline",
        "refused",
        "adapters are matrices of whole projections; with the weights frozen there are few optimizer states to split",
        _adapters_of_parts,
    ),
    Row("compiled blocks × every layout", "works", "equal to one process, to 1e-5 in the loss"),
    Row(
        "compiled blocks × packed batches",
        "refused",
        "each batch has other lengths, and would be compiled anew",
        _compiled_packed,
    ),
    Row("compiled blocks × LoRA", "refused", "not tested", _compiled_adapters),
    Row("engine.attention × every layout and batching", "works", "kernels differ in rounding only"),
    Row(
        "a FlashAttention package or cuDNN × fp32",
        "refused",
        "these kernels compute in bf16 and fp16",
        _half_precision_attention,
    ),
    Row("attention kernels of CUDA × device: cpu", "refused", "there is no such kernel", _attention_on_a_cpu),
)


def check_supported(recipe: TrainingRecipe, model: ModelConfig, origin: str) -> None:
    """Raise ConfigError if `recipe` cannot train `model`, which `origin` names; for a model that is not part of the config."""
    problems = list(unsupported(recipe, model))
    if problems:
        raise ConfigError("\n  ".join([f"{origin}: this model cannot be trained so", *problems]))


def unsupported(recipe: TrainingRecipe, model: ModelConfig | None) -> Iterator[Problem]:
    """What of the support table `recipe` breaks, for `model` if it is known."""
    for row in SUPPORT:
        problem = row.problem(recipe, model)
        if problem is not None:
            yield problem
