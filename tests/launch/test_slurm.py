"""The batch script, carried out by bash with an `srun`, `scontrol` and `sbatch` that do what Slurm's do, on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.slurm import SlurmRequest, batch_script, parse_options, submit
from tests.commands import Run

REQUEST = SlurmRequest(nodes=2, tasks_per_node=2, gpus=True, options=(("time", "1-00:00:00"), ("signal", "B:USR1@900")))

# Starts as many tasks as it is told to, with the variables that Slurm gives them, and hands signals on.
SRUN = """#!/bin/bash
echo "srun $*" >> "$RECORD"
while [[ $1 == --* ]]; do
    case $1 in --output=*) output=${1#--output=};; esac
    shift
done
tasks=()
trap 'kill -USR1 "${tasks[@]}"' USR1
for rank in 0 1 2 3; do
    log=${output//%j/$SLURM_JOB_ID}
    SLURM_PROCID=$rank SLURM_NTASKS=4 SLURM_LOCALID=$((rank % 2)) SLURM_STEP_ID=0 "$@" > "${log//%t/$rank}" 2>&1 &
    tasks+=($!)
done
worst=0
for task in "${tasks[@]}"; do
    while :; do
        wait "$task" && code=0 || code=$?
        kill -0 "$task" 2>/dev/null || break
    done
    [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$RECORD"
[ "$1 $2" != "show hostnames" ] || printf 'node1\\nnode2\\n'
"""
# In place of our Python: says what it was told, and ends as its arguments say.
PYTHON = """#!/bin/bash
trap 'exit 138' USR1
echo "$* $SLURM_PROCID $MASTER_ADDR $MASTER_PORT"
case $4 in code=*) exit "${4#code=}";; esac
sleep 30 & wait
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Environment of a job on a cluster of this machine alone."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "node[1-2]", "RECORD": str(tmp_path / "record")}
    return {**os.environ, **slurm, "PATH": f"{programs}:{os.environ['PATH']}"}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def write(*program: str) -> Path:
        monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
        path = tmp_path / "job.sbatch"
        path.write_text(batch_script(REQUEST, "pretrain-small", program, tmp_path / "logs"))
        return path

    return write


def carry_out(script: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=30)


def test_every_rank_gets_the_command_and_the_meeting_place(
    cluster: dict[str, str], script: Callable[..., Path], tmp_path: Path
) -> None:
    ended = carry_out(script("pretrain", "code=0", "name=with space;"), cluster)
    assert ended.returncode == 0, ended.stderr
    for rank in range(4):
        said = (tmp_path / "logs" / f"4242-rank{rank}.log").read_text()
        assert said == f"-m megatron_plasticity pretrain code=0 name=with space; {rank} node1 24242\n"
    assert "--kill-on-bad-exit=1" in (tmp_path / "record").read_text()


def test_the_code_of_a_failed_rank_arrives_and_nothing_is_queued_again(
    cluster: dict[str, str], script: Callable[..., Path], tmp_path: Path
) -> None:
    assert carry_out(script("pretrain", "code=2"), cluster).returncode == 2
    assert "requeue" not in (tmp_path / "record").read_text()


@pytest.mark.parametrize(("seconds", "code", "requeued"), [("5000", 0, True), ("0", 138, False)])
def test_before_the_limit_the_run_saves_and_is_queued_again(
    cluster: dict[str, str], script: Callable[..., Path], tmp_path: Path, seconds: str, code: int, requeued: bool
) -> None:
    job = subprocess.Popen(
        ["bash", script("pretrain", "config.yaml")],
        env={**cluster, "SECONDS": seconds},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    logs = [tmp_path / "logs" / f"4242-rank{rank}.log" for rank in range(4)]
    deadline = time.monotonic() + 20
    while not all(log.is_file() and log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)  # to the shell alone, as `--signal=B:` does
    said, _ = job.communicate(timeout=20)
    assert job.returncode == code, said
    assert ("scontrol requeue 4242" in (tmp_path / "record").read_text()) is requeued
    assert ("leaves no time to train" in said) is not requeued


def test_the_directives_and_that_a_persons_options_replace_ours() -> None:
    lines = batch_script(REQUEST, "small", ["pretrain", "x.yaml"], Path("/shared/logs")).splitlines()
    directives = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert directives == [
        "job-name=small",
        "nodes=2",
        "ntasks-per-node=2",
        "gpus-per-node=2",
        "output=/shared/logs/%j.log",
        "open-mode=append",
        "signal=B:USR1@900",
        "time=1-00:00:00",
        "requeue",
    ]
    cpu = batch_script(SlurmRequest(1, 2, gpus=False), "small", ["pretrain"], Path("/shared/logs"))
    assert "gpus-per-node" not in cpu


def test_bad_options_are_all_named() -> None:
    assert parse_options(["qos=high", "constraint=a=b"]) == (("qos", "high"), ("constraint", "a=b"))
    with pytest.raises(UserError) as caught:
        parse_options(["qos", "-p=x", "comment=two\nlines"])
    assert str(caught.value).count("expected a long option of sbatch") == 3


def test_a_job_is_submitted_with_the_resolved_config(
    run: Run, pretrain_config: Callable[..., PretrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\necho "77;cluster"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=":")
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(pretrain_config().model_dump(mode="json", exclude_none=True)))
    arguments = ["launch", "pretrain", path, "--slurm", "--nodes", 2, "--gpus-per-node", 2, "batch.micro_batch_size=1"]
    code, out, errors = run(*arguments)
    assert code == 0, errors
    assert out.startswith("job 77: ")
    script = Path(out.split(": ", 1)[1].strip())
    text = script.read_text()
    assert f"set -- pretrain {script.with_name('config.yaml')}" in text
    assert yaml.safe_load(script.with_name("config.yaml").read_text())["batch"]["micro_batch_size"] == 1
    assert "hf_s3cret" not in text
    # The script alone, so that it can be kept.
    code, out, errors = run(*arguments, "--dry-run")
    assert code == 0
    assert out.startswith("#!/bin/bash\n")
    assert subprocess.run(["bash", "-n"], input=out, text=True, timeout=10).returncode == 0


def test_what_sbatch_refuses_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'invalid partition specified: gpu' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError, match="invalid partition specified: gpu"):
        submit(tmp_path / "job.sbatch")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="not on PATH"):
        submit(tmp_path / "job.sbatch")
