"""Which AdamW is made, and what is said when apex or DeepSpeed's is asked for and is not there. apex itself needs CUDA and is not
run; DeepSpeed's are in tests/training/test_deepspeed_adamw.py."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from megatron_plasticity.config.deepspeed import offloads_optimizer
from megatron_plasticity.config.training import BatchConfig, EngineConfig, OptimizerConfig, TrainingRecipe
from megatron_plasticity.errors import UserError
from megatron_plasticity.optim.adamw import check_adamw, create_moments, make_adamw, set_step

APEX = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, implementation="apex")
DEEPSPEED = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, implementation="deepspeed")
CPU = torch.device("cpu")


def groups() -> list[dict[str, Any]]:
    return [{"params": [torch.nn.Parameter(torch.ones(3))], "weight_decay": 0.1}]


class FusedAdam(torch.optim.Optimizer):
    """Has apex's interface: the count of steps lives in the group."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, adam_w_mode: bool, bias_correction: bool
    ) -> None:
        self.modes = (adam_w_mode, bias_correction)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})


@pytest.fixture
def fake_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam  # type: ignore[attr-defined]  # a module made on the spot
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def test_torch_is_the_default() -> None:
    optimizer = make_adamw(groups(), OptimizerConfig(learning_rate=0.1, weight_decay=0.1), CPU)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_apex_is_found_at_run_time_and_decouples_decay(fake_apex: None) -> None:
    optimizer = make_adamw(groups(), APEX, CPU)
    assert isinstance(optimizer, FusedAdam)
    assert optimizer.modes == (True, True)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_apex_goes_on_from_a_step(fake_apex: None) -> None:
    optimizer = make_adamw(groups(), APEX, CPU)
    (parameter,) = optimizer.param_groups[0]["params"]
    create_moments(optimizer, [parameter])
    set_step(optimizer, [parameter], 7)
    assert optimizer.param_groups[0]["step"] == 7
    assert set(optimizer.state[parameter]) == {"exp_avg", "exp_avg_sq"}


def test_apex_that_is_missing_or_another_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))  # as the package from PyPI: no `optimizers`
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)
    with pytest.raises(UserError, match=r"docs/install\.md"):
        make_adamw(groups(), APEX, CPU)


def test_apex_under_zero_3_is_refused() -> None:
    with pytest.raises(ValueError, match="does not go with engine"):
        TrainingRecipe(
            optimizer=APEX, batch=BatchConfig(global_batch_size=1, micro_batch_size=1), engine=EngineConfig(zero_stage=3)
        )


class DeepSpeedAdam(torch.optim.Optimizer):
    """Keeps what it was made with."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, **modes: bool) -> None:
        self.modes = modes
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})


class DeepSpeedFusedAdam(DeepSpeedAdam):
    pass


@pytest.fixture
def fake_deepspeed(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    adam = types.ModuleType("deepspeed.ops.adam")
    adam.DeepSpeedCPUAdam, adam.FusedAdam = DeepSpeedAdam, DeepSpeedFusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", adam)
    return adam


@pytest.mark.parametrize(
    ("device", "offloaded", "kind", "modes"),
    [
        ("cpu", False, DeepSpeedAdam, {"adamw_mode": True, "bias_correction": True}),
        ("cuda", False, DeepSpeedFusedAdam, {"adam_w_mode": True, "bias_correction": True}),
        ("cuda", True, DeepSpeedAdam, {"adamw_mode": True, "bias_correction": True}),
    ],
)
def test_deepspeeds_kernel_is_that_of_the_device_and_decouples_decay(
    fake_deepspeed: types.ModuleType, device: str, offloaded: bool, kind: type, modes: dict[str, bool]
) -> None:
    optimizer = make_adamw(groups(), DEEPSPEED, torch.device(device), offloaded)
    assert type(optimizer) is kind
    assert isinstance(optimizer, DeepSpeedAdam)
    assert optimizer.modes == modes
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert optimizer.defaults["lr"] == 0.1
    assert optimizer.defaults["betas"] == DEEPSPEED.betas


def test_deepspeeds_goes_on_from_a_step_of_each_tensor(fake_deepspeed: types.ModuleType) -> None:
    optimizer = make_adamw(groups(), DEEPSPEED, CPU)
    (parameter,) = optimizer.param_groups[0]["params"]
    create_moments(optimizer, [parameter])
    assert optimizer.state[parameter]["step"] == 0, "without it the first step would fail"
    set_step(optimizer, [parameter], 7)
    assert optimizer.state[parameter]["step"] == 7


def test_a_kernel_that_cannot_be_built_is_explained(fake_deepspeed: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **settings: Any) -> None:
        try:
            raise RuntimeError("Ninja is required to load C++ extensions\nand more")
        except RuntimeError as error:
            raise RuntimeError("DeepSpeedCPUAdam requires the cpu_adam op") from error

    monkeypatch.setattr(fake_deepspeed, "DeepSpeedCPUAdam", fails)
    with pytest.raises(UserError, match=r"implementation: deepspeed .*CPUAdam cannot be built here \(Ninja is required to load"):
        check_adamw(recipe_with(DEEPSPEED), CPU)


def test_what_is_torchs_is_not_tried_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", None)  # it takes seconds to import torch's compiler, which the engine pays anyway
    check_adamw(recipe_with(OptimizerConfig(learning_rate=0.1, weight_decay=0.1)), CPU)


@pytest.mark.parametrize(
    ("raw", "offloads"),
    [
        ({}, False),
        ({"zero_optimization": {"reduce_bucket_size": 7}}, False),
        ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, False),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, True),
        ({"zero_optimization": {"offload_optimizer": {"pin_memory": True}}}, False),
        ({"zero_optimization": {"cpu_offload": True}}, True),
    ],
)
def test_offloading_is_read_from_the_raw_block(raw: dict[str, Any], offloads: bool) -> None:
    assert offloads_optimizer(EngineConfig(deepspeed=raw)) == offloads


def recipe_with(optimizer: OptimizerConfig) -> TrainingRecipe:
    return TrainingRecipe(optimizer=optimizer, batch=BatchConfig(global_batch_size=1, micro_batch_size=1))
