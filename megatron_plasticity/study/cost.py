"""What a study's runs will need, by arithmetic on their configs: tokens, FLOPs, GPU-hours, disk. Nothing is measured here, and
torch is not imported.

Of training on examples and of answers only the longest possible length is known beforehand: those figures are upper bounds.
Analyses are not counted; all of them together are a small part of one pretraining run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_plasticity.config.analysis import CaptureConfig
from megatron_plasticity.config.evaluation import EvaluateConfig
from megatron_plasticity.config.interchange import ImportConfig
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig, TrainingRecipe
from megatron_plasticity.launch.plan import PEAK_FLOPS, Machine
from megatron_plasticity.models.sizes import checkpoint_bytes, training_flops
from megatron_plasticity.study.plan import PlannedCell, StudyPlan
from megatron_plasticity.study.task_sizes import TaskSize, task_size

SAMPLING = 0.1
"""Assumed share of the training's MFU that sampling reaches: each step reads all weights for one token of each sequence."""
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Cost:
    """Of one or several runs. None where it cannot be known yet."""

    runs: int = 0
    tokens: float | None = 0
    """Read in training, or written in an evaluation."""
    flops: float | None = 0
    gpu_hours: float | None = 0
    disk: float | None = 0
    """Bytes of checkpoints and dumped activations."""

    def __add__(self, other: Cost) -> Cost:
        def add(one: float | None, two: float | None) -> float | None:
            return None if one is None or two is None else one + two

        return Cost(
            self.runs + other.runs,
            add(self.tokens, other.tokens),
            add(self.flops, other.flops),
            add(self.gpu_hours, other.gpu_hours),
            add(self.disk, other.disk),
        )


@dataclass(frozen=True)
class Costs:
    """The costs of a study's runs on GPUs of a kind."""

    plan: StudyPlan
    machine: Machine
    here: bool = True
    """Whether tasks count as they are prepared on this machine."""

    @functools.cached_property
    def _cells(self) -> Mapping[str, PlannedCell]:
        return {cell.id: cell for cell in self.plan.cells}

    @functools.cached_property
    def _sizes(self) -> Mapping[str, TaskSize]:
        return {task.name: task_size(task, self.here) for task in self.plan.config.tasks}

    def of(self, cells: Iterable[PlannedCell]) -> Cost:
        """Of these runs together."""
        return sum((self.of_one(cell) for cell in cells), Cost())

    def of_one(self, cell: PlannedCell) -> Cost:
        """Of one run, from its beginning."""
        config, model = cell.config, self._model(cell)
        if isinstance(config, PretrainConfig):
            return self._pretraining(config)
        if isinstance(config, ImportConfig):
            return Cost(1, disk=None if model is None else checkpoint_bytes(model, weights_only=True))
        if isinstance(config, FinetuneConfig):
            return self._finetuning(config, model)
        if isinstance(config, EvaluateConfig):
            return self._evaluation(config, model)
        return Cost(1)

    def _pretraining(self, config: PretrainConfig) -> Cost:
        tokens = config.total_steps * config.tokens_per_step
        flops = training_flops(config.model, tokens, tokens * config.model.context_length)
        disk = config.checkpoint.count(config.total_steps) * checkpoint_bytes(config.model)
        disk += dump_bytes(config.capture, config.model, config.total_steps)
        return Cost(1, tokens, flops, self._hours(flops, config), disk)

    def _finetuning(self, config: FinetuneConfig, model: ModelConfig | None) -> Cost:
        steps = self._steps(config)
        tokens = None if steps is None else steps * config.batch.global_batch_size * config.max_length
        if model is None:
            return Cost(1, tokens, None, None, None)
        flops = None if tokens is None else training_flops(model, tokens, tokens * config.max_length)
        if flops is not None and config.lora:
            flops = flops * 2 / 3  # the gradients of frozen weights are not computed
        disk = None
        if steps is not None or config.checkpoint.every_steps is None:
            disk = config.checkpoint.count(steps or 0) * checkpoint_bytes(model, weights_only=config.lora is not None)
        if disk is not None and steps is not None:
            disk += dump_bytes(config.capture, model, steps)
        return Cost(1, tokens, flops, None if flops is None else self._hours(flops, config), disk)

    def _steps(self, config: FinetuneConfig) -> int | None:
        examples = self._sizes[config.task.name].train
        return None if examples is None else max(1, examples * config.epochs // config.batch.global_batch_size)

    def _evaluation(self, config: EvaluateConfig, model: ModelConfig | None) -> Cost:
        questions = self._questions(config.tasks)
        tokens = None if questions is None else questions * (1 + config.samples) * config.max_new_tokens
        if model is None or tokens is None:
            return Cost(1, tokens, None, None)
        flops = training_flops(model, tokens, tokens * config.max_new_tokens) / 3  # a forward pass alone
        return Cost(1, tokens, flops, flops / (PEAK_FLOPS["bf16"] * self.machine.mfu * SAMPLING) / 3600)

    def _questions(self, tasks: Iterable[TaskConfig]) -> int | None:
        sizes = [self._sizes[task.name].questions for task in tasks]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def _hours(self, flops: float, recipe: TrainingRecipe) -> float:
        again = 4 / 3 if recipe.engine.activation_checkpointing else 1
        return again * flops / (PEAK_FLOPS[recipe.engine.precision] * self.machine.mfu) / 3600

    def _model(self, cell: PlannedCell) -> ModelConfig | None:
        """The architecture that a run trains or asks; None of a model from elsewhere."""
        while cell.parent is not None:
            cell = self._cells[cell.parent]
        return cell.config.model if isinstance(cell.config, PretrainConfig) else None


def dump_bytes(capture: CaptureConfig | None, model: ModelConfig, steps: int) -> float:
    """Bytes of the activations that a training run dumps, at most."""
    if capture is None:
        return 0.0
    from megatron_plasticity.capture.points import LOGITS, match_points, state_shape

    points = match_points(model, capture.points)
    widths = [2 * capture.top_k if point == LOGITS else math.prod(state_shape(point, model)) for point in points]
    positions = 1 if capture.positions == "last" else min(capture.max_tokens or model.context_length, model.context_length)
    states = sum(widths) * _DTYPE_BYTES[capture.dtype] * positions * capture.sequences if capture.keep != "statistics" else 0
    squares = sum(8 * (width * width if capture.covariance else width) for width in widths) if capture.keep != "states" else 0
    return float((states + squares) * len(capture.schedule(steps)))
