"""What a step is made of, against fp64: compiled blocks, the loss, the optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_checks.machine import DTYPES, ERROR, SEED, Gpu, Row, largest, recipe, relative
from torch import Tensor
from torch.nn import functional as F

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import OptimizerConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.doctor.software import compilers
from megatron_plasticity.launch.doctor.surroundings import ops
from megatron_plasticity.launch.memory import largest_stage, memory
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.loss import IGNORE, linear_cross_entropy
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.optim.adamw import make_adamw

# --- Compiled blocks.


def compiled_blocks(machine: Gpu) -> Iterator[Row]:
    """Logits and gradients of compiled blocks and of blocks as written, both against fp64."""
    tokens = token_rows(machine.model, 2)
    for precision in DTYPES:
        exact = _logits_and_gradients(reference_model(machine, machine.model, precision), tokens)
        errors = {}
        for compiled in (False, True):
            torch.compiler.reset()
            model = Transformer(machine.model)
            initialise(model, SEED)
            model = model.to(machine.device, DTYPES[precision])
            if compiled:
                for block in model.layers:
                    block.compile(backend=machine.compiler)
            found = _logits_and_gradients(model, tokens)
            errors[compiled] = [relative(ours, reference) for ours, reference in zip(found, exact, strict=True)]
        limit = 2 * max(errors[False])
        measured = (
            f"logits {errors[True][0]:.1e}, gradients {max(errors[True][1:]):.1e}; as written {errors[False][0]:.1e}, "
            f"{max(errors[False][1:]):.1e}"
        )
        yield machine.row(
            f"compiled blocks, {precision}", measured, largest(*errors[True]), limit, needs_cuda=True, shown="twice as written"
        )


def _logits_and_gradients(model: Transformer, tokens: Tensor) -> list[Tensor]:
    tokens = tokens.to(next(model.parameters()).device)
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten())
    return [logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def reference_model(machine: Gpu, config: ModelConfig, precision: str) -> Transformer:
    """In fp64, of the weights that a model in this precision begins with."""
    model = Transformer(config, "sdpa-math")
    initialise(model, SEED)
    return model.to(DTYPES[precision]).to(machine.device, torch.float64)


def token_rows(config: ModelConfig, rows: int) -> Tensor:
    """[rows, context + 1], each row with a period, so that there is something to learn from what came before."""
    generator = torch.Generator().manual_seed(SEED)
    period = torch.randint(config.vocab_size, (rows, 7), generator=generator)
    return period.repeat(1, config.context_length // 7 + 2)[:, : config.context_length + 1]


# --- The loss.


def loss(machine: Gpu) -> Iterator[Row]:
    """The fused linear cross-entropy with z-loss and its gradients, several pieces of rows, against fp64; and that it takes no
    more memory than `plan` says, which is less than all logits, whatever their number format."""
    tokens, width, vocabulary = machine.loss_shape
    generator = torch.Generator().manual_seed(SEED)
    targets = torch.randint(vocabulary, (2, tokens // 2), generator=generator)
    targets[:, : tokens // 8] = IGNORE
    values = [torch.randn(2, tokens // 2, width, generator=generator), torch.randn(vocabulary, width, generator=generator)]
    values[1] /= width**0.5  # logits of variance 1
    targets, z_loss_weight, scale = targets.to(machine.device), 1e-3, 1.0 / tokens
    for precision, compiled in itertools.product(DTYPES, (False,) if machine.rehearsal else (False, True)):
        hidden, weight = (value.to(machine.device, DTYPES[precision]).requires_grad_() for value in values)
        exact = _exact_loss(hidden, weight, targets, z_loss_weight, scale)
        machine.forget_peak()
        before = machine.in_use()
        found = linear_cross_entropy(hidden, weight, targets, z_loss_weight=z_loss_weight, scale=scale, compiled=compiled)
        gradients = torch.autograd.grad(found.total, (hidden, weight))
        machine.synchronize()
        held = machine.peak() - before
        errors = [relative(a, b) for a, b in zip((found.total.detach(), *gradients), exact, strict=True)]
        what = f"loss, {precision}{', compiled' if compiled else ''}"
        measured = f"loss {errors[0]:.1e}, gradients {errors[1]:.1e} (hidden), {errors[2]:.1e} (weight)"
        yield machine.row(what, measured, largest(*errors), ERROR[precision])
        planned, every = planned_for_loss(machine, precision), tokens * vocabulary * DTYPES[precision].itemsize
        measured = f"{held / 2**20:,.0f} MiB, predicted {planned / 2**20:,.0f} MiB; all logits would be {every / 2**20:,.0f} MiB"
        limit = _MOST_OVER_PLAN * planned
        yield machine.row(f"{what}: memory", measured, held, limit, needs_cuda=True, shown="5 % over plan")
        del hidden, weight, exact, found, gradients


_MOST_OVER_PLAN = 1.05


def planned_for_loss(machine: Gpu, precision: str) -> float:
    """Bytes that `plan` predicts for loss and gradients of this shape."""
    tokens, width, vocabulary = machine.loss_shape
    heads = width // machine.model.head_dim
    shape = {"hidden_size": width, "query_heads": heads, "vocab_size": vocabulary, "context_length": tokens // 2}
    config = ModelConfig.model_validate({**machine.model.model_dump(), **shape})
    device = "cpu" if machine.rehearsal else "cuda"
    return largest_stage(memory(config, recipe(machine, precision, 1, micro=2), 1, device)).moments["loss"].loss


def _exact_loss(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss_weight: float, scale: float) -> list[Tensor]:
    """Loss, and gradients of hidden state and weight, in fp64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = (leaves[0] @ leaves[1].t()).flatten(0, 1)
    squares = logits.logsumexp(dim=-1).square()[targets.flatten() != IGNORE].sum()
    total = scale * (F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum") + z_loss_weight * squares)
    return [total.detach(), *torch.autograd.grad(total, leaves)]


# --- The optimizer.


def optimizers(machine: Gpu) -> Iterator[Row]:
    """Every AdamW that is usable here, twenty steps, against torch's in fp64."""
    start = torch.randn(machine.vector, generator=torch.Generator().manual_seed(SEED))
    exact = _stepped(start.double(), machine.device, lambda groups: torch.optim.AdamW(groups, **_SETTINGS, foreach=False))
    for name, make in _adamws(machine).items():
        try:
            ours = _stepped(start, machine.device, make)
        except (UserError, ImportError, RuntimeError) as error:
            if name.startswith("torch") or name == _OURS:
                raise
            yield machine.missing(f"AdamW, {name}", str(error))
            continue
        error = relative(ours, exact)
        yield machine.row(f"AdamW, {name}", f"{error:.1e} after 20 steps", error, 3e-6)


_OURS = "as training makes it"
_SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
_Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def _adamws(machine: Gpu) -> dict[str, _Make]:
    def ours(implementation: str) -> _Make:
        settings = {"learning_rate": _SETTINGS["lr"], "betas": _SETTINGS["betas"], "eps": _SETTINGS["eps"], "weight_decay": 0.0}
        config = OptimizerConfig.model_validate({**settings, "implementation": implementation})
        return lambda groups: make_adamw(groups, config, machine.device)

    return {
        _OURS: ours("torch"),
        "torch, fused": lambda groups: torch.optim.AdamW(groups, **_SETTINGS, fused=True),
        "torch, foreach": lambda groups: torch.optim.AdamW(groups, **_SETTINGS, foreach=True),
        "NVIDIA apex": ours("apex"),
        "DeepSpeed": _where_it_can_be_had(ours("deepspeed"), machine),
    }


def _where_it_can_be_had(make: _Make, machine: Gpu) -> _Make:
    """`make`, for DeepSpeed's optimizer, whose kernel is compiled when it is first used."""

    def made(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if (reason := _not_to_be_had(machine)) is not None:
            raise ImportError(reason)
        return make(groups)

    return made


def _not_to_be_had(machine: Gpu) -> str | None:
    """Why there is no such kernel here; None where it was built before, or can be built now."""
    kernel, known = "cpu_adam" if machine.rehearsal else "fused_adam", ops()
    if kernel in (*known.prebuilt, *known.in_folder):
        return None
    if machine.rehearsal:
        return f"{kernel} is not built yet, and a rehearsal does not take the minutes that building it takes"
    tools, cuda = compilers(), torch.version.cuda or "none"
    lacks = [what for what, found in (("C++ compiler", tools.cxx), ("ninja", tools.ninja), ("nvcc", tools.nvcc)) if not found]
    if lacks:
        return f"{kernel} is not built yet, and cannot be: there is no {', no '.join(lacks)}"
    if str(tools.nvcc).partition(".")[0] != cuda.partition(".")[0]:
        return f"{kernel} is not built yet, and cannot be: nvcc is of CUDA {tools.nvcc}, torch of CUDA {cuda}"
    return None


def _stepped(start: Tensor, device: torch.device, make: _Make) -> Tensor:
    """`start` after twenty steps on gradients of its own, half of it with weight decay."""
    parameters = [torch.nn.Parameter(half.clone().to(device)) for half in start.tensor_split(2)]
    optimizer = make([{"params": [parameters[0]], "weight_decay": 0.3}, {"params": [parameters[1]], "weight_decay": 0.0}])
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        optimizer.step()
    return torch.cat([parameter.detach() for parameter in parameters])
