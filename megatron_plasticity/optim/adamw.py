"""AdamW: torch's, or on request NVIDIA apex's fused kernel or DeepSpeed's kernels. All decouple lr·λ from the gradient; the count
of steps by which the moments are corrected is in another place in each."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_plasticity.config.deepspeed import offloads_optimizer
from megatron_plasticity.config.training import OptimizerConfig, TrainingRecipe
from megatron_plasticity.errors import UserError


def make_adamw(
    groups: list[dict[str, Any]], config: OptimizerConfig, device: torch.device, offloaded: bool = False
) -> torch.optim.Optimizer:
    """The optimizer for `groups` (see `optimizer_groups`) of a model on `device`; `offloaded`: its steps are taken in the CPU's
    memory. Raises UserError if what is asked for cannot be used."""
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    if config.implementation == "torch":
        return torch.optim.AdamW(groups, **settings, fused=device.type == "cuda")
    if config.implementation == "apex":
        return _apex_fused_adam()(groups, **settings, adam_w_mode=True, bias_correction=True)
    return _deepspeed_adam(groups, settings, on_cuda=device.type == "cuda" and not offloaded)


def check_adamw(recipe: TrainingRecipe, device: torch.device) -> None:
    """Raise UserError if the optimizer that is asked for cannot be used here. DeepSpeed's is compiled now if it never was."""
    if recipe.optimizer.implementation != "torch":
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1, device=device))], "weight_decay": 0.0}]
        make_adamw(groups, recipe.optimizer, device, offloads_optimizer(recipe.engine))


def create_moments(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Give the optimizer the state that it would make in its first step: zero moments, at step 0."""
    for tensor in tensors:
        optimizer.state[tensor] = {"exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
        if isinstance(optimizer, torch.optim.AdamW):
            # One tensor each: AdamW adds to it in place, and a shared one would count once per group.
            on = tensor.device if optimizer.defaults["fused"] else "cpu"
            optimizer.state[tensor]["step"] = torch.tensor(0.0, dtype=torch.float32, device=on)
        elif _is_deepspeeds(optimizer):
            optimizer.state[tensor]["step"] = 0


def set_step(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor], step: int) -> None:
    """Let Adam's bias correction go on from `step` steps taken. torch and DeepSpeed count per tensor, apex per group."""
    if isinstance(optimizer, torch.optim.AdamW):
        for tensor in tensors:
            optimizer.state[tensor]["step"].fill_(float(step))
    elif _is_deepspeeds(optimizer):
        for tensor in tensors:
            optimizer.state[tensor]["step"] = step
    else:
        for group in optimizer.param_groups:
            group["step"] = step


def _apex_fused_adam() -> Any:
    """`apex.optimizers.FusedAdam`; the package called apex on PyPI is another one and has no such thing."""
    try:
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"optimizer.implementation: apex was asked for and is not usable here ({error}); build NVIDIA apex from source as "
            "docs/install.md says (the package of that name on PyPI is unrelated), or use implementation: torch"
        ) from None


def _deepspeed_adam(groups: list[dict[str, Any]], settings: dict[str, Any], on_cuda: bool) -> torch.optim.Optimizer:
    """DeepSpeed's FusedAdam, or its CPUAdam."""
    adam = importlib.import_module("deepspeed.ops.adam")
    try:
        if on_cuda:
            return adam.FusedAdam(groups, **settings, adam_w_mode=True, bias_correction=True)
        return adam.DeepSpeedCPUAdam(groups, **settings, adamw_mode=True, bias_correction=True)
    except Exception as error:  # of the compiler, of ninja, of torch, of DeepSpeed: each has its own
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(". ")
        kernel, tools = ("FusedAdam", ", ninja and nvcc of torch's CUDA version") if on_cuda else ("CPUAdam", " and ninja")
        raise UserError(
            f"optimizer.implementation: deepspeed was asked for, and its {kernel} cannot be built here ({reason}); it needs a "
            f"C++ compiler{tools} on PATH (docs/install.md), or use implementation: torch"
        ) from None


def _is_deepspeeds(optimizer: torch.optim.Optimizer) -> bool:
    """Asked without importing DeepSpeed, which takes seconds and has been imported where one of its optimizers exists."""
    adam = sys.modules.get("deepspeed.ops.adam")
    return adam is not None and isinstance(optimizer, adam.FusedAdam | adam.DeepSpeedCPUAdam)
