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
bad_exit=0
while [[ $1 == --* ]]; do
    case $1 in --output=*) output=${1#--output=};; --kill-on-bad-exit=*) bad_exit=${1#*=};; esac
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
left=4
while [ "$left" -gt 0 ]; do
    wait -n "${tasks[@]}" && code=0 || code=$?
    living=()
    for task in "${tasks[@]}"; do
        kill -0 "$task" 2>/dev/null && living+=("$task")
    done
    [ "${#living[@]}" -lt "$left" ] || continue  # a signal ended `wait` early
    left=${#living[@]}
    tasks=("${living[@]}")
    [ "$code" -gt "$worst" ] && worst=$code
    # As Slurm does: all others, SIGTERM at first.
    [ "$code" -eq 0 ] || [ "$bad_exit" -eq 0 ] || [ "$left" -eq 0 ] || kill -TERM "${tasks[@]}"
done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$RECORD"
[ "$1 $2" != "show hostnames" ] || printf 'node1\\nnode2\\n'
"""
# In place of our Python: says what it was told, and ends as its arguments say. Told to save, rank 0 ends last, and adds a
# checkpoint if it is to.
PYTHON = """#!/bin/bash
case $2 in
*.kept) echo "$*" >> "$RECORD"; cat "$KEPT" 2>/dev/null; exit 0;;
*.slurm_preflight) echo "$*" >> "$RECORD"; exit "${PREFLIGHT_ENDS:-0}";;
esac
save() {
    if [ "$SLURM_PROCID" = 0 ]; then
        sleep 0.5
        [ "$4" != adds ] || echo step-2 >> "$KEPT"
    fi
    exit 138
}
trap 'save "$@"' USR1
echo "$* $SLURM_PROCID $MASTER_ADDR $MASTER_PORT"
case $4 in
code=*) exit "${4#code=}";;
lost=*)
    [ "$SLURM_PROCID" = 0 ] || exit "${4#lost=}"
    echo "step-$RANDOM$RANDOM" >> "$KEPT"
    LC_ALL=C sort -o "$KEPT" "$KEPT"
    exit 75;;
esac
while :; do sleep 0.05; done
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
    slurm["KEPT"] = str(tmp_path / "kept")
    (tmp_path / "kept").write_text("step-1\n")
    return {**os.environ, **slurm, "PATH": f"{programs}:{os.environ['PATH']}"}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def write(*program: str, preflight: float | None = None) -> Path:
        monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
        path = tmp_path / "job.sbatch"
        path.write_text(batch_script(REQUEST, "pretrain-small", program, tmp_path / "logs", preflight))
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
    assert "--export=ALL" in (tmp_path / "record").read_text(), "with `--sbatch export=NONE` too"


def test_the_code_of_a_failed_rank_arrives_and_nothing_is_queued_again(
    cluster: dict[str, str], script: Callable[..., Path], tmp_path: Path
) -> None:
    assert carry_out(script("pretrain", "code=2"), cluster).returncode == 2
    assert "requeue" not in (tmp_path / "record").read_text()


@pytest.mark.parametrize(("what", "code", "requeued"), [("adds", 0, True), ("adds-nothing", 138, False)])
def test_before_the_limit_the_run_saves_and_is_queued_again(
    cluster: dict[str, str], script: Callable[..., Path], tmp_path: Path, what: str, code: int, requeued: bool
) -> None:
    """Rank 0 still saves when the others have ended."""
    job = subprocess.Popen(
        ["bash", script("pretrain", what)], env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
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
    assert ("before a checkpoint was added" in said) is not requeued


@pytest.mark.parametrize("code", [75, 137])
def test_a_lost_process_is_tried_again_some_times(
    cluster: dict[str, str], script: Callable[..., Path], tmp_path: Path, code: int
) -> None:
    job, record = script("pretrain", f"lost={code}"), tmp_path / "record"
    for _ in range(10):
        assert carry_out(job, cluster).returncode == 0
    assert record.read_text().count("scontrol requeue 4242") == 10
    assert carry_out(job, cluster).returncode == code
    assert record.read_text().count("scontrol requeue 4242") == 10


def test_a_process_that_is_lost_before_a_checkpoint_is_not(
    cluster: dict[str, str], script: Callable[..., Path], tmp_path: Path
) -> None:
    ended = carry_out(script("pretrain", "code=75"), cluster)
    assert ended.returncode == 75
    assert "a process was lost before a checkpoint was added" in ended.stderr
    assert "requeue" not in (tmp_path / "record").read_text()


def test_nothing_is_started_where_the_nodes_are_found_wanting(
    cluster: dict[str, str], script: Callable[..., Path], tmp_path: Path
) -> None:
    job = script("pretrain", "code=0", preflight=90)
    assert carry_out(job, {**cluster, "PREFLIGHT_ENDS": "2"}).returncode == 2
    said = (tmp_path / "record").read_text()
    assert f"slurm_preflight 90 {tmp_path / 'logs'} pretrain code=0" in said
    assert "srun" not in said
    assert carry_out(job, cluster).returncode == 0


def directives_of(request: SlurmRequest) -> list[str]:
    lines = batch_script(request, "small", ["pretrain", "x.yaml"], Path("/shared/logs")).splitlines()
    return [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]


def test_the_directives_and_that_a_persons_options_replace_ours() -> None:
    assert directives_of(REQUEST) == [
        "job-name=small",
        "nodes=2",
        "ntasks-per-node=2",
        "gpus-per-node=2",
        "cpus-per-task=4",
        "output=/shared/logs/%j.log",
        "open-mode=append",
        "signal=B:USR1@900",
        "requeue",
        "time=1-00:00:00",
    ]
    assert not [line for line in directives_of(SlurmRequest(1, 2, gpus=False)) if line.startswith(("gpus", "cpus"))]


@pytest.mark.parametrize("other", ["gpus=16", "gres=gpu:h100:2", "gpus-per-task=1"])
def test_gpus_are_asked_for_once(other: str) -> None:
    found = directives_of(SlurmRequest(2, 2, True, parse_options([other, "exclusive", "cpus-per-gpu=12", "no-requeue"])))
    assert [line for line in found if "gpu" in line] == [other, "cpus-per-gpu=12"]
    assert "exclusive" in found
    assert "requeue" not in found


def test_setup_comes_before_everything() -> None:
    """And before `set -u`, which module systems and conda do not survive."""
    request = SlurmRequest(1, 2, True, setup=("module load cuda", "source ~/conda.sh"))
    lines = batch_script(request, "small", ["pretrain"], Path("/shared/logs")).splitlines()
    assert lines.index("module load cuda") < lines.index("source ~/conda.sh") < lines.index("set -u")


def test_bad_options_are_all_named() -> None:
    assert parse_options(["qos=high", "constraint=a=b", "exclusive"]) == (
        ("qos", "high"),
        ("constraint", "a=b"),
        ("exclusive", None),
    )
    with pytest.raises(UserError) as caught:
        parse_options(["QOS", "-p=x", "comment=two\nlines", "nodes=3", "ntasks=8", "array=0-3", "output=x", "signal=USR1@60"])
    said = str(caught.value)
    assert said.count("expected a long option of sbatch") == 3
    for part in ("nodes=3: state --nodes", "ntasks=8: state", "array=0-3: a launch is one run", "output=x: state --logs"):
        assert part in said
    assert "signal=USR1@60: expected signal=B:USR1@SECONDS" in said


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
    assert "\npreflight=300\n" in text
    code, out, errors = run(*arguments, "--skip-preflight", "--dry-run", "--setup", "module load cuda")
    assert "\npreflight=\n" in out
    assert "\nmodule load cuda\n" in out
    assert errors == ""
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
