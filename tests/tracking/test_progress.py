from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.tracking.progress import Both, ConsoleProgress, FolderProgress, NoProgress, Progress, format_duration
from megatron_plasticity.tracking.run_folder import RunFolder


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run(progress: Progress, clock: Clock, dones: range, total: int, seconds: float, **info: float | str) -> None:
    for done in dones:
        progress.update(done, total, "steps", **info)
        clock.now += seconds


def test_a_log_file_gets_a_line_every_ten_seconds_and_at_the_end(clock: Clock) -> None:
    stream = io.StringIO()
    with ConsoleProgress("pretrain", stream, clock=clock) as progress:
        run(progress, clock, range(31), 30, seconds=1.0)
    assert stream.getvalue().splitlines() == [
        "pretrain: 10/30 steps, 1 steps/s, 20 s left",
        "pretrain: 20/30 steps, 1 steps/s, 10 s left",
        "pretrain: 30/30 steps, 1 steps/s, took 30 s",
    ]


def test_tokens_per_second_and_other_information_are_shown(clock: Clock) -> None:
    stream = io.StringIO()
    with ConsoleProgress("pretrain", stream, interval=0.0, clock=clock) as progress:
        progress.update(1, 4, "steps")
        clock.now += 2.0
        progress.update(2, 4, "steps", tokens_per_second=12345.6, loss=3.14159, task="arithmetic")
    assert stream.getvalue().splitlines()[-1] == "pretrain: 2/4 steps, 12,346 tokens/s, loss 3.142, task arithmetic, 4 s left"


def test_a_resumed_run_does_not_count_what_it_did_not_do(clock: Clock) -> None:
    stream = io.StringIO()
    with ConsoleProgress("pretrain", stream, interval=0.0, clock=clock) as progress:
        progress.update(900, 1000, "steps")
        clock.now += 10.0
        progress.update(910, 1000, "steps")
    assert stream.getvalue().splitlines()[-1] == "pretrain: 910/1,000 steps, 1 steps/s, 1 min 30 s left"


def test_a_new_phase_has_a_clock_of_its_own(clock: Clock) -> None:
    stream = io.StringIO()
    with ConsoleProgress("evaluate", stream, interval=0.0, clock=clock) as progress:
        run(progress, clock, range(11), 10, seconds=1.0)
        clock.now += 1000.0
        run(progress, clock, range(3), 10, seconds=5.0)  # `done` starts again
    assert stream.getvalue().splitlines()[-1] == "evaluate: 2/10 steps, 0.2 steps/s, 40 s left"


def test_closing_prints_the_line_that_was_held_back_once(clock: Clock) -> None:
    stream = io.StringIO()
    progress = ConsoleProgress("pretrain", stream, clock=clock)
    run(progress, clock, range(4), 30, seconds=1.0)
    assert stream.getvalue() == ""
    progress.close()
    progress.close()
    assert stream.getvalue().splitlines() == ["pretrain: 3/30 steps, 1 steps/s, 27 s left"]


def test_a_terminal_gets_a_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    with ConsoleProgress("[pretrain]", stream, clock=clock) as progress:
        run(progress, clock, range(11), 10, seconds=1.0, loss=2.5)
    shown = stream.getvalue()
    assert "━" in shown
    assert "[pretrain]" in shown  # not taken for markup
    assert "10/10 steps" in shown
    assert "took 10 s" in shown


def test_both_passes_everything_on(tmp_path: Path, make_config: Callable[..., PretrainConfig], clock: Clock) -> None:
    folder = RunFolder.create(tmp_path, "pretrain", "wd0.5", make_config(), {})
    folder.mark_running()
    stream = io.StringIO()
    Both(ConsoleProgress("pretrain", stream, clock=clock), FolderProgress(folder), NoProgress()).update(30, 30, "steps", loss=2.0)
    assert stream.getvalue() == "pretrain: 30/30 steps, loss 2\n"
    assert folder.state.progress is not None
    assert folder.state.progress.items() >= {"done": 30, "total": 30, "unit": "steps", "loss": 2.0}.items()


def test_the_folder_is_told_once_a_second_and_at_the_end(
    tmp_path: Path, make_config: Callable[..., PretrainConfig], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.create(tmp_path, "pretrain", "wd0.5", make_config(), {})
    told: list[float] = []
    monkeypatch.setattr(RunFolder, "update_progress", lambda self, done, total, unit, **info: told.append(done))
    progress = FolderProgress(folder, clock)
    run(progress, clock, range(1, 31), 30, seconds=0.25)
    assert told == [1, 5, 9, 13, 17, 21, 25, 29, 30]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3599.9, "1 h 00 min"), (7500, "2 h 05 min")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
