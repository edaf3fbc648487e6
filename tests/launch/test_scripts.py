"""The shell wrappers: what they start, and what they say when they are used wrongly."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_plasticity.launch.slurm import BODY, STEP_OPTIONS


def call(repository: Path, folder: Path, *arguments: str, name: str = "deepspeed") -> subprocess.CompletedProcess[str]:
    """Run a copy of a script, beside which there is no environment, with a launcher that prints its arguments."""
    script = folder / "launch_scripts" / f"{name}.sh"
    script.parent.mkdir(exist_ok=True)
    script.write_text((repository / "launch_scripts" / f"{name}.sh").read_text())
    fake = folder / "bin" / name
    fake.parent.mkdir(exist_ok=True)
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    return subprocess.run(["bash", script, *arguments], env=environment, capture_output=True, text=True, timeout=30)


def test_it_starts_the_launcher(repository: Path, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=8\n")
    ended = call(repository, tmp_path, str(hostfile), "pretrain", "configs/x.yaml", "name=with space")
    assert ended.returncode == 0
    assert ended.stdout.splitlines() == [
        "--hostfile",
        str(hostfile),
        "--force_multi",
        "--module",
        "megatron_plasticity",
        "pretrain",
        "configs/x.yaml",
        "name=with space",
    ]


def test_it_explains_itself(repository: Path, tmp_path: Path) -> None:
    ended = call(repository, tmp_path)
    assert ended.returncode == 2
    assert "HOSTFILE has lines" in ended.stderr
    missing = call(repository, tmp_path, "nowhere", "pretrain", "x.yaml")
    assert missing.returncode == 2
    assert "nowhere: no such hostfile" in missing.stderr


def test_torchrun_is_started_with_the_place_of_this_node(repository: Path, tmp_path: Path) -> None:
    ended = call(repository, tmp_path, "2", "1", "node1", "8", "pretrain", "configs/x.yaml", "name=with space", name="torchrun")
    assert ended.returncode == 0
    assert " ".join(ended.stdout.splitlines()) == (
        "--nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr node1 --master-port 29500 "
        "--module megatron_plasticity pretrain configs/x.yaml name=with space"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "NODE_RANK which one this is"),
        (("2", "x", "node1", "8", "pretrain", "x.yaml"), "error: x: NODES, NODE_RANK and GPUS"),
    ],
)
def test_torchrun_explains_itself(repository: Path, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    ended = call(repository, tmp_path, *arguments, name="torchrun")
    assert ended.returncode == 2
    assert said in ended.stderr


def test_the_slurm_script_ends_as_the_one_that_launch_writes(repository: Path) -> None:
    """Whose behaviour tests/launch/test_slurm.py shows."""
    script = (repository / "launch_scripts" / "slurm.sbatch").read_text()
    assert script.endswith(BODY)
    assert f"srun {' '.join(STEP_OPTIONS)} " in BODY, "as in a study"
    assert "#SBATCH --signal=B:USR1@300" in script


def test_the_slurm_script_explains_itself(repository: Path) -> None:
    ended = subprocess.run(["bash", repository / "launch_scripts" / "slurm.sbatch"], capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2
    assert "usage: sbatch [OPTIONS] launch_scripts/slurm.sbatch" in ended.stderr


def test_the_slurm_script_names_a_python_without_this_project(repository: Path, tmp_path: Path) -> None:
    script, environment = repository / "launch_scripts" / "slurm.sbatch", {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7"}
    for added, named in (({}, ".venv/bin/python"), ({"PYTHON": "/nowhere/python"}, "/nowhere/python")):
        ended = subprocess.run(
            ["bash", script, "pretrain", "x.yaml"],
            cwd=tmp_path, env={**environment, **added}, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert ended.returncode == 2
        assert f"error: {named} in {tmp_path} cannot import megatron_plasticity" in ended.stderr
