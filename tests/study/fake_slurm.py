"""A Slurm that runs jobs on this machine: `python fake_slurm.py PROGRAM ARGUMENTS`, as the programs sbatch, squeue … on PATH.

Every element of an array is a process of its own that runs the batch script. What is known of it is one file in FAKE_SLURM/jobs.
Files in FAKE_SLURM change how it behaves: `away` makes the controller unreachable, `no-accounting` sacct useless, `limit` holds
the seconds after which a first attempt gets the signal that its script asks for, and `die` the state in which first attempts end.
`room` holds the number of jobs that a user may have.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STATE = Path(os.environ["FAKE_SLURM"])
JOBS = STATE / "jobs"


def main() -> int:
    program, *arguments = sys.argv[1:]
    if (STATE / "away").exists() and program != "element":
        sys.stderr.write(f"{program}: error: Unable to contact slurm controller (connect failure)\n")
        return 1
    with (STATE / "calls").open("a") as calls:
        calls.write(" ".join([program, *arguments]) + "\n")
    return {
        "sbatch": sbatch,
        "squeue": squeue,
        "sacct": sacct,
        "scancel": scancel,
        "scontrol": scontrol,
        "srun": srun,
        "element": element,
    }[program](arguments)


def sbatch(arguments: list[str]) -> int:
    script = Path(arguments[-1])
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script.read_text(), re.MULTILINE))
    job = str(100 + len(list(STATE.glob("submitted-*"))))
    (STATE / f"submitted-{job}").write_text(script.read_text())
    first, last = map(int, options["array"].partition("%")[0].split("-"))
    room = STATE / "room"
    under_way = sum(info["state"] in ("PENDING", "RUNNING") for info in known().values())
    if room.exists() and last + 1 + under_way > int(room.read_text()):
        sys.stderr.write("sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates ")
        sys.stderr.write("accounting/QOS policy (job submit limit, user's size and/or time limits)\n")
        return 1
    for index in range(first, last + 1):
        write(f"{job}_{index}", {"state": "PENDING", "name": options["job-name"], "script": str(script), "attempt": 1})
        start(f"{job}_{index}")
    print(f"{job};cluster")
    return 0


def start(name: str) -> None:
    subprocess.Popen(
        [sys.executable, __file__, "element", name], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def element(arguments: list[str]) -> int:
    """The life of one attempt at an element, in a process of its own."""
    (name,) = arguments
    job, index = name.split("_")
    info = read(name)
    if (STATE / "die").exists() and info["attempt"] == 1:
        write(name, {**info, "state": (STATE / "die").read_text(), "code": "0:0"})
        return 0
    environment = {
        **os.environ,
        "SLURM_ARRAY_JOB_ID": job,
        "SLURM_ARRAY_TASK_ID": index,
        "SLURM_JOB_ID": str(os.getpid()),  # a port follows from it, and several tests may run side by side
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_RESTART_COUNT": str(info["attempt"] - 1),
    }
    process = subprocess.Popen(["bash", info["script"]], env=environment, start_new_session=True)
    write(name, {**info, "state": "RUNNING", "pid": process.pid})
    limit = STATE / "limit"
    deadline = time.monotonic() + float(limit.read_text()) if limit.exists() and info["attempt"] == 1 else None
    while process.poll() is None:
        if deadline is not None and time.monotonic() > deadline:
            deadline = None
            process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)
    info = read(name)
    if info["state"] == "REQUEUED":
        write(name, {**info, "state": "PENDING", "attempt": info["attempt"] + 1})
        start(name)
    elif info["state"] != "CANCELLED by 0":
        code = process.returncode
        write(name, {**info, "state": "FAILED" if code else "COMPLETED", "code": f"0:{-code}" if code < 0 else f"{code}:0"})
    return 0


def squeue(arguments: list[str]) -> int:
    asked = {key: value for key, _, value in (argument.removeprefix("--").partition("=") for argument in arguments)}
    for name, info in known().items():
        if info["state"] not in ("PENDING", "RUNNING", "REQUEUED") or asked.get("name", info["name"]) != info["name"]:
            continue
        print(name.partition("_")[0] if asked["format"] == "%F" else f"{name}|{info['state']}|node1")
    return 0


def sacct(arguments: list[str]) -> int:
    if (STATE / "no-accounting").exists():
        sys.stderr.write("Slurm accounting storage is disabled\n")
        return 1
    asked = next(argument for argument in arguments if argument.startswith("--jobs=")).removeprefix("--jobs=").split(",")
    for name, info in known().items():
        if name.partition("_")[0] in asked:
            print(f"{name}|{info['state']}|{info.get('code', '0:0')}")
    return 0


def scancel(arguments: list[str]) -> int:
    for name, info in known().items():
        if (name in arguments or name.partition("_")[0] in arguments) and info["state"] in ("PENDING", "RUNNING"):
            write(name, {**info, "state": "CANCELLED by 0"})
            if "pid" in info:
                os.kill(info["pid"], signal.SIGTERM)
    return 0


def scontrol(arguments: list[str]) -> int:
    if arguments[0] == "requeue":
        write(arguments[1], {**read(arguments[1]), "state": "REQUEUED"})
    else:
        print("localhost")  # where ranks can meet
    return 0


def srun(arguments: list[str]) -> int:
    """Two tasks, as ranks of one run."""
    program = arguments[next(i for i, argument in enumerate(arguments) if not argument.startswith("-")) :]
    tasks = []
    for rank in range(2):
        task = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
        tasks.append(subprocess.Popen(program, env={**os.environ, **task}))
    kill_on_bad_exit = "--kill-on-bad-exit=1" in arguments
    while None in (codes := [task.poll() for task in tasks]) and not (kill_on_bad_exit and any(codes)):
        time.sleep(0.1)
    for task in tasks:
        task.terminate()
    return max(abs(task.wait()) for task in tasks)


def known() -> dict[str, dict[str, Any]]:
    return {path.stem: read(path.stem) for path in sorted(JOBS.glob("*.json"))}


def read(name: str) -> dict[str, Any]:
    return json.loads((JOBS / f"{name}.json").read_text())


def write(name: str, info: dict[str, Any]) -> None:
    temporary = JOBS / f".{name}.{os.getpid()}"
    temporary.write_text(json.dumps(info))
    temporary.replace(JOBS / f"{name}.json")


if __name__ == "__main__":
    sys.exit(main())
