"""A training run in legs, each under its own layout, that hand over through checkpoint folders as `training/session.py` does."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_plasticity.models.checkpoint import WEIGHTS, open_checkpoint, save_checkpoint
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.transformer import local_model
from megatron_plasticity.optim.schedule import learning_rate_at
from megatron_plasticity.parallel.grid import process_grid
from megatron_plasticity.training.engine import TrainingEngine
from megatron_plasticity.training.optimizer_state import MOMENTS
from megatron_plasticity.training.resume import TrainerState, check_continues
from tests.distributed.matrix import Layout
from tests.distributed.runs import WEIGHT_DECAY, data_of
from tests.ranks import run_on_ranks
from tests.training.programs import step_batch

STEPS = 6


@dataclass(frozen=True)
class Leg:
    """Steps `first` … `last` − 1 of the run."""

    first: int
    last: int
    start: Path | None = None
    """The checkpoint to load; without one, the leg starts from initial weights."""
    copy: Path | None = None
    """Where to save what was loaded, before the first step."""
    end: Path | None = None
    """Where to save what comes out."""


def run_leg(layout: Layout, leg: Leg, log: Path) -> list[float]:
    """The losses of the leg's steps."""
    return run_on_ranks(layout.processes, _on_a_rank, layout, leg, log=log, seconds=100.0)[0]


def _on_a_rank(layout: Layout, leg: Leg) -> list[float]:
    recipe = layout.recipe
    source = open_checkpoint(leg.start) if leg.start else None
    losses = []
    with process_grid(torch.device("cpu"), recipe.parallel) as grid:
        model = local_model(layout.model, grid)
        if source is None:
            initialise(model, seed=1)
        else:
            model.load_whole(source.tensors())
        engine = TrainingEngine(model, recipe, WEIGHT_DECAY, grid)
        if source is not None:
            check_continues(source, _state(engine, leg.first), layout.model, engine.groups)
            engine.restore(source.tensors(), {moment: source.tensors(moment) for moment in MOMENTS}, source.step)
        if leg.copy is not None:
            _save(engine, leg.copy, leg.first)
        for step in range(leg.first, leg.last):
            engine.set_learning_rate(learning_rate_at(step, STEPS, recipe.optimizer.learning_rate, recipe.schedule))
            batch = step_batch(recipe, grid, step, data_of(layout))
            losses.append(float(grid.sum(engine.train_batch(batch))) / batch.target_tokens)
        if leg.end is not None:
            _save(engine, leg.end, leg.last)
        engine.close()
    return losses


def _save(engine: TrainingEngine, path: Path, step: int) -> None:
    tensors = {WEIGHTS: engine.full_weights()} | {moment: engine.full_moments(moment) for moment in MOMENTS}
    if engine.grid.is_main:
        save_checkpoint(path, engine.model.config, _state(engine, step).to_json(), tensors)
    else:
        for pairs in tensors.values():
            collections.deque(pairs, maxlen=0)


def _state(engine: TrainingEngine, step: int) -> TrainerState:
    return TrainerState.of(step, STEPS, "pretrain", "legs", engine.groups, engine.recipe, {"store": "random"})
