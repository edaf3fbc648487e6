"""System metrics of training runs: who writes them, when, and that nothing depends on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_plasticity.config.hashing import config_hash
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.parallel.grid import ProcessGrid
from megatron_plasticity.tracking.metrics import MetricLog, read_metrics
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.training import system_metrics
from megatron_plasticity.training.pretrain import pretrain
from megatron_plasticity.training.system_metrics import SystemMetrics, watched_machine


def outcome(step: int) -> Any:
    return SimpleNamespace(step=step)


def test_a_row_follows_the_clock_and_the_last_step_has_one(tmp_path: Path) -> None:
    now = [0.0]
    with MetricLog(tmp_path / "system.jsonl") as log:
        callback = SystemMetrics(lambda: {"cpu": 33.333}, log, "system/", 10.0, 6, clock=lambda: now[0])
        for step in range(1, 7):
            now[0] += 4.0
            callback.after_step(outcome(step))
    rows = read_metrics(tmp_path / "system.jsonl")
    assert [(row["step"], row["system/cpu"]) for row in rows] == [(3, 33.3), (6, 33.3)]


def test_a_full_disk_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with MetricLog(tmp_path / "system.jsonl") as log:
        monkeypatch.setattr(log, "write", full)
        SystemMetrics(lambda: {"cpu": 1.0}, log, "system/", 0.0, 6).after_step(outcome(1))


class Grid(ProcessGrid):
    """A process of a launch on several hosts, without the launch."""

    size = 4  # type: ignore[assignment]

    def gather(self, value: Any) -> Any:
        return None

    def from_main(self, value: Any) -> Any:
        return ["one", "one", "two", "two"]


@pytest.mark.parametrize(("rank", "host", "written"), [(0, "one", True), (1, "one", False), (2, "two", True), (3, "two", False)])
def test_the_first_process_of_each_host_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, host: str, written: bool
) -> None:
    monkeypatch.setattr(system_metrics, "host_name", lambda: host)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    with watched_machine(tmp_path, 0.001, Grid(rank, 4, torch.device("cpu")), 0, 1) as callbacks:
        for callback in callbacks:
            callback.after_step(outcome(1))
    files = [path.name for path in tmp_path.iterdir()]
    assert files == ([f"system-{host}.jsonl"] if written else [])
    if written:
        (row,) = read_metrics(tmp_path / files[0])
        assert row[f"system/{host}/system_memory_usage_percentage"] > 0


def test_they_can_be_switched_off_and_change_neither_hash_nor_results(
    pretrain_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    def run(seconds: float, output: str) -> Any:
        changes = {"steps": 3, "logging": {"system_every_seconds": seconds}, "output": str(tmp_path / output)}
        return pretrain(pretrain_config(changes), NoProgress())

    on, off = run(0.001, "on"), run(0, "off")
    assert on.path.name == off.path.name
    assert config_hash(on.config) == config_hash(off.config)
    assert on.results == off.results
    assert [row["train/loss"] for row in read_metrics(on.metrics_path) if "train/loss" in row] == [
        row["train/loss"] for row in read_metrics(off.metrics_path) if "train/loss" in row
    ]
    rows = read_metrics(on.path / "system.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"system/cpu_utilization_percentage", "system/process_memory_usage_megabytes"} <= set(rows[0])
    assert not list(off.path.glob("system*"))
