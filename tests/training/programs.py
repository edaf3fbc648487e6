"""What training tests run, alone or on several ranks: a few steps of the real engine, and a bare torch loop to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import (
    BatchConfig,
    DecayConfig,
    DecayScope,
    EngineConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingRecipe,
)
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.loss import IGNORE, token_loss
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.optim.decay import decay_groups, optimizer_groups
from megatron_plasticity.optim.schedule import learning_rate_at
from megatron_plasticity.parallel.grid import process_grid
from megatron_plasticity.training.engine import TrainingEngine
from megatron_plasticity.training.optimizer_state import MOMENTS, Moment

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


def recipe(
    zero_stage: int = 0,
    precision: str = "fp32",
    *,
    scope: DecayScope = "no_token_embedding",
    clip: float = 0.5,
    global_batch: int = 8,
    micro_batch: int = 8,
    checkpointing: bool = False,
) -> TrainingRecipe:
    return TrainingRecipe(
        optimizer=OptimizerConfig(
            learning_rate=5e-3,
            weight_decay=0.3,
            decay=DecayConfig(scope=scope),
            gradient_clip=clip,
        ),
        schedule=ScheduleConfig(),
        batch=BatchConfig(global_batch_size=global_batch, micro_batch_size=micro_batch),
        engine=EngineConfig(zero_stage=zero_stage, precision=precision, activation_checkpointing=checkpointing),  # type: ignore[arg-type]
        device="cpu",
    )


def initial_model(model: ModelConfig = MODEL) -> Transformer:
    transformer = Transformer(model)
    initialise(transformer, seed=1)
    return transformer


def global_batch(step: int, size: int) -> tuple[Tensor, Tensor]:
    """Random tokens, with a different number of ignored targets in each row."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, MODEL.vocab_size, (size, 13), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    for row in range(size):
        targets[row, : row % 7] = IGNORE
    return inputs, targets


def engine_run(
    settings: TrainingRecipe,
    steps: int,
    weight_decay: float = 0.3,
    model: ModelConfig = MODEL,
    interrupted_at: int | None = None,
    data: Callable[[int, int], tuple[Tensor, Tensor]] = global_batch,
) -> Trajectory:
    """Train for `steps` steps under DeepSpeed; with `interrupted_at`, save whole tensors there and go on in a new engine."""
    losses, norms = [], []
    size = settings.batch.global_batch_size
    micro = settings.batch.micro_batch_size
    with process_grid(torch.device("cpu")) as grid:
        engine = TrainingEngine(initial_model(model), settings, weight_decay, grid)
        for step in range(steps):
            if step == interrupted_at:
                engine = _restarted(engine, settings, weight_decay, model, step)
            engine.set_learning_rate(learning_rate_at(step, steps, settings.optimizer.learning_rate, settings.schedule))
            inputs, targets = data(step, size)
            target_tokens = int((targets != IGNORE).sum())
            cross_entropy = torch.zeros(())
            for a in range(engine.accumulation):
                rows = slice((a * grid.data_size + grid.data_rank) * micro, (a * grid.data_size + grid.data_rank + 1) * micro)
                cross_entropy += engine.train_micro_batch(inputs[rows], targets[rows], target_tokens)
            losses.append(float(grid.sum(cross_entropy)) / target_tokens)
            norms.append(engine.gradient_norm)
        weights = {name: tensor.detach().clone() for name, tensor in engine.full_weights()}
        moments = {m: {name: t.clone() for name, t in engine.full_moments(m)} for m in MOMENTS}
        engine.close()
    return Trajectory(losses, norms, weights, moments)


def _restarted(
    engine: TrainingEngine, settings: TrainingRecipe, weight_decay: float, model: ModelConfig, step: int
) -> TrainingEngine:
    weights = {name: tensor.detach().clone() for name, tensor in engine.full_weights()}
    moments: dict[Moment, dict[str, Tensor]] = {m: {name: t.clone() for name, t in engine.full_moments(m)} for m in MOMENTS}
    grid = engine.grid
    engine.close()
    fresh = Transformer(model)
    fresh.load_state_dict(weights)
    engine = TrainingEngine(fresh, settings, weight_decay, grid)
    engine.restore(weights, moments, step)
    return engine


def bare_run(
    settings: TrainingRecipe,
    steps: int,
    weight_decay: float = 0.3,
    model: ModelConfig = MODEL,
    data: Callable[[int, int], tuple[Tensor, Tensor]] = global_batch,
) -> Trajectory:
    """The same in plain torch: one process, the whole batch at once, fp32 master weights beside a bf16 model if asked for."""
    master = initial_model(model)
    bf16 = settings.engine.precision == "bf16"
    if bf16:  # as under DeepSpeed, the master weights begin as what bf16 kept of the initial ones
        for parameter in master.parameters():
            parameter.data = parameter.data.bfloat16().float()
    working = initial_model(model).bfloat16() if bf16 else master
    groups = optimizer_groups(master, decay_groups(master, settings.optimizer, weight_decay), settings.optimizer)
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=settings.optimizer.betas, eps=settings.optimizer.eps)
    losses, norms = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, settings.optimizer.learning_rate, settings.schedule)
        inputs, targets = data(step, settings.batch.global_batch_size)
        used = targets != IGNORE
        token_losses = token_loss(working(inputs), targets)
        loss = token_losses.cross_entropy.sum() / used.sum()
        losses.append(float(loss.detach()))
        if model.z_loss_weight:
            loss = loss + model.z_loss_weight * (token_losses.log_partition.square() * used).sum() / used.sum()
        working.zero_grad()
        loss.backward()
        if bf16:
            for parameter, source in zip(master.parameters(), working.parameters(), strict=True):
                parameter.grad = source.grad.float()  # type: ignore[union-attr]
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in master.parameters()])))  # type: ignore[misc]
        if settings.optimizer.gradient_clip:
            torch.nn.utils.clip_grad_norm_(master.parameters(), settings.optimizer.gradient_clip)
        optimizer.step()
        if bf16:
            for parameter, source in zip(working.parameters(), master.parameters(), strict=True):
                parameter.data.copy_(source.data)
    weights = {name: parameter.detach().clone() for name, parameter in master.named_parameters()}
    moments: dict[str, Any] = {m: {n: optimizer.state[p][m].clone() for n, p in master.named_parameters()} for m in MOMENTS}
    return Trajectory(losses, norms, weights, moments)


def largest_difference(a: Trajectory, b: Trajectory) -> float:
    """Over all weights."""
    return max(float((a.weights[name] - b.weights[name]).abs().max()) for name in a.weights)
