"""The real deepspeed launcher, as on a cluster, with two ranks on gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.launch.command import deepspeed_command
from megatron_plasticity.models.checkpoint import open_checkpoint
from megatron_plasticity.tracking.metrics import read_metrics
from megatron_plasticity.tracking.process import is_alive
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


@pytest.mark.slow
@pytest.mark.distributed
def test_ctrl_c_under_the_launcher_saves_on_every_rank(pretrain_config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    """The terminal signals the whole group, and the launcher its ranks once more."""
    changes = {"steps": 3000, "evaluate_every_steps": 0, "batch": {"micro_batch_size": 2}, "engine": {"zero_stage": 1}}
    config = pretrain_config({**changes, "checkpoint": {"every_steps": None}})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    with (tmp_path / "out").open("w") as out:
        launcher = subprocess.Popen(
            deepspeed_command("pretrain", path, 2), env=environment, cwd=tmp_path, stdout=out, stderr=out, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while not any(read_metrics(path) for path in (tmp_path / "runs").glob("*/metrics.jsonl")):
            assert launcher.poll() is None, (tmp_path / "out").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.killpg(launcher.pid, signal.SIGINT)
        launcher.wait(60)
    (folder,) = (tmp_path / "runs").iterdir()
    while is_alive((state := RunFolder.open(folder).state).pid, state.process_start):
        assert time.monotonic() < deadline + 60
        time.sleep(0.2)
    assert RunFolder.open(folder).state.status == "interrupted"
    assert open_checkpoint(folder).step > 0
