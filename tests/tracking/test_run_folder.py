from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.errors import ConfigError, Interrupted, UserError
from megatron_plasticity.tracking import run_folder as run_folder_module
from megatron_plasticity.tracking.disk import explain_disk_errors
from megatron_plasticity.tracking.process import host_name, is_alive, process_start
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.tracking.run_state import RunState

ConfigMaker = Callable[..., PretrainConfig]


@pytest.fixture
def folder(tmp_path: Path, make_config: ConfigMaker) -> RunFolder:
    return RunFolder.create(tmp_path, "pretrain", "wd0.5", make_config(), {"corpus": "c0ffee"})


def set_state(folder: RunFolder, **changes: Any) -> None:
    replace(folder.state, **changes).write(folder.path / "state.json")


@contextmanager
def running_elsewhere(folder: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """Another process of this host that runs the folder until it is killed."""
    program = (
        "import sys, time; from pathlib import Path; from megatron_plasticity.tracking.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).running(): print('running', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(folder.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        yield process
    finally:
        process.kill()
        process.communicate()


class TestCreate:
    def test_the_name_tells_kind_name_and_hash(self, folder: RunFolder) -> None:
        assert folder.path.name == f"pretrain-wd0.5-{folder.hash}"
        assert (folder.kind, folder.name, len(folder.hash)) == ("pretrain", "wd0.5", 10)
        assert folder.inputs == {"corpus": "c0ffee"}
        assert folder.state == RunState()

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"optimizer": {"learning_rate": 1e-3, "adamw_timescale": math.inf}},
            {"steps": None, "tokens": 10_000, "capture": {"points": ["embed"], "steps": [0, 5]}},
            {"engine": {"deepspeed": {"zero_optimization": {"overlap_comm": False}}}},
            {"name": "null", "output": "/somewhere/else"},  # a name that YAML would read as nothing
        ],
    )
    def test_config_yaml_loads_back_to_an_equal_section(
        self, tmp_path: Path, make_config: ConfigMaker, changes: dict[str, Any]
    ) -> None:
        config = make_config(**changes)
        assert RunFolder.create(tmp_path, "pretrain", "x", config, {}).config == config

    def test_config_yaml_is_readable(self, folder: RunFolder) -> None:
        text = (folder.path / "config.yaml").read_text()
        assert "betas: [0.9, 0.95]\n" in text
        assert "optimizer:\n  learning_rate: 0.0003\n" in text
        assert yaml.safe_load(text)["data"]["folder"] == "data/tiny"
        assert "!!" not in text  # no Python types

    def test_an_equal_run_is_found_again(self, folder: RunFolder, tmp_path: Path, make_config: ConfigMaker) -> None:
        with folder.running():
            folder.mark_done({"held_out_loss": 3.0})
        again = RunFolder.create(tmp_path, "pretrain", "wd0.5", make_config(), {"corpus": "c0ffee"})
        assert again == folder
        assert again.is_done

    def test_other_inputs_are_another_run(self, folder: RunFolder, tmp_path: Path, make_config: ConfigMaker) -> None:
        assert RunFolder.create(tmp_path, "pretrain", "wd0.5", make_config(), {"corpus": "decaf"}) != folder

    def test_neutral_fields_follow_the_new_config_until_the_run_is_done(
        self, folder: RunFolder, tmp_path: Path, make_config: ConfigMaker
    ) -> None:
        def recreate(every_steps: int) -> int:
            config = make_config(logging={"every_steps": every_steps})
            again = RunFolder.create(tmp_path, "pretrain", "wd0.5", config, {"corpus": "c0ffee"})
            assert again == folder
            return again.config.model_dump()["logging"]["every_steps"]

        assert recreate(3) == 3
        with folder.running():
            assert recreate(5) == 3
            folder.mark_done({})
        assert recreate(7) == 3

    def test_the_kind_must_fit_the_config(self, tmp_path: Path, make_config: ConfigMaker) -> None:
        with pytest.raises(ValueError, match="'finetune' is configured by FinetuneConfig, not PretrainConfig"):
            RunFolder.create(tmp_path, "finetune", "x", make_config(), {})

    def test_a_file_in_the_way_is_explained(self, tmp_path: Path, make_config: ConfigMaker) -> None:
        (tmp_path / "runs").write_text("")
        with pytest.raises(UserError, match="a file is in its place"):
            RunFolder.create(tmp_path / "runs", "pretrain", "x", make_config(), {})


class TestOpen:
    def test_finds_the_folder_and_the_one_around_a_checkpoint(self, folder: RunFolder) -> None:
        checkpoint = folder.path / "checkpoints" / "step-10"
        checkpoint.mkdir(parents=True)
        assert RunFolder.open(folder.path) == folder
        assert RunFolder.containing(checkpoint) == RunFolder.containing(folder.path) == folder

    def test_a_misspelt_name_gets_a_suggestion(self, folder: RunFolder) -> None:
        with pytest.raises(UserError, match=rf"no such run folder; did you mean .*{folder.path.name}\?"):
            RunFolder.open(folder.path.with_name(folder.path.name.replace("wd0.5", "wd-0.5")))

    def test_a_folder_of_run_folders_lists_them(self, folder: RunFolder) -> None:
        with pytest.raises(
            UserError, match=rf"not a run folder, which has config.yaml .*; run folders in .*: {folder.path.name}"
        ):
            RunFolder.open(folder.path.parent)

    def test_a_folder_inside_a_run_is_explained(self, folder: RunFolder) -> None:
        (folder.path / "activations").mkdir()
        with pytest.raises(UserError, match=rf"not a run folder.*it lies in the run folder .*{folder.path.name}"):
            RunFolder.open(folder.path / "activations")

    def test_a_renamed_folder_is_refused(self, folder: RunFolder) -> None:
        moved = folder.path.rename(folder.path.with_name("mine"))
        with pytest.raises(UserError, match="is called <kind>-<name>-<hash>; give this one its name back"):
            RunFolder.open(moved)

    def test_an_edited_config_is_refused_with_the_key(self, folder: RunFolder) -> None:
        path = folder.path / "config.yaml"
        path.write_text(path.read_text().replace("seed: 42", "sed: 42"))
        with pytest.raises(ConfigError, match="sed: unknown key; did you mean 'seed'"):
            _ = folder.config

    def test_a_damaged_state_is_named(self, folder: RunFolder) -> None:
        (folder.path / "state.json").write_text('{"status": ')
        with pytest.raises(UserError, match=r"state\.json: cannot be read as JSON"):
            _ = folder.state


class TestStates:
    def test_pending_running_done(self, folder: RunFolder) -> None:
        assert folder.state.status == "pending"
        before = time.time()
        with folder.running():
            state = folder.state
            assert (state.status, state.host, state.pid, state.attempts) == ("running", host_name(), os.getpid(), 1)
            assert state.started is not None
            assert before <= state.started <= time.time()
            folder.mark_done({"steps": 30})
        assert folder.is_done
        assert folder.results == {"steps": 30}
        assert folder.state.finished is not None

    def test_an_error_is_kept_and_the_next_attempt_forgets_it(self, folder: RunFolder) -> None:
        with pytest.raises(ZeroDivisionError), folder.running():
            _ = 1 / 0
        assert (folder.state.status, folder.state.error) == ("failed", "ZeroDivisionError: division by zero")
        with folder.running():
            assert (folder.state.attempts, folder.state.error) == (2, None)
            folder.mark_done({})

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("stopped; saved at step 10", signal.SIGTERM)])
    def test_being_stopped_is_no_failure(self, folder: RunFolder, error: BaseException) -> None:
        with pytest.raises(type(error)), folder.running():
            raise error
        assert folder.state.status == "interrupted"

    def test_ending_without_results_is_a_failure(self, folder: RunFolder) -> None:
        with pytest.raises(RuntimeError, match="came to its end without results"), folder.running():
            pass
        assert folder.state.status == "failed"

    def test_what_is_done_stays_done(self, folder: RunFolder) -> None:
        with folder.running():
            folder.mark_done({"a": 1})
        with pytest.raises(UserError, match="is done already; delete the folder to run it again"), folder.running():
            pytest.fail("ran twice")
        folder.mark_failed("too late")
        assert folder.is_done

    def test_the_state_is_written_after_the_results(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mark_running()

        def fail(*_: object) -> None:
            raise OSError(errno.EIO, "killed between the two")

        monkeypatch.setattr(RunState, "write", fail)
        with pytest.raises(OSError, match="killed between"):
            folder.mark_done({"a": 1})
        assert json.loads((folder.path / "results.json").read_text()) == {"a": 1}
        assert not folder.is_done
        with pytest.raises(UserError, match="has no results yet, its state is 'running'"):
            _ = folder.results

    def test_results_hold_numbers_of_every_sort(self, folder: RunFolder) -> None:
        folder.mark_running()
        results = {
            "loss": math.inf,
            "per_head": np.array([[1.0, 2.0]]),
            "tensor": torch.tensor([1, 2]),
            "scalar": np.float64(-math.inf),
            "checkpoint": Path("checkpoints/step-3"),
            "text": "inf",
            "interval": (0.1, np.float32(0.5)),
        }
        folder.mark_done(results)
        json.loads((folder.path / "results.json").read_text(), parse_constant=pytest.fail)
        assert folder.results == {
            "loss": math.inf,
            "per_head": [[1.0, 2.0]],
            "tensor": [1, 2],
            "scalar": -math.inf,
            "checkpoint": "checkpoints/step-3",
            "text": "inf",
            "interval": [0.1, 0.5],
        }

    def test_checkpoints_are_sorted_by_step(self, folder: RunFolder) -> None:
        assert folder.checkpoints() == []
        for name in ("step-100", "step-9", "step-20", ".step-30.tmp", "step-x"):
            (folder.path / "checkpoints" / name).mkdir(parents=True)
        assert [path.name for path in folder.checkpoints()] == ["step-9", "step-20", "step-100"]


class TestProgress:
    def test_is_written_at_most_once_a_second_and_at_the_end(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [1000.0]
        monkeypatch.setattr(run_folder_module.time, "time", lambda: now[0])
        folder.mark_running()
        seen = []
        for done in range(41):
            folder.update_progress(done, 40, "steps", loss=math.nan if done == 40 else 1.0)
            progress = folder.state.progress
            assert progress is not None
            seen.append(progress["done"])
            now[0] += 0.0625
        assert sorted(set(seen)) == [0, 16, 32, 40]
        assert folder.state.heartbeat == 1000.0 + 40 * 0.0625
        assert math.isnan((folder.state.progress or {})["loss"])

    def test_means_nothing_for_a_run_that_is_not_running(self, folder: RunFolder) -> None:
        folder.update_progress(1, 2, "steps")
        assert folder.state == RunState()


class TestOneProcessAtATime:
    def test_a_second_process_is_refused_and_a_killed_one_is_taken_over(self, folder: RunFolder) -> None:
        with running_elsewhere(folder) as other:
            with (
                pytest.raises(UserError, match=rf"is being run by process {other.pid} on {host_name()}"),
                folder.running(),
            ):
                pytest.fail("two processes at once")
            assert folder.state.pid == other.pid
            assert folder.state.status == "running"
            other.send_signal(signal.SIGKILL)
            other.wait()
            assert json.loads((folder.path / "state.json").read_text())["status"] == "running"
            assert folder.state.status == "interrupted"
            assert folder.state.error == f"process {other.pid} on {host_name()} ended without a word"
        with folder.running():
            assert folder.state.attempts == 2
            folder.mark_done({})

    def test_the_lock_is_given_back_even_if_a_forked_child_lives_on(self, folder: RunFolder) -> None:
        with folder.lock():
            child = os.fork()
            if child == 0:  # pragma: no cover
                signal.pause()
                os._exit(0)
        try:
            with folder.lock():
                pass
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    def test_another_process_with_the_same_number_is_not_the_one(self, folder: RunFolder) -> None:
        folder.mark_running()
        start = process_start(os.getpid())
        assert start is not None
        set_state(folder, process_start=start - 1)
        assert folder.state.status == "interrupted"

    def test_a_heartbeat_from_another_host_holds_the_folder(self, folder: RunFolder) -> None:
        folder.mark_running()
        set_state(folder, host="node-7", pid=123, heartbeat=time.time() - 30)
        assert folder.state.status == "running"
        with pytest.raises(UserError, match=r"is being run by process 123 on node-7, last heard of 3\d s ago"), folder.running():
            pytest.fail("two hosts at once")
        set_state(folder, heartbeat=time.time() - 601)
        with folder.running():
            folder.mark_done({})

    def test_zombies_and_strangers(self) -> None:
        assert is_alive(os.getpid(), None)
        assert not is_alive(None, None)
        child = os.fork()
        if child == 0:  # pragma: no cover
            os._exit(0)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert not is_alive(child, None)  # ended, but not yet collected
        os.waitpid(child, 0)
        assert not is_alive(child, None)


class TestDiskErrors:
    def test_a_full_disk_is_said_plainly(self, tmp_path: Path) -> None:
        with (
            pytest.raises(UserError, match=rf"{tmp_path}: the disk is full.*make room and run the same command again"),
            explain_disk_errors(tmp_path),
            Path("/dev/full").open("w") as file,
        ):
            file.write("x")

    def test_libraries_that_do_not_raise_oserror_are_understood(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="the disk is full"), explain_disk_errors(tmp_path):
            torch.save({"a": torch.zeros(100_000)}, "/dev/full")

    def test_a_full_disk_leaves_the_earlier_state(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mark_running()
        before = sorted(path.name for path in folder.path.iterdir())

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=rf"{folder.path}: the disk is full"):
            folder.mark_done({"a": 1})
        assert folder.state.status == "running"
        assert sorted(path.name for path in folder.path.iterdir()) == before

    def test_the_error_of_the_run_is_the_one_that_is_seen(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.raises(ZeroDivisionError), folder.running():
            monkeypatch.setattr(os, "fsync", full)
            _ = 1 / 0

    def test_permissions_are_explained_and_other_errors_pass(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="writing is not allowed there"), explain_disk_errors(tmp_path):
            raise PermissionError(errno.EACCES, "Permission denied")
        with pytest.raises(OSError, match="Input/output"), explain_disk_errors(tmp_path):
            raise OSError(errno.EIO, "Input/output error")
        with pytest.raises(UserError, match=r"^already said$"), explain_disk_errors(tmp_path):
            raise UserError("already said")
