"""Runs on several ranks, really trained: over the machines of a hostfile, and as a Slurm job."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from megatron_plasticity.config.load import check_config, merge
from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.study.backends import slurm
from megatron_plasticity.study.runner import run_study
from megatron_plasticity.study.status import read_status
from tests.study.machines import NOTHING, fake_slurm, fake_ssh
from tests.study.small import small_tree

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def study(folder: Path, corpus: Path, resources: dict[str, Any]) -> StudyConfig:
    changes = {
        "corpus": None,
        "base": {"data": {"folder": str(corpus)}, "steps": 2, "batch": {"micro_batch_size": 1}, "capture": None},
        "axes": {"optimizer.weight_decay": [1.0]},
        "analyses": NOTHING,
        "tasks": [],
        "finetune": None,
        "resources": {"processes_per_run": 2, "retries": 0, **resources},
    }
    return check_config(StudyConfig, merge(small_tree(folder), changes), "spread study")


def log_and_loss(folder: Path) -> tuple[str, float]:
    (cell,) = read_status(folder).cells
    return (cell.folder / "log").read_text(), json.loads((cell.folder / "results.json").read_text())["held_out_loss"]


@pytest.mark.full  # half a minute: each launcher imports DeepSpeed three times
def test_over_machines(tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_ssh(tmp_path, monkeypatch)
    hosts = tmp_path / "hosts"
    hosts.write_text(f"{socket.gethostname()} slots=1\nlocalhost slots=1\n")
    outcome = run_study(study(tmp_path, tiny_corpus, {"backend": "hostfile", "hostfile": str(hosts)}))
    assert outcome.failed == {}
    text, loss = log_and_loss(outcome.folder)
    assert 4 < loss < 7
    assert "layout data 2," in text
    started = [line for line in calls.read_text().splitlines() if line.endswith("megatron_plasticity.study.backends.remote")]
    assert len(started) == 2, "one connection for each machine"


def test_as_a_slurm_job(tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "_SECONDS_BETWEEN_QUERIES", 0.5)
    with fake_slurm(tmp_path, monkeypatch) as queue:
        outcome = run_study(study(tmp_path, tiny_corpus, {"backend": "slurm"}))
    assert outcome.failed == {}
    text, loss = log_and_loss(outcome.folder)
    assert 4 < loss < 7
    (srun,) = [line for line in (queue / "calls").read_text().splitlines() if line.startswith("srun")]
    assert "--export=ALL --kill-on-bad-exit=0 --wait=900" in srun, "who still saves is left to it"
    assert "#SBATCH --ntasks-per-node=2\n" in (queue / "submitted-100").read_text()
    assert "attempt 1 of job 100_0" in text
