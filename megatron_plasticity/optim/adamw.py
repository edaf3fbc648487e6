"""AdamW: torch's, or NVIDIA apex's fused kernel where it is installed and asked for. Both decouple lr·λ from the gradient."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_plasticity.config.training import OptimizerConfig
from megatron_plasticity.errors import UserError


def make_adamw(groups: list[dict[str, Any]], config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer for `groups` (see `optimizer_groups`). Raises UserError if apex is asked for and cannot be used."""
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    if config.implementation == "torch":
        return torch.optim.AdamW(groups, **settings, fused=device.type == "cuda")
    return _apex_fused_adam()(groups, **settings, adam_w_mode=True, bias_correction=True)


def create_moments(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Give the optimizer the state that it would make in its first step: zero moments, at step 0."""
    for tensor in tensors:
        optimizer.state[tensor] = {"exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
        if isinstance(optimizer, torch.optim.AdamW):
            # One tensor each: AdamW adds to it in place, and a shared one would count once per group.
            on = tensor.device if optimizer.defaults["fused"] else "cpu"
            optimizer.state[tensor]["step"] = torch.tensor(0.0, dtype=torch.float32, device=on)


def set_step(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor], step: int) -> None:
    """Let Adam's bias correction go on from `step` steps taken. torch counts per tensor, apex per group."""
    if isinstance(optimizer, torch.optim.AdamW):
        for tensor in tensors:
            optimizer.state[tensor]["step"].fill_(float(step))
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
