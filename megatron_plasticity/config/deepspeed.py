"""The DeepSpeed JSON as an output of our config: it is never written by hand, so no number exists twice."""

from __future__ import annotations

from typing import Any

from megatron_plasticity.config.parallel import ParallelConfig
from megatron_plasticity.config.training import BatchConfig, EngineConfig, TrainingRecipe
from megatron_plasticity.errors import ConfigError


def effective_zero_stage(engine: EngineConfig, parallel: ParallelConfig) -> int:
    """The ZeRO stage that really runs.

    bf16 at stage 0: DeepSpeed refuses to accumulate gradients in fp32 there, and without that it takes one optimizer step with
    zero gradients while it initialises its state, one decay too many. fp32 at stage 0 with a pipeline: it clips by the norm of a
    part of the model. Stage 1 computes both correctly.
    """
    return 1 if engine.zero_stage == 0 and (engine.precision == "bf16" or parallel.pipeline > 1) else engine.zero_stage


def offloads_optimizer(engine: EngineConfig) -> bool:
    """Whether the raw DeepSpeed block has AdamW step in the memory of the CPU."""
    zero = engine.deepspeed.get("zero_optimization")
    if not isinstance(zero, dict):
        return False
    offload = zero.get("offload_optimizer")
    if isinstance(offload, dict):
        return offload.get("device", "none") != "none"
    return bool(zero.get("cpu_offload", False))  # its older name


def accumulation_steps(batch: BatchConfig, data_parallel_size: int) -> int:
    """Micro-batches per rank and optimizer step. Raises ConfigError if the global batch cannot be split evenly."""
    per_pass = batch.micro_batch_size * data_parallel_size
    if batch.global_batch_size % per_pass:
        raise ConfigError(
            f"batch.global_batch_size={batch.global_batch_size} cannot be split over {data_parallel_size} data-parallel ranks "
            f"of micro_batch_size={batch.micro_batch_size}: it must be a multiple of {per_pass}"
        )
    return batch.global_batch_size // per_pass


def deepspeed_json(
    engine: EngineConfig, batch: BatchConfig, gradient_clip: float, parallel: ParallelConfig, data_parallel_size: int
) -> dict[str, Any]:
    """Settings for `deepspeed.initialize`. Raises ConfigError when `engine.deepspeed` sets a key that our fields decide."""
    ours: dict[str, Any] = {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(batch, data_parallel_size),
        # Left out, DeepSpeed clips at 1.0.
        "gradient_clipping": gradient_clip,
        "zero_optimization": {"stage": effective_zero_stage(engine, parallel)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }
    if engine.precision == "bf16":
        ours["bf16"] = {"enabled": True}
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
        # Left out, DeepSpeed rounds even gradients that it accumulates in fp32 to bf16 before it averages them over ranks, so the
        # number of ranks would enter the result.
        ours["communication_data_type"] = "fp32"
    if parallel.pipeline > 1:
        # What one stage sends another is already split (sequence parallelism) or needed whole on each tensor rank.
        ours["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    return _add(ours, engine.deepspeed, "engine.deepspeed")


def check_engine(recipe: TrainingRecipe, processes: int) -> None:
    """Raise ConfigError if `recipe` cannot run on so many processes: the layout, the batch, or the raw DeepSpeed settings."""
    data_parallel_size = recipe.parallel.data_parallel_size(processes)
    deepspeed_json(recipe.engine, recipe.batch, recipe.optimizer.gradient_clip, recipe.parallel, data_parallel_size)


# Owned by our fields even where the rendered JSON leaves them out.
_RESERVED = {"optimizer", "scheduler", "fp16", "bf16", "data_types", "torch_autocast"}


def _add(ours: dict[str, Any], raw: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in raw.items():
        present = ours.get(key)
        if isinstance(present, dict) and isinstance(value, dict):
            merged[key] = _add(present, value, f"{path}.{key}")
        elif key in ours or key in _RESERVED:
            raise ConfigError(
                f"{path}.{key}: decided by our own fields (optimizer, batch, engine); remove it from the raw DeepSpeed block"
            )
        else:
            merged[key] = value
    return merged
