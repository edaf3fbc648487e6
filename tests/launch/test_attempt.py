"""Exit codes, signals and secrets of a launch, with DeepSpeed's real launcher and ranks that do next to nothing."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.errors import LostProcess, UserError
from megatron_plasticity.launch.attempt import Launcher, Outcome, say
from megatron_plasticity.launch.command import Meeting, cluster_command, free_port
from megatron_plasticity.launch.environment import travelling
from megatron_plasticity.launch.folder import LaunchFolder, RankRecord
from megatron_plasticity.launch.machines import Machines
from megatron_plasticity.launch.start import _verdict
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


def test_a_rank_that_ends_because_of_another_is_not_blamed() -> None:
    """Although the clock of its machine is behind."""
    followed = RankRecord(0, "node1", 1000, None, 2, 3.0, because_of_another=True)
    assert Outcome(2, [followed, record(1, 2, 4.0)], 2).first_to_fail == record(1, 2, 4.0)
    assert Outcome(2, [followed, record(1, None)], 2).exit_code == 2


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


@dataclass(frozen=True)
class Direct(Launcher):
    """One rank, without a launcher between."""

    def command(self, program: Sequence[str], logs: Path) -> list[str]:
        return [sys.executable, *program]


def direct(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """Run a script as the only rank."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    script = folder / "rank.py"
    script.write_text("import os, signal, sys, time\nfrom pathlib import Path\n" + text)
    launcher = Direct(Machines.local(1), Meeting("127.0.0.1", free_port()), travelling(os.environ), cpu=True)
    return launcher.run([str(script)], folder / "logs", echo=True, seconds=30)


def test_a_closed_terminal_lets_the_ranks_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGHUP)
    outcome = direct(
        tmp_path,
        "from megatron_plasticity.launch.rank import launched_rank\n"
        "with launched_rank(os.environ):\n"
        "    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))\n"
        "    os.kill(os.getppid(), signal.SIGHUP)\n"
        "    time.sleep(60)\n",
        monkeypatch,
    )
    assert outcome.stopped_by == signal.SIGTERM
    assert not outcome.too_long
    assert [record.exit_code for record in outcome.records] == [143], "it could end by itself"
    assert not (tmp_path / "logs" / "environment.json").exists()
    assert signal.getsignal(signal.SIGHUP) == before


def test_a_record_that_cannot_be_read_ends_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network file system says ESTALE, or shows half a file, while it is replaced."""
    outcome = direct(
        tmp_path,
        "from megatron_plasticity.launch.rank import LAUNCH_FOLDER, launched_rank\n"
        "folder = Path(os.environ[LAUNCH_FOLDER])\n"
        "with launched_rank(os.environ):\n"
        "    (folder / 'ranks' / '0.json').write_text('{')\n"
        "    (folder / 'ranks' / '1.json').mkdir()\n"
        "    time.sleep(1.5)\n"
        "    sys.exit(7)\n",
        monkeypatch,
    )
    assert outcome.exit_code == 7
    assert [record.rank for record in outcome.records] == [0]


def test_a_reader_that_has_left_is_no_reason_to_end_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Left(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Left())
    say("step 1\n")
    say("step 2\n")


def test_the_command_is_shown_with_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    sent = travelling({"HF_TOKEN": "s3cret", "PATH": os.environ["PATH"]})
    shown = Launcher(Machines.local(2), Meeting("127.0.0.1", 1), sent, cpu=True, threads=3).shown(["--module", "x"], tmp_path)
    first, second = shown.splitlines()
    assert first.startswith("DS_ACCELERATOR=cpu OMP_NUM_THREADS=3 ")
    assert second.endswith("the ranks get besides: HF_TOKEN")
    assert "s3cret" not in shown


@pytest.mark.parametrize(
    ("code", "said", "unsaid"),
    [(2, "nothing will change until that is mended", "the same command"), (75, "the same command goes on", "mended")],
)
def test_the_end_says_what_to_do(tmp_path: Path, run_folder: RunFolder, code: int, said: str, unsaid: str) -> None:
    outcome = Outcome(code, [record(0, code, 1.0)], 1)
    with pytest.raises(UserError) as caught:
        _verdict(outcome, Launcher(Machines.local(1), Meeting("", 1), travelling({})), launch_folder(tmp_path), run_folder)
    assert caught.value.exit_code == code
    assert said in str(caught.value)
    assert unsaid not in str(caught.value)


def test_a_signal_in_the_last_step_stops_nothing(
    tmp_path: Path, run_folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    with run_folder.running() as running:
        running.mark_done({})
    outcome = Outcome(0, [record(0, 0)], 1, signal.SIGTERM)
    assert (
        _verdict(outcome, Launcher(Machines.local(1), Meeting("", 1), travelling({})), launch_folder(tmp_path), run_folder) == 0
    )
    assert "it ended before it could be stopped" in capsys.readouterr().out


def launch_folder(folder: Path) -> LaunchFolder:
    return LaunchFolder.create(folder / "launch", {})


@pytest.fixture
def run_folder(pretrain_config: Callable[..., PretrainConfig], tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "pretrain", "small", pretrain_config(), {})


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
