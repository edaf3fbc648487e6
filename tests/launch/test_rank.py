"""What a rank does first and last: its environment, its rank, its record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_plasticity.errors import LostProcess, UserError
from megatron_plasticity.launch.folder import LaunchFolder, RankRecord, sweep
from megatron_plasticity.launch.rank import LAUNCH_FOLDER, launched_rank
from megatron_plasticity.launch.slurm import check_meeting_place, rank_environment
from megatron_plasticity.launch.stop import signal_ranks, stop
from megatron_plasticity.parallel.grid import _local_rank, resolve_device
from megatron_plasticity.tracking.process import host_name, process_start


def test_a_rank_takes_its_environment_and_leaves_its_exit_code(tmp_path: Path) -> None:
    folder = LaunchFolder.create(tmp_path / "launch", {"HF_TOKEN": "s3cret"})
    environment = {LAUNCH_FOLDER: str(folder.path), "RANK": "3"}
    with pytest.raises(SystemExit), launched_rank(environment):
        assert environment == {"RANK": "3", "HF_TOKEN": "s3cret"}, "and what it starts is no rank"
        (begun,) = folder.records()
        assert (begun.rank, begun.pid, begun.exit_code) == (3, os.getpid(), None)
        sys.exit(7)
    (ended,) = folder.records()
    assert ended.exit_code == 7
    assert ended.ended is not None


@pytest.mark.parametrize("ending", [None, 0])
def test_a_good_end_is_zero(tmp_path: Path, ending: int | None) -> None:
    folder = LaunchFolder.create(tmp_path / "launch", {})
    with pytest.raises(SystemExit), launched_rank({LAUNCH_FOLDER: str(folder.path), "RANK": "0"}):
        sys.exit(ending)
    assert folder.records()[0].exit_code == 0


def test_a_rank_says_that_it_ended_because_of_another(tmp_path: Path) -> None:
    folder = LaunchFolder.create(tmp_path / "launch", {})
    with pytest.raises(SystemExit), launched_rank({LAUNCH_FOLDER: str(folder.path), "RANK": "0"}):
        try:
            raise LostProcess("rank 1 on node2: no such file", 2)
        except UserError as error:  # as cli.py does
            sys.exit(error.exit_code)
    (ended,) = folder.records()
    assert (ended.exit_code, ended.because_of_another) == (2, True)


def test_a_defect_is_one(tmp_path: Path) -> None:
    folder = LaunchFolder.create(tmp_path / "launch", {})
    with pytest.raises(ZeroDivisionError), launched_rank({LAUNCH_FOLDER: str(folder.path), "RANK": "0"}):
        _ = 1 // 0
    assert folder.records()[0].exit_code == 1


def test_without_a_launch_nothing_happens() -> None:
    environment = {"RANK": "0"}
    with launched_rank(environment):
        assert environment == {"RANK": "0"}


def test_only_the_owner_can_read_the_environment_and_it_can_be_forgotten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = LaunchFolder.create(tmp_path / "launch", {"HF_TOKEN": "s3cret"})
    (file,) = (path for path in folder.path.iterdir() if path.is_file())
    assert file.stat().st_mode & 0o777 == 0o600
    folder.forget_environment()
    assert not file.exists()
    with pytest.raises(SystemExit) as ended, launched_rank({LAUNCH_FOLDER: str(folder.path), "RANK": "1"}):
        pass
    assert ended.value.code == 2
    assert "a rank on this machine cannot read it (No such file or directory)" in capsys.readouterr().err


def test_the_last_rank_that_reads_the_environment_removes_it(tmp_path: Path) -> None:
    """Whoever launched it may be gone by then."""
    folder = LaunchFolder.create(tmp_path / "launch", {"HF_TOKEN": "s3cret"})
    file = folder.path / "environment.json"
    with launched_rank({LAUNCH_FOLDER: str(folder.path), "RANK": "0", "WORLD_SIZE": "2"}):
        assert file.exists()
    with launched_rank({LAUNCH_FOLDER: str(folder.path), "RANK": "1", "WORLD_SIZE": "2"}):
        assert not file.exists()


def test_a_launch_sweeps_what_others_have_left(tmp_path: Path) -> None:
    folders = {
        name: LaunchFolder.create(tmp_path / name, {"HF_TOKEN": "s3cret"}) for name in ("mine", "new", "old", "killed", "far")
    }
    folders["mine"].record_launcher()
    note(folders["killed"], host_name(), os.getpid(), 1)  # another process had this number
    note(folders["far"], "elsewhere", os.getpid(), 1)
    os.utime(folders["old"].path / "environment.json", (0, 0))
    sweep(tmp_path)
    left = {name for name, folder in folders.items() if (folder.path / "environment.json").exists()}
    assert left == {"mine", "new", "far"}


def note(folder: LaunchFolder, host: str, pid: int, started: int | None) -> None:
    """Who launched it."""
    (folder.path / "launch.json").write_text(json.dumps({"host": host, "pid": pid, "process_start": started}))


def test_a_launch_is_stopped_through_the_process_that_watches_it(tmp_path: Path) -> None:
    folder = LaunchFolder.create(tmp_path / "launch", {})
    watcher = subprocess.Popen(["sleep", "60"])
    note(folder, host_name(), watcher.pid, process_start(watcher.pid))
    command = [sys.executable, "-m", "megatron_plasticity.launch.stop", str(folder.path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert f"process {watcher.pid}, which watches over the ranks, was told" in ended.stdout
    assert watcher.wait(10) == -signal.SIGTERM
    assert stop(folder) == "nothing of it runs any more"


def test_a_launch_without_a_watcher_is_stopped_through_its_ranks(tmp_path: Path) -> None:
    folder = LaunchFolder.create(tmp_path / "launch", {})
    note(folder, "elsewhere", 1, 1)
    with pytest.raises(UserError, match="try the same command on elsewhere"):
        stop(folder)
    sleeper = subprocess.Popen(["sleep", "60"])
    folder.record(RankRecord(0, "node7", 1, None))
    folder.record(RankRecord(1, host_name(), sleeper.pid, process_start(sleeper.pid)))
    assert stop(folder) == "rank 1 was told; all ranks of the run save and stop"
    assert sleeper.wait(10) == -signal.SIGTERM
    with pytest.raises(UserError, match="try the same command on elsewhere or node7"):
        stop(folder)
    with pytest.raises(UserError, match="not the folder of a launch"):
        stop(LaunchFolder(tmp_path))


def test_a_file_system_without_owners_gets_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open

    def for_everybody(path: str | Path, flags: int, mode: int = 0o777) -> int:
        descriptor = really_open(path, flags, mode)
        os.fchmod(descriptor, 0o755)
        return descriptor

    monkeypatch.setattr(os, "open", for_everybody)
    with pytest.raises(UserError, match="cannot keep a file to its owner"):
        LaunchFolder.create(tmp_path / "launch", {"HF_TOKEN": "s3cret"})
    assert not [path for path in (tmp_path / "launch").rglob("*") if path.is_file()]


def test_a_rank_that_starts_after_the_stop_ends_at_once(tmp_path: Path) -> None:
    folder = LaunchFolder.create(tmp_path / "launch", {})
    folder.ask_to_stop(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, launched_rank({LAUNCH_FOLDER: str(folder.path), "RANK": "0"}):
        raise AssertionError("it must not begin")
    assert ended.value.code == 128 + signal.SIGTERM


def test_only_living_ranks_of_this_machine_get_a_signal(tmp_path: Path) -> None:
    folder = LaunchFolder.create(tmp_path / "launch", {})
    sleeper = subprocess.Popen(["sleep", "60"])
    here, started = host_name(), process_start(sleeper.pid)
    folder.record(RankRecord(0, here, sleeper.pid, started))
    folder.record(RankRecord(1, "elsewhere", os.getpid(), process_start(os.getpid())))
    folder.record(RankRecord(2, here, os.getpid(), 1))  # another process had this number
    folder.record(RankRecord(3, here, os.getpid(), process_start(os.getpid()), exit_code=0))
    assert signal_ranks(folder, signal.SIGTERM) == [0]
    assert sleeper.wait(10) == -signal.SIGTERM


SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "20001"}


def test_a_task_of_srun_learns_its_rank() -> None:
    assert rank_environment(SLURM | MEETING) == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    # A step of fewer tasks than the allocation has.
    assert rank_environment(SLURM | MEETING | {"SLURM_STEP_NUM_TASKS": "6"})["WORLD_SIZE"] == "6"


@pytest.mark.parametrize("environment", [SLURM, MEETING, SLURM | MEETING | {"RANK": "0"}, {}])
def test_nothing_else_is_taken_for_one(environment: dict[str, str]) -> None:
    """A shell inside an allocation, a rank of another launcher, a plain process."""
    assert rank_environment(environment) == {}


def test_tasks_that_cannot_meet_do_not_train(capsys: pytest.CaptureFixture[str]) -> None:
    lonely = SLURM | {"SLURM_STEP_NUM_TASKS": "8", "MASTER_ADDR": "node1"}
    with pytest.raises(SystemExit) as ended, launched_rank(dict(lonely), trains=True):
        raise AssertionError("it must not begin")
    assert ended.value.code == 2
    assert "srun has started 8 tasks without MASTER_PORT" in capsys.readouterr().err
    with launched_rank(dict(lonely)):
        pass  # such as `srun megatron-plasticity doctor`
    for harmless in (lonely | MEETING, lonely | {"RANK": "0"}, SLURM, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, {}):
        check_meeting_place(harmless)


@pytest.mark.parametrize(("place", "count", "index"), [("3", 1, 0), ("3", 4, 3), (None, 1, 0), (None, 8, 0)])
def test_a_process_that_sees_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch, place: str | None, count: int, index: int) -> None:
    """As with one GPU bound to each task of Slurm."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if place is not None:
        monkeypatch.setenv("LOCAL_RANK", place)
    assert resolve_device("cuda").index == index
    with _local_rank(resolve_device("cuda")):
        assert os.environ["LOCAL_RANK"] == str(index), "DeepSpeed takes it for the number of the GPU"
    assert os.environ.get("LOCAL_RANK") == place


def test_a_process_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match="number 4 on its machine, from 0, and sees 4 GPUs"):
        resolve_device("cuda")
