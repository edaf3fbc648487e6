"""Pipeline and tensor parallelism through the real deepspeed launcher, as on a cluster."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.launch.command import deepspeed_command
from megatron_plasticity.models.checkpoint import open_checkpoint
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.training.pretrain import pretrain

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS = {"steps": 3, "optimizer": {"eps": 1e-4}}
LAYOUT: dict[str, Any] = {
    **STEPS,
    "parallel": {"pipeline": 2, "tensor": 2, "sequence": True},
    "batch": {"micro_batch_size": 2},
    "engine": {"zero_stage": 1},
}


def launch(config: PretrainConfig, processes: int, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    command = deepspeed_command("pretrain", path, processes)
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=250)


def test_two_stages_of_two_tensor_parallel_ranks_train_as_one_process(
    pretrain_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    ended = launch(pretrain_config(LAYOUT), 4, tmp_path)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert ended.stdout.count("held_out_loss") == 1, "one rank speaks"
    (folder,) = (tmp_path / "runs").iterdir()
    alone = pretrain(pretrain_config({**STEPS, "output": str(tmp_path / "alone")}), NoProgress())
    assert folder.name == alone.path.name
    for loss in ("held_out_loss", "seen_loss", "train_loss"):
        assert RunFolder.open(folder).results[loss] == pytest.approx(alone.results[loss], rel=1e-5)
    ours, theirs = open_checkpoint(folder).tensors(), open_checkpoint(alone.path).tensors()
    for name in theirs:
        assert float((ours[name] - theirs[name]).norm() / theirs[name].norm()) < 1e-5, name


def test_a_wrong_number_of_processes_ends_before_any_work(pretrain_config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    # With MLflow: its mirror makes the run folder early.
    ended = launch(pretrain_config({**LAYOUT, "logging": {"mlflow": True}}), 3, tmp_path)
    assert ended.returncode == 2
    said = ended.stdout + ended.stderr
    assert "pipeline=2 × tensor=2 needs a multiple of 4 processes, and there are 3" in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()
