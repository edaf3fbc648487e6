"""How far a study is, as a person and a program see it."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from megatron_plasticity.study import claim
from megatron_plasticity.study.claim import RUNNER_FILE
from megatron_plasticity.study.plan import plan_study
from megatron_plasticity.study.runner import _write_study_file
from megatron_plasticity.study.status import StudyStatus, read_status, status_page
from megatron_plasticity.tracking.process import host_name, process_start
from megatron_plasticity.tracking.run_folder import RunFolder
from tests.commands import Run
from tests.study.small import small_study


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study with a base model that is done, one under way, and failures."""
    plan = plan_study(small_study(tmp_path), "hash")
    plan.folder.mkdir(parents=True)
    _write_study_file(plan, None)
    runs = {
        cell.id: RunFolder.create(cell.folder.parent, cell.kind, cell.name, cell.config, cell.inputs)
        for cell in plan.cells
        if cell.kind != "finetune" or cell.weight_decay == 1.0
    }
    for id in ("pretrain-wd0", "pretrain-wd1", "probes-wd0", "finetune-wd1-arithmetic"):
        runs[id].mark_running()
    runs["pretrain-wd0"].mark_done({"held_out_loss": 1.0})
    runs["pretrain-wd1"].update_progress(2, 6, "steps", tokens_per_second=1234.0)
    runs["probes-wd0"].mark_failed("ValueError: nothing to probe\nand a second line")
    runs["finetune-wd1-arithmetic"].mark_failed("[Errno 5] Input/output error")
    (plan.folder / RUNNER_FILE).write_text(
        json.dumps(
            {
                "host": "login1",
                "pid": 99,
                "heartbeat": time.time(),
                "running": {"pretrain-wd1": "job 5_0, running: node7", "attention-wd0": "job 6_0, pending: Priority"},
                "waiting": {
                    "finetune-wd1-arithmetic": {"until": time.time() + 90, "reason": "Input/output error", "failures": 1}
                },
            }
        )
    )
    return plan.folder


def text_of(status: StudyStatus, show_all: bool = False) -> str:
    stream = io.StringIO()
    Console(file=stream, width=160).print(status_page(status, show_all))
    return stream.getvalue()


def test_what_each_run_is(folder: Path) -> None:
    status = read_status(folder)
    by_id = {cell.id: cell for cell in status.cells}
    assert by_id["pretrain-wd0"].status == "done"
    under_way = by_id["pretrain-wd1"]
    assert (under_way.status, under_way.where, under_way.attempts) == ("running", "job 5_0, running: node7", 1)
    assert under_way.share == pytest.approx(1 / 3)
    assert by_id["attention-wd0"].status == "queued"
    assert by_id["finetune-wd1-arithmetic"].status == "retry"
    assert (by_id["probes-wd0"].status, by_id["probes-wd0"].headline) == ("failed", "ValueError: nothing to probe")
    assert by_id["features-wd0"].status == "waiting"
    assert status.counts["pretrain"] == {"done": 1, "running": 1}


def test_the_page_shows_what_matters(folder: Path) -> None:
    text = text_of(read_status(folder))
    assert "study small: 1 of 18 runs done; runner: process 99 on login1" in text
    assert "33%  2/6 steps, 1,234 tokens/s" in text
    assert "job 6_0, pending: Priority" in text
    assert "in 1 min" in text
    assert "ValueError: nothing to probe" in text
    assert "second line" not in text
    assert "features-wd0" not in text
    assert "features-wd0" in text_of(read_status(folder), show_all=True)


def test_without_a_runner_what_failed_blocks_what_needs_it(folder: Path) -> None:
    (folder / RUNNER_FILE).unlink()
    status = read_status(folder)
    by_id = {cell.id: cell for cell in status.cells}
    assert by_id["finetune-wd1-arithmetic"].status == "failed"
    assert by_id["evaluate-wd1-arithmetic"].status == "blocked"
    assert "no runner; `megatron-plasticity study run` goes on" in text_of(status)


def test_a_thousand_runs_fit_a_screen(folder: Path) -> None:
    study = json.loads((folder / "study.json").read_text())
    first = study["cells"][0]
    more = [{**first, "id": f"pretrain-{number}", "folder": f"pretrain-{number}-abcdef"} for number in range(1000)]
    for cell in more[:40]:
        (folder / cell["folder"]).mkdir()
        (folder / cell["folder"] / "config.yaml").touch()
        (folder / cell["folder"] / "state.json").write_text(json.dumps({"status": "failed", "error": "it broke"}))
    (folder / "study.json").write_text(json.dumps({**study, "cells": [*study["cells"], *more]}))
    began = time.process_time()
    text = text_of(read_status(folder))
    assert time.process_time() - began < 2
    assert len(text.splitlines()) < 60
    assert "26 more: --all" in text


def test_the_command(run: Run, folder: Path) -> None:
    code, out, _ = run("study", "status", folder)
    assert code == 0
    assert "1 of 18 runs done" in out
    code, out, _ = run("study", "status", folder, "--json")
    parsed = json.loads(out)
    assert parsed["runner"]["pid"] == 99
    assert parsed["counts"]["pretrain"] == {"done": 1, "running": 1}
    assert {cell["id"]: cell["status"] for cell in parsed["cells"]}["probes-wd0"] == "failed"


def test_watching_ends_when_all_is_done(run: Run, folder: Path) -> None:
    for cell in read_status(folder).cells:
        cell.folder.mkdir(exist_ok=True)
        (cell.folder / "config.yaml").touch()
        (cell.folder / "state.json").write_text(json.dumps({"status": "done"}))
    code, out, _ = run("study", "status", folder, "--watch", "--seconds", "0.1")
    assert code == 0
    assert "18 of 18 runs done" in out


def test_retry_names_what_it_cannot_do(run: Run, folder: Path) -> None:
    (folder / RUNNER_FILE).unlink()
    code, _, err = run("study", "retry", folder, "pretrain-wd0", "probes-wd00")
    assert code == 2
    assert "pretrain-wd0: is done; to have it done again, move" in err
    assert "probes-wd00: there is no such run; did you mean probes-wd0?" in err


def test_cancel_refuses_while_a_runner_lives(run: Run, folder: Path) -> None:
    runner = folder / RUNNER_FILE
    here = {"host": host_name(), "pid": os.getpid(), "process_start": process_start(os.getpid())}
    runner.write_text(json.dumps({**json.loads(runner.read_text()), **here}))
    code, _, err = run("study", "cancel", folder)
    assert code == 73
    assert f"is being run by process {os.getpid()} on" in err
    assert "would submit anew what is cancelled" in err


def test_cancel_does_not_wait_for_ever_for_a_runner_whose_machine_is_gone(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "SECONDS_BETWEEN_BEATS", 0.05)
    monkeypatch.setenv("PATH", "/nowhere")
    code, out, err = run("study", "cancel", folder)
    assert "process 99 on login1; watching for" in out
    assert code == 2
    assert "needs sbatch, squeue, scancel on PATH" in err, "it went on to ask Slurm"


def test_jobs_without_a_runner_are_in_the_queue_still(run: Run, folder: Path) -> None:
    (folder / RUNNER_FILE).unlink()
    cells = {cell.id: cell for cell in read_status(folder).cells}
    array = {"number": 1, "name": "small-1", "job": "5", "kind": "attention", "folders": [cells["attention-wd0"].folder.name]}
    (folder / "slurm.json").write_text(json.dumps({"arrays": [array]}))
    cell = next(cell for cell in read_status(folder).cells if cell.id == "attention-wd0")
    assert (cell.status, cell.where) == ("queued", "job 5_0, as it was submitted")
    (folder / "slurm.json").write_text("[1, 2")
    assert next(cell for cell in read_status(folder).cells if cell.id == "attention-wd0").status == "waiting"


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--watch", "--json"), "not allowed with"), (("--watch", "--seconds", "0"), "more than 0")],
)
def test_options_that_make_no_sense(run: Run, folder: Path, options: tuple[str, ...], message: str) -> None:
    code, _, err = run("study", "status", folder, *options)
    assert code == 2
    assert message in err
