"""A gradient that is not finite: no weight changes on any process, the samples are named, the run stops or goes on by policy."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.data.stream import sample_order, training_blocks
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.checkpoint import open_checkpoint
from megatron_plasticity.models.loss import TrainingLoss
from megatron_plasticity.tracking.metrics import read_metrics
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.training.engine import TrainingEngine
from megatron_plasticity.training.loop import StepOutcome
from megatron_plasticity.training.non_finite import MOST_IN_A_ROW, NonFiniteSteps
from megatron_plasticity.training.objective import Objective
from megatron_plasticity.training.pretrain import pretrain, pretrain_folder
from tests.ranks import run_on_ranks

Make = Callable[..., PretrainConfig]
STEP = 3
"""The step, counted from 1, that is spoilt."""


def block_to_spoil(config: PretrainConfig) -> int:
    """The last sample of the step: with two ranks the second rank's."""
    reader = training_blocks(config.data, config.model.context_length)
    size = config.batch.global_batch_size
    return int(sample_order(config.data, reader).blocks((STEP - 1) * size, STEP * size)[-1])


def spoil_loss_of(config: PretrainConfig, block: int, set_attribute: Callable[[Any, str, Any], None]) -> None:
    """From now on the loss of this block is not a number, wherever it is computed."""
    targets_of_block = torch.as_tensor(training_blocks(config.data, config.model.context_length).batch([block])[1])[0]
    true_loss = Objective.loss

    def loss(self: Objective, hidden: Tensor, weight: Tensor | None, targets: Tensor, *others: Any) -> TrainingLoss:
        is_spoilt = (targets == targets_of_block).all(dim=-1).any()
        return TrainingLoss(
            *(part * torch.where(is_spoilt, float("nan"), 1.0) for part in true_loss(self, hidden, weight, targets, *others))
        )

    set_attribute(Objective, "loss", loss)


def train_spoilt(config: PretrainConfig) -> str:
    """On a rank; the message it ended with."""
    spoil_loss_of(config, block_to_spoil(config), setattr)
    try:
        pretrain(config, NoProgress())
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")])
def test_a_spoilt_sample_stops_the_run_before_a_weight_changes(
    pretrain_config: Make, zero_stage: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = {"zero_stage": zero_stage, "precision": precision}
    config = pretrain_config({"engine": engine, "checkpoint": {"every_steps": STEP - 1}})
    block = block_to_spoil(config)
    spoil_loss_of(config, block, monkeypatch.setattr)
    weights: list[dict[str, Tensor]] = []
    after_step = NonFiniteSteps.after_step

    def note_weights(self: NonFiniteSteps, outcome: StepOutcome) -> None:
        weights.append({name: weight.clone() for name, weight in self._engine.full_weights() if weight is not None})
        after_step(self, outcome)

    monkeypatch.setattr(NonFiniteSteps, "after_step", note_weights)
    with pytest.raises(UserError, match=rf"step {STEP}: .*no weight was changed.* block {block} \(.*rank 0\).*non_finite=skip"):
        pretrain(config, NoProgress())
    saved = open_checkpoint(pretrain_folder(config).path)
    assert saved.step == STEP - 1
    assert len(weights) == STEP
    for name, weight in saved.tensors().items():
        assert torch.equal(weights[-1][name], weight), name


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_a_skipped_step_is_as_if_it_had_not_been(
    pretrain_config: Make, tmp_path: Path, zero_stage: int, precision: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Neither Adam's moments and step count nor the decay are touched: equal to a run in which that step is left out by hand."""
    engine = {"zero_stage": zero_stage, "precision": precision}
    config = pretrain_config({"engine": {**engine, "non_finite": "skip"}, "output": str(tmp_path / "skipped")})
    with monkeypatch.context() as patch:
        spoil_loss_of(config, block_to_spoil(config), patch.setattr)
        skipped = pretrain(config, NoProgress())
    assert skipped.results["skipped_steps"] == [STEP]
    assert "the step is skipped" in capsys.readouterr().err
    rows = [row for row in read_metrics(skipped.metrics_path) if row["step"] == STEP]
    assert any(row.get("train/step_skipped") == 1.0 for row in rows)
    assert not any("train/loss" in row for row in rows)

    true_train_batch = TrainingEngine.train_batch
    taken = 0

    def leave_one_out(self: TrainingEngine, batch: Any) -> Tensor:
        nonlocal taken
        taken += 1
        return torch.zeros((), dtype=torch.float64) if taken == STEP else true_train_batch(self, batch)

    monkeypatch.setattr(TrainingEngine, "train_batch", leave_one_out)
    by_hand = pretrain(pretrain_config({"engine": engine, "output": str(tmp_path / "by_hand")}), NoProgress())
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        expected = open_checkpoint(by_hand.path).tensors(group)
        for name, tensor in open_checkpoint(skipped.path).tensors(group).items():
            assert torch.equal(tensor, expected[name]), (group, name)


def test_a_model_that_only_skips_has_diverged(pretrain_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pretrain_config({"engine": {"non_finite": "skip"}, "steps": MOST_IN_A_ROW + 5})
    monkeypatch.setattr(TrainingEngine, "_noted", lambda self, loss: loss.total * float("nan"))
    with pytest.raises(UserError, match=rf"step {MOST_IN_A_ROW + 1}: .*So were the {MOST_IN_A_ROW} steps before it"):
        pretrain(config, NoProgress())


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"pipeline": 2}])
def test_one_rank_stops_all_with_the_same_words(pretrain_config: Make, tmp_path: Path, layout: dict[str, int]) -> None:
    changes = {"batch": {"micro_batch_size": 1}, "parallel": layout, "engine": {"zero_stage": 1}}
    config = pretrain_config(changes)
    first, second = run_on_ranks(2, train_spoilt, config, log=tmp_path / "log")
    assert first == second
    rank = 0 if layout else 1
    assert f"block {block_to_spoil(config)} (data-parallel rank {rank})" in first
    assert pretrain_folder(config).state.status == "failed"


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_going_on_after_a_skipped_step_is_going_on(
    pretrain_config: Make, tmp_path: Path, zero_stage: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam has counted one step less than the run."""
    engine = {"zero_stage": zero_stage, "precision": precision, "non_finite": "skip"}

    def config(output: str) -> PretrainConfig:
        return pretrain_config({"engine": engine, "output": str(tmp_path / output), "checkpoint": {"every_steps": STEP + 1}})

    spoil_loss_of(config("a"), block_to_spoil(config("a")), monkeypatch.setattr)
    undisturbed = pretrain(config("a"), NoProgress())
    shutil.copytree(undisturbed.path, tmp_path / "b" / undisturbed.path.name)
    resumed = pretrain_folder(config("b"))
    for path in resumed.checkpoints()[1:]:
        shutil.rmtree(path)
    for name in ("results.json", "state.json"):
        (resumed.path / name).unlink()
    pretrain(config("b"), NoProgress())
    assert resumed.results["skipped_steps"] == [STEP]
    expected, found = (open_checkpoint(folder.path) for folder in (undisturbed, resumed))
    assert found.trainer["skipped_steps"] == 1
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        for name, tensor in found.tensors(group).items():
            assert torch.equal(tensor, expected.tensors(group)[name]), (group, name)


def test_a_run_that_logged_no_loss_ends_with_none(pretrain_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its only logged step was skipped."""
    changes = {"steps": STEP, "logging": {"every_steps": 100, "norms_every_steps": 0}, "engine": {"non_finite": "skip"}}
    config = pretrain_config(changes)
    spoil_loss_of(config, block_to_spoil(config), monkeypatch.setattr)
    assert math.isnan(pretrain(config, NoProgress()).results["train_loss"])
