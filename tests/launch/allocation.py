"""What a few steps of the real engine allocate on a CPU, byte for byte, as torch's profiler sees each allocation."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import TrainingRecipe
from megatron_plasticity.data.micro_batch import MicroBatch
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.transformer import local_model
from megatron_plasticity.parallel.grid import ProcessGrid, process_grid
from megatron_plasticity.training.batches import StepBatch
from megatron_plasticity.training.engine import TrainingEngine

STEPS = 2  # the first makes what is made once


@dataclass(frozen=True)
class Allocation:
    """Bytes of one process."""

    between_steps: int
    peak: int
    """The most at one moment of the last step."""
    stage: int


def allocation(model: ModelConfig, recipe: TrainingRecipe) -> Allocation:
    """Train for two steps, alone or as one of several ranks."""
    with process_grid(torch.device("cpu"), recipe.parallel) as grid:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            part = local_model(model, grid)
            initialise(part, seed=1)
            engine = TrainingEngine(part, recipe, 0.1, grid)
            for step in range(STEPS):
                with record_function(f"step {step}"):
                    engine.train_batch(_batch(model, recipe, grid))
                if step == STEPS - 2:
                    alive = _live_addresses()
        engine.close()
    return _between_and_peak(profiler.profiler.kineto_results.experimental_event_tree(), alive, grid.stage)  # type: ignore[union-attr]


def _batch(model: ModelConfig, recipe: TrainingRecipe, grid: ProcessGrid) -> StepBatch:
    size, count = recipe.batch.micro_batch_size, recipe.batch.global_batch_size
    rows = [torch.randint(0, model.vocab_size, (size, model.context_length + 1)) for _ in range(count // size // grid.data_size)]
    tokens = count * model.context_length
    parts = [MicroBatch(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]
    return StepBatch(parts, tokens, tokens, tokens * model.context_length, [[0] * len(part.inputs) for part in parts])


def _live_addresses() -> set[int]:
    """Where the storages of all tensors begin, gradients included."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _between_and_peak(tree: list[Any], alive: set[int], stage: int) -> Allocation:
    start, end = next((node.start_time_ns, node.end_time_ns) for node in _walk(tree) if node.name == f"step {STEPS - 1}")
    sizes: dict[int, int] = {}
    between = peak = 0
    for time, address, size in sorted(_allocations(tree)):
        if not between and time >= start:
            # What gloo's threads have freed since, the profiler did not see.
            sizes = {address: size for address, size in sizes.items() if address in alive}
            between = sum(sizes.values())
        if size > 0:
            sizes[address] = size
        else:
            sizes.pop(address, None)
        if start <= time <= end:
            peak = max(peak, sum(sizes.values()))
    return Allocation(between, peak, stage)


def _allocations(tree: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes) of every allocation, and negative bytes where one is freed."""
    for node in _walk(tree):
        if "Allocation" in node.tag.name:
            yield node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size


def _walk(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        yield node
        yield from _walk(node.children)
