"""The real deepspeed launcher, as on a cluster, with two ranks on gloo."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.launch.command import deepspeed_command
from megatron_plasticity.tracking.run_folder import RunFolder


@pytest.mark.slow
@pytest.mark.distributed
def test_the_deepspeed_launcher_trains_on_two_ranks(pretrain_config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    config = pretrain_config({"steps": 3, "batch": {"micro_batch_size": 2}, "engine": {"zero_stage": 2}})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    ended = subprocess.run(
        deepspeed_command("pretrain", path, 2), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()
    assert RunFolder.open(folder).results["steps"] == 3
    assert ended.stdout.count("held_out_loss") == 1, "one rank speaks"


@pytest.mark.slow
@pytest.mark.distributed
def test_an_error_under_the_launcher_arrives(pretrain_config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    config = pretrain_config({"batch": {"micro_batch_size": 4}})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    ended = subprocess.run(
        deepspeed_command("pretrain", path, 2), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode != 0
    assert "global_batch_size=4 cannot be split over 2 data-parallel ranks" in ended.stdout + ended.stderr
