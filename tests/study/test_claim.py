"""One runner per study, also where a file system has no locks."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_plasticity.errors import FolderHeld, UserError
from megatron_plasticity.study import claim
from megatron_plasticity.study.claim import RUNNER_FILE, claimed, living_runner, wait_for_a_silent_runner
from megatron_plasticity.tracking.process import host_name, process_start


@pytest.fixture(autouse=True)
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def granted(path: Path) -> Iterator[None]:
        yield

    monkeypatch.setattr(claim, "file_lock", granted)
    monkeypatch.setattr(claim, "SECONDS_BETWEEN_BEATS", 0.05)


def write(folder: Path, **content: object) -> None:
    runner = {"host": "elsewhere", "pid": 7, "token": "theirs", "heartbeat": 1.0}
    (folder / RUNNER_FILE).write_text(json.dumps({**runner, **content}))


def test_the_file_names_the_runner_and_beats(tmp_path: Path) -> None:
    with claimed(tmp_path) as mine:
        mine.note({"running": {"a": "b"}})
        first = json.loads((tmp_path / RUNNER_FILE).read_text())
        assert (first["host"], first["pid"], first["running"]) == (host_name(), os.getpid(), {"a": "b"})
        deadline = time.monotonic() + 5
        while json.loads((tmp_path / RUNNER_FILE).read_text())["heartbeat"] == first["heartbeat"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert living_runner(tmp_path) is not None
    assert not (tmp_path / RUNNER_FILE).exists()
    assert living_runner(tmp_path) is None


def test_a_living_runner_of_this_host_is_respected(tmp_path: Path) -> None:
    write(tmp_path, host=host_name(), pid=os.getppid(), process_start=process_start(os.getppid()))
    with pytest.raises(UserError, match=rf"process {os.getppid()} on"), claimed(tmp_path):
        raise AssertionError("must not be reached")


def test_one_that_is_gone_is_not(tmp_path: Path) -> None:
    write(tmp_path, host=host_name(), pid=os.getppid(), process_start=1)  # another process had that number
    with claimed(tmp_path) as mine:
        assert mine.lost is None


def test_a_runner_of_another_host_is_watched_first(tmp_path: Path) -> None:
    """By its beats, not by its clock, which may be wrong."""
    write(tmp_path)
    said: list[str] = []
    stopped = threading.Event()

    def beat() -> None:
        beats = 1.0
        while not stopped.wait(0.01):
            beats += 1
            temporary = tmp_path / "runner.new"
            temporary.write_text(json.dumps({"host": "elsewhere", "pid": 7, "token": "theirs", "heartbeat": beats}))
            temporary.replace(tmp_path / RUNNER_FILE)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 7 on elsewhere"), claimed(tmp_path, said.append):
            raise AssertionError("must not be reached")
    finally:
        stopped.set()
        thread.join()
    assert "watching" in said[0]
    with claimed(tmp_path, said.append) as mine:
        assert mine.lost is None, "it beats no longer"
    assert len(said) == 2


def test_a_runner_notices_that_another_took_over(tmp_path: Path) -> None:
    with claimed(tmp_path) as mine:
        write(tmp_path)
        deadline = time.monotonic() + 5
        while mine.lost is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert mine.lost == "process 7 on elsewhere"
    assert json.loads((tmp_path / RUNNER_FILE).read_text())["token"] == "theirs", "theirs is left alone"


def test_a_silent_runner_of_another_host_holds_nobody_up_for_ever(tmp_path: Path) -> None:
    write(tmp_path)
    said: list[str] = []
    wait_for_a_silent_runner(tmp_path, said.append)
    assert "watching for" in said[0]
    write(tmp_path, host=host_name(), pid=os.getpid(), process_start=process_start(os.getpid()))
    with pytest.raises(FolderHeld, match="is being run by process"):
        wait_for_a_silent_runner(tmp_path, said.append)
