"""DeepSpeed behind a small face: one optimizer step, losses without gradients, whole tensors; the same under every layout.

Every number that DeepSpeed needs comes from our config; every trap of it that we know of is met here or in
`config/deepspeed.py`, and has a test in `tests/training/test_engine.py` or `tests/distributed/`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_plasticity.config.deepspeed import accumulation_steps, deepspeed_json, effective_zero_stage, offloads_optimizer
from megatron_plasticity.config.training import TrainingRecipe
from megatron_plasticity.data.micro_batch import MicroBatch, to_device
from megatron_plasticity.models.attention_choice import choose_attention
from megatron_plasticity.models.lora import Adapters
from megatron_plasticity.models.loss import TrainingLoss
from megatron_plasticity.models.partition import stage_layers, stage_of
from megatron_plasticity.models.sizes import parameter_shapes
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.optim.adamw import make_adamw
from megatron_plasticity.optim.decay import DecayGroups, decay_groups, optimizer_groups
from megatron_plasticity.parallel.grid import ProcessGrid
from megatron_plasticity.training.batches import StepBatch
from megatron_plasticity.training.objective import Objective, scored_positions
from megatron_plasticity.training.optimizer_state import MOMENTS, Moment, create_state, full_moment, full_weight, restore
from megatron_plasticity.training.pipeline import PipelineSchedule, pipeline_module


class TrainingEngine:
    """A model, or adapters on it, under `deepspeed.initialize` with a torch AdamW in our decay groups."""

    def __init__(
        self,
        model: Transformer,
        recipe: TrainingRecipe,
        weight_decay: float,
        grid: ProcessGrid,
        adapters: Adapters | None = None,
    ) -> None:
        """`model` is this process's part under the layout of `grid` (see `local_model`) and holds its fp32 initial weights; it
        is moved and cast in place. `adapters` are those that are attached to it."""
        import deepspeed

        self.model = model
        self.grid = grid
        self.recipe = recipe
        self.zero_stage = effective_zero_stage(recipe.engine, grid.parallel)
        self.accumulation = accumulation_steps(recipe.batch, grid.data_size)
        self.adapters = adapters
        self.shapes = parameter_shapes(model.config) if adapters is None else adapters.shapes
        """Whole shapes of what is trained, by name."""
        self.groups: DecayGroups = decay_groups(self.shapes, recipe.optimizer, weight_decay)
        model.activation_checkpointing = recipe.engine.activation_checkpointing
        self.attention = choose_attention(recipe.engine, model.config, grid.parallel.tensor, grid.device)
        """The kernels of attention, as this machine has them."""
        model.use_attention(self.attention.backend)
        if recipe.engine.compile:
            model.compile_blocks()
        self._objective = Objective(model, recipe.engine.compile)
        groups = optimizer_groups(model, self.groups, recipe.optimizer)
        optimizer = make_adamw(groups, recipe.optimizer, grid.device, offloads_optimizer(recipe.engine))
        settings = deepspeed_json(recipe.engine, recipe.batch, recipe.optimizer.gradient_clip, grid.parallel, grid.data_size)
        is_pipeline = grid.parallel.pipeline > 1
        with _quiet_deepspeed():
            self._engine: Any = deepspeed.initialize(
                model=pipeline_module(model, grid, self._pipeline_loss) if is_pipeline else self._objective,
                optimizer=optimizer,
                config=settings,
                mpu=None if is_pipeline else grid.deepspeed,
                dist_init_required=False,
            )[0]
        create_state(self._engine)
        self._pipeline = PipelineSchedule(self._engine) if is_pipeline else None
        self._cross_entropy = torch.zeros((), dtype=torch.float64, device=grid.device)
        self._loss_scale = 0.0
        self._gradient_norm = torch.zeros(())
        self.skipped_steps = 0
        """Steps so far that changed nothing, those before the checkpoint that the run went on from among them."""
        self.step_was_skipped = False
        """Whether the last step changed nothing, on all processes, since the gradient was not finite on one."""

    @property
    def layout(self) -> str:
        """One line for a person: how the processes share the work."""
        parallel, micro = self.grid.parallel, self.recipe.batch.micro_batch_size
        stages = [f"{layers.start}–{layers[-1]}" for layers in stage_layers(self.model.config, parallel)]
        parts = [f"pipeline {parallel.pipeline} (layers {', '.join(stages)})" if parallel.pipeline > 1 else None]
        parts.append(f"data {self.grid.data_size}")
        parts.append(f"tensor {parallel.tensor}{' with sequence' if parallel.sequence else ''}" if parallel.tensor > 1 else None)
        return (
            f"layout {' × '.join(part for part in parts if part)}, ZeRO {self.zero_stage}, {self.recipe.engine.precision}, "
            f"{self.accumulation} × {micro} sequences per data-parallel rank and step"
        )

    def train_batch(self, batch: StepBatch) -> Tensor:
        """One optimizer step on a global batch, unless its gradient is not finite (`step_was_skipped`); returns its summed
        cross-entropy over this data-parallel rank's targets.

        The loss is a mean per target token over the whole global batch, however tokens fall on micro-batches and ranks: DeepSpeed
        divides by accumulation and averages over data-parallel ranks, which the scale undoes. Summed over all processes the
        results give the global batch's: those that do not report a loss (`grid.reports_loss`) return 0.
        """
        self._loss_scale = self.accumulation * self.grid.data_size / batch.target_tokens
        self._cross_entropy.zero_()
        self.step_was_skipped = False
        skipped_before = self._engine.skipped_steps
        if self._pipeline is not None:
            self._pipeline.train(batch.micro_batches)
        else:
            for micro_batch in batch.micro_batches:
                self._engine.backward(self._loss_of(micro_batch))
                if self._engine.is_gradient_accumulation_boundary() and self._norm_is_ours:
                    self._gradient_norm = _global_norm(self.model, self.grid)
                    self.step_was_skipped = not bool(torch.isfinite(self._gradient_norm))
                with _held_still(self._engine.optimizer) if self.step_was_skipped else contextlib.nullcontext():
                    self._engine.step()
        # DeepSpeed's ZeRO optimizers leave a step out, without Adam and without decay, when the norm is not finite.
        self.step_was_skipped |= self._engine.skipped_steps > skipped_before
        self.skipped_steps += self.step_was_skipped
        return self._reported_cross_entropy()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Takes effect in the next step."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate

    @property
    def gradient_norm(self) -> float:
        """Global L2 norm of the last step's gradient, before clipping; the same on every process."""
        norm = self._gradient_norm if self._norm_is_ours else self._engine.get_global_grad_norm()
        return float(norm)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch], shows_logits: bool = False) -> Tensor:
        """Summed cross-entropy of micro-batches without gradients, fp64; 0 on processes that report none. With `shows_logits` the
        head returns logits, for hooks to see.

        A collective: every process must call it with as many micro-batches (ZeRO-3 gathers weights), those of one data-parallel
        rank with the same.
        """
        self.grid.liveness.beat()
        self._cross_entropy.zero_()
        self._loss_scale = 1.0
        self._objective.shows_logits = shows_logits
        if self._pipeline is not None:
            self._pipeline.evaluate(micro_batches)
        else:
            self._engine.eval()
            try:
                for micro_batch in micro_batches:
                    self._loss_of(micro_batch)
            finally:
                self._engine.train()
        self._objective.shows_logits = False
        return self._reported_cross_entropy()

    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """Names and whole fp32 master weights of the whole model, adapters merged into them, one at a time, on the main process;
        None on the others.

        A collective: every process must exhaust it."""
        trained = self.trained_weights()
        if self.adapters is None:
            yield from trained
            return
        for name in parameter_shapes(self.model.config):
            a, b = (next(trained)[1], next(trained)[1]) if self.adapters.on(name) else (None, None)
            yield name, self.adapters.merge(name, a, b) if self.grid.is_main else None

    def trained_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """As `full_weights`, of what is trained: the adapters where there are any, else the whole model."""
        return self._on_main(lambda parameter: full_weight(self._engine, parameter))

    def full_moments(self, moment: Moment) -> Iterator[tuple[str, Tensor | None]]:
        """Names and whole AdamW moments, as `trained_weights`."""
        return self._on_main(lambda parameter: full_moment(self._engine, parameter, moment))

    def restore(
        self, weights: Mapping[str, Tensor], moments: Mapping[Moment, Mapping[str, Tensor]], step: int, skipped_steps: int = 0
    ) -> None:
        """Continue from fp32 weights and moments of all that is trained, by name, after `step` steps, of which `skipped_steps`
        changed nothing. The model must have been built from `weights`."""
        assert set(moments) == set(MOMENTS)

        def part(name: str, whole: Tensor) -> Tensor:
            return self.model.sharding(name).take(whole, self.grid.tensor.rank)

        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        restore(self._engine, trained, weights, moments, part, step - skipped_steps)
        self.skipped_steps = skipped_steps

    def close(self) -> None:
        """Let go of hooks and buffers, so that the next run of this process starts clean."""
        self._engine.destroy()

    def _pipeline_loss(self, hidden_and_weight: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        return self._noted(self._objective.loss(*hidden_and_weight, targets, self._loss_scale))

    def _loss_of(self, micro_batch: MicroBatch) -> Tensor:
        scored = scored_positions(micro_batch.targets)
        scored = None if scored is None else to_device(scored, self.grid.device)
        batch = micro_batch.to(self.grid.device)
        return self._noted(self._engine(batch.inputs, batch.targets, self._loss_scale, batch.segments, scored))

    def _noted(self, loss: TrainingLoss) -> Tensor:
        """What a micro-batch adds to the loss, as DeepSpeed wants it; its cross-entropy is noted."""
        self._cross_entropy += loss.cross_entropy
        return loss.total

    def _reported_cross_entropy(self) -> Tensor:
        return self._cross_entropy.clone() if self.grid.reports_loss else torch.zeros_like(self._cross_entropy)

    def _on_main(self, gather: Any) -> Iterator[tuple[str, Tensor | None]]:
        parameters = dict(self.model.named_parameters())
        ranks = self.grid.tensor
        for name in self.shapes:
            stage = stage_of(name, self.model.config, self.grid.parallel)
            whole = None
            with self.grid.liveness.exchanging():
                if stage == self.grid.stage:
                    piece = gather(parameters[name]).detach()
                    whole = self.model.sharding(name).join(ranks.all_gather(piece)) if ranks.size > 1 else piece
                whole = self.grid.to_main(whole, stage)
            yield name, whole

    @property
    def _norm_is_ours(self) -> bool:
        """fp32 at stage 0: DeepSpeed clips but does not say by which norm."""
        return self.zero_stage == 0


def _global_norm(model: nn.Module, grid: ProcessGrid) -> Tensor:
    """Over the tensor-parallel ranks each piece counts once. (Stage 0 never meets a pipeline, see `effective_zero_stage`.)"""
    counted = [p.grad for p in model.parameters() if p.grad is not None and getattr(p, "tensor_model_parallel", True)]
    if grid.tensor.size == 1:
        return torch.nn.utils.get_total_norm(counted)
    square = torch.nn.utils.get_total_norm(counted).square()
    grid.tensor.all_reduce(square)
    return square.sqrt()


@contextlib.contextmanager
def _held_still(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the block a step of the optimizer does nothing."""
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del optimizer.step


@contextlib.contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """DeepSpeed logs some sixty lines per start on every rank; what a person needs of it we print ourselves."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(None):  # the pipeline module prints
            yield
    finally:
        logger.setLevel(level)
