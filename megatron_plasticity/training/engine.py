"""DeepSpeed behind a small face: forward and backward of a micro-batch, optimizer step, losses without gradients, whole tensors.

Every number that DeepSpeed needs comes from our config; every trap of it that we know of is met here or in
`config/deepspeed.py`, and has a test in `tests/training/test_engine.py`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_plasticity.config.deepspeed import accumulation_steps, deepspeed_json, effective_zero_stage
from megatron_plasticity.config.training import TrainingRecipe
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.loss import TokenLoss
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.optim.adamw import make_adamw
from megatron_plasticity.optim.decay import DecayGroups, decay_groups, optimizer_groups
from megatron_plasticity.parallel.grid import ProcessGrid
from megatron_plasticity.training.objective import Objective, training_loss
from megatron_plasticity.training.optimizer_state import MOMENTS, Moment, create_state, full_moment, full_weight, restore


class TrainingEngine:
    """A model under `deepspeed.initialize` with a torch AdamW in our decay groups."""

    def __init__(self, model: Transformer, recipe: TrainingRecipe, weight_decay: float, grid: ProcessGrid) -> None:
        """`model` holds its fp32 initial weights, equal on every rank; it is moved and cast in place."""
        import deepspeed

        self.model = model
        self.grid = grid
        self.recipe = recipe
        self.zero_stage = effective_zero_stage(recipe.engine)
        self.accumulation = accumulation_steps(recipe.batch, grid.data_size)
        self.groups: DecayGroups = decay_groups(model, recipe.optimizer, weight_decay)
        model.activation_checkpointing = recipe.engine.activation_checkpointing
        optimizer = make_adamw(optimizer_groups(model, self.groups, recipe.optimizer), recipe.optimizer, grid.device)
        settings = deepspeed_json(recipe.engine, recipe.batch, recipe.optimizer.gradient_clip, grid.data_size)
        with _quiet_deepspeed():
            self._engine: Any = deepspeed.initialize(
                model=Objective(model), optimizer=optimizer, config=settings, dist_init_required=False
            )[0]
        create_state(self._engine)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by canonical name; under ZeRO-3 they are partitioned, so go through `full_weights` for values."""
        return dict(self.model.named_parameters())

    def train_micro_batch(self, inputs: Tensor, targets: Tensor, target_tokens: int) -> Tensor:
        """Forward and backward of one of this step's micro-batches [B, S]; returns its summed cross-entropy, detached.

        `target_tokens` counts the targets of the whole global batch: the loss is a mean per token over it, however tokens fall on
        micro-batches and ranks. DeepSpeed divides by accumulation and averages over ranks, which the scale undoes.
        """
        losses = self._engine(inputs, targets)
        scale = self.accumulation * self.grid.data_size / target_tokens
        self._engine.backward(training_loss(losses, targets, self.model.config.z_loss_weight) * scale)
        if self._engine.is_gradient_accumulation_boundary() and self._norm_is_ours:
            self._gradient_norm = _global_norm(self.model)
        self._engine.step()
        if self._engine.skipped_steps:
            # DeepSpeed would go on, without Adam and without decay, and count this step as none.
            raise UserError("DeepSpeed skipped an optimizer step: the gradient norm is not finite; lower the learning rate or λ")
        return losses.cross_entropy.detach().sum()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Takes effect in the step that the next `accumulation` micro-batches complete."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate

    @property
    def gradient_norm(self) -> float:
        """Global L2 norm of the last step's gradient, before clipping."""
        norm = self._gradient_norm if self._norm_is_ours else self._engine.get_global_grad_norm()
        return float(norm)

    @torch.no_grad()
    def token_losses(self, inputs: Tensor, targets: Tensor) -> TokenLoss:
        """Losses [B, S] without gradients. Every rank must call it equally often (ZeRO-3 gathers weights)."""
        self._engine.eval()
        try:
            return self._engine(inputs, targets)
        finally:
            self._engine.train()

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole fp32 master weights, one at a time. A collective: every rank must exhaust it."""
        for name, parameter in self.parameters.items():
            yield name, full_weight(self._engine, parameter)

    def full_moments(self, moment: Moment) -> Iterator[tuple[str, Tensor]]:
        """Names and whole AdamW moments, one at a time. A collective: every rank must exhaust it."""
        for name, parameter in self.parameters.items():
            yield name, full_moment(self._engine, parameter, moment)

    def restore(self, weights: dict[str, Tensor], moments: dict[Moment, dict[str, Tensor]], step: int) -> None:
        """Continue from whole fp32 weights and moments after `step` steps. The model must have been built from `weights`."""
        assert set(moments) == set(MOMENTS)
        restore(self._engine, self.parameters, weights, moments, step)

    @property
    def _norm_is_ours(self) -> bool:
        """fp32 at stage 0: DeepSpeed clips but does not say by which norm."""
        return self.zero_stage == 0

    def close(self) -> None:
        """Let go of hooks and buffers, so that the next run of this process starts clean."""
        self._engine.destroy()


def _global_norm(model: nn.Module) -> Tensor:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


@contextlib.contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """DeepSpeed logs some sixty lines per start on every rank; what a person needs of it we print ourselves."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
