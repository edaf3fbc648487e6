"""Pipeline parallelism: one stage of the model inside DeepSpeed's PipelineModule, driven by its engine's schedule.

Each of our stages is one "layer" of the PipelineModule, so that the split, the names and activation checkpointing stay ours, and
DeepSpeed does what it is there for: the 1F1B schedule, the sends, tied weights, and the optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from megatron_plasticity.data.micro_batch import MicroBatch
from megatron_plasticity.models.sizes import TOKEN_EMBEDDING
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.parallel.grid import ProcessGrid


class _Stage(nn.Module):
    """A stage without its head: that is the loss function's, since DeepSpeed holds on to what a stage returns.

    The last stage returns what the head reads and the head's matrix. It must be a view of it: DeepSpeed sets gradients to zero
    when the backward pass comes to what a stage has returned, and what had reached the parameter itself by then would be lost.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden = self.model.hidden(x)
        if not self.model.is_last_stage:
            return hidden
        weight = self.model.head.matrix(self.model.tied_weight)
        return hidden, weight.view_as(weight)


def pipeline_module(stage: Transformer, grid: ProcessGrid, loss: Callable[[tuple[Tensor, Tensor], Tensor], Tensor]) -> Any:
    """`stage` as this process's part of a PipelineModule. `loss` takes what the head reads and its matrix, and targets."""
    from deepspeed.pipe import PipelineModule, TiedLayerSpec

    layer = _Stage(stage)

    class _TiedStage(TiedLayerSpec):
        """A stage that holds the tied embedding, built already where it is needed."""

        def __init__(self) -> None:
            super().__init__("embed", _Stage, tied_weight_attr=[f"model.{TOKEN_EMBEDDING}"])

        def build(self, log: bool = False) -> _Stage:
            return layer

    # Only the entry of this process's own stage is built; the others stand for stages that lie elsewhere.
    stages: list[Any] = [layer if number == grid.stage else nn.Identity() for number in range(grid.parallel.pipeline)]
    if stage.config.tied_embeddings:
        stages[0] = stages[-1] = _TiedStage()
    module = PipelineModule(stages, topology=grid.deepspeed.topology(), loss_fn=loss, partition_method="uniform")
    # DeepSpeed takes every parameter of the tied stage for a copy, and would leave them out of the gradient norm; one is.
    for name, parameter in stage.named_parameters():
        is_copy = name == TOKEN_EMBEDDING and not grid.is_first_stage
        parameter.ds_pipe_replicated = is_copy  # type: ignore[attr-defined]
    return module


class PipelineSchedule:
    """Runs micro-batches through DeepSpeed's PipelineEngine, also such of different lengths."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._agreed_shape: Any = None

    def train(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Forward and backward of a step's micro-batches, and the optimizer step."""
        self._agree_on_shapes(micro_batches)
        self._engine.train_batch(_pairs(micro_batches))

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Forward passes without gradients, in evaluation mode; the loss function sees what comes out."""
        self._agree_on_shapes(micro_batches)
        self._engine.eval_batch(_pairs(micro_batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(micro_batches))

    def _agree_on_shapes(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Stages tell each other the shape of what they send once, unless it changes. They all know the same micro-batches, so
        they all know when."""
        shapes = {tuple(micro_batch.inputs.shape) for micro_batch in micro_batches}
        self._engine.dynamic_shape = len(shapes) > 1
        if self._engine.dynamic_shape or shapes != {self._agreed_shape}:
            self._engine.reset_activation_shape()
        self._agreed_shape = None if self._engine.dynamic_shape else next(iter(shapes))


def _pairs(micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[Tensor, Tensor]]:
    """What DeepSpeed's schedule takes; it has no place for segments (see config/support.py)."""
    for micro_batch in micro_batches:
        assert micro_batch.segments is None, "the stages after the first would not know of them"
        yield micro_batch.inputs, micro_batch.targets
