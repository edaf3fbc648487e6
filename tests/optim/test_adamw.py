"""Which AdamW is made, and what is said when apex is asked for and is not there. apex itself needs CUDA and is not run."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from megatron_plasticity.config.training import BatchConfig, EngineConfig, OptimizerConfig, TrainingRecipe
from megatron_plasticity.errors import UserError
from megatron_plasticity.optim.adamw import create_moments, make_adamw, set_step

APEX = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, implementation="apex")
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
