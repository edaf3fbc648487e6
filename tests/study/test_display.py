"""What a person sees while a study runs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from megatron_plasticity.study.display import StudyDisplay
from megatron_plasticity.study.plan import StudyPlan, plan_study
from megatron_plasticity.tracking.run_folder import RunFolder
from tests.study.small import small_study


class Clock:
    """time.time() of a run folder, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("megatron_plasticity.tracking.run_folder.time.time", clock)
    return clock


@pytest.fixture
def plan(tmp_path: Path) -> StudyPlan:
    return plan_study(small_study(tmp_path), "hash")


def running_folder(plan: StudyPlan) -> RunFolder:
    cell = plan.cells[0]
    folder = RunFolder.create(cell.folder.parent, cell.kind, "wd0", cell.config, {"corpus": "hash"})
    assert folder.path == cell.folder, "the plan knows the folder before the run makes it"
    folder.mark_running()
    return folder


def line(plan: StudyPlan, monkeypatch: pytest.MonkeyPatch) -> str:
    """The line that a log gets while the first cell runs."""
    monkeypatch.setattr("megatron_plasticity.study.display._SECONDS_BETWEEN_LINES", 0.0)
    stream = io.StringIO()
    with StudyDisplay(plan, already_done=set(), stream=stream) as display:
        display.refresh([plan.cells[0]], set(), {})
    return stream.getvalue().splitlines()[-1]


def test_a_resumed_run_is_timed_from_where_it_went_on(plan: StudyPlan, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = running_folder(plan)
    folder.update_progress(300, 600, "steps", tokens_per_second=8000.0)
    assert "left;" not in line(plan, monkeypatch), "nothing is known of this attempt's speed yet"
    clock.now += 10
    folder.update_progress(310, 600, "steps", tokens_per_second=8000.0)
    text = line(plan, monkeypatch)
    assert "310/600 steps, 8,000 tokens/s, 4 min 50 s left" in text
    assert text.startswith("0/18 runs, about ")


def test_finished_and_failed_runs_are_told(plan: StudyPlan, clock: Clock) -> None:
    folder = running_folder(plan)
    clock.now += 65
    folder.mark_done({"held_out_loss": 1.25})
    stream = io.StringIO()
    with StudyDisplay(plan, already_done=set(), stream=stream) as display:
        display.finished(plan.cells[0])
        display.failed(plan.cells[1], "the disk is full")
    text = stream.getvalue()
    assert "[1/18] pretrain-wd0 done in 1 min 05 s: held-out loss 1.2500" in text
    assert "probes-wd0 FAILED: the disk is full" in text
    assert str(plan.cells[1].folder / "log") in text


def test_a_terminal_gets_bars(plan: StudyPlan, clock: Clock) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    folder = running_folder(plan)
    folder.update_progress(1, 6, "steps")
    clock.now += 10
    folder.update_progress(3, 6, "steps")
    stream = Terminal()
    with StudyDisplay(plan, already_done=set(), stream=stream) as display:
        display.refresh([plan.cells[0]], set(), {})
    assert "3/6 steps" in stream.getvalue()
    assert "15 s left" in stream.getvalue()


def test_damaged_results_do_not_stop_the_view(plan: StudyPlan, clock: Clock) -> None:
    folder = running_folder(plan)
    folder.mark_done({"held_out_loss": 1.25})
    (folder.path / "results.json").write_text("{")
    stream = io.StringIO()
    with StudyDisplay(plan, already_done=set(), stream=stream) as display:
        display.finished(plan.cells[0])
    assert "pretrain-wd0 done" in stream.getvalue()
