"""One step under every layout that one GPU holds, and between two ranks on it, against fp64."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_checks.arithmetic import reference_model, token_rows
from gpu_checks.machine import NEEDS_CUDA, OK, SEED, Gpu, Row, largest, recipe
from torch import Tensor
from torch.nn import functional as F

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import TrainingRecipe
from megatron_plasticity.data.micro_batch import MicroBatch
from megatron_plasticity.launch.command import free_port
from megatron_plasticity.launch.workers import start_worker
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.loss import IGNORE
from megatron_plasticity.models.transformer import local_model
from megatron_plasticity.parallel.grid import ProcessGrid, process_grid
from megatron_plasticity.training.batches import StepBatch
from megatron_plasticity.training.engine import TrainingEngine

# --- One step under every layout that one GPU holds.


def step_batch(config: ModelConfig, settings: TrainingRecipe, grid: ProcessGrid) -> StepBatch:
    """This process's share; targets of different numbers in each row."""
    inputs, targets = _inputs_and_targets(config, settings.batch.global_batch_size)
    micro = settings.batch.micro_batch_size
    starts = range(grid.data_rank * micro, len(inputs), micro * grid.data_size)
    micro_batches = [MicroBatch(inputs[start : start + micro], targets[start : start + micro]) for start in starts]
    samples = [list(range(micro))] * len(micro_batches)
    return StepBatch(micro_batches, int((targets != IGNORE).sum()), inputs.numel(), inputs.numel() * inputs.shape[1], samples)


def _inputs_and_targets(config: ModelConfig, rows: int) -> tuple[Tensor, Tensor]:
    tokens = token_rows(config, rows)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    for row in range(rows):
        targets[row, : 3 * row] = IGNORE
    return inputs, targets


def one_step(machine: Gpu, settings: TrainingRecipe, grid: ProcessGrid) -> tuple[float, float]:
    """Mean loss and gradient norm of a first step."""
    model = local_model(machine.model, grid)
    initialise(model, SEED)
    engine = TrainingEngine(model, settings, 0.1, grid)
    try:
        batch = step_batch(machine.model, settings, grid)
        total = grid.sum(engine.train_batch(batch))
        return float(total) / batch.target_tokens, engine.gradient_norm
    finally:
        engine.close()


def exact_step(machine: Gpu, precision: str, rows: int) -> tuple[float, float]:
    """The same in fp64, the whole batch at once."""
    model = reference_model(machine, machine.model, precision)
    inputs, targets = (tensor.to(machine.device) for tensor in _inputs_and_targets(machine.model, rows))
    mean = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    gradients = torch.autograd.grad(mean, list(model.parameters()))
    return mean.item(), float(torch.nn.utils.get_total_norm(gradients))


_LOSS_AND_NORM = {"fp32": (1e-5, 1e-4), "bf16": (5e-3, 3e-2)}
"""Largest relative differences. In bf16 of what a model of bf16 weights has in fp64."""


def step_row(machine: Gpu, check: str, precision: str, found: Sequence[tuple[float, float]], rows: int) -> Row:
    """The worst of steps that all should equal the exact one."""
    exact = exact_step(machine, precision, rows)
    differences = [[abs(ours - true) / true for ours, true in zip(step, exact, strict=True)] for step in found]
    loss, norm = (largest(*column) for column in zip(*differences, strict=True))
    limits = _LOSS_AND_NORM[precision]
    value = largest(loss / limits[0], norm / limits[1])
    measured = f"loss {loss:.1e}, gradient norm {norm:.1e}"
    return machine.row(check, measured, value, 1.0, shown=f"{limits[0]:.0e}, {limits[1]:.0e}")


def layouts(machine: Gpu) -> Iterator[Row]:
    """fp32 and bf16 × ZeRO 0–3, each with and without accumulation and activation checkpointing; some compiled."""
    cases = [(accumulation, checkpointing) for accumulation in (1, 2) for checkpointing in (False, True)]
    with process_grid(machine.device) as grid:
        for precision, stage in itertools.product(("fp32", "bf16"), range(4)):
            found = [
                one_step(machine, recipe(machine, precision, stage, accumulation=a, micro=4 // a, checkpointing=c), grid)
                for a, c in (cases[::3] if machine.rehearsal else cases)
            ]
            what = f"a step, {precision}, ZeRO {stage}, {len(found)} ways to split it"
            yield step_row(machine, what, precision, found, 4)
        for precision, stage in machine.compiled_layouts:
            torch.compiler.reset()
            settings = recipe(machine, precision, stage, accumulation=2, micro=2, compile=True, checkpointing=True)
            yield step_row(
                machine, f"a step, {precision}, ZeRO {stage}, compiled", precision, [one_step(machine, settings, grid)], 4
            )


# --- Processes that talk.


def ranks(machine: Gpu) -> Iterator[Row]:
    """NCCL with one process; then two processes on the one GPU over gloo, which NCCL would refuse."""
    with process_grid(machine.device) as grid:
        backend = torch.distributed.get_backend()
        wrong = [name for name, right in _collectives(grid).items() if not right]
        measured = f"wrong: {', '.join(wrong)}" if wrong else f"six collectives give what they should ({backend})"
        yield machine.row("NCCL, one process", measured, len(wrong), 0, needs_cuda=True, shown="none wrong")
    for layout in machine.rank_layouts:
        what = "two ranks on one GPU over gloo, " + ", ".join(f"{name} {value}" for name, value in layout.items())
        found = _on_two_ranks(machine, layout)
        if isinstance(found, str):
            yield machine.missing(what, found)
        else:
            row = step_row(machine, what, "fp32", [found], 4)
            yield dataclasses.replace(row, verdict=NEEDS_CUDA) if machine.rehearsal and row.verdict == OK else row


def _collectives(grid: ProcessGrid) -> dict[str, bool]:
    distributed, expected = torch.distributed, torch.arange(8.0, device=grid.device)
    tensors = {name: expected.clone() for name in ("all_reduce", "broadcast")}
    distributed.all_reduce(tensors["all_reduce"])
    distributed.broadcast(tensors["broadcast"], src=0)
    tensors["all_gather"], tensors["reduce_scatter"] = torch.zeros_like(expected), torch.zeros_like(expected)
    distributed.all_gather_into_tensor(tensors["all_gather"], expected.clone())
    distributed.reduce_scatter_tensor(tensors["reduce_scatter"], expected.clone())
    said = [{"rank": 0}]
    distributed.broadcast_object_list(said, src=0, device=grid.device)
    distributed.barrier()
    equal = {name: torch.equal(tensor, expected) for name, tensor in tensors.items()}
    return {**equal, "broadcast_object_list": said == [{"rank": 0}], "barrier": True}


def _on_two_ranks(machine: Gpu, layout: Mapping[str, int]) -> tuple[float, float] | str:
    """Loss and gradient norm of a step, or why gloo cannot take it."""
    context = multiprocessing.get_context("fork" if machine.rehearsal else "spawn")  # CUDA does not survive a fork
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        pipes, workers = [], []
        for rank in range(2):
            reader, writer = context.Pipe(duplex=False)
            workers.append(
                start_worker(
                    context,
                    _rank,
                    (type(machine), dict(layout), writer),
                    name=f"rank-{rank}",
                    log=Path(folder) / f"{rank}",
                    threads=1,
                    environment={**shared, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
                )
            )
            writer.close()
            pipes.append(reader)
        try:
            return pipes[0].recv() if pipes[0].poll(30) else "no answer within 30 s"
        except EOFError:
            said = (Path(folder) / "0").read_text(encoding="utf-8").strip().splitlines()
            return f"gloo does not take it: {said[-1] if said else 'the process ended'}"
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def _rank(kind: type[Gpu], layout: dict[str, int], writer: Any) -> None:
    """In a process of its own."""
    import deepspeed.comm

    real = deepspeed.comm.init_distributed
    deepspeed.comm.init_distributed = lambda **settings: real(**{**settings, "dist_backend": "gloo"})
    machine = kind()
    stage = layout.pop("zero_stage", 1)
    settings = recipe(machine, "fp32", stage, accumulation=2, micro=2, parallel=layout)
    with process_grid(machine.device, settings.parallel) as grid:
        writer.send(one_step(machine, settings, grid))
