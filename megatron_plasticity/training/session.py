"""What pretraining and fine-tuning share around the loop: the run folder, the checkpoint to start from, saving, stopping."""

from __future__ import annotations

import collections
import contextlib
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_plasticity.config.training import TrainingRecipe
from megatron_plasticity.errors import CheckpointError
from megatron_plasticity.models.checkpoint import (
    ADAPTERS,
    WEIGHTS,
    CheckpointFolder,
    latest_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from megatron_plasticity.models.lora import Adapters
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.parallel.grid import ProcessGrid
from megatron_plasticity.tracking.disk import explain_disk_errors
from megatron_plasticity.tracking.metrics import MetricLog, read_metrics
from megatron_plasticity.tracking.progress import Progress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.training.batches import Batches
from megatron_plasticity.training.callbacks import SPIKE, Checkpoints, Norms, TrainingMetrics
from megatron_plasticity.training.engine import TrainingEngine
from megatron_plasticity.training.loop import Callback, train
from megatron_plasticity.training.non_finite import SKIPPED, NonFiniteSteps
from megatron_plasticity.training.optimizer_state import MOMENTS
from megatron_plasticity.training.resume import TrainerState, check_continues
from megatron_plasticity.training.signals import StopSignal
from megatron_plasticity.training.system_metrics import watched_machine


@dataclass(frozen=True)
class TrainingSession:
    """One training run between its folder and its engine."""

    folder: RunFolder
    recipe: TrainingRecipe
    engine: TrainingEngine
    batches: Batches
    start_step: int
    data_identity: dict[str, Any]
    """What decides which samples a step reads, and on which base; stored in checkpoints and compared on resume."""
    kind: str
    log: MetricLog | None
    """On the first rank only."""

    def run(self, callbacks: list[Callback], progress: Progress) -> None:
        """Train to the last step. What may stop a run comes first, then metrics, so that a checkpoint is never ahead of them;
        checkpoints come last."""
        logging, total = self.recipe.logging, self.batches.steps

        def save(step: int) -> None:
            for callback in callbacks:
                callback.before_checkpoint()
            self.save(step)

        # Losses are compared, and rows written, by the main process alone.
        rows = read_metrics(self.folder.metrics_path) if self.engine.grid.is_main else []
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        # The main process's word, since only it has cut the file to the steps that are in the weights.
        skipped = self.engine.grid.from_main([row["step"] for row in rows if SKIPPED in row])
        watchers: list[Callback] = [
            NonFiniteSteps(self.engine, self.batches.sample_name, self.write_row, skipped),
            TrainingMetrics(self.engine, total, logging.every_steps, self.write_row, progress, losses),
            Norms(self.engine, total, logging.norms_every_steps, self.write_row),
            *callbacks,
            Checkpoints(save, total, self.recipe.checkpoint.every_steps),
        ]
        machine = watched_machine(self.folder.path, logging.system_every_seconds, self.engine.grid, self.start_step, total)
        with StopSignal() as stop, self.engine.grid.liveness.watched(), machine as system:
            train(self.engine, self.batches, self.start_step, [*system, *watchers], stop)

    def announce(self) -> None:
        """Tell the person what runs: layout, attention kernels and decay groups. For the main process."""
        attention = self.engine.attention
        print(f"{self.engine.layout}\nattention by {attention.kernel}")
        print(self.engine.groups.table(self.engine.shapes), flush=True)
        if attention.slow is not None:
            print(f"warning: SLOW: {attention.slow}", file=sys.stderr, flush=True)

    def write_row(self, step: int, values: Mapping[str, float]) -> None:
        assert self.log is not None, "only the first rank writes"
        self.log.write(step, values)

    def checkpoint_path(self, step: int) -> Path:
        return self.folder.path / "checkpoints" / f"step-{step}"

    def results(self) -> dict[str, Any]:
        """What every finished training run puts into results.json; the loss is that of the last step that was logged and not
        skipped."""
        rows = read_metrics(self.folder.metrics_path)
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        return {
            "train_loss": losses[-1] if losses else math.nan,
            "skipped_steps": [row["step"] for row in rows if SKIPPED in row],
            "loss_spikes": [row["step"] for row in rows if SPIKE in row],
            "steps": self.batches.steps,
            "weight_decay": self.engine.groups.weight_decay,
            "attention_kernel": self.engine.attention.kernel,
            "checkpoint": f"checkpoints/step-{self.batches.steps}",
        }

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`. A collective: tensors are gathered one by one, the first rank writes them."""
        tensors = {WEIGHTS: self.engine.full_weights()} | {m: self.engine.full_moments(m) for m in MOMENTS}
        if self.engine.adapters is not None:
            tensors[ADAPTERS] = self.engine.trained_weights()
        if not self.engine.grid.is_main:
            for pairs in tensors.values():
                collections.deque(pairs, maxlen=0)
            return
        assert self.log is not None
        self.log.sync()
        engine = self.engine
        state = TrainerState.of(
            step,
            self.batches.steps,
            self.kind,
            self.folder.path.name,
            engine.groups,
            self.recipe,
            self.data_identity,
            engine.skipped_steps,
        )
        path = self.checkpoint_path(step)
        with explain_disk_errors(path), self.engine.grid.liveness.busy():
            save_checkpoint(path, self.engine.model.config, state.to_json(), tensors)


@contextlib.contextmanager
def training_session(
    folder: RunFolder,
    kind: str,
    recipe: TrainingRecipe,
    model: Transformer,
    weight_decay: float,
    batches: Batches,
    data_identity: dict[str, Any],
    grid: ProcessGrid,
    adapters: Adapters | None = None,
) -> Iterator[TrainingSession]:
    """A session that starts where the run left off: from its latest intact checkpoint, else from `checkpoint.resume_from`, else
    from `model` as it is. With `adapters`, which are attached to it, only these come from a checkpoint.

    Raises CheckpointError if the checkpoint belongs to another model, λ, optimizer or data.
    """
    source = _starting_point(folder, recipe, grid)
    group, shapes = (WEIGHTS, None) if adapters is None else (ADAPTERS, adapters.shapes)
    weights = source.tensors(group, shapes) if source else None
    if source is not None and weights is not None and source.model == model.config:
        model.load_whole(weights)
    engine = TrainingEngine(model, recipe, weight_decay, grid, adapters)
    start_step = 0
    log = None
    try:
        if source is not None and weights is not None:
            start_step = source.step
            state = TrainerState.of(start_step, batches.steps, kind, folder.path.name, engine.groups, recipe, data_identity)
            check_continues(source, state, model.config, engine.groups)
            is_own = source.path.parents[1] == folder.path
            if start_step > batches.steps or (start_step == batches.steps and not is_own):
                raise CheckpointError(
                    f"{source.path}: at step {start_step}, not before the last of the {batches.steps} steps of this run"
                )
            skipped = source.trainer.get("skipped_steps", 0)
            engine.restore(weights, {moment: source.tensors(moment, shapes) for moment in MOMENTS}, start_step, skipped)
        log = MetricLog(folder.metrics_path, start_step) if grid.is_main else None
        yield TrainingSession(folder, recipe, engine, batches, start_step, data_identity, kind, log)
    finally:
        engine.close()
        if log is not None:
            log.close()


@contextlib.contextmanager
def held(folder: RunFolder, grid: ProcessGrid) -> Iterator[None]:
    """Run the folder inside the block, on the first rank; the others only compute."""
    if not grid.is_main:
        yield
        return
    grid.liveness.at_end(folder.mark_failed)
    with folder.running(), explain_disk_errors(folder.path), grid.liveness.explained():
        for unfinished in (folder.path / "checkpoints").glob(".step-*.tmp"):  # of an attempt that was killed while writing
            shutil.rmtree(unfinished)
        yield


def _starting_point(folder: RunFolder, recipe: TrainingRecipe, grid: ProcessGrid) -> CheckpointFolder | None:
    """The checkpoint to go on from. The main process chooses and verifies it (every byte is hashed), and the others follow."""
    chosen: Path | None = None
    problem: CheckpointError | None = None
    if grid.is_main:
        try:
            chosen = _verified_starting_point(folder, recipe)
        except CheckpointError as error:
            problem = error
    path, message = grid.from_main((str(chosen) if chosen else None, str(problem) if problem else None))
    if message is not None:
        raise problem or CheckpointError(message)
    return None if path is None else open_checkpoint(Path(path), verify=False)


def _verified_starting_point(folder: RunFolder, recipe: TrainingRecipe) -> Path | None:
    damaged: list[str] = []
    own = latest_checkpoint(folder.path, damaged=damaged)
    if own is not None:
        for problem in damaged:
            print(f"warning: {problem}\n  the run goes on from {own.path.name} instead", file=sys.stderr, flush=True)
        return own.path
    if damaged:
        raise CheckpointError(
            "none of this run's checkpoints can be used:\n  "
            + "\n  ".join(damaged)
            + f"\n  Delete {folder.path / 'checkpoints'} to start over."
        )
    return None if recipe.checkpoint.resume_from is None else open_checkpoint(recipe.checkpoint.resume_from).path
