"""What a rank does first and last: its environment, its rank, its record."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.folder import LaunchFolder, RankRecord
from megatron_plasticity.launch.rank import LAUNCH_FOLDER, launched_rank
from megatron_plasticity.launch.slurm import check_meeting_place, rank_environment
from megatron_plasticity.launch.stop import signal_ranks
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
