"""Whole activations of the model in training, under any layout, on the main process."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from megatron_plasticity.capture.recorder import Recorder
from megatron_plasticity.models.partition import stage_of
from megatron_plasticity.training.engine import TrainingEngine


def record_activations(engine: TrainingEngine, recorder: Recorder, inputs: Tensor) -> dict[str, Tensor]:
    """{point: activations} of `inputs` [up to micro_batch_size, S] int64 on the main process, nothing on the others.

    A collective: every process runs the forward pass (ZeRO-3 gathers weights in it; each stage and tensor-parallel rank has its
    part of the activations), with the same inputs.
    """
    micro, grid = engine.recipe.batch.micro_batch_size, engine.grid
    padded = torch.cat((inputs, inputs[:1].expand(micro - len(inputs), -1)))  # stages agree on one shape
    with recorder if grid.data_rank == 0 else contextlib.nullcontext():
        engine.evaluate([(padded, padded)])
    captured = {}
    for point in recorder.points:
        stage = stage_of(point, engine.model.config, grid.parallel)
        whole = grid.to_main(recorder.captured.get(point), stage)
        if whole is not None:
            captured[point] = whole[: len(inputs)].cpu()
    return captured
