"""Slurm: the batch script of a run, and the rank of a process that `srun` started.

`srun` starts one process per task directly. DeepSpeed's own `--launcher slurm` would do the same through one more program, and
leaves RANK, WORLD_SIZE and MASTER_ADDR unset as well.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_plasticity.errors import UserError

SECONDS_BEFORE_THE_LIMIT = 300
"""A run is told to save so long before its time is up."""
CPUS_PER_GPU = 4
"""Without a word Slurm gives a process one core, which its threads for data, NCCL and checkpoints would share."""

STEP_OPTIONS = ("--export=ALL", "--kill-on-bad-exit=0", "--wait=900")
"""Of the `srun` that starts the ranks of a run. One that has ended must not take with it those that still save: they notice by
themselves when one is lost (`parallel/liveness.py`). Whoever has not noticed after a quarter of an hour is ended."""

# The end of launch_scripts/slurm.sbatch too, which a test compares. "$@" is the verb with arguments; $python, $logs, and
# $preflight (seconds for the all-reduce, or nothing) are set.
BODY = r"""
export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
if [ -z "$MASTER_ADDR" ]; then
    echo "error: scontrol does not name the nodes of this job; is it on PATH there?" >&2
    exit 2
fi
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun no longer takes it from sbatch
fi
mkdir -p "$logs"
echo "$(date): attempt $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST; logs in $logs"

# Slurm tells this shell shortly before the time is up; srun passes the signal on to every rank, and the run saves and ends.
almost_over= cancelled= step=
trap 'almost_over=yes; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null' USR1
trap 'cancelled=yes; [ -z "$step" ] || kill -TERM "$step" 2>/dev/null' TERM
if [ -n "$preflight" ]; then
    "$python" -m megatron_plasticity.launch.slurm_preflight "$preflight" "$logs" "$@" || exit
fi
before=$("$python" -m megatron_plasticity.launch.kept "$@") || exit
[ -z "$cancelled" ] || exit 143

# A rank that has ended must not take with it those that still save: they notice by themselves when one is lost.
srun --export=ALL --kill-on-bad-exit=0 --wait=900 --open-mode=append --output="$logs/%j-rank%t.log" \
    "$python" -m megatron_plasticity "$@" &
step=$!
code=0
while :; do
    wait "$step" && code=0 || code=$?
    kill -0 "$step" 2>/dev/null || break  # a signal ends `wait` early
done
if [ "$code" -eq 0 ] || [ -n "$cancelled" ]; then
    echo "$(date): ended with exit code $code"
    exit "$code"
fi

# Once more if the time was nearly over, or if a process was lost (75) or killed (137), at most ten times. A job that adds no
# checkpoint would go round for ever.
why=
if [ -n "$almost_over" ]; then
    why="the time limit came"
elif [ "$code" -eq 75 ] || [ "$code" -eq 137 ]; then
    echo "$(date): exit code $code" >> "$logs/$SLURM_JOB_ID-lost.log"
    if [ "$(wc -l < "$logs/$SLURM_JOB_ID-lost.log")" -le 10 ]; then
        why="a process was lost"
    fi
fi
if [ -n "$why" ]; then
    added=$(LC_ALL=C comm -13 <(echo "$before") <("$python" -m megatron_plasticity.launch.kept "$@"))
    if [ -z "$added" ]; then
        echo "error: $why before a checkpoint was added, so the job is not queued again; see $logs, or give it more time" >&2
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "$(date): $why; saved, and queued again"
        exit 0
    else
        echo "error: $why; saved, but Slurm does not queue the job again: submit it once more" >&2
    fi
fi
echo "$(date): ended with exit code $code"
exit "$code"
"""

_KEY = re.compile(r"[a-z][a-z-]*")
_SIGNAL = re.compile(r"B:USR1@\d+")
_OURS = {
    "nodes": "state --nodes",
    "ntasks": "state --nodes and --gpus-per-node",
    "ntasks-per-node": "state --gpus-per-node, one process for each",
    "ntasks-per-gpu": "there is one process for each of --gpus-per-node",
    "ntasks-per-core": "there is one process for each of --gpus-per-node",
    "ntasks-per-socket": "there is one process for each of --gpus-per-node",
    "array": "a launch is one run; `megatron-plasticity study run --slurm` makes arrays",
    "output": "state --logs",
}
_GPU_OPTIONS = ("gpus", "gres", "gpus-per-task", "gpus-per-socket")


@dataclass(frozen=True)
class SlurmRequest:
    """What to ask Slurm for."""

    nodes: int
    tasks_per_node: int
    """Processes per node: one per GPU, or without GPUs as many as are wanted."""
    gpus: bool
    """Whether each process has a GPU."""
    options: tuple[tuple[str, str | None], ...] = ()
    """Further options of sbatch, by their long names, None for one that takes no value; they replace ours."""
    setup: tuple[str, ...] = ()
    """Lines of shell before anything else, such as `module load cuda`."""

    @property
    def processes(self) -> int:
        return self.nodes * self.tasks_per_node


def parse_options(pairs: Sequence[str]) -> tuple[tuple[str, str | None], ...]:
    """Options of `--sbatch KEY[=VALUE]`. Raises UserError, with all problems, for one that is none, or that decides what the
    launch itself decides."""
    parsed: list[tuple[str, str | None]] = []
    problems = []
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not _KEY.fullmatch(key) or not value.isprintable():
            problems.append(f"--sbatch {pair!r}: expected a long option of sbatch, such as qos=high or exclusive")
        elif key in _OURS:
            problems.append(f"--sbatch {pair}: {_OURS[key]}")
        elif key == "signal" and not _SIGNAL.fullmatch(value):
            problems.append(f"--sbatch {pair}: expected signal=B:USR1@SECONDS, by which the run is told to save before the limit")
        parsed.append((key, value if separator else None))
    if problems:
        raise UserError("\n".join(problems))
    return tuple(parsed)


def batch_script(request: SlurmRequest, name: str, program: Sequence[str], logs: Path, preflight: float | None = None) -> str:
    """The script for sbatch; `program` is a verb with its arguments. `preflight` are the seconds that an all-reduce over all
    ranks may take before training; None checks nothing. Nothing of the environment is in the script."""
    chosen = dict(request.options)
    ours: dict[str, str | None] = {"job-name": name, "nodes": str(request.nodes), "ntasks-per-node": str(request.tasks_per_node)}
    if request.gpus and not chosen.keys() & set(_GPU_OPTIONS):
        ours["gpus-per-node"] = str(request.tasks_per_node)
    if request.gpus and "cpus-per-gpu" not in chosen:
        ours["cpus-per-task"] = str(CPUS_PER_GPU)
    ours |= {"output": str(logs / "%j.log"), "open-mode": "append", "signal": f"B:USR1@{SECONDS_BEFORE_THE_LIMIT}"}
    if "no-requeue" not in chosen:
        ours["requeue"] = None
    setting = [
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
        f"python={shlex.quote(sys.executable)}",
        f"logs={shlex.quote(str(logs))}",
        f"preflight={'' if preflight is None else f'{preflight:g}'}",
        f"set -- {shlex.join(program)}",
    ]
    # Scripts of module systems and conda do not survive `set -u`.
    return "\n".join(["#!/bin/bash", *directives(ours | chosen), *request.setup, "set -u", *setting]) + "\n" + BODY


def directives(options: Mapping[str, str | None]) -> list[str]:
    """The lines of a batch script that are for sbatch; None makes an option without a value."""
    return [f"#SBATCH --{key}" + ("" if value is None else f"={shlex.quote(value)}") for key, value in options.items()]


def submit(script: Path) -> str:
    """Give the script to sbatch; returns the number of the job. Raises UserError with sbatch's own words."""
    if (sbatch := shutil.which("sbatch")) is None:
        raise UserError("sbatch is not on PATH: --slurm is for a login node of a Slurm cluster")
    ended = subprocess.run([sbatch, "--parsable", str(script)], capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"sbatch refuses {script}: {ended.stderr.strip() or ended.stdout.strip()}")
    return ended.stdout.strip().partition(";")[0]  # JOB;CLUSTER where there are several


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK … of a task of `srun`; nothing elsewhere.

    A shell inside an allocation has Slurm's variables too: only where somebody has set MASTER_ADDR and MASTER_PORT, as the batch
    script does, are the tasks meant to be ranks of one run.
    """
    if "RANK" in environment or not {"MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_STEP_ID"} <= environment.keys():
        return {}
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
    }


def nodes_of_job(environment: Mapping[str, str]) -> list[str]:
    """Names of the nodes of the job whose variables these are, in Slurm's order."""
    command = ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def meeting_place(environment: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR, MASTER_PORT and SRUN_CPUS_PER_TASK for a step of the job whose variables these are, as BODY sets them."""
    found = {"MASTER_ADDR": nodes_of_job(environment)[0], "MASTER_PORT": str(20000 + int(environment["SLURM_JOB_ID"]) % 10000)}
    if "SLURM_CPUS_PER_TASK" in environment:  # srun does not take it from sbatch any more
        found["SRUN_CPUS_PER_TASK"] = environment["SLURM_CPUS_PER_TASK"]
    return found


def check_meeting_place(environment: Mapping[str, str]) -> None:
    """Raises UserError in one of several tasks of `srun` that are not told where to meet: each would train all alone."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_STEP_ID" not in environment or "RANK" in environment or tasks == "1":
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]:
        raise UserError(
            f"srun has started {tasks} tasks without {' and '.join(missing)}, so that they cannot meet: export it "
            "before `srun --export=ALL`, as launch_scripts/slurm.sbatch does"
        )
