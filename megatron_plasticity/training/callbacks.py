"""What is watched, measured and saved during training. Each callback is one of these concerns; none changes a weight."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from megatron_plasticity.config.training import adamw_timescale
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.sizes import parameter_class, training_flops
from megatron_plasticity.tracking.loss_spikes import LossSpikes
from megatron_plasticity.tracking.progress import Progress
from megatron_plasticity.training.engine import TrainingEngine
from megatron_plasticity.training.loop import Callback, StepOutcome

WriteRow = Callable[[int, Mapping[str, float]], None]

SPIKE = "train/loss_spike"

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets; no MFU is given for others.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "GH200": 989e12}


class TrainingMetrics(Callback):
    """Loss, learning rate, decay, gradient norm and speed, every `every_steps` steps; and the sign of life."""

    def __init__(
        self,
        engine: TrainingEngine,
        total_steps: int,
        every_steps: int,
        write: WriteRow,
        progress: Progress,
        losses_before: Iterable[float] = (),
    ) -> None:
        """`losses_before` are the logged ones of the steps that were taken before."""
        self._spikes = LossSpikes(engine.recipe.logging.spike_deviations)
        for loss in losses_before:
            self._spikes.excess(loss)
        self._engine, self._total, self._every, self._write, self._progress = engine, total_steps, every_steps, write, progress
        self._seconds, self._tokens, self._squared_lengths = 0.0, 0, 0
        self._paused = 0.0

    def after_step(self, outcome: StepOutcome) -> None:
        self._tokens += outcome.batch.input_tokens
        self._squared_lengths += outcome.batch.squared_lengths
        self._seconds += outcome.seconds
        if outcome.step % self._every and outcome.step != self._total:
            return
        began = time.perf_counter()
        loss = float(self._engine.grid.sum(outcome.cross_entropy.clone())) / outcome.batch.target_tokens
        self._seconds += time.perf_counter() - began  # reading the loss waits for the kernels that a GPU has not finished
        tokens_per_second = self._tokens / self._seconds
        groups = self._engine.groups
        spike = None if outcome.skipped else self._spikes.excess(loss)
        decay = self._engine.recipe.optimizer.decay_per_step(groups.weight_decay, outcome.learning_rate)
        row = {
            "train/learning_rate": outcome.learning_rate,
            "train/learning_rate_times_weight_decay": decay,
            "train/tokens_per_second": tokens_per_second,
        }
        if not outcome.skipped:
            row |= {"train/loss": loss, "train/gradient_norm": self._engine.gradient_norm}
        if spike is not None:
            row[SPIKE] = spike
        timescale = adamw_timescale(decay, self._total)
        if timescale is not None:
            row["train/adamw_timescale"] = timescale
        utilisation = self._model_flops_utilisation()
        if utilisation is not None:
            row["train/mfu"] = utilisation
        if self._engine.grid.is_main:
            self._write(outcome.step, row)
        self._progress.update(outcome.step, self._total, "steps", tokens_per_second=tokens_per_second, loss=round(loss, 3))
        if spike is not None and self._engine.grid.is_main:
            print(
                f"warning: step {outcome.step}: the loss, {loss:.3f}, stands out by {spike:.3f} nats from those before it",
                file=sys.stderr,
                flush=True,
            )
        if not (outcome.skipped or math.isfinite(loss)):
            raise UserError(
                f"the training loss became {loss} at step {outcome.step} (λ={groups.weight_decay:g}, "
                f"learning rate {outcome.learning_rate:g}); lower the learning rate or λ"
            )
        self._seconds, self._tokens, self._squared_lengths = 0.0, 0, 0

    def _model_flops_utilisation(self) -> float | None:
        """PaLM's MFU (2204.02311, appendix B); None on devices whose peak we do not know, and for adapters, under which most of a
        backward pass is not done."""
        if self._engine.grid.device.type != "cuda" or self._engine.adapters is not None:
            return None
        name = torch.cuda.get_device_name(self._engine.grid.device)
        peak = next((flops for key, flops in _PEAK_FLOPS.items() if key in name), None)
        if peak is None:
            return None
        flops = training_flops(self._engine.model.config, self._tokens, self._squared_lengths)
        return flops / self._seconds / (peak * self._engine.grid.size)


class Norms(Callback):
    """L2 norms of the fp32 weights and of the step's update, and the effective learning rate η/‖W‖, per parameter class, every
    `every_steps` steps.

    Gradients have no norm per class here: the engine takes them apart and lets go of them within the step, differently for each
    ZeRO stage, and gives their global norm only.
    """

    def __init__(self, engine: TrainingEngine, total_steps: int, every_steps: int, write: WriteRow) -> None:
        self._engine, self._total, self._every, self._write = engine, total_steps, every_steps, write
        self._before: dict[str, Tensor] = {}

    def before_step(self, step: int) -> None:
        if self._due(step):
            self._before = {name: weight.cpu().clone() for name, weight in self._engine.full_weights() if weight is not None}

    def after_step(self, outcome: StepOutcome) -> None:
        if not self._due(outcome.step):
            return
        squares: dict[str, float] = {}
        for name, weight in self._engine.full_weights():
            if weight is None:  # the main process computes
                continue
            now = weight.cpu()
            for quantity, tensor in (("weight_norm", now), ("update_norm", now - self._before[name])):
                key = f"{quantity}/{parameter_class(name)}"
                squares[key] = squares.get(key, 0.0) + float(tensor.double().square().sum())
        self._before = {}
        if self._engine.grid.is_main:
            row = {key: math.sqrt(value) for key, value in squares.items()}
            for key, norm in list(row.items()):
                quantity, _, name = key.partition("/")
                if quantity == "weight_norm" and norm > 0:
                    row[f"effective_learning_rate/{name}"] = outcome.learning_rate / norm
            self._write(outcome.step, row)

    def _due(self, step: int) -> bool:
        return bool(self._every) and (step % self._every == 0 or step == self._total)


class LossEvaluation(Callback):
    """Calls `evaluate(step)` for a row of losses, every `every_steps` steps (0: never) and after the last one."""

    def __init__(
        self, evaluate: Callable[[int], dict[str, float]], total_steps: int, every_steps: int, write: WriteRow, is_main: bool
    ) -> None:
        self._evaluate, self._total, self._every, self._write, self._is_main = evaluate, total_steps, every_steps, write, is_main
        self.last: dict[str, float] = {}

    def after_step(self, outcome: StepOutcome) -> None:
        if outcome.step != self._total and not (self._every and outcome.step % self._every == 0):
            return
        self.last = self._evaluate(outcome.step)
        if self._is_main:
            self._write(outcome.step, self.last)


class Checkpoints(Callback):
    """Calls `save(step)` every `every_steps` steps, after the last step, and when the run is asked to stop."""

    def __init__(self, save: Callable[[int], None], total_steps: int, every_steps: int | None) -> None:
        self._save, self._total, self._every = save, total_steps, every_steps

    def after_step(self, outcome: StepOutcome) -> None:
        if outcome.step == self._total or (self._every and outcome.step % self._every == 0):
            self._save(outcome.step)

    def at_stop(self, step: int) -> None:
        if not (self._every and step % self._every == 0):  # else it was saved a moment ago
            self._save(step)
