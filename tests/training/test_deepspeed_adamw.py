"""DeepSpeed's AdamW under the engine: its Python part everywhere, with kernels of ours, and its own CPU kernel where that can be
compiled (`full`)."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_plasticity.config.parallel import ParallelConfig
from megatron_plasticity.config.training import OptimizerConfig, TrainingRecipe
from megatron_plasticity.optim import adamw
from megatron_plasticity.optim.adamw import make_adamw
from megatron_plasticity.training.engine import TrainingEngine
from tests.ranks import run_on_ranks
from tests.training.programs import MODEL, bare_run, engine_run, largest_difference, recipe, repeating_batch

STAGES = [0, 1, 2, 3]


def by_deepspeed(settings: TrainingRecipe) -> TrainingRecipe:
    return settings.model_copy(update={"optimizer": settings.optimizer.model_copy(update={"implementation": "deepspeed"})})


def step_of_a_kernel(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    decay: float,
) -> None:
    """What DeepSpeed's kernels compute, by their source."""
    parameter.mul_(1 - lr * decay)
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    denominator = (square.sqrt() / math.sqrt(1 - betas[1] ** step)).add_(eps)
    parameter.addcdiv_(mean, denominator, value=-lr / (1 - betas[0] ** step))


@pytest.fixture(params=["CPUAdam", "FusedAdam"])
def kernels_of_ours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """DeepSpeed's optimizers with kernels that need no compiler."""
    import cpuinfo
    from deepspeed.ops.adam import cpu_adam, fused_adam

    def adam_update(
        _: int, step: int, lr: float, beta1: float, beta2: float, eps: float, decay: float, corrected: bool, *tensors: Tensor
    ) -> None:
        assert corrected
        parameter, gradient, mean, square = tensors
        step_of_a_kernel(parameter, gradient, mean, square, lr, (beta1, beta2), eps, step, decay)

    def create_adam(
        number: int, lr: float, beta1: float, beta2: float, eps: float, decay: float, decoupled: bool, *_: Any
    ) -> None:
        assert decoupled

    @torch.no_grad()
    def multi_tensor_adam(chunk: int, overflow: Tensor, lists: list[list[Tensor]], lr: float, *settings: Any) -> None:
        beta1, beta2, eps, step, decoupled, corrected, decay = settings
        assert decoupled
        assert corrected
        for gradient, parameter, mean, square in zip(*lists, strict=True):
            step_of_a_kernel(parameter, gradient, mean, square, lr, (beta1, beta2), eps, step, decay)

    cpu = SimpleNamespace(adam_update=adam_update, create_adam=create_adam, destroy_adam=lambda number: None)
    fused = SimpleNamespace(multi_tensor_adam=multi_tensor_adam)
    monkeypatch.setattr(cpu_adam, "CPUAdamBuilder", lambda: SimpleNamespace(load=lambda: cpu))
    monkeypatch.setattr(fused_adam, "FusedAdamBuilder", lambda: SimpleNamespace(load=lambda: fused))
    monkeypatch.setattr(cpuinfo, "get_cpu_info", dict)  # starts programs, for a second
    if request.param == "FusedAdam":
        real = adamw._deepspeed_adam
        monkeypatch.setattr(adamw, "_deepspeed_adam", lambda groups, settings, on_cuda: real(groups, settings, on_cuda=True))
    return request.param


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_its_steps_are_counted_as_torch_counts_them(kernels_of_ours: str, zero_stage: int, precision: str) -> None:
    """Early steps, where the correction of the moments is large, under each way in which DeepSpeed calls the optimizer (ZeRO-3:
    several times a step), and a restart on the way, which is bit for bit none."""
    raw = {"zero_optimization": {"sub_group_size": 2000}} if zero_stage == 3 else {}
    settings = recipe(zero_stage, precision, clip=0.0, deepspeed=raw)

    def kind(engine: TrainingEngine, step: int) -> str:
        optimizer = engine._engine.optimizer
        return type(getattr(optimizer, "optimizer", optimizer)).__name__

    undisturbed = engine_run(by_deepspeed(settings), 6, observe=kind)
    assert set(undisturbed.observed) == {kernels_of_ours.replace("CPUAdam", "DeepSpeedCPUAdam")}
    assert largest_difference(undisturbed, bare_run(settings, 6)) < (1e-6 if precision == "fp32" else 2e-3)
    resumed = engine_run(by_deepspeed(settings), 6, interrupted_at=3)
    assert resumed.losses == undisturbed.losses
    assert largest_difference(resumed, undisturbed) == 0.0
    for moment, tensors in undisturbed.moments.items():
        assert all(torch.equal(tensors[name], resumed.moments[moment][name]) for name in tensors)


def test_a_forgotten_count_would_be_seen(kernels_of_ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_plasticity.training import optimizer_state

    settings = by_deepspeed(recipe(1, clip=0.0))
    undisturbed = engine_run(settings, 4)
    monkeypatch.setattr(optimizer_state, "set_step", lambda optimizer, tensors, step: None)
    assert largest_difference(engine_run(settings, 4, interrupted_at=2), undisturbed) > 1e-4


# --- With its own kernel for CPUs ---

own_kernel = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def compiled() -> None:
    """Compiles it where that was never done, for one to three minutes."""
    if not (shutil.which("c++") and shutil.which("ninja")):
        pytest.skip("needs a C++ compiler and ninja")
    make_adamw([{"params": [torch.nn.Parameter(torch.zeros(1))]}], by_deepspeed(recipe()).optimizer, torch.device("cpu"))


def trajectory(implementation: str, dtype: torch.dtype, gradients: float = 1e-2) -> list[Tensor]:
    """Two tensors, of which the first decays, after fifty steps with a learning rate that grows."""
    generator = torch.Generator().manual_seed(0)
    decayed, other = (torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (257, 231))
    config = OptimizerConfig.model_validate({"learning_rate": 5e-3, "weight_decay": 0.3, "implementation": implementation})
    groups = [{"params": [decayed], "weight_decay": 0.3}, {"params": [other], "weight_decay": 0.0}]
    optimizer = make_adamw(groups, config, torch.device("cpu"))
    for step in range(50):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (step + 1) / 50
        for parameter in (decayed, other):
            parameter.grad = (torch.randn(parameter.shape, generator=generator) * gradients).to(dtype)
        optimizer.step()
    return [decayed.detach().double(), other.detach().double()]


@pytest.mark.full
@pytest.mark.timeout(900)
@own_kernel
def test_fifty_steps_are_as_near_to_fp64_as_torchs() -> None:
    exact = trajectory("torch", torch.float64)
    off = {
        name: max(float((ours - wanted).abs().max()) for ours, wanted in zip(trajectory(name, torch.float32), exact, strict=True))
        for name in ("torch", "deepspeed")
    }
    assert off["deepspeed"] < 3e-6
    assert off["deepspeed"] < 2 * off["torch"]


@pytest.mark.full
@pytest.mark.timeout(900)
@own_kernel
def test_without_gradients_its_weights_only_decay() -> None:
    generator = torch.Generator().manual_seed(0)
    decayed, other = (torch.randn(n, generator=generator).double() for n in (257, 231))
    factor = math.prod(1 - 5e-3 * (step + 1) / 50 * 0.3 for step in range(50))
    after = trajectory("deepspeed", torch.float32, gradients=0.0)
    torch.testing.assert_close(after[0], decayed * factor, rtol=1e-6, atol=0)
    assert torch.equal(after[1], other)


@pytest.mark.full
@pytest.mark.timeout(900)
@own_kernel
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", STAGES)
def test_fifty_steps_equal_a_bare_torch_loop_and_a_resume_goes_on_bit_for_bit(zero_stage: int, precision: str) -> None:
    # In bf16 one step: the last bit of a weight flips roundings, from which on runs part.
    steps = 50 if precision == "fp32" else 1
    settings = recipe(zero_stage, precision, clip=0.5 if precision == "fp32" else 0.0)
    ours, reference = engine_run(by_deepspeed(settings), steps), bare_run(settings, steps)
    assert largest_difference(ours, reference) < 2e-6
    assert ours.losses == pytest.approx(reference.losses, rel=1e-6)
    undisturbed, resumed = engine_run(by_deepspeed(settings), 8), engine_run(by_deepspeed(settings), 8, interrupted_at=4)
    assert resumed.losses == undisturbed.losses
    assert largest_difference(resumed, undisturbed) == 0.0
    for moment, tensors in undisturbed.moments.items():
        assert all(torch.equal(tensors[name], resumed.moments[moment][name]) for name in tensors)


@pytest.mark.full
@pytest.mark.timeout(900)
@own_kernel
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_offloaded_it_computes_the_same(zero_stage: int) -> None:
    offloaded = recipe(zero_stage, deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    ours, resumed = engine_run(by_deepspeed(offloaded), 8), engine_run(by_deepspeed(offloaded), 8, interrupted_at=4)
    assert largest_difference(ours, bare_run(recipe(zero_stage), 8)) < 2e-6
    assert largest_difference(resumed, ours) == 0.0


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.timeout(900)
@own_kernel
@pytest.mark.parametrize(("zero_stage", "layout"), [(1, {"pipeline": 2}), (2, {"tensor": 2, "sequence": True}), (3, {})], ids=str)
def test_every_layout_trains_as_one_process(zero_stage: int, layout: dict[str, Any], tmp_path: Path) -> None:
    # A larger ε than usual: the updates of gradients near zero are those of their rounding, which differs by layout.
    settings = recipe(zero_stage, micro_batch=2, eps=1e-6, parallel=ParallelConfig(**layout))
    arguments = (by_deepspeed(settings), 6, 0.3, MODEL)
    ours = run_on_ranks(2, engine_run, *arguments, None, repeating_batch, log=tmp_path / "log", seconds=280)
    assert largest_difference(ours[0], bare_run(settings, 6, data=repeating_batch)) < 2e-5
    resumed = run_on_ranks(2, engine_run, *arguments, 3, repeating_batch, log=tmp_path / "log", seconds=280)
    assert resumed[0].losses == ours[0].losses
    assert largest_difference(resumed[0], ours[0]) == 0.0
