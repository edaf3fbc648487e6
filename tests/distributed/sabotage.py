"""Defects made on purpose, so that the oracle itself can be tested. Each is called in the process of a rank, before anything else
runs there, and breaks one thing for as long as that process lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_plasticity.config import deepspeed
from megatron_plasticity.models import loss
from megatron_plasticity.models.loss import TrainingLoss
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.parallel import tensor
from megatron_plasticity.parallel.grid import ProcessGrid
from megatron_plasticity.parallel.tensor import TensorRanks
from megatron_plasticity.training import engine, pipeline
from megatron_plasticity.training.batches import StepBatch
from megatron_plasticity.training.objective import Objective
from tests.training import programs

SABOTAGES: dict[str, Callable[[], None]] = {}


def _sabotage(function: Callable[[], None]) -> Callable[[], None]:
    SABOTAGES[function.__name__] = function
    return function


@_sabotage
def gradient_of_norm_gains_not_summed() -> None:
    """Under sequence parallelism each rank sees its own positions only."""

    def forward(self: tensor.RMSNorm, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    tensor.RMSNorm.forward = forward  # type: ignore[method-assign]


@_sabotage
def qk_norm_of_local_heads() -> None:
    """The mean square of the heads that a rank holds, instead of all heads."""

    class _Local:
        @staticmethod
        def apply(squares: Tensor, ranks: TensorRanks) -> Tensor:
            return squares * ranks.size

    tensor._SumBothWays = _Local  # type: ignore[assignment,misc]


@_sabotage
def qk_norm_without_its_adjoint() -> None:
    """The mean square is right, but its gradient stays on the rank."""

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None

    tensor._SumBothWays.backward = backward  # type: ignore[method-assign,assignment]


@_sabotage
def gradient_of_replicated_heads_not_summed() -> None:
    """Each of the ranks that hold the same key/value head keeps what its own query heads ask for."""
    original = TensorRanks.sum_over_copies

    def sum_over_copies(self: TensorRanks, gradient: Tensor, copies: int) -> Tensor:
        return original(self, gradient, copies) if copies == self.size else gradient  # norm gains are held by all ranks

    TensorRanks.sum_over_copies = sum_over_copies  # type: ignore[method-assign]


@_sabotage
def input_gradient_not_summed() -> None:
    """Going backwards, a column-parallel matrix passes on what this rank's columns say."""

    class _Nothing:
        def wait(self) -> None: ...

    original = TensorRanks.all_reduce

    def all_reduce(self: TensorRanks, x: Tensor, asynchronous: bool = False) -> Any:
        return _Nothing() if asynchronous else original(self, x)

    TensorRanks.all_reduce = all_reduce  # type: ignore[method-assign]


@_sabotage
def softmax_of_the_local_vocabulary() -> None:
    """The partition function of the logits that a rank holds."""
    original = loss._over_vocabulary
    loss._over_vocabulary = lambda log_partition, chosen, ranks: (
        log_partition + torch.tensor(ranks.size).log(),
        original(log_partition, chosen, ranks)[1],
    )


@_sabotage
def one_norm_gain_decays_on_the_last_stage() -> None:
    original = engine.optimizer_groups

    def groups_of(model: Transformer, groups: Any, config: Any) -> list[dict[str, Any]]:
        if model.is_last_stage:
            gain = "final_norm.weight"
            kept = tuple(name for name in groups.not_decayed if name != gain)
            groups = replace(groups, decayed=(*groups.decayed, gain), not_decayed=kept)
        return original(model, groups, config)

    engine.optimizer_groups = groups_of  # type: ignore[assignment]


@_sabotage
def stage_zero_as_deepspeed_has_it() -> None:
    """Where we would run stage 1 instead (`effective_zero_stage`)."""
    for module in (engine, deepspeed):
        module.effective_zero_stage = lambda settings, parallel: settings.zero_stage  # type: ignore[assignment]
    # It has no norm to report there.
    engine.TrainingEngine.gradient_norm = property(lambda self: float("nan"))  # type: ignore[assignment,method-assign]


def _mark_parameters(counts: bool) -> None:
    """DeepSpeed's sign on every parameter, whether or not it is replicated."""
    original = Transformer.__init__

    def init(self: Transformer, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        for parameter in self.parameters():
            parameter.tensor_model_parallel = counts  # type: ignore[attr-defined]

    Transformer.__init__ = init  # type: ignore[method-assign]


@_sabotage
def replicated_parameters_count_once_per_rank() -> None:
    """In the gradient norm."""
    _mark_parameters(True)


@_sabotage
def only_parts_of_the_first_rank_count() -> None:
    """In the gradient norm."""
    _mark_parameters(False)


@_sabotage
def initial_weights_from_a_local_stream() -> None:
    """Each rank draws its part by itself, from the same seed."""

    @torch.no_grad()
    def initialise(model: Transformer, seed: int) -> None:
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(seed + number))

    programs.initialise = initialise  # type: ignore[assignment]


@_sabotage
def tied_gradients_not_exchanged() -> None:
    """First and last stage each update their copy of the embedding by their own gradient."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    PipelineEngine._INSTRUCTION_MAP = {
        instruction: (lambda self: None) if method is PipelineEngine._exec_reduce_tied_grads else method
        for instruction, method in PipelineEngine._INSTRUCTION_MAP.items()
    }


@_sabotage
def tied_embedding_counts_twice() -> None:
    """In the gradient norm: the last stage's copy is not marked as one."""
    original = engine.pipeline_module

    def pipeline_module(stage: Transformer, *rest: Any) -> Any:
        module = original(stage, *rest)
        for parameter in stage.parameters():
            parameter.ds_pipe_replicated = False  # type: ignore[attr-defined]
        return module

    engine.pipeline_module = pipeline_module


@_sabotage
def other_batches_within_a_pipeline() -> None:
    """The last tensor-parallel rank of the last stage takes the batch of another data-parallel rank."""
    original = programs.step_batch

    def step_batch(settings: Any, grid: ProcessGrid, *rest: Any) -> StepBatch:
        if grid.is_last_stage and grid.tensor.rank == grid.tensor.size - 1:
            grid = replace(grid, data_rank=(grid.data_rank + 1) % grid.data_size)
        return original(settings, grid, *rest)

    programs.step_batch = step_batch  # type: ignore[assignment]
    # The ranks then have targets at unlike positions, and would end over exchanges of unlike size.
    engine.scored_positions = lambda targets: None  # type: ignore[assignment]


@_sabotage
def mean_of_micro_batches() -> None:
    """Each micro-batch counts the same, however many targets it has."""
    original = Objective.loss

    def mean(self: Objective, hidden: Tensor, weight: Tensor | None, targets: Tensor, scale: float, *others: Any) -> TrainingLoss:
        return original(self, hidden, weight, targets, 1 / max(1, int((targets >= 0).sum())), *others)

    Objective.loss = mean  # type: ignore[method-assign,assignment]


@_sabotage
def matrix_of_the_head_itself_returned() -> None:
    """The last stage returns its parameter, and no view of it."""
    original = pipeline._Stage.forward

    def forward(self: pipeline._Stage, x: Tensor) -> Any:
        returned = original(self, x)
        return (returned[0], self.model.head.weight) if isinstance(returned, tuple) else returned

    pipeline._Stage.forward = forward  # type: ignore[method-assign]
