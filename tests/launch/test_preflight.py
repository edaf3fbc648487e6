"""The preflight: what the machines say is compared, and every problem is named before anything starts."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.collective_check import JOINED, MET
from megatron_plasticity.launch.command import free_port
from megatron_plasticity.launch.hostfile import Host
from megatron_plasticity.launch.job import LaunchedJob
from megatron_plasticity.launch.machines import Machines
from megatron_plasticity.launch.preflight import Check, all_reduce_problems, ask_hosts, host_checks, run_check, table
from megatron_plasticity.launch.probe import MARK, Findings, Gpu, Question, code_hash, digest, probe
from megatron_plasticity.launch.remote import on_hosts
from tests.commands import Run

GIB = 2**30
VERSIONS = {"megatron-plasticity": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"}
HOSTS = [Host("node1", (0, 1)), Host("node2", (0, 1))]


@pytest.fixture
def job(pretrain_config: Callable[..., PretrainConfig], tmp_path: Path) -> LaunchedJob:
    return LaunchedJob.load(
        "pretrain", write(pretrain_config({"device": "cuda", "batch": {"micro_batch_size": 1}}), tmp_path), []
    )


def write(config: PretrainConfig, folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    return path


def findings(job: LaunchedJob, **changes: Any) -> Findings:
    """A machine with which nothing is wrong."""
    well = Findings(
        python="3.11.7",
        versions=VERSIONS,
        code="c0de" * 16,
        time=1000.0,
        gpus=[Gpu("NVIDIA H100", 80 * GIB, GIB // 2)] * 2,
        cores=16,
        addresses=["10.0.0.1"],
        inputs={str(path): "same" for path in job.inputs},
        sees_token=True,
        can_write=True,
        free=10**12,
        port_problem=None,
        driver="580.65.06",
    )
    return dataclasses.replace(well, **changes)


def problems(job: LaunchedJob, **changes: Any) -> list[str]:
    """What is found wrong if the second machine differs by `changes`."""
    found = {"node1": findings(job), "node2": findings(job, **changes)}
    checks = host_checks(job, HOSTS, found, {"node1": 1000.0, "node2": 1000.5}, 29500, over_ssh=True)
    return [problem for check in checks for problem in check.problems]


def test_nothing_is_wrong_with_equal_machines(job: LaunchedJob) -> None:
    assert problems(job) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"python": "3.12.1"}, "node2: Python 3.12.1 instead of 3.11.7, which node1 has"),
        (
            {"versions": {"megatron-plasticity": "0.1.0", "torch": "2.12.0", "deepspeed": "0.19.8", "transformers": "missing"}},
            "node2: torch 2.12.0 instead of 2.13.0, transformers missing instead of 5.23.0, which node1 has",
        ),
        (
            {"versions": {**VERSIONS, "triton": "3.9.0", "flash-attn": "2.8.3"}},
            "node2: triton 3.9.0 instead of missing, flash-attn 2.8.3 instead of missing, which node1 has",
        ),
        ({"driver": "570.1"}, "node2: NVIDIA's driver 570.1 instead of 580.65.06, which node1 has"),
        (
            {"gpus": [Gpu("NVIDIA A100", 80 * GIB, GIB // 2)] * 2},
            "node2: has NVIDIA A100 where node1 has NVIDIA H100; the slowest would set the pace",
        ),
        ({"code": "beef" * 16}, "node2: other code of this project (files of the package hash to beefbeef and c0dec0de)"),
        ({"gpus": [Gpu("NVIDIA H100", 80 * GIB, 0)]}, "node2: has 1 GPUs, so none for slot 1"),
        ({"gpus": []}, "node2: has 0 GPUs, so none for slot 0, 1"),
        ({"gpus": [Gpu("NVIDIA H100", 80 * GIB, 0), Gpu("NVIDIA H100", 80 * GIB, 79 * GIB)]}, "node2: GPU 1 has 1.0 of 80.0 GiB"),
        ({"sees_token": False}, "node2: does not see what is written to"),
        ({"can_write": False}, "node2: may not write to"),
        ({"free": 1000}, "node2: 0.0 MB are free at"),
        ({"time": 1060.0}, "node2: its clock is 60 s ahead of this machine's"),
        ({"time": 980.0}, "node2: its clock is 20 s behind this machine's"),
    ],
)
def test_what_differs_is_named(job: LaunchedJob, changes: dict[str, Any], said: str) -> None:
    (problem,) = problems(job, **changes)
    assert said in problem


def test_inputs_that_are_missing_or_stale_are_named(job: LaunchedJob) -> None:
    (corpus,) = map(str, job.inputs)
    assert problems(job, inputs={corpus: None}) == [
        f"node2: {corpus} is not there; it must be on a folder that all machines share"
    ]
    assert problems(job, inputs={corpus: "other"}) == [f"node2: {corpus} holds other files than on node1"]


def test_all_problems_come_at_once(job: LaunchedJob) -> None:
    assert len(problems(job, code="", sees_token=False, free=0, time=0.0, gpus=[])) == 5


def test_a_port_in_use_is_named(job: LaunchedJob) -> None:
    found = {"node1": findings(job, port_problem="Address already in use")}
    checks = host_checks(job, HOSTS[:1], found, {"node1": 1000.0}, 29500, over_ssh=True)
    assert [problem for check in checks for problem in check.problems] == [
        "node1: Address already in use; choose another one with --master-port"
    ]


def test_the_probe_looks_at_the_real_machine(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        question = Question([str(tmp_path), str(tmp_path / "nowhere")], str(tmp_path / "not" / "yet"), None, port)
        there = probe(question)
    assert there.port_problem == "Address already in use"
    assert there.inputs == {str(tmp_path): digest(tmp_path), str(tmp_path / "nowhere"): None}
    assert there.can_write
    assert not there.sees_token
    assert there.code == code_hash()
    assert there.versions["torch"].startswith("2.")
    before = digest(tmp_path)
    (tmp_path / "one more").touch()
    assert digest(tmp_path) != before
    (tmp_path / "manifest.json").write_text('{"hash": "a"}')
    before = digest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"hash": "b"}')
    assert digest(tmp_path) != before, "prepared anew, of the same size"
    assert {"mlflow", "pydantic", "numpy"} <= there.versions.keys(), "all that the project declares"
    assert there.versions.get("nvidia-ml-py") != "missing", "of use, not needed"


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 4, 580.65.06'\necho 'NVIDIA GB10, [N/A], [N/A], 580'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    there = probe(Question())
    assert there.gpus == [Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20, 4 * 2**20), Gpu("NVIDIA GB10", 0, 0)]
    assert there.driver == "580.65.06"


def test_a_login_that_prints_something_is_no_problem(job: LaunchedJob) -> None:
    there = findings(job)
    assert Findings.read(f"Welcome!\n{MARK}{json.dumps(dataclasses.asdict(there))}\n") == there
    assert Findings.read(f"Welcome{MARK}{json.dumps(dataclasses.asdict(there))}\nBye\n") == there, "a banner without an end"
    assert Findings.read("Welcome!\n") is None


def test_a_file_that_a_network_file_system_shows_late_is_seen(tmp_path: Path) -> None:
    token = tmp_path / "token"
    timer = threading.Timer(0.7, token.touch)
    timer.start()
    assert probe(Question(output=str(tmp_path), token=str(token))).sees_token
    timer.join()


def test_cpus_that_nobody_may_have_meant_are_pointed_out(pretrain_config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    job = LaunchedJob.load("pretrain", write(pretrain_config({"device": "auto"}), tmp_path), [])
    found = {name: findings(job, gpus=[]) for name in ("node1", "node2")}
    (check,) = [c for c in host_checks(job, HOSTS, found, dict.fromkeys(found, 1000.0), 1, True) if c.name == "processors"]
    assert "warning: nvidia-smi finds no GPU" in check.detail


def test_who_did_not_come_is_named_and_not_those_who_waited() -> None:
    met, joined = f"node {MET} 0 of 4\n", f"node {JOINED} 0 of 4\n"
    assert all_reduce_problems(HOSTS, [met, met, met, ""], "gloo")[:-1] == ["node2: rank 3 did not reach rank 0"]
    assert all_reduce_problems(HOSTS, [met + joined, met, met, met + joined], "nccl")[:-1] == [
        "node1: rank 1 reached rank 0 and did not join the others",
        "node2: rank 2 reached rank 0 and did not join the others",
    ]
    assert "NCCL_SOCKET_IFNAME" in all_reduce_problems(HOSTS, [met] * 4, "nccl")[-1]


@pytest.mark.distributed
def test_the_ranks_that_come_say_so_though_one_does_not(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
    }
    command = [sys.executable, "-m", "megatron_plasticity.launch.collective_check", "--backend", "gloo", "--seconds", "8"]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "2")
    ]
    first, last = (rank.communicate(timeout=60)[0] for rank in ranks)
    assert all(rank.returncode for rank in ranks)
    hosts = [Host("a", (0,)), Host("b", (0,)), Host("c", (0,))]
    assert all_reduce_problems(hosts, [first, "", last], "gloo")[:-1] == ["b: rank 1 did not reach rank 0"]


@pytest.mark.parametrize(
    ("visible", "slots"), [(None, (0, 1)), ("2,3,5", (2, 3)), (" 4, 1 ", (4, 1)), ("1,0,-1,7", (1, 0)), ("", (0, 1))]
)
def test_local_takes_the_gpus_that_are_visible(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, slots: tuple[int, ...]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machines = Machines.local(2)
    assert machines.hosts[0].slots == slots
    assert machines.hides_gpus is (visible == "")


@pytest.mark.parametrize(
    ("visible", "said"),
    [("0", "leaves 1 of this machine's GPUs"), ("GPU-8f1c,GPU-aa", "'GPU-8f1c' is a name"), ("MIG-1/2/3", "MIG")],
)
def test_visible_gpus_that_do_not_do_are_refused(monkeypatch: pytest.MonkeyPatch, visible: str, said: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=said):
        Machines.local(2)
    assert Machines.local(2, gpus=False).processes == 2, "a run on the CPU does not ask"


def test_hidden_gpus_are_not_counted_on(job: LaunchedJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559, 4, 580'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (_, gpus, *_), _ = ask_hosts(job, [Host("localhost", (0,))], None, over_ssh=False, hides_gpus=True)
    assert gpus.problems == ("localhost: has 0 GPUs, so none for slot 0",)


SSH = {
    "no-key": "Permission denied (publickey).",
    "unknown": "Host key verification failed.",
    "down": "ssh: connect to host down port 22: Connection timed out",
    "bare": "bash: line 1: /venv/bin/python: No such file or directory",
}


def test_hosts_that_do_not_answer_are_named_with_what_to_do(
    job: LaunchedJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    cases = "\n".join(f"*' {name} '*) echo '{said}' >&2; exit 255;;" for name, said in SSH.items())
    ssh.write_text(f'#!/bin/bash\ncase "$*" in\n{cases}\nesac\nfor last; do :; done\nexec bash -c "$last"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(ssh.parent), prepend=":")
    checks, found = ask_hosts(job, [Host(name, (0,)) for name in (*SSH, "good")], None, over_ssh=True)
    assert list(found) == ["good"]
    said = "\n".join(checks[0].problems)
    assert "no-key: Permission denied (publickey). (ssh must work without a password" in said
    assert "unknown: Host key verification failed. (log in once by hand" in said
    assert "down: ssh: connect to host down port 22: Connection timed out" in said
    assert "bare: bash: line 1: /venv/bin/python: No such file or directory (this folder and this Python" in said
    assert found["good"].sees_token
    assert not job.output.exists(), "what was made for the token is gone"


def test_a_host_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\nexec sleep 60\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (answer,) = on_hosts(["node1"], "megatron_plasticity.launch.probe", seconds=0.5, over_ssh=True)
    assert answer.complaint == "did not answer in time"


def test_the_run_itself_is_checked_with_all_problems(pretrain_config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    config = pretrain_config({"data": {"folder": str(tmp_path / "nowhere")}})
    check = run_check(LaunchedJob.load("pretrain", write(config, tmp_path), []), processes=3)
    assert [part in " ".join(check.problems) for part in ("not a prepared corpus", "cannot be split over 3")] == [True, True]


def test_checkpoints_that_are_there_need_no_room(pretrain_config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    job = LaunchedJob.load("pretrain", write(pretrain_config(), tmp_path), [])
    whole = job.disk_bytes()
    (job.folder().path / "checkpoints" / "step-5").mkdir(parents=True)
    assert job.disk_bytes() == pytest.approx(whole * 2 / 3), "3 of 12 steps by 5"


def test_the_table_is_readable() -> None:
    lines = table([Check("versions", (), "all equal"), Check("disk", ("node1: full", "node2: " + "very " * 40 + "full"))])
    assert lines.splitlines()[0] == "  ok      versions  all equal"
    assert lines.splitlines()[1] == "  FAILED  disk      node1: full"
    assert max(map(len, lines.splitlines())) <= 110


def test_nothing_is_made_or_started_where_a_check_fails(
    run: Run, pretrain_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    path = write(pretrain_config(), tmp_path)
    code, _, errors = run("launch", "pretrain", path, "--local", 3)
    assert code == 2
    assert "FAILED  configuration" in errors
    assert "cannot be split over 3 data-parallel ranks" in " ".join(errors.split())
    assert "1 problem, see above; nothing was started" in errors
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_the_command_and_starts_nothing(
    run: Run, pretrain_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    path = write(pretrain_config(), tmp_path)
    code, out, errors = run("launch", "pretrain", path, "--local", 2, "--dry-run", "batch.micro_batch_size=2")
    assert code == 0, errors
    assert "ok      configuration" in errors
    assert "deepspeed --num_gpus 2 --master_port" in out
    assert "--module megatron_plasticity pretrain" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--local", "2", "--nodes", "2"), "--nodes goes with --slurm, not with --local"),
        (("--slurm", "--env", "X", "--include", "a"), "--include goes with --hostfile, not with --slurm"),
        (("--slurm",), "--slurm needs --gpus-per-node"),
        (("--local", "2", "--setup", "module load cuda"), "--setup goes with --slurm, not with --local"),
        (("--local", "2", "--all-reduce-seconds", "1"), "--all-reduce-seconds 1: expected at least 10"),
        (("--slurm", "--gpus-per-node", "0"), "--gpus-per-node 0: expected at least 1"),
        (("--local", "0"), "--local 0: a number of processes is at least 1"),
        (("--hostfile", "nowhere"), "nowhere: cannot read this hostfile"),
        (("--slurm", "--gpus-per-node", "1", "--sbatch", "QOS"), "--sbatch 'QOS': expected a long option of sbatch"),
    ],
)
def test_options_that_do_not_go_together(
    run: Run, pretrain_config: Callable[..., PretrainConfig], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    code, _, errors = run("launch", "pretrain", write(pretrain_config(), tmp_path), *arguments)
    assert code == 2
    assert said in errors
