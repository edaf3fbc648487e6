"""What training tests run, alone or on several ranks: a few steps of the real engine, and a bare torch loop to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.parallel import ParallelConfig
from megatron_plasticity.config.training import (
    BatchConfig,
    DecayConfig,
    DecayScope,
    EngineConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingRecipe,
)
from megatron_plasticity.data.micro_batch import MicroBatch
from megatron_plasticity.models.checkpoint import WEIGHTS
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.loss import IGNORE
from megatron_plasticity.models.sizes import parameter_shapes
from megatron_plasticity.models.transformer import Transformer, local_model
from megatron_plasticity.optim.decay import decay_groups, optimizer_groups
from megatron_plasticity.optim.schedule import learning_rate_at
from megatron_plasticity.parallel.grid import ProcessGrid, process_grid
from megatron_plasticity.training.batches import StepBatch
from megatron_plasticity.training.engine import TrainingEngine
from megatron_plasticity.training.objective import Objective
from megatron_plasticity.training.optimizer_state import MOMENTS
from tests.reference_loss import reference_loss

MODEL = ModelConfig.model_validate(
    {
        "family": "llama2",
        "layers": 2,
        "hidden_size": 32,
        "mlp_hidden_size": 48,
        "query_heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "context_length": 16,
    }
)
OLMO = ModelConfig(**{**MODEL.model_dump(), "family": "olmo2", "z_loss_weight": 1e-2, "norm_eps": 1e-6})


@dataclass(frozen=True)
class Trajectory:
    """What a run did: lists over steps, weights by name (fp32)."""

    losses: list[float]
    gradient_norms: list[float]
    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    first_gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the first step, after clipping."""
    observed: list[Any] = field(default_factory=list)
    """What `observe` returned, by step."""


def recipe(
    zero_stage: int = 0,
    precision: str = "fp32",
    *,
    scope: DecayScope = "no_token_embedding",
    clip: float = 0.5,
    learning_rate: float = 5e-3,
    eps: float = 1e-8,
    global_batch: int = 8,
    micro_batch: int = 8,
    checkpointing: bool = False,
    parallel: ParallelConfig | None = None,
    deepspeed: dict[str, Any] | None = None,
    compile: bool = False,
) -> TrainingRecipe:
    return TrainingRecipe(
        optimizer=OptimizerConfig(
            learning_rate=learning_rate,
            weight_decay=0.3,
            decay=DecayConfig(scope=scope),
            gradient_clip=clip,
            eps=eps,
        ),
        schedule=ScheduleConfig(),
        batch=BatchConfig(global_batch_size=global_batch, micro_batch_size=micro_batch),
        engine=EngineConfig(
            zero_stage=zero_stage,  # type: ignore[arg-type]
            precision=precision,  # type: ignore[arg-type]
            activation_checkpointing=checkpointing,
            compile=compile,
            deepspeed=deepspeed or {},
        ),
        parallel=parallel or ParallelConfig(),
        device="cpu",
    )


def initial_model(model: ModelConfig = MODEL) -> Transformer:
    transformer = Transformer(model)
    initialise(transformer, seed=1)
    return transformer


def global_batch(step: int, size: int, period: int = 13) -> tuple[Tensor, Tensor]:
    """Random tokens that repeat after `period`, with a different number of ignored targets in each row."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, MODEL.vocab_size, (size, period), generator=generator).repeat(1, 13)[:, :13]
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    for row in range(size):
        targets[row, : row % 7] = IGNORE
    return inputs, targets


def repeating_batch(step: int, size: int) -> tuple[Tensor, Tensor]:
    """A batch in which attention finds something to learn. The gradients of wholly random tokens cancel for the most part, which
    leaves their rounding to be compared."""
    return global_batch(step, size, period=4)


def examples_of_different_lengths(step: int, size: int) -> tuple[Tensor, Tensor]:
    """As in fine-tuning: in each row a prompt without targets, a response, and padding. Some rows have no response at all."""
    inputs, targets = repeating_batch(step, size)
    ends = torch.randint(3, inputs.shape[1] + 1, (size,), generator=torch.Generator().manual_seed(1000 + step))
    targets[torch.arange(inputs.shape[1]) >= ends[:, None]] = IGNORE
    return inputs, targets


def engine_run(
    settings: TrainingRecipe,
    steps: int,
    weight_decay: float = 0.3,
    model: ModelConfig = MODEL,
    interrupted_at: int | None = None,
    data: Callable[[int, int], tuple[Tensor, Tensor]] = global_batch,
    observe: Callable[[TrainingEngine, int], Any] | None = None,
) -> Trajectory:
    """Train for `steps` steps under DeepSpeed in the layout of `settings`; with `interrupted_at`, save whole tensors there and go
    on in a new engine. Whole tensors are on the main process only. `observe` looks at the engine after each step (0-based)."""
    losses, norms, observed = [], [], []
    first_gradients: dict[str, Tensor] = {}
    with process_grid(torch.device("cpu"), settings.parallel) as grid:
        local = local_model(model, grid)
        initialise(local, seed=1)
        engine = TrainingEngine(local, settings, weight_decay, grid)
        for step in range(steps):
            if step == interrupted_at:
                engine = _restarted(engine, settings, weight_decay, model, step)
            engine.set_learning_rate(learning_rate_at(step, steps, settings.optimizer.learning_rate, settings.schedule))
            batch = step_batch(settings, grid, step, data)
            losses.append(float(grid.sum(engine.train_batch(batch))) / batch.target_tokens)
            norms.append(engine.gradient_norm)
            if step == 0:
                moments = whole(engine.full_moments("exp_avg"))
                first_gradients = {name: moment / (1 - settings.optimizer.betas[0]) for name, moment in moments.items()}
            if observe is not None:
                observed.append(observe(engine, step))
        weights = whole(engine.full_weights())
        moments = {m: whole(engine.full_moments(m)) for m in MOMENTS}
        engine.close()
    return Trajectory(losses, norms, weights, moments, first_gradients, observed)


def step_batch(
    settings: TrainingRecipe, grid: ProcessGrid, step: int, data: Callable[[int, int], tuple[Tensor, Tensor]] = global_batch
) -> StepBatch:
    """This process's share of a global batch, each micro-batch as long as its own rows need, as in fine-tuning."""
    size, micro = settings.batch.global_batch_size, settings.batch.micro_batch_size
    inputs, targets = data(step, size)
    multiple = grid.tensor.size if grid.tensor.sequence else 1
    micro_batches = []
    for start in range(grid.data_rank * micro, size, micro * grid.data_size):
        rows = slice(start, start + micro)
        length = max([0, *(targets[rows] != IGNORE).any(dim=0).nonzero().flatten().tolist()]) + 1
        columns = slice(-(-length // multiple) * multiple)
        micro_batches.append(MicroBatch(inputs[rows, columns].contiguous(), targets[rows, columns].contiguous()))
    samples = [list(range(len(micro_batch.inputs))) for micro_batch in micro_batches]
    squares = inputs.numel() * inputs.shape[1]
    return StepBatch(micro_batches, int((targets != IGNORE).sum()), inputs.numel(), squares, samples)


def whole(tensors: Iterable[tuple[str, Tensor | None]]) -> dict[str, Tensor]:
    """Copies of whole tensors by name; empty on all processes but the main one."""
    return {name: tensor.detach().clone() for name, tensor in tensors if tensor is not None}


def _restarted(
    engine: TrainingEngine, settings: TrainingRecipe, weight_decay: float, model: ModelConfig, step: int
) -> TrainingEngine:
    """A new engine that goes on from whole tensors, which every process reads, as they would from a checkpoint."""
    grid = engine.grid
    saved: list[Any] = [{WEIGHTS: whole(engine.full_weights()), **{m: whole(engine.full_moments(m)) for m in MOMENTS}}]
    engine.close()
    if grid.size > 1:
        torch.distributed.broadcast_object_list(saved)
    fresh = local_model(model, grid)
    fresh.load_whole(saved[0][WEIGHTS])
    engine = TrainingEngine(fresh, settings, weight_decay, grid)
    engine.restore(saved[0][WEIGHTS], {m: saved[0][m] for m in MOMENTS}, step)
    return engine


def bare_run(
    settings: TrainingRecipe,
    steps: int,
    weight_decay: float = 0.3,
    model: ModelConfig = MODEL,
    data: Callable[[int, int], tuple[Tensor, Tensor]] = global_batch,
    own_loss: bool = True,
) -> Trajectory:
    """The same in plain torch: one process, the whole batch at once, fp32 master weights beside a bf16 model if asked for.

    With our own loss, which rounds as the engine does (it is held against torch's operations in tests/models/test_loss.py), or
    with torch's, which rounds otherwise."""
    master = initial_model(model)
    bf16 = settings.engine.precision == "bf16"
    if bf16:  # as under DeepSpeed, the master weights begin as what bf16 kept of the initial ones
        for parameter in master.parameters():
            parameter.data = parameter.data.bfloat16().float()
    working = initial_model(model).bfloat16() if bf16 else master
    groups = optimizer_groups(master, decay_groups(parameter_shapes(model), settings.optimizer, weight_decay), settings.optimizer)
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=settings.optimizer.betas, eps=settings.optimizer.eps)
    losses, norms = [], []
    first_gradients: dict[str, Tensor] = {}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, settings.optimizer.learning_rate, settings.schedule)
        inputs, targets = data(step, settings.batch.global_batch_size)
        used = int((targets != IGNORE).sum())
        if own_loss:
            total, cross_entropy = Objective(working)(inputs, targets, 1 / used)
        else:
            each = reference_loss(working(inputs), targets)
            cross_entropy = each.cross_entropy.sum()
            total = (cross_entropy + model.z_loss_weight * each.log_partition.square()[targets != IGNORE].sum()) / used
        losses.append(float(cross_entropy.detach() / used))
        working.zero_grad()
        total.backward()
        if bf16:
            for parameter, source in zip(master.parameters(), working.parameters(), strict=True):
                parameter.grad = source.grad.float()  # type: ignore[union-attr]
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in master.parameters()])))  # type: ignore[misc]
        if settings.optimizer.gradient_clip:
            torch.nn.utils.clip_grad_norm_(master.parameters(), settings.optimizer.gradient_clip)
        if step == 0:
            first_gradients = {name: p.grad.clone() for name, p in master.named_parameters() if p.grad is not None}
        optimizer.step()
        if bf16:
            for parameter, source in zip(working.parameters(), master.parameters(), strict=True):
                parameter.data.copy_(source.data)
    weights = {name: parameter.detach().clone() for name, parameter in master.named_parameters()}
    moments: dict[str, Any] = {m: {n: optimizer.state[p][m].clone() for n, p in master.named_parameters()} for m in MOMENTS}
    return Trajectory(losses, norms, weights, moments, first_gradients)


def largest_difference(a: Trajectory, b: Trajectory) -> float:
    """Over all weights."""
    return max(float((a.weights[name] - b.weights[name]).abs().max()) for name in a.weights)
