"""Sizes of training steps: the prediction against a simulated random walk, and what a log yields."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_plasticity.analysis.training_dynamics import equilibrium, timescale_position, training_dynamics
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.models.sizes import parameter_shapes

Make = Callable[..., PretrainConfig]


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_adamw_on_random_gradients_settles_at_the_predicted_update(beta: float) -> None:
    """torch's AdamW on a random walk, begun ten times too large: after some lifetimes the update is what the formula says."""
    rate, decay = 0.01, 0.5
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(20_000, generator=generator))
    optimizer = torch.optim.AdamW([weight], lr=rate, betas=(beta, 0.95), weight_decay=decay)
    relative = []
    for step in range(1500):
        weight.grad = torch.randn(weight.shape, generator=generator)
        before = weight.detach().clone()
        optimizer.step()
        if step >= 1200:
            relative.append(float((weight.detach() - before).norm() / before.norm()))
    # The variance of Adam's denominator at β₂ = 0.95 and the decay within the step cost a few per cent.
    assert sum(relative) / len(relative) == pytest.approx(equilibrium(rate * decay, beta), rel=0.05)


def rows(steps: list[int], weight: float, update: float) -> list[dict[str, Any]]:
    kinds = ("token_embedding", "head", "attention", "mlp", "norm")
    norms = {f"{what}_norm/{kind}": value for kind in kinds for what, value in (("weight", weight), ("update", update))}
    return [row for step in steps for row in ({"step": step, "train/gradient_norm": 1.0 * step}, {"step": step, **norms})]


def dynamics(config: PretrainConfig, logged: list[dict[str, Any]]) -> dict[str, Any]:
    return training_dynamics(config, config.total_steps, logged, parameter_shapes(config.model))


def constant(pretrain_config: Make, **optimizer: Any) -> PretrainConfig:
    changes = {"schedule": {"kind": "constant", "warmup_fraction": 0}, "steps": 100, "optimizer": optimizer}
    return pretrain_config(changes)


def test_sizes_of_the_steps_of_a_log(pretrain_config: Make) -> None:
    found = dynamics(constant(pretrain_config, weight_decay=2.0), rows([20, 40, 60, 80, 100], 10.0, 0.5))
    assert found["steps"] == [20, 40, 60, 80, 100]
    assert found["learning_rate"] == [0.005] * 5
    assert found["timescale"] == {"of_run": pytest.approx(1 / (0.005 * 2 * 100)), "position": "above"}
    mlp = found["classes"]["mlp"]
    assert mlp["effective_learning_rate"] == pytest.approx([0.0005] * 5)
    assert mlp["relative_update"] == pytest.approx([0.05] * 5)
    predicted = math.sqrt(2 * 0.005 * 2 * 0.1 / 1.9)
    assert mlp["equilibrium"] == pytest.approx([predicted] * 5)
    assert found["summary"]["mlp"]["over_equilibrium"] == pytest.approx(0.05 / predicted)
    assert found["gradient_norm"] == 100, "of the last tenth of the steps"


def test_only_what_decays_has_an_equilibrium(pretrain_config: Make) -> None:
    decay = {"weight_decay": 1.0, "decay": {"scope": "matrices"}}
    found = dynamics(constant(pretrain_config, **decay), rows([50, 100], 10.0, 0.5))
    decays = {kind for kind, of_class in found["classes"].items() if of_class["equilibrium"]}
    assert decays == {"attention", "mlp"}
    assert found["summary"]["norm"]["over_equilibrium"] is None

    without = dynamics(constant(pretrain_config, weight_decay=0.0), rows([50, 100], 10.0, 0.5))
    assert without["timescale"] == {"of_run": None, "position": "infinite"}
    assert all(of_class["equilibrium"] is None for of_class in without["classes"].values())


def test_the_ends_of_a_schedule_are_left_out(pretrain_config: Make) -> None:
    """Updates that are as large at every step: against the prediction for a linear schedule's steps of at least half the peak."""
    changes = {"schedule": {"kind": "linear", "warmup_fraction": 0.1, "final_fraction": 0}, "steps": 100}
    config = pretrain_config({**changes, "optimizer": {"weight_decay": 2.0}})
    logged = [3, 10, 30, 50, 80, 100]
    found = dynamics(config, rows(logged, 10.0, 0.5))
    predicted = dict(zip(logged, found["classes"]["mlp"]["equilibrium"], strict=True))
    assert found["learning_rate"][1] == 0.005
    assert found["summary"]["mlp"]["over_equilibrium"] == pytest.approx(0.05 / predicted[30])


def test_independent_decay_counts_as_what_a_step_takes_off(pretrain_config: Make) -> None:
    independent = {"weight_decay": 0.01, "decay": {"coupling": "independent"}}
    found = dynamics(constant(pretrain_config, **independent), rows([100], 10.0, 0.5))
    assert found["classes"]["mlp"]["equilibrium"] == pytest.approx([math.sqrt(2 * 0.01 * 0.1 / 1.9)])
    assert found["timescale"]["of_run"] == pytest.approx(1.0)


def test_a_log_without_norms_and_one_with_a_gap(pretrain_config: Make) -> None:
    config = constant(pretrain_config, weight_decay=1.0)
    empty = dynamics(config, [{"step": 10, "train/loss": 2.0}])
    assert (empty["steps"], empty["summary"], empty["gradient_norm"]) == ([], {}, None)
    broken = rows([50, 100], 10.0, 0.5)
    broken[1]["update_norm/mlp"] = math.nan
    broken[3]["weight_norm/mlp"] = 0.0
    mlp = dynamics(config, broken)["classes"]["mlp"]
    assert mlp["relative_update"] == [None, None]
    assert mlp["effective_learning_rate"] == [pytest.approx(0.0005), None]


@pytest.mark.parametrize(
    ("timescale", "position"),
    [(None, "infinite"), (0.1, "below"), (0.2496, "within"), (0.5, "within"), (0.8389, "within"), (0.9, "above")],
)
def test_where_a_timescale_lies(timescale: float | None, position: str) -> None:
    assert timescale_position(timescale) == position
