"""The preflight in a Slurm allocation, with an `srun` and a `scontrol` that do what Slurm's do, on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.launch.command import free_port
from megatron_plasticity.launch.job import LaunchedJob
from megatron_plasticity.launch.preflight import Check
from megatron_plasticity.launch.slurm_preflight import ask_nodes, preflight, tasks_per_node

# One task per node, each with its label; node3 has no Python there, and node4 is down. The all-reduce is a step of all tasks.
SRUN = """#!/bin/bash
echo "srun $* GPUS_PER_TASK=${SLURM_GPUS_PER_TASK-unset}" >> "$RECORD"
label=
while [[ $1 == --* ]]; do
    case $1 in --label) label=yes;; --output=*) output=${1#--output=};; esac
    shift
done
if [ -n "$label" ]; then
    question=$(cat)
    echo "0: Welcome to node1"
    echo "$question" | CUDA_VISIBLE_DEVICES=2,3 "$@" | sed 's/^/0: /'
    echo "$question" | "$@" | sed 's/^/1: /'
    if [ -n "$BROKEN" ]; then
        echo "2: /venv/bin/python: No such file or directory" >&2
        echo "srun: error: Node failure on node4" >&2
        exit 2
    fi
    exit 0
fi
for rank in 0 1 2 3; do
    SLURM_PROCID=$rank SLURM_NTASKS=4 SLURM_LOCALID=$((rank % 2)) SLURM_STEP_ID=0 "$@" > "${output//%t/$rank}" 2>&1 &
done
worst=0
for task in $(jobs -p); do wait "$task" || worst=$?; done
exit "$worst"
"""
SCONTROL = "#!/bin/bash\nprintf 'node%s\\n' $NODES\n"


@pytest.fixture
def allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two nodes of two tasks; returns where calls of `srun` are written down."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    values = {"RECORD": str(tmp_path / "record"), "NODES": "1 2", "SLURM_JOB_NODELIST": "node[1-2]", "BROKEN": ""}
    values |= {"SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_GPUS_PER_TASK": "1", "OMP_NUM_THREADS": "1"}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "record"


@pytest.fixture
def job(pretrain_config: Callable[..., PretrainConfig], tmp_path: Path) -> LaunchedJob:
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(pretrain_config({"batch": {"micro_batch_size": 1}}).model_dump(mode="json", exclude_none=True))
    )
    return LaunchedJob.load("pretrain", path, [])


def test_slurms_numbers_of_tasks() -> None:
    assert tasks_per_node("8(x3),4") == [8, 8, 8, 4]
    assert tasks_per_node("2") == [2]


@pytest.mark.distributed
def test_nodes_and_ranks_are_checked(allocation: Path, job: LaunchedJob, tmp_path: Path) -> None:
    checks = {check.name: check for check in preflight(job, 90, tmp_path)}
    assert [check for check in checks.values() if not check.passed] == []
    assert checks["srun, Python"].detail == "2 machines answered"
    assert checks["all-reduce"].detail.startswith("4 ranks over gloo")
    assert checks.keys() >= {"configuration", "versions", "inputs shared", "output shared", "disk", "clocks", "master port"}
    probe, _ = allocation.read_text().splitlines()
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in probe
    assert "GPUS_PER_TASK=unset" in probe, "one task sees all GPUs of its node"
    assert not list(tmp_path.glob(".all-reduce-*"))


def test_nodes_that_cannot_are_named_and_nothing_else_is_tried(
    allocation: Path, job: LaunchedJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKEN", "yes")
    monkeypatch.setenv("NODES", "1 2 3 4")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "1(x4)")
    checks: list[Check] = preflight(job, 90, tmp_path)
    problems = [problem for check in checks for problem in check.problems]
    assert [problem.split(" (")[0] for problem in problems] == [
        "node3: /venv/bin/python: No such file or directory",
        "node4: srun: error: Node failure on node4",
    ]
    assert len(allocation.read_text().splitlines()) == 1, "no all-reduce"


def test_a_node_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (answer,) = ask_nodes(["node1"], "{}", 0.5)
    assert answer.complaint == "did not answer in time"
