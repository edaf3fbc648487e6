"""Activations of the model in training, under any layout: whole on the main process, and dumped at the steps of a config."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_plasticity.capture.dump import recorder_of, write_dump
from megatron_plasticity.capture.manifest import ACTIVATIONS_FOLDER, model_identity
from megatron_plasticity.capture.points import HEAD, LOGITS
from megatron_plasticity.capture.recipe import memory_bytes
from megatron_plasticity.capture.recorder import Recorder
from megatron_plasticity.capture.sequences import CapturedSequences
from megatron_plasticity.capture.writer import ActivationWriter
from megatron_plasticity.config.analysis import CaptureConfig
from megatron_plasticity.data.micro_batch import MicroBatch
from megatron_plasticity.evaluation.capture_sequences import sequence_inputs
from megatron_plasticity.models.partition import stage_of
from megatron_plasticity.training.engine import TrainingEngine
from megatron_plasticity.training.loop import Callback, StepOutcome
from megatron_plasticity.training.session import TrainingSession


def capture_inputs(config: CaptureConfig | None) -> dict[str, str]:
    """Hashes of what a training run reads for its dumps, which enter its hash. Raises UserError if that is not there."""
    return {} if config is None else {f"capture_{name}": digest for name, digest in sequence_inputs(config).items()}


def record_activations(
    engine: TrainingEngine, recorder: Recorder, inputs: Tensor, kept: Tensor | None = None
) -> dict[str, Tensor]:
    """{name: activations} of `inputs` [up to micro_batch_size, S] int64 on the main process, nothing on the others.

    `kept` [B, K] are the positions to record, as in `Recorder.keeping`; without it sequence-parallel ranks must divide S. A
    collective: every process runs the forward pass (ZeRO-3 gathers weights in it; each stage and tensor-parallel rank has its
    part of the activations), with the same inputs.
    """
    micro, grid = engine.recipe.batch.micro_batch_size, engine.grid
    rows = torch.arange(micro).clamp(max=len(inputs) - 1)  # stages agree on one number of rows
    padded = inputs[rows]
    if grid.parallel.sequence:  # each rank holds as many positions; causal attention does not see those at the end
        padded = F.pad(padded, (0, -inputs.shape[1] % grid.tensor.size))
    kept = None if kept is None else kept[rows]
    with recorder.keeping(kept) if grid.data_rank == 0 else contextlib.nullcontext():
        engine.evaluate([MicroBatch(padded, padded)], shows_logits=not {HEAD, LOGITS}.isdisjoint(recorder.points))
    captured = {}
    for name in recorder.names:
        stage = stage_of(name, engine.model.config, grid.parallel)
        whole = grid.to_main(recorder.captured.get(name), stage)
        if whole is not None:
            captured[name] = whole[: len(inputs)].cpu()
    return captured


class Capture(Callback):
    """Dumps activations on fixed sequences at the scheduled steps into `folder`. Use it in a `with` block, which ends when all
    is on disk; until then training goes on while a thread writes."""

    def __init__(
        self,
        engine: TrainingEngine,
        config: CaptureConfig,
        sequences: CapturedSequences,
        total_steps: int,
        folder: Path,
        identity: Mapping[str, Any],
    ) -> None:
        """Raises UserError for a hook point that does not exist, a step after the last, covariances that exceed the memory bound,
        or a folder that holds activations of another model or of other sequences."""
        self._engine, self._config, self._sequences = engine, config, sequences
        self._steps = config.schedule(total_steps)
        self._recorder = recorder_of(config, engine.model)
        self._writer: ActivationWriter | None = None
        if engine.grid.is_main:
            self._writer = ActivationWriter(folder, identity, memory_bytes=memory_bytes(config))
            try:
                sequences.save(folder)
            except BaseException:
                self._writer.close()
                raise

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)

    def before_step(self, step: int) -> None:
        if step == 1 and 0 in self._steps:
            self._dump(0)

    def after_step(self, outcome: StepOutcome) -> None:
        if outcome.step in self._steps:
            self._dump(outcome.step)

    def before_checkpoint(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def _dump(self, step: int) -> None:
        if self._writer is None:
            collections.deque(self._recorded(), maxlen=0)
        else:
            write_dump(self._writer, step, self._config, self._recorded())

    def _recorded(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for tokens, kept in self._sequences.batches(self._engine.recipe.batch.micro_batch_size):
            yield record_activations(self._engine, self._recorder, tokens, kept), kept


@contextlib.contextmanager
def capturing(
    session: TrainingSession, config: CaptureConfig | None, make_sequences: Callable[[CaptureConfig], CapturedSequences]
) -> Iterator[list[Callback]]:
    """The callback that dumps what `config` says into the run folder, for a run inside the block; none without a config.

    Raises UserError as `Capture`, before anything is trained.
    """
    if config is None:
        yield []
        return
    identity = model_identity(session.folder.hash, session.engine.model.config, session.engine.groups.weight_decay)
    folder = session.folder.path / ACTIVATIONS_FOLDER
    with Capture(session.engine, config, make_sequences(config), session.batches.steps, folder, identity) as capture:
        yield [capture]
