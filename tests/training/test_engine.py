"""The engine against a bare torch loop, and each trap of DeepSpeed that would silently change a weight-decay study."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from megatron_plasticity.config.deepspeed import deepspeed_json, effective_zero_stage
from megatron_plasticity.config.parallel import ParallelConfig
from megatron_plasticity.config.training import BatchConfig, EngineConfig
from megatron_plasticity.data.micro_batch import MicroBatch
from megatron_plasticity.errors import ConfigError
from megatron_plasticity.models.loss import IGNORE
from megatron_plasticity.parallel.grid import process_grid
from megatron_plasticity.training.batches import StepBatch
from megatron_plasticity.training.engine import TrainingEngine
from tests.ranks import run_on_ranks
from tests.training.programs import (
    MODEL,
    OLMO,
    bare_run,
    engine_run,
    global_batch,
    initial_model,
    largest_difference,
    recipe,
    whole,
)

STAGES = [0, 1, 2, 3]
BATCH = BatchConfig(global_batch_size=8, micro_batch_size=8)


@pytest.mark.parametrize("weight_decay", [0.3, 0.0])
@pytest.mark.parametrize("clip", [0.5, 0.0])
@pytest.mark.parametrize("zero_stage", STAGES)
def test_fifty_fp32_steps_equal_a_bare_torch_loop(zero_stage: int, clip: float, weight_decay: float) -> None:
    settings = recipe(zero_stage, clip=clip)
    ours, reference = engine_run(settings, 50, weight_decay), bare_run(settings, 50, weight_decay)
    assert largest_difference(ours, reference) < 1e-6
    assert ours.losses == pytest.approx(reference.losses, rel=1e-6)
    assert ours.gradient_norms == pytest.approx(reference.gradient_norms, rel=1e-5)


@pytest.mark.parametrize("weight_decay", [0.3, 0.0])
@pytest.mark.parametrize("zero_stage", STAGES)
def test_fifty_bf16_steps_equal_a_bare_torch_loop(zero_stage: int, weight_decay: float) -> None:
    # Without clipping: a factor that differs in its last bit would flip roundings to bf16, and the runs would part.
    settings = recipe(zero_stage, "bf16", clip=0.0)
    ours, reference = engine_run(settings, 50, weight_decay), bare_run(settings, 50, weight_decay)
    assert largest_difference(ours, reference) < 1e-6
    assert ours.losses == pytest.approx(reference.losses, rel=1e-6)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_bf16_clips_by_the_same_norm(zero_stage: int) -> None:
    settings = recipe(zero_stage, "bf16", clip=0.5)
    ours, reference = engine_run(settings, 1), bare_run(settings, 1)
    assert ours.gradient_norms == pytest.approx(reference.gradient_norms, rel=1e-5)
    assert reference.gradient_norms[0] > 0.5, "the clip must bite, or this test says nothing"
    assert largest_difference(ours, reference) < 1e-6


@pytest.mark.parametrize("zero_stage", STAGES)
def test_an_olmo_with_z_loss_accumulation_and_activation_checkpointing(zero_stage: int) -> None:
    settings = recipe(zero_stage, micro_batch=2, checkpointing=True)
    ours, reference = engine_run(settings, 5, model=OLMO), bare_run(settings, 5, model=OLMO)
    assert largest_difference(ours, reference) < 1e-5
    assert ours.losses == pytest.approx(reference.losses, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", STAGES)
def test_going_on_from_whole_tensors_is_going_on(zero_stage: int, precision: str) -> None:
    """Weights, moments, each group's λ and Adam's step survive: the trajectory is the same bit for bit."""
    settings = recipe(zero_stage, precision)
    undisturbed, resumed = engine_run(settings, 8), engine_run(settings, 8, interrupted_at=4)
    assert resumed.losses == undisturbed.losses
    assert largest_difference(resumed, undisturbed) == 0.0
    for moment, tensors in undisturbed.moments.items():
        assert all(torch.equal(tensors[name], resumed.moments[moment][name]) for name in tensors)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", STAGES)
def test_without_gradients_weights_only_decay(zero_stage: int, precision: str) -> None:
    """Ten steps of zero gradients shrink what decays by ∏(1 − lr·λ), leave the rest alone, and take no hidden extra step."""
    settings = recipe(zero_stage, precision, clip=0.0)
    with process_grid(torch.device("cpu")) as grid:
        engine = TrainingEngine(initial_model(), settings, 0.3, grid)
        before = whole(engine.full_weights())
        inputs, targets = global_batch(0, 8)
        for _ in range(10):
            engine.set_learning_rate(0.01)
            nothing = MicroBatch(inputs, torch.full_like(targets, IGNORE))
            engine.train_batch(StepBatch([nothing], target_tokens=1, input_tokens=1, squared_lengths=1, samples=[[0]]))
        after = whole(engine.full_weights())
        engine.close()
    for name in before:
        factor = 1.0 if name == "embed.weight" else (1 - 0.01 * 0.3) ** 10
        torch.testing.assert_close(after[name], before[name] * factor, rtol=2e-6, atol=1e-8)


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", STAGES)
def test_two_ranks_equal_one_process(zero_stage: int, tmp_path: Path) -> None:
    """Rows have different numbers of targets, so a mean of means would show. Accumulation on top, and a restart on two ranks."""
    settings = recipe(zero_stage, micro_batch=2)
    ranks = run_on_ranks(2, engine_run, settings, 6, log=tmp_path / "log")
    reference = bare_run(settings, 6)
    for trajectory in ranks:
        assert trajectory.losses == pytest.approx(reference.losses, rel=1e-6)
        assert trajectory.gradient_norms == pytest.approx(reference.gradient_norms, rel=1e-5)
    assert largest_difference(ranks[0], reference) < 1e-5
    resumed = run_on_ranks(2, engine_run, settings, 6, 0.3, MODEL, 3, log=tmp_path / "log")
    assert largest_difference(resumed[0], ranks[0]) == 0.0


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_two_bf16_ranks_go_on_bit_for_bit(zero_stage: int, tmp_path: Path) -> None:
    settings = recipe(zero_stage, "bf16", micro_batch=4)
    undisturbed = run_on_ranks(2, engine_run, settings, 6, log=tmp_path / "log")
    resumed = run_on_ranks(2, engine_run, settings, 6, 0.3, MODEL, 3, log=tmp_path / "log")
    assert resumed[1].losses == undisturbed[1].losses
    assert largest_difference(resumed[0], undisturbed[0]) == 0.0


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_gradients_are_averaged_over_ranks_in_fp32(zero_stage: int, tmp_path: Path) -> None:
    """Two ranks see what one does in two micro-batches, so only the averaging could differ: DeepSpeed's default rounds it."""
    settings = recipe(zero_stage, "bf16", micro_batch=4, clip=0.0)
    one, two = engine_run(settings, 1), run_on_ranks(2, engine_run, settings, 1, log=tmp_path / "log")[0]
    for name, gradient in one.first_gradients.items():
        torch.testing.assert_close(two.first_gradients[name], gradient, rtol=1e-6, atol=1e-9)


def test_stage_zero_in_bf16_runs_as_stage_one() -> None:
    assert effective_zero_stage(EngineConfig(zero_stage=0, precision="bf16"), ParallelConfig()) == 1
    assert effective_zero_stage(EngineConfig(zero_stage=0, precision="fp32"), ParallelConfig()) == 0


def test_clipping_is_always_written() -> None:
    settings = deepspeed_json(EngineConfig(), BatchConfig(global_batch_size=8, micro_batch_size=2), 0.0, ParallelConfig(), 2)
    assert settings["gradient_clipping"] == 0.0
    assert settings["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize(
    "raw",
    [
        {"train_batch_size": 8},
        {"optimizer": {"type": "Adam"}},
        {"zero_optimization": {"stage": 3}},
        {"fp16": {"enabled": True}},
        {"gradient_clipping": 1.0},
    ],
)
def test_a_raw_deepspeed_setting_that_is_ours_is_refused(raw: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="decided by our own fields"):
        deepspeed_json(EngineConfig(deepspeed=raw), BATCH, 1.0, ParallelConfig(), 1)


def test_a_raw_deepspeed_setting_of_its_own_is_added() -> None:
    engine = EngineConfig(deepspeed={"zero_optimization": {"reduce_bucket_size": 7}, "comms_logger": {"enabled": False}})
    settings = deepspeed_json(engine, BATCH, 1.0, ParallelConfig(), 1)
    assert settings["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 7}
    assert settings["comms_logger"] == {"enabled": False}


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 12"):
        deepspeed_json(EngineConfig(), BatchConfig(global_batch_size=16, micro_batch_size=4), 1.0, ParallelConfig(), 3)


def test_no_shared_memory_op_is_built_on_a_cpu() -> None:
    """It would take 45 s to compile and leave 66 MiB in /dev/shm per rank and launch."""
    shared_memory = Path("/dev/shm")
    before = set(shared_memory.iterdir()) if shared_memory.is_dir() else set()
    with process_grid(torch.device("cpu")):
        assert sys.modules["deepspeed.comm.torch"].build_shm_op() is None  # type: ignore[attr-defined]
        after = set(shared_memory.iterdir()) if shared_memory.is_dir() else set()
    assert not {path.name for path in after - before if "deepspeed" in path.name.lower()}


def test_the_grid_leaves_no_sign_of_a_launcher_behind() -> None:
    """accelerate, for one, would look for the rest of it."""
    with process_grid(torch.device("cpu")):
        assert os.environ["LOCAL_RANK"] == "0"
    assert "LOCAL_RANK" not in os.environ


def test_a_wrong_decay_group_would_be_seen() -> None:
    """The comparison with the bare loop is sharp enough: decaying one tensor more moves weights far more than its tolerance."""
    settings = recipe(0)
    assert largest_difference(bare_run(settings, 5), bare_run(recipe(0, scope="all"), 5)) > 1e-4
