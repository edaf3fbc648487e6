"""Studies on the machines of a hostfile, with an ssh that stays on this one; and how failures are met, which is alike for all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_plasticity.config.study import StudyConfig, _slurm_seconds
from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.hostfile import Host
from megatron_plasticity.study import runner
from megatron_plasticity.study.again import _failed_root, config_of
from megatron_plasticity.study.backends import hostfile as hostfile_module
from megatron_plasticity.study.backends.hostfile import HostfileBackend, _port_on
from megatron_plasticity.study.backends.remote import order
from megatron_plasticity.study.check import check_study
from megatron_plasticity.study.places import places_of
from megatron_plasticity.study.plan import plan_study
from megatron_plasticity.study.runner import run_study
from megatron_plasticity.study.status import CellStatus, read_status
from megatron_plasticity.tracking.run_folder import RunFolder
from tests.commands import Run
from tests.study.machines import counting_study, fake_ssh, stand_in_runs


@pytest.fixture
def ssh_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stand_in_runs(monkeypatch)
    return fake_ssh(tmp_path, monkeypatch)


def study(
    folder: Path, corpus: Path, changes: dict[str, Any] | None = None, hosts: str = "one slots=1\ntwo slots=1\n"
) -> StudyConfig:
    (folder / "hosts").write_text(hosts)
    resources = {"backend": "hostfile", "hostfile": str(folder / "hosts"), **(changes or {}).pop("resources", {})}
    return counting_study(folder, corpus, {"resources": resources, **(changes or {})})


def behave(folder: Path, **behaviour: str) -> None:
    (folder / "runs/small").mkdir(parents=True)
    (folder / "runs/small/behaviour.json").write_text(json.dumps({f"wd{key[1:]}": words for key, words in behaviour.items()}))


def log_of(config: StudyConfig, id: str) -> str:
    cell = next(cell for cell in read_status(config.output / config.name).cells if cell.id == id)
    return (cell.folder / "log").read_text()


def test_runs_are_spread_over_the_machines(
    tmp_path: Path, tiny_corpus: Path, ssh_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted_secret")
    config = study(tmp_path, tiny_corpus)
    outcome = run_study(config)
    assert outcome.failed == {}
    assert len(outcome.done) == 2
    folders = [cell.folder for cell in read_status(outcome.folder).cells]
    assert {RunFolder.open(folder).results["host"] for folder in folders} == {"one", "two"}
    assert "attempt 1: well" in log_of(config, "pretrain-wd0")
    assert "hf_planted_secret" not in ssh_log.read_text(), "what is secret travels through the connection"
    assert not (outcome.folder / "runner.json").exists()
    assert not list(outcome.folder.glob(".seen*"))


def test_what_may_pass_is_tried_again(
    tmp_path: Path, tiny_corpus: Path, ssh_log: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    behave(tmp_path, _0="killed memory", _1="wrong")
    outcome = run_study(study(tmp_path, tiny_corpus))
    assert outcome.done == ("pretrain-wd0",)
    assert outcome.failed == {"pretrain-wd1": "optimizer.learning_rate: too large"}, "a wrong config is wrong the second time too"
    states = {cell.id: cell for cell in read_status(outcome.folder).cells}
    assert states["pretrain-wd0"].attempts == 3
    assert states["pretrain-wd1"].attempts == 1
    said = capfd.readouterr().err
    assert "its process was killed by signal 9 (out of memory?)" in said
    assert "CUDA out of memory" in said
    assert "tried again in" in said


def test_what_fails_at_the_same_point_is_given_up(tmp_path: Path, tiny_corpus: Path, ssh_log: Path) -> None:
    behave(tmp_path, _0="killed killed killed killed")
    outcome = run_study(study(tmp_path, tiny_corpus, {"resources": {"retries": 1}}))
    assert "killed by signal 9" in outcome.failed["pretrain-wd0"]
    assert "(2 attempts that got no further failed)" in outcome.failed["pretrain-wd0"]
    status = read_status(outcome.folder)
    failed = next(cell for cell in status.cells if cell.id == "pretrain-wd0")
    assert (failed.status, failed.attempts) == ("failed", 2)
    assert "killed by signal 9" in failed.headline


def test_a_run_that_gets_on_has_all_its_attempts_again(tmp_path: Path, tiny_corpus: Path, ssh_log: Path) -> None:
    behave(tmp_path, _0="saved-then-killed saved-then-killed")
    outcome = run_study(study(tmp_path, tiny_corpus, {"resources": {"retries": 1}}))
    assert outcome.failed == {}
    assert next(cell for cell in read_status(outcome.folder).cells if cell.id == "pretrain-wd0").attempts == 3


def test_a_run_that_hangs_is_ended_and_tried_again(
    tmp_path: Path, tiny_corpus: Path, ssh_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SECONDS_TO_STOP_ALL", 0.2)
    monkeypatch.setattr(hostfile_module, "SECONDS_TO_STOP_REMOTELY", 0.2)
    behave(tmp_path, _0="hangs")
    outcome = run_study(study(tmp_path, tiny_corpus, {"resources": {"silent_minutes": 0.05}}))
    assert outcome.failed == {}
    assert len(outcome.done) == 2
    assert "attempt 2: well" in log_of(study(tmp_path, tiny_corpus), "pretrain-wd0")


def test_a_machine_that_is_away_is_left_alone_for_a_while(
    tmp_path: Path, tiny_corpus: Path, ssh_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = study(tmp_path, tiny_corpus)
    monkeypatch.setattr(HostfileBackend, "check", lambda *_: None)
    (tmp_path / "two.away").touch()
    outcome = run_study(config)
    assert len(outcome.done) == 2, "the other machine does it"
    assert ssh_log.read_text().count(" two cd ") == 1


def test_machines_that_cannot_be_used_are_named_all_at_once(
    tmp_path: Path, tiny_corpus: Path, ssh_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two.away").touch()
    hosts = "one slots=1\ntwo slots=1\nthree slots=1\nfour slots=1\n"
    (tmp_path / "three.blind").touch()
    (tmp_path / "four.old").touch()
    with pytest.raises(UserError) as raised:
        run_study(study(tmp_path, tiny_corpus, hosts=hosts))
    message = str(raised.value)
    assert "two: cannot be reached by ssh without a password: ssh: connect to host two port 22: No route to host" in message
    assert "three: does not see" in message
    assert "four: torch old-" in message
    assert "  one:" not in message


def test_a_stopped_runner_leaves_nothing_behind(tmp_path: Path, tiny_corpus: Path, ssh_log: Path) -> None:
    behave(tmp_path, _0="waits", _1="waits")
    config = study(tmp_path, tiny_corpus)
    (tmp_path / "study.json").write_text(json.dumps(config.model_dump(mode="json")))
    script = (
        "import json, sys\nfrom megatron_plasticity.config.study import StudyConfig, _slurm_seconds\n"
        "from megatron_plasticity.study.runner import run_study\n"
        f"run_study(StudyConfig(**json.load(open({str(tmp_path / 'study.json')!r}))))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    states = wait_for_states(config, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert "the same command goes on from here" in said
    assert {RunFolder.open(path.parent).state.status for path in states} == {"interrupted"}
    assert all(list(path.parent.glob("checkpoints/step-*")) for path in states), "the runs have saved"
    assert len(run_study(config).done) == 2
    assert all(RunFolder.open(path.parent).results["begin"] > 0 for path in states), "and go on from there"


def wait_for_states(config: StudyConfig, process: subprocess.Popen[str]) -> list[Path]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None
        states = list((config.output / config.name).glob("pretrain-*/state.json"))
        if len(states) == 2 and all((json.loads(state.read_text()).get("progress") or {}).get("done", 0) > 0 for state in states):
            return states
        time.sleep(0.05)
    raise AssertionError("no run made progress")


def far_end() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_plasticity.study.backends.remote"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def test_a_command_ends_with_the_connection(tmp_path: Path) -> None:
    end = far_end()
    assert end.stdin is not None
    assert end.stdout is not None
    waiting = "import signal, subprocess, sys, time; subprocess.Popen(['sleep', '77']); print('here', flush=True); time.sleep(77)"
    end.stdin.write(order([sys.executable, "-c", waiting], str(tmp_path), {}, 5.0))
    end.stdin.flush()
    assert end.stdout.readline() == b"here\n"
    end.stdin.close()
    assert end.wait(10) == 128 + signal.SIGTERM
    assert end.stdout.read() == b"", "what the command had started has ended as well, or it would hold this open"


def test_the_far_end_hands_on_code_folder_and_environment(tmp_path: Path) -> None:
    end, value = far_end(), 'it\'s "quoted"'
    assert end.stdin is not None
    assert end.stdout is not None
    script = "import os, sys; print(os.getcwd(), os.environ['PLANTED']); sys.exit(7)"
    end.stdin.write(order([sys.executable, "-c", script], str(tmp_path), {"PLANTED": value}, 5.0))
    end.stdin.flush()
    assert end.wait(20) == 7
    assert end.stdout.read().decode() == f"{tmp_path} {value}\n"


def test_a_command_ends_when_nothing_is_heard_of_the_runner(tmp_path: Path) -> None:
    """A network that is cut closes no connection."""
    script = (
        "import sys; from megatron_plasticity.study.backends import remote as r; r.SECONDS_UNTIL_ALONE = 0.5; sys.exit(r.main())"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as end:
        assert end.stdin is not None
        end.stdin.write(order(["sleep", "77"], str(tmp_path), {}, 5.0))
        end.stdin.flush()
        assert end.wait(20) == 128 + signal.SIGTERM


def hosts(*slots: int) -> list[Host]:
    return [Host(f"n{number}", tuple(range(count))) for number, count in enumerate(slots)]


@pytest.mark.parametrize(
    ("slots", "processes", "places"),
    [
        ((2,), 1, ["n0:0", "n0:1"]),
        ((8, 4), 4, ["n0:0-3", "n0:4-7", "n1:0-3"]),
        ((8, 8), 3, ["n0:0-2", "n0:3-5", "n1:0-2", "n1:3-5"]),
        ((8, 8, 8, 8, 8), 16, ["n0–n1", "n2–n3"]),
        ((4, 8, 4), 8, ["n1:0-7", "n0–n2"]),
    ],
)
def test_places(slots: tuple[int, ...], processes: int, places: list[str]) -> None:
    assert [place.name for place in places_of(hosts(*slots), processes, "hosts")] == places


def test_no_place_is_an_error() -> None:
    with pytest.raises(UserError, match=r"hosts: no place for a run of resources\.processes_per_run=12: .*; n0 has 8, n1 has 8"):
        places_of(hosts(8, 8), 12, "hosts")


def test_the_commands_of_a_place(tmp_path: Path, tiny_corpus: Path) -> None:
    """On part of a machine the launcher is told its GPUs; over machines each gets its rank and the same meeting point."""
    two = {"base": {"device": "auto", "batch": {"micro_batch_size": 1}}, "resources": {"processes_per_run": 2}, "finetune": None}
    config = study(tmp_path, tiny_corpus, {**two}, "one slots=4\n")
    backend = HostfileBackend.of(config)
    cell = plan_study(config, "h").cells[0]
    command = backend._command_on_one(backend.places[1].hosts[0], cell, launched=True)
    assert command[1:] == ["-m", "megatron_plasticity.study.cell", str(cell.folder), "--processes", "2", "--devices", "2,3"]
    config = study(tmp_path, tiny_corpus, {**two})
    backend = HostfileBackend.of(config)
    first, second = (backend._command_on_many(backend.places[0], cell, rank, "29500") for rank in (0, 1))
    assert "one@two" in first
    assert {*second} - {*first} == {"1"}
    assert second[second.index("--node_rank") + 1] == "1"
    assert second[second.index("--master_addr") + 1] == "one"
    backend._addresses["one"] = "10.0.0.1"  # as `check` finds it: the name may lead nowhere from the others
    assert "10.0.0.1" in backend._command_on_many(backend.places[0], cell, 1, "29500")


def test_a_port_that_is_taken_is_not_used(ssh_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("random.sample", lambda population, k: [port, 20001])
        assert _port_on(Host("one", (0,))) == 20001
    assert _port_on(Host("one", (0,))) == port


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resources": {"backend": "local", "hostfile": "hosts"}}, 'must be given with backend "hostfile"'),
        ({"resources": {"backend": "hostfile"}}, 'must be given with backend "hostfile"'),
        ({"resources": {"backend": "hostfile", "hostfile": "/nowhere"}}, r"/nowhere: cannot read this hostfile"),
        ({"resources": {"backend": "slurm", "slurm": {"options": ["--array=1"]}}}, r"--array is stated by the runner itself"),
        ({"resources": {"backend": "slurm", "slurm": {"options": ["-n 1"]}}}, r"'-n 1' is no option of sbatch"),
        ({"resources": {"backend": "slurm", "slurm": {"time": "soon"}}}, r"time"),
        ({"resources": {"backend": "slurm", "slurm": {"time": 86400}}}, r"slurm\.time.*write it in quotes"),
        ({"resources": {"backend": "slurm", "slurm": {"time": "5:00"}}}, r"leaves nothing of `time`=5:00, which is 300 s"),
        ({"resources": {"backend": "slurm", "processes_per_run": 12, "slurm": {"gpus_per_node": 8}}}, r"fills no whole number"),
        ({"resources": {"backend": "slurm"}, "base": {"device": "auto"}}, r"slurm\.gpus_per_node: state how many"),
    ],
)
def test_resources_that_do_not_suit_the_back_end(
    tmp_path: Path, tiny_corpus: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_study(counting_study(tmp_path, tiny_corpus, changes))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("30:05", 1805), ("1:00:00", 3600), ("1-2", 93600), ("1-2:03", 93780), ("1-02:03:04", 93784)],
)
def test_times_as_sbatch_reads_them(time: str, seconds: int) -> None:
    assert _slurm_seconds(time) == seconds


def test_only_what_failed_is_tried_again(tmp_path: Path, tiny_corpus: Path, ssh_log: Path, run: Run) -> None:
    behave(tmp_path, _0="wrong", _1="wrong")
    config = study(tmp_path, tiny_corpus)
    folder = tmp_path / "runs/small"
    assert len(run_study(config).failed) == 2
    code, out, err = run("study", "retry", folder, "pretrain-wd1")
    assert code == 0, err
    assert "1 runs done, 0 failed, 0 not started" in out
    assert {cell.id: cell.status for cell in read_status(folder).cells} == {"pretrain-wd0": "failed", "pretrain-wd1": "done"}
    code, out, _ = run("study", "retry", folder)
    assert code == 0
    assert "2 runs done" in out
    code, out, _ = run("study", "retry", folder)
    assert "no run of this study has failed" in out


def test_what_needs_a_failed_run_cannot_be_retried_alone() -> None:
    def cell(id: str, status: str, needs: str | None = None) -> CellStatus:
        return CellStatus(id, "finetune", status, Path(id), needs=needs)

    cells = {c.id: c for c in (cell("a", "failed"), cell("b", "blocked", "a"), cell("c", "blocked", "b"), cell("d", "waiting"))}
    assert [_failed_root(cells, id) for id in "abcd"] == [None, "a", "a", None]


def test_the_study_of_a_folder_has_the_same_runs(tmp_path: Path, tiny_corpus: Path) -> None:
    """What JSON makes of a study, infinity included, is the same study."""
    axes = {"optimizer.adamw_timescale": (math.inf, 0.5), "seed": (1, 2)}
    config = counting_study(tmp_path, tiny_corpus).model_copy(update={"axes": axes})
    plan = plan_study(config, "h")
    plan.folder.mkdir(parents=True)
    runner._write_study_file(plan, None)
    again = plan_study(config_of(plan.folder), "h")
    assert [(cell.id, cell.folder) for cell in again.cells] == [(cell.id, cell.folder) for cell in plan.cells]


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A real sshd on this machine, under whichever name it is asked for."""
    server, client = shutil.which("sshd", path="/usr/sbin:/sbin:" + os.environ["PATH"]), shutil.which("ssh")
    if server is None or client is None or os.geteuid() != 0:
        pytest.skip("needs openssh-server and openssh-client, and root to start the server")
    stand_in_runs(monkeypatch)
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {tmp_path}/host_key\nAuthorizedKeysFile {tmp_path}/user_key.pub\n"
        f"PidFile {tmp_path}/sshd.pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
    )
    (tmp_path / "ssh_config").write_text(
        f"Host *\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {tmp_path}/user_key\n  IdentitiesOnly yes\n"
        f"  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", f"-F {tmp_path}/ssh_config")
    Path("/run/sshd").mkdir(exist_ok=True)
    process = subprocess.Popen([server, "-D", "-f", tmp_path / "sshd_config"], stderr=subprocess.DEVNULL)
    try:
        wait_until_listening(port)
        yield
    finally:
        process.terminate()
        process.wait()


def wait_until_listening(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError("sshd does not listen")


def test_over_a_real_ssh(tmp_path: Path, tiny_corpus: Path, sshd: None) -> None:
    outcome = run_study(study(tmp_path, tiny_corpus))
    assert outcome.failed == {}
    assert len(outcome.done) == 2


def test_a_run_ends_with_its_real_connection(tmp_path: Path, tiny_corpus: Path, sshd: None) -> None:
    behave(tmp_path, _0="waits")
    config = study(tmp_path, tiny_corpus)
    backend, cell = HostfileBackend.of(config), plan_study(config, "h").cells[0]
    folder = RunFolder.create(cell.folder.parent, cell.kind, cell.name, cell.config, cell.inputs)
    (job,) = backend.start([cell])
    assert isinstance(job, hostfile_module.RemoteJob)
    deadline = time.monotonic() + 60
    while folder.state.progress is None:
        assert time.monotonic() < deadline, (folder.path / "log").read_text()
        time.sleep(0.05)
    job.connections[0].kill()  # as if the runner's machine had lost its power
    while folder.state.status == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert folder.state.error == "stopped by SIGTERM; run the same command again to go on", "it could save"
    assert folder.checkpoints()
