"""A step whose gradient is not finite: no weight has changed by it. It stops the run, or is left out, on all processes alike."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection

from megatron_plasticity.data.micro_batch import MicroBatch
from megatron_plasticity.errors import UserError
from megatron_plasticity.training.callbacks import WriteRow
from megatron_plasticity.training.engine import TrainingEngine
from megatron_plasticity.training.loop import Callback, StepOutcome

MOST_IN_A_ROW = 10
"""Steps that may be skipped one after the other: a model that gets no further has diverged."""
SKIPPED = "train/step_skipped"
_MOST_NAMED = 16


class NonFiniteSteps(Callback):
    """Follows `engine.non_finite`: stops, or skips and keeps count; names the samples whose loss is not finite."""

    def __init__(self, engine: TrainingEngine, sample_name: str, write: WriteRow, skipped: Collection[int] = ()) -> None:
        """`sample_name` is what `StepBatch.samples` numbers, such as "block"; `skipped` are the steps skipped so far."""
        self._engine, self._sample_name, self._write = engine, sample_name, write
        self._skipped = set(skipped)

    def after_step(self, outcome: StepOutcome) -> None:
        if not outcome.skipped:
            return
        message = self._describe(outcome)
        if self._engine.recipe.engine.non_finite == "stop":
            raise UserError(f"{message}. Lower the learning rate or λ, or have such steps left out: engine.non_finite=skip")
        if self._skipped.issuperset(range(outcome.step - MOST_IN_A_ROW, outcome.step)):
            raise UserError(f"{message}. So were the {MOST_IN_A_ROW} steps before it: lower the learning rate or λ")
        self._skipped.add(outcome.step)
        if self._engine.grid.is_main:
            print(f"warning: {message}; the step is skipped", file=sys.stderr, flush=True)
            self._write(outcome.step, {SKIPPED: 1.0})

    def _describe(self, outcome: StepOutcome) -> str:
        """The same on every process, each of which looks at its own samples once more, with the weights as they were."""
        engine, batch = self._engine, outcome.batch
        found: list[list[int]] = []
        for micro_batch, samples in zip(batch.micro_batches, batch.samples, strict=True):
            for row, numbers in _rows(micro_batch, samples):
                if not math.isfinite(float(engine.evaluate([row]))):
                    found.append(numbers)
        everywhere = engine.grid.gather((engine.grid.data_rank, found))
        culprits = [
            f"{self._sample_name} {', '.join(map(str, numbers))} (data-parallel rank {rank})"
            for rank, groups in everywhere or ()
            for numbers in groups
        ]
        named = engine.grid.from_main(_some(culprits))
        decay, rate = engine.groups.weight_decay, outcome.learning_rate
        return (
            f"step {outcome.step}: the gradient is not finite, so no weight was changed (λ={decay:g}, learning rate {rate:.3g}). "
            + (
                f"The loss is not finite on {named}"
                if named
                else "No sample's cross-entropy is other than finite: look at the backward pass, or at the z-loss"
            )
        )


def _rows(micro_batch: MicroBatch, samples: list[int]) -> list[tuple[MicroBatch, list[int]]]:
    """The parts of a micro-batch that can be computed alone, and the samples in each: all, where they are packed into one row."""
    if len(micro_batch.inputs) != len(samples):
        return [(micro_batch, samples)]
    rows = [slice(row, row + 1) for row in range(len(samples))]
    return [(MicroBatch(micro_batch.inputs[row], micro_batch.targets[row], micro_batch.segments), samples[row]) for row in rows]


def _some(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
