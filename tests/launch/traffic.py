"""What a few steps of the real engine send between ranks and multiply, as torch's dispatcher sees it (run on ranks)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megatron_plasticity.config.deepspeed import accumulation_steps
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import TrainingRecipe
from megatron_plasticity.data.micro_batch import MicroBatch
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.transformer import local_model
from megatron_plasticity.parallel.grid import ProcessGrid, process_grid
from megatron_plasticity.training.batches import StepBatch
from megatron_plasticity.training.engine import TrainingEngine

# Name of torch's operation → ours, and which of its arguments holds the whole tensor.
_KINDS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "send": ("send", 0),
}


class Traffic(TorchDispatchMode):
    """Counts the bytes of every collective and message that this process takes part in, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name in _KINDS:
                kind, position = _KINDS[name]
                if any(_is_alone(argument) for argument in args):
                    return func(*args, **(kwargs or {}))
                whole = [leaf for leaf in tree_leaves(args[position]) if isinstance(leaf, Tensor)]
                self.bytes[kind] += sum(tensor.numel() * tensor.element_size() for tensor in whole)
            elif name not in ("recv_", "broadcast_", "barrier"):
                raise AssertionError(f"a collective that is not counted: {name}")
        return func(*args, **(kwargs or {}))


def _is_alone(argument: Any) -> bool:
    """Whether this is a process group of one rank."""
    if not isinstance(argument, torch.ScriptObject):
        return False
    try:
        return torch.distributed.ProcessGroup.unbox(argument).size() == 1
    except (RuntimeError, TypeError):  # another object of torch's, such as the operation to reduce with
        return False


def traffic_of(cases: Sequence[tuple[ModelConfig, TrainingRecipe]]) -> list[dict[str, int]]:
    """Bytes by kind of the third step of each case, on this process. All cases have the same layout."""
    found = []
    with process_grid(torch.device("cpu"), cases[0][1].parallel) as grid:
        for model, recipe in cases:
            engine = _engine(model, recipe, grid)
            batch = _batch(model, recipe, grid)
            for _ in range(2):  # DeepSpeed agrees on shapes in the first step, and learns in which order weights are needed
                engine.train_batch(batch)
            with Traffic() as traffic:
                engine.train_batch(batch)
            engine.close()
            found.append(dict(traffic.bytes))
    return found


def matmul_flops(model: ModelConfig, recipe: TrainingRecipe) -> int:
    """FLOPs of the matrix products of one step, attention apart, as torch counts them; on one process."""
    with process_grid(torch.device("cpu"), recipe.parallel) as grid:
        engine = _engine(model, recipe, grid)
        with FlopCounterMode(display=False) as counter:
            engine.train_batch(_batch(model, recipe, grid))
        engine.close()
    return counter.get_flop_counts()["Global"][torch.ops.aten.mm]


def _engine(model: ModelConfig, recipe: TrainingRecipe, grid: ProcessGrid) -> TrainingEngine:
    part = local_model(model, grid)
    initialise(part, seed=1)
    return TrainingEngine(part, recipe, 0.1, grid)


def _batch(model: ModelConfig, recipe: TrainingRecipe, grid: ProcessGrid) -> StepBatch:
    size, count = recipe.batch.micro_batch_size, accumulation_steps(recipe.batch, grid.data_size)
    rows = [torch.randint(0, model.vocab_size, (size, model.context_length + 1)) for _ in range(count)]
    tokens = recipe.batch.global_batch_size * model.context_length
    parts = [MicroBatch(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]
    return StepBatch(parts, tokens, tokens, tokens * model.context_length, [[0] * size for _ in parts])
