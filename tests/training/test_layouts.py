"""Whole jobs under tensor, sequence and pipeline parallelism: what they leave behind equals what one process leaves behind."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_plasticity.capture.points import hook_points
from megatron_plasticity.capture.store import ActivationStore
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.errors import Interrupted
from megatron_plasticity.models.checkpoint import open_checkpoint
from megatron_plasticity.tracking.metrics import read_metrics
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.training.finetune import finetune
from megatron_plasticity.training.pretrain import pretrain
from tests.ranks import run_on_ranks
from tests.training.test_pretrain import StopAt, final_weights

pytestmark = pytest.mark.distributed

Make = Callable[..., PretrainConfig]

# Smooth enough that rounding, which a layout changes, does not grow: Adam divides by the square root of small gradients.
SMOOTH = {"optimizer": {"learning_rate": 0.001, "eps": 1e-5}}
OLMO = {"model": {"family": "olmo2", "z_loss_weight": 1e-3, "norm_eps": 1e-6, "layers": 3}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2 with sequence, ZeRO 3": (
        2,
        {"parallel": {"tensor": 2, "sequence": True}, "engine": {"zero_stage": 3}, "batch": {"micro_batch_size": 2}},
    ),
    "pipeline 2": (2, {"parallel": {"pipeline": 2}, "batch": {"micro_batch_size": 1}}),
    "pipeline 2 × tensor 2 with sequence": (
        4,
        {
            "parallel": {"pipeline": 2, "tensor": 2, "sequence": True, "layers_per_stage": [1, 2]},
            "batch": {"micro_batch_size": 2},
            "engine": {"zero_stage": 1, "activation_checkpointing": True},
        },
    ),
    "pipeline 2 × data 2": (4, {"parallel": {"pipeline": 2}, "batch": {"micro_batch_size": 1}, "engine": {"zero_stage": 1}}),
}


def pretrain_on_a_rank(config: PretrainConfig, stop_at: int | None = None) -> str:
    """For `run_on_ranks`; with `stop_at`, the main process is sent a SIGTERM at that step, as by a scheduler."""
    try:
        return str(pretrain(config, NoProgress() if stop_at is None else StopAt(stop_at, signal.SIGTERM)).path)
    except Interrupted as error:
        return str(error)


def finetune_on_a_rank(config: FinetuneConfig) -> str:
    return str(finetune(config, NoProgress()).path)


def assert_same_rows(ours: RunFolder, theirs: RunFolder) -> None:
    """Every metric but the clock's, to fp32 rounding."""
    rows, expected = read_metrics(ours.metrics_path), read_metrics(theirs.metrics_path)
    assert [set(row) for row in rows] == [set(row) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for key in set(row) - {"time", "train/tokens_per_second"}:
            assert row[key] == pytest.approx(other[key], rel=2e-5), (row["step"], key)


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], relative: float = 1e-5) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert float((tensor - theirs[name]).norm() / theirs[name].norm()) < relative, name


def assert_same_activations(ours: ActivationStore, theirs: ActivationStore, step: int) -> None:
    assert ours.points(step) == theirs.points(step)
    for point in ours.points(step):
        a, b = ours.read(step, point), theirs.read(step, point)
        assert a.shape == b.shape, point
        if point == "logits.ids":  # two nearly equal logits may change places
            assert float((a == b).double().mean()) > 0.99, step
        else:
            assert float((a - b).norm() / b.norm()) < 2e-5, (step, point)


@pytest.mark.parametrize("family", ["llama2", "olmo2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pretraining_leaves_the_same_behind(pretrain_config: Make, tmp_path: Path, layout: str, family: str) -> None:
    """Losses, norms, held-out losses, weights and the activations of every hook point; the run folder's hash is the same too."""
    shared = {**SMOOTH, **(OLMO if family == "olmo2" else {"model": {"layers": 3}})}
    shared["capture"] = {"steps": [0, 12], "sequences": 5, "points": ["*", "logits"], "dtype": "float32"}
    alone = pretrain(pretrain_config({"output": str(tmp_path / "a"), **shared}), NoProgress())
    processes, changes = LAYOUTS[layout]
    merged = {**shared, **changes, "output": str(tmp_path / "b")}
    paths = run_on_ranks(processes, pretrain_on_a_rank, pretrain_config(merged), log=tmp_path / "log")
    together = RunFolder.open(Path(paths[0]))
    assert together.path.name == alone.path.name, "a layout does not enter the hash"
    assert_same_rows(together, alone)
    assert_close(final_weights(together), final_weights(alone))
    theirs, ours = ActivationStore(alone.path / "activations"), ActivationStore(together.path / "activations")
    config = pretrain_config(merged).model
    assert ours.points(12) == [*hook_points(config), "logits.values", "logits.ids"]
    for step in (0, 12):
        assert_same_activations(ours, theirs, step)


def test_a_run_goes_on_under_another_layout(pretrain_config: Make, tmp_path: Path) -> None:
    """The same command with another `parallel`: four processes, then one, then two, in one run folder."""
    undisturbed = pretrain(pretrain_config({"output": str(tmp_path / "a"), **SMOOTH}), NoProgress())
    shared = {"output": str(tmp_path / "b"), **SMOOTH}
    four = {"parallel": {"pipeline": 2, "tensor": 2, "sequence": True}, "batch": {"micro_batch_size": 2}}
    stopped = run_on_ranks(4, pretrain_on_a_rank, pretrain_config({**shared, **four}), 3, log=tmp_path / "log")
    assert all("after step 3" in message for message in stopped)
    with pytest.raises(Interrupted, match="after step 7"):
        pretrain(pretrain_config(shared), StopAt(7, signal.SIGTERM))
    two = {"parallel": {"tensor": 2}, "engine": {"zero_stage": 3}}
    (path, _) = run_on_ranks(2, pretrain_on_a_rank, pretrain_config({**shared, **two}), log=tmp_path / "log")
    resumed = RunFolder.open(Path(path))
    assert resumed.path.name == undisturbed.path.name
    assert resumed.state.attempts == 3
    assert_same_rows(resumed, undisturbed)
    assert_close(final_weights(resumed), final_weights(undisturbed))


@pytest.mark.parametrize("layout", ["tensor 2 with sequence, ZeRO 3", "pipeline 2", "pipeline 2 × tensor 2 with sequence"])
def test_fine_tuning_examples_of_different_lengths(
    pretrain_config: Make, finetune_config: Callable[..., FinetuneConfig], tmp_path: Path, layout: str
) -> None:
    base = pretrain(pretrain_config({"steps": 2, "model": {"layers": 3, "context_length": 128}}), NoProgress())
    # Examples of 103 to 170 tokens, cut at an odd length, so that sequence parallelism must pad.
    shared = {"optimizer": {"learning_rate": 0.001, "eps": 1e-5}, "task": {"name": "steps"}, "max_length": 120,
              "capture": {"points": ["*resid*", "*attn.q", "logits"], "positions": "answer", "sequences": 5, "max_tokens": 119,
                          "keep": "both"}}  # fmt: skip
    alone = finetune(finetune_config(base.path, {"output": str(tmp_path / "a"), **shared}), NoProgress())
    processes, changes = LAYOUTS[layout]
    config = finetune_config(base.path, {**shared, **changes, "output": str(tmp_path / "b")})
    together = RunFolder.open(Path(run_on_ranks(processes, finetune_on_a_rank, config, log=tmp_path / "log")[0]))
    assert together.path.name == alone.path.name
    assert_same_rows(together, alone)
    assert_close(final_weights(together), final_weights(alone))
    theirs, ours = ActivationStore(alone.path / "activations"), ActivationStore(together.path / "activations")
    (last,) = theirs.steps
    assert_same_activations(ours, theirs, last)
    for point in theirs.points_with_statistics(last):
        torch.testing.assert_close(
            ours.statistics(last, point).covariance, theirs.statistics(last, point).covariance, rtol=1e-3, atol=1e-5
        )


def test_a_checkpoint_is_the_same_file_from_every_layout(pretrain_config: Make, tmp_path: Path) -> None:
    """Nothing was trained yet: initial weights come from the whole tensor's stream, and are written whole, byte for byte."""
    hashes = set()
    for number, (processes, changes) in enumerate([(1, {}), *LAYOUTS.values()]):
        config = pretrain_config({**changes, "output": str(tmp_path / str(number)), "model": {"layers": 3}, "steps": 1,
                                  "optimizer": {"learning_rate": 1e-30, "weight_decay": 0.0}})  # fmt: skip
        paths = run_on_ranks(processes, pretrain_on_a_rank, config, log=tmp_path / "log")
        checkpoint = open_checkpoint(Path(paths[0])).path
        hashes.add((checkpoint / "weights-00001.safetensors").read_bytes())
    assert len(hashes) == 1
