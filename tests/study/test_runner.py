"""A whole study, small: run, interrupted, gone on with, failed in part, reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_plasticity.config.data import DataConfig
from megatron_plasticity.data.stream import corpus_hash
from megatron_plasticity.launch.plan import Machine
from megatron_plasticity.study.cost import Costs
from megatron_plasticity.study.plan import plan_study
from megatron_plasticity.study.report import write_report
from megatron_plasticity.study.results import collect
from megatron_plasticity.study.runner import run_study
from tests.study.small import small_study, small_tree

pytestmark = pytest.mark.slow

NOTHING = {"probes": None, "attention": None, "overfitting": None, "features": None, "truncation": None}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "megatron_plasticity", *map(str, arguments)]


def write_study(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(small_tree(folder, changes)))
    return path


def test_a_study_from_corpus_to_report(tmp_path: Path) -> None:
    outcome = run_study(small_study(tmp_path))
    assert outcome.failed == {}
    assert outcome.not_started == ()
    assert len(outcome.done) == 18
    results = collect(outcome.folder)
    assert {cell.status for cell in results.cells} == {"done"}
    plan = plan_study(small_study(tmp_path), corpus_hash(DataConfig(folder=next((tmp_path / "data").glob("small-*")))))
    costs = Costs(plan, Machine())
    for cell in plan.cells:
        if cell.kind in ("pretrain", "finetune"):
            written = [*cell.folder.glob("checkpoints/**/*.safetensors"), *cell.folder.glob("activations/**/*.safetensors")]
            assert sum(path.stat().st_size for path in written) == pytest.approx(costs.of_one(cell).disk, rel=0.05), "as planned"
    assert results.weight_decays == (0.0, 1.0)

    page = write_report(outcome.folder)
    text = page.read_text()
    assert "<svg" in text
    assert "<script" not in text
    assert (page.parent / "cells.csv").is_file()
    assert json.loads((page.parent / "report.json").read_text())

    first = next(cell for cell in results.cells if cell.id == "pretrain-wd1")
    written = (first.folder / "results.json").stat().st_mtime_ns
    again = run_study(small_study(tmp_path))
    assert len(again.done) == 18
    assert (first.folder / "results.json").stat().st_mtime_ns == written, "what is done is not done again"


def test_fine_tuning_in_several_ways_from_several_checkpoints(tmp_path: Path) -> None:
    changes = {
        "analyses": NOTHING,
        "finetune_axes": {"optimizer.learning_rate": [0.001, 0.01], "seed": [1, 2]},
        "finetune_steps": [4],
    }
    outcome = run_study(small_study(tmp_path, changes))
    assert outcome.failed == {}
    assert len(outcome.done) == 2 * (1 + 2 * (1 + 2 * 4)), "every folder has the name that was planned"
    results = collect(outcome.folder)
    assert list(results.variants) == ["learning_rate = 0.001", "learning_rate = 0.01"]
    models = results.groups[0].models
    assert all(len(scores.by_seed) == 2 for model in models for scores in model.finetuned_scores.values())
    assert all(set(model.earlier[4].finetuned_scores) == set(model.finetuned_scores) for model in models)
    assert 'id="steps"' in write_report(outcome.folder).read_text()


def test_a_stopped_study_keeps_what_is_done_and_goes_on(tmp_path: Path) -> None:
    study = write_study(
        tmp_path, {"base": {"steps": 400}, "axes": {"optimizer.weight_decay": [1.0]}, "analyses": NOTHING, "tasks": []}
    )
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command("study", "run", study), stdout=out, stderr=subprocess.STDOUT)
        state = wait_for_progress(tmp_path / "runs" / "small", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert "the same command goes on from here" in (tmp_path / "out").read_text()
    left = json.loads(state.read_text())
    assert left["status"] == "interrupted"
    stopped_at = left["progress"]["done"]
    assert 0 < stopped_at < 400
    assert not list(state.parent.glob("checkpoints/.*")), "nothing half-written"

    finished = subprocess.run(command("study", "run", study, "base.steps=400"), capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    end = json.loads(state.read_text())
    assert end["status"] == "done"
    assert end["attempts"] == 2
    steps = [json.loads(line)["step"] for line in (state.parent / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps), "steps are counted once"


def test_a_failure_stops_only_what_depends_on_it(tmp_path: Path) -> None:
    # λ·lr > 2 makes weights explode: this base model fails, the other one is not concerned.
    changes = {"axes": {"optimizer.weight_decay": [0.0, 1e30]}, "analyses": {**NOTHING, "attention": {"map_sequences": 1}}}
    outcome = run_study(small_study(tmp_path, changes))
    assert set(outcome.failed) == {"pretrain-wd1e30"}
    assert "Lower the learning rate or λ" in outcome.failed["pretrain-wd1e30"]
    assert set(outcome.not_started) == {f"{kind}-wd1e30" for kind in ("attention", "evaluate")} | {
        "finetune-wd1e30-arithmetic",
        "evaluate-wd1e30-arithmetic",
    }
    assert len(outcome.done) == 5
    text = write_report(outcome.folder).read_text()
    assert "Lower the learning rate or λ" in text


def test_two_runners_do_not_meet(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"base": {"steps": 400}, "analyses": NOTHING, "tasks": []})
    first = subprocess.Popen(command("study", "run", study), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_progress(tmp_path / "runs" / "small", first)
        second = subprocess.run(command("study", "run", study), capture_output=True, text=True, timeout=60)
        assert second.returncode == 73
        assert f"process {first.pid}" in second.stderr
    finally:
        first.send_signal(signal.SIGTERM)
        first.wait(60)


def test_workers_end_with_a_runner_that_is_killed(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"base": {"steps": 2000}, "analyses": NOTHING, "tasks": []})
    runner = subprocess.Popen(command("study", "run", study), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = wait_for_progress(tmp_path / "runs" / "small", runner)
    worker = json.loads(state.read_text())["pid"]
    runner.kill()
    runner.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}/stat").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not is_running(worker)
    assert json.loads(state.read_text())["status"] == "interrupted"


def wait_for_progress(folder: Path, process: subprocess.Popen[bytes]) -> Path:
    """The state file of a pretraining run that has taken a step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the study ended too early"
        for state in folder.glob("pretrain-*/state.json"):
            progress = json.loads(state.read_text()).get("progress")
            if progress and progress["done"] > 0:
                return state
        time.sleep(0.1)
    raise AssertionError("no run made progress")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
