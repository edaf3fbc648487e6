"""Exit codes, signals and secrets of a launch, with DeepSpeed's real launcher and ranks that do next to nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.errors import LostProcess, UserError
from megatron_plasticity.launch.attempt import Launcher, Outcome
from megatron_plasticity.launch.command import Meeting, cluster_command, free_port
from megatron_plasticity.launch.environment import travelling
from megatron_plasticity.launch.folder import RankRecord
from megatron_plasticity.launch.machines import Machines
from megatron_plasticity.models.checkpoint import open_checkpoint
from megatron_plasticity.tracking.metrics import read_metrics
from megatron_plasticity.tracking.run_folder import RunFolder
from tests.launch.test_environment import SECRETS


def record(rank: int, exit_code: int | None, ended: float | None = None) -> RankRecord:
    return RankRecord(rank, "node1", 1000 + rank, None, exit_code, ended)


@pytest.mark.parametrize(
    ("launcher_code", "records", "stopped_by", "expected"),
    [
        (0, [record(0, 0), record(1, 0)], None, 0),
        # pdsh gives the largest code, which the rank that was ended by its launcher has.
        (143, [record(0, 143, 5.0), record(1, 2, 4.0)], None, 2),
        (7, [record(0, 7, 9.0), record(1, 3, 8.0)], None, 3),
        (75, [record(0, 75, 5.0), record(1, None)], None, 75),
        (247, [record(0, 143, 5.0), record(1, None)], None, 128 + signal.SIGKILL),
        (255, [record(0, 75, 5.0), record(1, None)], None, LostProcess.exit_code),
        (143, [record(0, 143, 5.0), record(1, 143, 5.0)], signal.SIGINT, 130),
        (-9, [], None, 137),
        (1, [], None, 1),
    ],
)
def test_the_exit_code_says_what_went_wrong_first(
    launcher_code: int, records: list[RankRecord], stopped_by: int | None, expected: int
) -> None:
    assert Outcome(launcher_code, records, 2, stopped_by).exit_code == expected


def test_what_a_remote_shell_would_take_apart_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="without quotes") as caught:
        cluster_command(["--module", "x", "a;b"], Path("hostfile"), Meeting("node1", 29500), Path("logs"))
    assert "with space" in str(caught.value)
    assert "'a;b'" in str(caught.value)


RANK = """
import os, sys, time
from megatron_plasticity.launch.rank import launched_rank

with launched_rank(os.environ):
    print("the token is as long as", len(os.environ["HF_TOKEN"]), flush=True)
    if os.environ["RANK"] == "1":
        sys.exit(7)
    time.sleep(60)
"""


@pytest.mark.distributed
def test_the_code_of_the_rank_that_failed_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launcher = Launcher(Machines.local(2), Meeting("127.0.0.1", free_port()), travelling(os.environ), cpu=True, threads=1)
    outcome = launcher.run([str(script)], tmp_path / "logs", echo=True)
    assert outcome.exit_code == 7
    assert outcome.first_to_fail is not None
    assert outcome.first_to_fail.rank == 1
    assert outcome.without_a_word == [0], "it sleeps and is ended"
    assert capsys.readouterr().out.startswith(f"the token is as long as {len(SECRETS['HF_TOKEN'])}")
    written = "".join(path.read_text(errors="replace") for path in (tmp_path / "logs").rglob("*") if path.is_file())
    assert "--num_gpus 2" in written
    assert not [name for name, secret in SECRETS.items() if secret in written]


@pytest.mark.slow
@pytest.mark.distributed
def test_sigterm_lets_every_rank_save(pretrain_config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    changes = {"steps": 3000, "evaluate_every_steps": 0, "batch": {"micro_batch_size": 2}, "checkpoint": {"every_steps": None}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(pretrain_config(changes).model_dump(mode="json", exclude_none=True)))
    command = [sys.executable, "-m", "megatron_plasticity", "launch", "pretrain", str(path), "--local", "2"]
    with (tmp_path / "out").open("w") as out:
        launch = subprocess.Popen(command, stdout=out, stderr=out)
        deadline = time.monotonic() + 150
        while not any(read_metrics(path) for path in (tmp_path / "runs").glob("*/metrics.jsonl")):
            assert launch.poll() is None, (tmp_path / "out").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        launch.send_signal(signal.SIGTERM)
        assert launch.wait(60) == 128 + signal.SIGTERM, (tmp_path / "out").read_text()
    (folder,) = (tmp_path / "runs").glob("pretrain-*")
    assert RunFolder.open(folder).state.status == "interrupted"
    assert open_checkpoint(folder).step > 0
    assert "SIGTERM: the ranks are told to save and stop" in (tmp_path / "out").read_text()


def test_no_secret_is_on_pdshs_command_line_and_its_exit_code_arrives(
    pretrain_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    """With a pdsh that writes down what it is given, and a probe that needs no other machine."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ssh").write_text(
        f'#!/bin/bash\necho "$0 $*" >> {tmp_path}/arguments\nfor last; do :; done\nexec bash -c "$last"\n'
    )
    (programs / "pdsh").write_text(f'#!/bin/bash\necho "$0 $*" >> {tmp_path}/arguments\nenv > {tmp_path}/environment\nexit 3\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    path, hostfile = tmp_path / "config.yaml", tmp_path / "hostfile"
    path.write_text(yaml.safe_dump(pretrain_config().model_dump(mode="json", exclude_none=True)))
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    environment = {**os.environ, **SECRETS, "PATH": f"{programs}:{os.environ['PATH']}", "PDSH_SSH_ARGS_APPEND": "-p 2222"}
    command = [sys.executable, "-m", "megatron_plasticity", "launch", "pretrain", str(path), "--hostfile", str(hostfile)]
    ended = subprocess.run(
        [*command, "--skip-preflight", "batch.micro_batch_size=2"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 3, ended.stderr
    assert "no rank began its work; the launcher said:" in ended.stderr
    arguments = (tmp_path / "arguments").read_text()
    assert "-w node1,node2" in arguments
    assert "-p 2222 node1 cd" in arguments
    assert "ServerAliveInterval=10" in (tmp_path / "environment").read_text()
    assert "-p 2222" in (tmp_path / "environment").read_text()
    said = arguments + ended.stdout + ended.stderr
    said += "".join(file.read_text(errors="replace") for file in (tmp_path / "runs").rglob("*") if file.is_file())
    assert "--hostfile" in said
    assert not [name for name, secret in SECRETS.items() if secret in said]
