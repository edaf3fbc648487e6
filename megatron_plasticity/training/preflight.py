"""What is wrong with a training run, found before its folder is made. Single runs and studies ask alike."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from megatron_plasticity.capture.recipe import check_recipe
from megatron_plasticity.config.analysis import CaptureConfig
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.support import unsupported
from megatron_plasticity.config.training import EngineConfig, FinetuneConfig, FinetuneRecipe, PretrainConfig
from megatron_plasticity.errors import ConfigError, problems_of
from megatron_plasticity.models.sizes import parameter_shapes
from megatron_plasticity.optim.decay import decay_groups
from megatron_plasticity.training.duration import finetuning_steps

if TYPE_CHECKING:
    import torch


def check_pretraining(config: PretrainConfig) -> None:
    """Raise ConfigError if the run cannot work, with all problems."""
    _refuse(config.name, list(pretraining_problems(config)))


def check_finetuning(config: FinetuneConfig, model: ModelConfig) -> None:
    """Raise ConfigError if the run cannot work on a base of this architecture, with all problems."""
    problems = [*finetuning_problems(config, model), *duration_problems(config, config.task.train_examples)]
    _refuse(f"{config.name} on {config.base}", problems)


def check_compiler(engine: EngineConfig, device: torch.device) -> None:
    """Raise ConfigError if blocks are to be compiled and this machine lacks what that takes. Not for plans, which may be made on
    another machine than runs."""
    if not engine.compile:
        return
    on_cpu = device.type == "cpu"
    variable, usual, what = ("CXX", "g++", "a C++ compiler") if on_cpu else ("CC", "gcc", "a C compiler, for Triton")
    compiler = os.environ.get(variable, usual)
    missing = [] if shutil.which(compiler) else [f"{what}, and there is no {compiler!r} on PATH (${variable} names another)"]
    if device.type == "cuda" and find_spec("triton") is None:
        missing.append("Triton, which comes with CUDA builds of torch")
    if missing:
        raise ConfigError(f"engine.compile needs {'; and '.join(missing)}. Install it, or set engine.compile: false")


def pretraining_problems(config: PretrainConfig) -> Iterator[str]:
    """Each begins with the key that it is about."""
    yield from problems_of([partial(decay_groups, parameter_shapes(config.model), config.optimizer, config.weight_decay)])
    if config.capture is not None:
        yield from _capture_problems(config.capture, config.model)
        yield from problems_of([partial(config.capture.schedule, config.total_steps)])


def finetuning_problems(recipe: FinetuneRecipe, model: ModelConfig) -> Iterator[str]:
    """Of fine-tuning a model of this architecture, whatever the task."""
    yield from unsupported(recipe, model)
    if recipe.max_length > model.context_length:
        yield f"max_length={recipe.max_length} exceeds the base model's context_length={model.context_length}"
    shapes = parameter_shapes(model)
    if recipe.lora is not None:
        from megatron_plasticity.models.lora import adapter_shapes, import_peft  # torch, which other plans need for nothing

        shapes = adapter_shapes(recipe.lora, model)
        yield from problems_of([import_peft])
    yield from problems_of([partial(decay_groups, shapes, recipe.optimizer, weight_decay=0.0)])
    if recipe.capture is not None:
        yield from _capture_problems(recipe.capture, model)


def duration_problems(recipe: FinetuneRecipe, examples: int | None) -> list[str]:
    """Of the number of steps, given the most examples that there can be; none where that is not known."""
    if examples is None:
        return []

    def check() -> None:
        steps = finetuning_steps(examples, recipe.epochs, recipe.batch)
        if recipe.capture is not None:
            recipe.capture.schedule(steps)

    return problems_of([check])


def _capture_problems(capture: CaptureConfig, model: ModelConfig) -> Iterator[str]:
    if capture.texts is not None and not capture.texts.is_file():
        yield f"capture.texts: {capture.texts}: there is no such file"
    yield from (f"capture: {problem}" for problem in problems_of([partial(check_recipe, capture, model)]))


def _refuse(run: str, problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n  ".join([f"{run}: this run cannot work", *problems]))
