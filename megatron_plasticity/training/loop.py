"""The training loop: what happens in a step is on this page, for pretraining and fine-tuning alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_plasticity.errors import Interrupted
from megatron_plasticity.optim.schedule import learning_rate_at
from megatron_plasticity.training.batches import Batches, StepBatch
from megatron_plasticity.training.engine import TrainingEngine
from megatron_plasticity.training.signals import StopSignal


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did."""

    step: int
    """Steps taken so far, this one included."""
    learning_rate: float
    cross_entropy: Tensor
    """What this process reports of the batch's summed cross-entropy (see `TrainingEngine.train_batch`); a device tensor, so that
    reading it is the reader's cost."""
    batch: StepBatch
    seconds: float
    """Wall time of the step itself, without callbacks. On a GPU the kernels may still be running."""
    skipped: bool = False
    """Whether no weight was changed, since the gradient was not finite."""


class Callback:
    """Something that watches training. It may not change weights. Callbacks run in the order of their list, on every rank."""

    def before_step(self, step: int) -> None:
        """Before step `step` (counted from 1) changes the weights."""

    def after_step(self, outcome: StepOutcome) -> None:
        """After the weights have changed."""

    def before_checkpoint(self) -> None:
        """A checkpoint is about to say that all steps before it are done: what they left behind must be on disk."""

    def at_stop(self, step: int) -> None:
        """The run was asked to stop after `step` steps: save what must not be lost."""


def train(engine: TrainingEngine, batches: Batches, start_step: int, callbacks: Sequence[Callback], stop: StopSignal) -> None:
    """Run steps `start_step` … `batches.steps` − 1 on every rank. Raises Interrupted after a stop signal, with all saved."""
    optimizer, schedule = engine.recipe.optimizer, engine.recipe.schedule
    for step in range(start_step, batches.steps):
        for callback in callbacks:
            callback.before_step(step + 1)

        engine.grid.liveness.beat()
        began = time.perf_counter()
        learning_rate = learning_rate_at(step, batches.steps, optimizer.learning_rate, schedule)
        engine.set_learning_rate(learning_rate)
        batch = batches.step(step)
        cross_entropy = engine.train_batch(batch)
        seconds = time.perf_counter() - began

        outcome = StepOutcome(step + 1, learning_rate, cross_entropy, batch, seconds, engine.step_was_skipped)
        for callback in callbacks:
            callback.after_step(outcome)
        # Every rank must take the same decision, and a signal may have reached only some.
        if engine.grid.any(stop.received is not None) and step + 1 < batches.steps:
            for callback in callbacks:
                callback.at_stop(step + 1)
            raise _interrupted(stop, step + 1)


def _interrupted(stop: StopSignal, step: int) -> Interrupted:
    name = stop.received.name if stop.received else "a signal on another rank"
    return Interrupted(
        f"stopped by {name} after step {step}; a checkpoint was saved, run the same command again to go on",
        stop.received or 15,
        by_all=True,
    )
