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

# The end of launch_scripts/slurm.sbatch too, which a test compares. "$@" is the verb with arguments; $python and $logs are set.
BODY = r"""
export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun no longer takes it from sbatch
fi
mkdir -p "$logs"
echo "$(date): attempt $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST; logs in $logs"

# Slurm tells this shell shortly before the time is up; srun passes the signal on to every rank, and the run saves and ends.
almost_over= step=
trap 'almost_over=yes; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null' USR1
trap '[ -z "$step" ] || kill -TERM "$step" 2>/dev/null' TERM
srun --kill-on-bad-exit=1 --open-mode=append --output="$logs/%j-rank%t.log" \
    "$python" -m megatron_plasticity "$@" &
step=$!
code=0
while :; do
    wait "$step" && code=0 || code=$?
    kill -0 "$step" 2>/dev/null || break  # a signal ends `wait` early
done

# 138 is 128 + SIGUSR1: saved, and not finished. A job without time to train would go round for ever.
if [ -n "$almost_over" ] && [ "$code" -eq 138 ]; then
    if [ "$SECONDS" -lt 600 ]; then
        echo "error: the time limit leaves no time to train; give the job more" >&2
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "$(date): saved before the time limit and queued again"
        exit 0
    fi
fi
echo "$(date): ended with exit code $code"
exit "$code"
"""

_KEY = re.compile(r"[a-z][a-z-]*")


@dataclass(frozen=True)
class SlurmRequest:
    """What to ask Slurm for."""

    nodes: int
    tasks_per_node: int
    """Processes per node: one per GPU, or without GPUs as many as are wanted."""
    gpus: bool
    """Whether each process has a GPU."""
    options: tuple[tuple[str, str], ...] = ()
    """Further options of sbatch, by their long names; they replace ours."""

    @property
    def processes(self) -> int:
        return self.nodes * self.tasks_per_node


def parse_options(pairs: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Options of `--sbatch KEY=VALUE`. Raises UserError for one that is none, with all problems."""
    parsed, problems = [], []
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not _KEY.fullmatch(key) or not value.isprintable():
            problems.append(f"--sbatch {pair!r}: expected a long option of sbatch, such as qos=high or constraint=h100")
        parsed.append((key, value))
    if problems:
        raise UserError("\n".join(problems))
    return tuple(parsed)


def batch_script(request: SlurmRequest, name: str, program: Sequence[str], logs: Path) -> str:
    """The script for sbatch; `program` is a verb with its arguments. Nothing of the environment is in it."""
    ours = {
        "job-name": name,
        "nodes": str(request.nodes),
        "ntasks-per-node": str(request.tasks_per_node),
        **({"gpus-per-node": str(request.tasks_per_node)} if request.gpus else {}),
        "output": str(logs / "%j.log"),
        "open-mode": "append",
        "signal": f"B:USR1@{SECONDS_BEFORE_THE_LIMIT}",
    }
    directives = [f"#SBATCH --{key}={shlex.quote(value)}" for key, value in (ours | dict(request.options)).items()]
    setting = [
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
        f"python={shlex.quote(sys.executable)}",
        f"logs={shlex.quote(str(logs))}",
        f"set -- {shlex.join(program)}",
    ]
    return "\n".join(["#!/bin/bash", *directives, "#SBATCH --requeue", "set -u", *setting]) + "\n" + BODY


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
