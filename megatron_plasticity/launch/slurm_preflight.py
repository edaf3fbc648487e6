"""The preflight of a Slurm job, in its allocation, before training starts:
`python -m megatron_plasticity.launch.slurm_preflight SECONDS LOGS VERB CONFIG [KEY.PATH=VALUE …]`.

One task per node looks around (`launch/probe.py`), then all ranks add up a number, for which they have SECONDS.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from megatron_plasticity.errors import UserError, ending_the_process
from megatron_plasticity.launch.hostfile import Host
from megatron_plasticity.launch.job import LaunchedJob
from megatron_plasticity.launch.machines import visible_devices
from megatron_plasticity.launch.preflight import (
    PROBE,
    PROBE_SECONDS,
    Check,
    all_reduce_problems,
    findings_in,
    host_checks,
    question,
    reached_check,
    run_check,
    table,
    uses_gpus,
)
from megatron_plasticity.launch.probe import Findings
from megatron_plasticity.launch.remote import Answer
from megatron_plasticity.launch.slurm import nodes_of_job

_TASKS = re.compile(r"(?P<tasks>\d+)(?:\(x(?P<nodes>\d+)\))?")
_LABELLED = re.compile(r"\s*(?P<task>\d+): ?(?P<text>.*)")
_SRUN = ("srun", "--export=ALL", "--kill-on-bad-exit=0")
# They would leave the one task of a node a share of its GPUs.
_SHARES = ("SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU", "SLURM_TRES_PER_TASK")


def tasks_per_node(text: str) -> list[int]:
    """How many tasks each node has, of Slurm's `8(x3),4`."""
    found = [match for part in text.split(",") if (match := _TASKS.fullmatch(part))]
    return [int(match["tasks"]) for match in found for _ in range(int(match["nodes"] or 1))]


def ask_nodes(nodes: Sequence[str], given: str, seconds: float) -> list[Answer]:
    """What a probe on each node of the allocation answers."""
    command = [*_SRUN, f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", "--wait=0", "--label"]
    environment = {name: value for name, value in os.environ.items() if name not in _SHARES}
    process = subprocess.Popen(
        [*command, sys.executable, "-m", PROBE],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    said: dict[int, list[str]] = {task: [] for task in range(len(nodes))}
    complained: dict[int, list[str]] = {task: [] for task in range(len(nodes))}
    at: dict[int, float] = {}
    of_srun: list[str] = []

    def read(stream: IO[str], by_task: dict[int, list[str]]) -> None:
        for line in stream:
            if (match := _LABELLED.fullmatch(line.rstrip("\n"))) is None or int(match["task"]) not in by_task:
                of_srun.append(line.strip())
                continue
            by_task[int(match["task"])].append(match["text"])
            at[int(match["task"])] = time.time()

    readers = [threading.Thread(target=read, args=pair) for pair in ((process.stdout, said), (process.stderr, complained))]
    for reader in readers:
        reader.start()
    try:
        process.stdin.write(given)
        process.stdin.close()
    except BrokenPipeError:  # srun has failed, and says why
        pass
    late = False
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        late = True
        process.kill()
        process.wait()
    for reader in readers:
        reader.join()
    answers = []
    for task, node in enumerate(nodes):
        errors = complained[task] or [line for line in of_srun if node in line] or of_srun
        code = 0 if said[task] else None if late else process.returncode or 1
        answers.append(Answer(node, code, "\n".join(said[task]), "\n".join(errors), at.get(task, time.time())))
    return answers


def _hosts(nodes: Sequence[str], counts: Sequence[int], found: Mapping[str, Findings]) -> list[Host]:
    """The nodes with the GPUs of the job, by the indexes that it has there."""
    hosts = []
    for node, count in zip(nodes, counts, strict=True):
        seen = visible_devices({"CUDA_VISIBLE_DEVICES": there.visible} if (there := found.get(node)) and there.visible else {})
        hosts.append(Host(node, seen[:count] if seen is not None and len(seen) >= count else tuple(range(count))))
    return hosts


def all_reduce_check(hosts: Sequence[Host], backend: str, seconds: float, shared: Path) -> Check:
    """Whether all ranks can add up a number within so many seconds. `shared`: folder that every node sees."""
    begin = time.monotonic()
    processes = sum(len(host.slots) for host in hosts)
    logs = Path(tempfile.mkdtemp(prefix=".all-reduce-", dir=shared))
    try:
        program = [sys.executable, "-m", "megatron_plasticity.launch.collective_check", "--backend", backend]
        command = [*_SRUN, "--wait=30", f"--output={logs}/%t.log", *program, "--seconds", f"{seconds:g}"]
        try:
            code = subprocess.run(command, timeout=seconds + 60).returncode
        except subprocess.TimeoutExpired:  # run() has killed it
            code = 1
        if code == 0:
            return Check("all-reduce", (), f"{processes} ranks over {backend}, {time.monotonic() - begin:.0f} s")
        said = [_text(logs / f"{rank}.log") for rank in range(processes)]
        problems = all_reduce_problems(hosts, said, backend)
        last = next((lines[-1] for text in said if (lines := text.split("\n")[:-1]) and "Error" in lines[-1]), None)
        return Check("all-reduce", (*problems, *(() if last is None else (f"one of them: {last}",))))
    finally:
        shutil.rmtree(logs, ignore_errors=True)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def preflight(job: LaunchedJob, seconds: float, logs: Path) -> list[Check]:
    """The checks of the run and of the nodes; with an all-reduce if nothing is wrong before."""
    nodes = nodes_of_job(os.environ)
    counts = tasks_per_node(os.environ["SLURM_TASKS_PER_NODE"])
    port = int(os.environ["MASTER_PORT"])
    checks = [run_check(job, sum(counts))]
    with question(job, port, several=True) as asked:
        answers = ask_nodes(nodes, asked, PROBE_SECONDS)
    found = findings_in(answers)
    hosts = _hosts(nodes, counts, found)
    checks.append(reached_check(answers, "srun, Python"))
    if found:
        hint = "something else on this node uses it; submit the job once more"
        checks += host_checks(job, hosts, found, {answer.host: answer.at for answer in answers}, port, True, hint)
    if all(check.passed for check in checks) and sum(counts) > 1:
        checks.append(all_reduce_check(hosts, "nccl" if uses_gpus(job, found) else "gloo", seconds, logs))
    return checks


def main() -> None:
    seconds, logs, verb, config, *overrides = sys.argv[1:]
    with ending_the_process():
        job = LaunchedJob.load(verb, Path(config), overrides)  # type: ignore[arg-type]  # cli.py knows the verbs
        checks = preflight(job, float(seconds), Path(logs))
    print(f"preflight\n{table(checks)}", flush=True)
    if not all(check.passed for check in checks):
        print("error: problems were found, see above; the run was not started", file=sys.stderr)
        sys.exit(UserError.exit_code)


if __name__ == "__main__":
    main()
