"""What each rank of a layout runs and sees, and what one process in plain torch makes of the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from megatron_plasticity.config.training import TrainingRecipe
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.models.checkpoint import WEIGHTS
from megatron_plasticity.models.loss import token_loss
from megatron_plasticity.models.sizes import parameter_shapes
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.optim.decay import DecayGroups, decay_groups
from megatron_plasticity.optim.schedule import learning_rate_at
from megatron_plasticity.training.engine import TrainingEngine
from megatron_plasticity.training.losses import mean_cross_entropy
from megatron_plasticity.training.optimizer_state import MOMENTS, full_weight
from tests.distributed.matrix import Layout
from tests.distributed.sabotage import SABOTAGES
from tests.ranks import run_on_ranks
from tests.training.programs import (
    Trajectory,
    bare_run,
    engine_run,
    examples_of_different_lengths,
    initial_model,
    repeating_batch,
    whole,
)

STEPS = 5
WEIGHT_DECAY = 0.3
# Divided neither by the ranks nor by their micro-batches.
HELD_OUT_BLOCKS = np.arange(13)

State = dict[str, dict[str, Tensor]]
"""Whole weights and moments, by kind and name."""


@dataclass(frozen=True)
class View:
    """What one process sees at the end of a run, beside losses and whole tensors."""

    position: tuple[int, int, int]
    """Pipeline stage, data-parallel rank, tensor-parallel rank."""
    pieces: dict[tuple[str, int], tuple[str, str]]
    """Fingerprints of what this process has of each parameter, by name and number of the piece: of the fp32 master weights, which
    data-parallel ranks hold together, and of what the forward pass uses."""
    held_out_loss: float
    groups: DecayGroups
    optimizer_error: float
    """On the main process: how far the steps looked at were from AdamW's formula, see `adamw_error`."""


@dataclass(frozen=True)
class Reference:
    """What one process makes of the same model, recipe and data."""

    trajectory: Trajectory
    held_out_loss: float
    groups: DecayGroups


def run_layout(layout: Layout, log: Path, sabotage: str | None = None) -> list[Trajectory]:
    """The layout's trajectory as each rank sees it, its `View` as the last thing observed; with `sabotage`, with one thing broken
    on purpose."""
    return run_on_ranks(layout.processes, _on_a_rank, layout, sabotage, log=log, seconds=100.0)


def reference_run(layout: Layout) -> Reference:
    own_loss = layout.dtype == "bf16"  # in fp32 nothing of ours but the model
    trajectory = bare_run(layout.recipe, STEPS, WEIGHT_DECAY, layout.model, data_of(layout), own_loss)
    model = Transformer(layout.model)
    model.load_state_dict(trajectory.weights)
    if layout.dtype == "bf16":
        model.bfloat16()
    inputs, targets = HeldOut(layout.model.vocab_size).batch(HELD_OUT_BLOCKS)
    with torch.no_grad():
        held_out_loss = float(token_loss(model(inputs), targets).cross_entropy.double().mean())
    return Reference(
        trajectory, held_out_loss, decay_groups(parameter_shapes(layout.model), layout.recipe.optimizer, WEIGHT_DECAY)
    )


def data_of(layout: Layout) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    return examples_of_different_lengths if layout.rows == "varied" else repeating_batch


class HeldOut:
    """A reader of random blocks, longer than the sequences of training."""

    def __init__(self, vocabulary: int) -> None:
        self._tokens = torch.randint(0, vocabulary, (len(HELD_OUT_BLOCKS), 17), generator=torch.Generator().manual_seed(7))

    def batch(self, blocks: np.ndarray) -> tuple[Tensor, Tensor]:
        tokens = self._tokens[torch.from_numpy(blocks)]
        return tokens[:, :-1].contiguous(), tokens[:, 1:].clone()


def adamw_error(before: State, after: State, recipe: TrainingRecipe, groups: DecayGroups, step: int) -> float:
    """How far the step number `step` (0-based) was from AdamW: the largest relative difference of any tensor.

    The gradient is what turns the first moment of before into that of after; it must explain the second moment, and the two
    moments the new weights. So the optimizer is held to its formula whatever rounding did to the gradient.
    """
    beta1, beta2 = recipe.optimizer.betas
    rate = learning_rate_at(step, STEPS, recipe.optimizer.learning_rate, recipe.schedule)
    errors = []
    for name, weight in before[WEIGHTS].items():
        mean, square = (after[moment][name].double() for moment in MOMENTS)
        gradient = (mean - beta1 * before["exp_avg"][name].double()) / (1 - beta1)
        errors.append(relative(square, beta2 * before["exp_avg_sq"][name].double() + (1 - beta2) * gradient.square()))
        unbiased_mean, unbiased_square = mean / (1 - beta1 ** (step + 1)), square / (1 - beta2 ** (step + 1))
        update = -rate * unbiased_mean / (unbiased_square.sqrt() + recipe.optimizer.eps)
        if name in groups.decayed:
            update -= rate * groups.weight_decay * weight.double()
        errors.append(relative(after[WEIGHTS][name], weight.double() + update))
    return max(errors)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖; infinite where one of them has a value that is not finite."""
    size = float(torch.linalg.vector_norm(theirs.double()))
    difference = float(torch.linalg.vector_norm(ours.double() - theirs.double()))
    if difference == 0.0:
        return 0.0
    return difference / size if size > 0 and np.isfinite(difference) else float("inf")


def fingerprint(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


class _Observer:
    """Looks at an engine after each step."""

    def __init__(self, layout: Layout) -> None:
        # In fp32 the comparison with one process says all of later steps; in bf16 it is loose, so the last is looked at too.
        self._looks_at = {0} if layout.dtype == "fp32" else {0, STEPS - 2, STEPS - 1}
        start = {name: parameter.detach() for name, parameter in initial_model(layout.model).named_parameters()}
        if layout.dtype == "bf16":  # under DeepSpeed, the master weights begin as what bf16 kept of the initial ones
            start = {name: weight.bfloat16().float() for name, weight in start.items()}
        nothing = {name: torch.zeros_like(weight) for name, weight in start.items()}
        self._states: dict[int, State] = {0: {WEIGHTS: start, **dict.fromkeys(MOMENTS, nothing)}}
        """By steps taken."""
        self._optimizer_error = 0.0

    def __call__(self, engine: TrainingEngine, step: int) -> View | None:
        if step in self._looks_at:
            moments = {moment: whole(engine.full_moments(moment)) for moment in MOMENTS}
            self._states[step + 1] = {WEIGHTS: whole(engine.full_weights()), **moments}
            if engine.grid.is_main and step in self._states:
                error = adamw_error(self._states[step], self._states[step + 1], engine.recipe, engine.groups, step)
                self._optimizer_error = max(self._optimizer_error, error)
        if step == STEPS // 2:  # in the middle only to show that it disturbs nothing
            self._held_out_loss(engine)
        return self._view(engine) if step == STEPS - 1 else None

    def _held_out_loss(self, engine: TrainingEngine) -> float:
        return mean_cross_entropy(engine, cast(BlockReader, HeldOut(engine.model.config.vocab_size)), HELD_OUT_BLOCKS)

    def _view(self, engine: TrainingEngine) -> View:
        grid = engine.grid
        pieces = {}
        for name, parameter in engine.model.named_parameters():
            part = engine.model.sharding(name).part_of(grid.tensor.rank)
            master: Any = full_weight(engine._engine, parameter)
            pieces[name, part] = (fingerprint(master.detach()), fingerprint(parameter.detach()))
        return View(
            (grid.stage, grid.data_rank, grid.tensor.rank),
            pieces,
            self._held_out_loss(engine),
            engine.groups,
            self._optimizer_error,
        )


def _on_a_rank(layout: Layout, sabotage: str | None) -> Trajectory:
    if sabotage is not None:
        SABOTAGES[sabotage]()
    return engine_run(layout.recipe, STEPS, WEIGHT_DECAY, layout.model, data=data_of(layout), observe=_Observer(layout))
