"""What is wrong with a launch, found before anything starts: of the run itself, and of the machines.

Every machine answers one probe (`launch/probe.py`); the answers are compared here.
"""

from __future__ import annotations

import json
import secrets
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.collective_check import JOINED, MET
from megatron_plasticity.launch.hostfile import Host, process_count
from megatron_plasticity.launch.job import LaunchedJob
from megatron_plasticity.launch.plan import GIB, WIDTH, Machine
from megatron_plasticity.launch.probe import PACKAGES, Findings, Question, probe
from megatron_plasticity.launch.remote import Answer, on_hosts
from megatron_plasticity.tracking.disk import explain_disk_errors

PROBE = "megatron_plasticity.launch.probe"
PROBE_SECONDS = 60
CLOCK_SECONDS = 5.0
"""More apart, and records of two machines no longer have an order."""


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    name: str
    problems: tuple[str, ...] = ()
    """Each names its machine."""
    detail: str = ""
    """What was found, where all is well."""

    @property
    def passed(self) -> bool:
        return not self.problems


def table(checks: Sequence[Check]) -> str:
    """One row per check, and under one that failed a line for each problem."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        for number, text in enumerate(check.problems or (check.detail,)):
            first = f"  {'ok' if check.passed else 'FAILED':6}  {check.name:{width}}  "
            indent = " " * len(first)
            lines += textwrap.wrap(
                text,
                max(WIDTH, len(first) + 40),
                initial_indent=first if number == 0 else indent,
                subsequent_indent=indent,
                break_on_hyphens=False,
                break_long_words=False,
            ) or [first.rstrip()]
    return "\n".join(lines)


def run_check(job: LaunchedJob, processes: int) -> Check:
    """Whether the run itself can work on so many processes."""
    return Check("configuration", tuple(job.problems(processes)), f"{job.name} on {processes} processes")


def ask_hosts(
    job: LaunchedJob, hosts: Sequence[Host], port: int | None, over_ssh: bool, *, hides_gpus: bool = False
) -> tuple[list[Check], dict[str, Findings]]:
    """Probe every machine: the checks of their answers, and what each machine said that answered. `hides_gpus`: ranks will see
    none of the GPUs."""
    with question(job, port, over_ssh) as asked:
        answers = on_hosts([host.name for host in hosts], PROBE, given=asked, seconds=PROBE_SECONDS, over_ssh=over_ssh)
    found = findings_in(answers)
    if hides_gpus:
        found = {name: replace(there, gpus=[]) for name, there in found.items()}
    checks = [reached_check(answers, "ssh, Python" if over_ssh else "this machine")]
    if found:
        checks += host_checks(job, hosts, found, {answer.host: answer.at for answer in answers}, port, over_ssh)
    return checks, found


@contextmanager
def question(job: LaunchedJob, port: int | None, several: bool) -> Iterator[str]:
    """What a probe is given on its standard input. Inside the block a file lies in the output folder for `several` machines to
    see."""
    with _token(job.output, several) as token:
        asked = Question(
            inputs=[str(path) for path in job.inputs],
            output=str(job.output),
            token=None if token is None else str(token),
            port=port,
        )
        yield json.dumps(asdict(asked))


def findings_in(answers: Sequence[Answer]) -> dict[str, Findings]:
    """Machine → what it says, of those that answered."""
    return {answer.host: found for answer in answers if (found := Findings.read(answer.output)) is not None}


@contextmanager
def _token(output: Path, over_ssh: bool) -> Iterator[Path | None]:
    """A file in the output folder that the other machines should see; folders that were made for it go again."""
    if not over_ssh:
        yield None
        return
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    token = output / f".launch-{secrets.token_hex(8)}"
    with explain_disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        token.touch()
    try:
        yield token
    finally:
        token.unlink(missing_ok=True)
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # somebody uses it by now
                break


def reached_check(answers: Sequence[Answer], name: str) -> Check:
    """Whether every machine answered with findings."""
    problems = [f"{answer.host}: {_explained(answer)}" for answer in answers if Findings.read(answer.output) is None]
    where = f"{len(answers)} machine{'s' if len(answers) > 1 else ''}"
    return Check(name, tuple(problems), f"{where} answered")


def _explained(answer: Answer) -> str:
    said = answer.complaint
    hints = {
        "Permission denied": "ssh must work without a password: put your public key into its ~/.ssh/authorized_keys",
        "Host key verification failed": "log in once by hand, and accept its key",
        "No module named": "install the project there, at the same path as here",
        "No such file": "this folder and this Python must be at the same path there as here",
    }
    return f"{said}{next((f' ({hint})' for text, hint in hints.items() if text in said), '')}"


def host_checks(
    job: LaunchedJob,
    hosts: Sequence[Host],
    found: dict[str, Findings],
    times: dict[str, float],
    port: int | None,
    over_ssh: bool,
    port_hint: str = "choose another one with --master-port",
) -> list[Check]:
    """Compare what the machines said. `times` are this machine's clock when each answer came, in Unix seconds. `over_ssh`: they
    are several, and share folders."""
    used = [host for host in hosts if host.name in found]
    checks = [_gpu_check(job, used, found, process_count(hosts), over_ssh), *_place_checks(job, found, over_ssh)]
    if over_ssh:
        checks[:0] = [same_code_check(found)]
        checks.append(clock_check(found, times))
    if port is not None:
        checks.append(_port_check(found, port_hint))
    return checks


def same_code_check(found: dict[str, Findings]) -> Check:
    """Every machine is compared with the first."""
    (first, reference), *others = found.items()
    problems = []
    if missing := [package for package, number in reference.versions.items() if number == "missing"]:
        problems.append(f"{first}: {', '.join(missing)} is not installed")
    for name, other in others:
        pairs = {"Python": (other.python, reference.python)}
        pairs |= {
            package: (other.versions.get(package, "missing"), reference.versions.get(package, "missing"))
            for package in {**reference.versions, **other.versions}
        }
        pairs["NVIDIA's driver"] = (other.driver or "missing", reference.driver or "missing")
        different = [f"{what} {here} instead of {there}" for what, (here, there) in pairs.items() if here != there]
        if not different and other.code != reference.code:
            different = [f"other code of this project (files of the package hash to {other.code[:8]} and {reference.code[:8]})"]
        if different:
            problems.append(f"{name}: {', '.join(different)}, which {first} has")
    shown = [f"{package} {reference.versions[package]}" for package in PACKAGES if package in reference.versions]
    more = len(reference.versions) - len(shown)
    detail = f"Python {reference.python}, {', '.join(shown)} and {more} more, code {reference.code[:8]}"
    return Check("versions", tuple(problems), detail)


def _gpu_check(
    job: LaunchedJob, hosts: Sequence[Host], found: dict[str, Findings], processes: int, over_ssh: bool = False
) -> Check:
    if not uses_gpus(job, found):
        detail = "CPU: " + ", ".join(f"{host.name} {found[host.name].cores} cores" for host in hosts[:4])
        if over_ssh and job.config.device == "auto" and any(len(host.slots) > 1 for host in hosts):
            detail += "; warning: nvidia-smi finds no GPU on any machine, so `device: auto` trains on CPUs"
        return Check("processors", (), detail)
    problems = gpu_problems(hosts, found)
    try:
        needed = job.gpu_bytes(processes)
    except UserError:  # a layout that does not go: `run_check` says it
        needed = None
    for host in hosts:
        gpus = found[host.name].gpus
        if needed is None:
            break
        for slot in [slot for slot in host.slots if slot < len(gpus) and gpus[slot].total]:
            gpu = gpus[slot]
            reserve = Machine(gpu.total / GIB).reserve * GIB
            if needed + reserve > gpu.total - gpu.used:
                problems.append(
                    f"{host.name}: GPU {slot} has {(gpu.total - gpu.used) / GIB:.1f} of {gpu.total / GIB:.1f} GiB free, and the "
                    f"run needs {needed / GIB:.1f} and a reserve of {reserve / GIB:.1f}; see `megatron-plasticity plan`"
                )
    names = sorted({name for kind in _gpu_kinds(hosts, found).values() for name in kind})
    need = "" if needed is None else f", of which the run needs {needed / GIB:.1f} GiB each"
    return Check("GPUs", tuple(problems), f"{processes} × {', '.join(names)}{need}")


def gpu_problems(hosts: Sequence[Host], found: dict[str, Findings]) -> list[str]:
    """Slots without a GPU, and machines with other GPUs than the first."""
    problems = []
    for host in hosts:
        count = len(found[host.name].gpus)
        if absent := [slot for slot in host.slots if slot >= count]:
            problems.append(f"{host.name}: has {count} GPUs, so none for slot {', '.join(map(str, absent))}")
    kinds = _gpu_kinds(hosts, found)
    first = next(iter(kinds))
    return problems + [
        f"{name}: has {', '.join(kind)} where {first} has {', '.join(kinds[first])}; the slowest would set the pace"
        for name, kind in kinds.items()
        if kind and kinds[first] and kind != kinds[first]
    ]


def _gpu_kinds(hosts: Sequence[Host], found: dict[str, Findings]) -> dict[str, list[str]]:
    """Machine → names of the GPUs in its slots."""
    slots = {host.name: [gpu for slot, gpu in enumerate(found[host.name].gpus) if slot in host.slots] for host in hosts}
    return {name: sorted({gpu.name for gpu in gpus}) for name, gpus in slots.items()}


def uses_gpus(job: LaunchedJob, found: dict[str, Findings]) -> bool:
    """Whether the ranks run on GPUs: as the config says, or if there is one."""
    return job.config.device == "cuda" or (job.config.device == "auto" and any(there.gpus for there in found.values()))


def _place_checks(job: LaunchedJob, found: dict[str, Findings], over_ssh: bool) -> Iterator[Check]:
    """Inputs, output folder and disk, which all machines share."""
    if over_ssh:
        reference = next(iter(found.values())).inputs
        problems = []
        for name, there in found.items():
            missing = [path for path, digest in there.inputs.items() if digest is None]
            problems += [f"{name}: {path} is not there; it must be on a folder that all machines share" for path in missing]
            stale = [path for path, digest in there.inputs.items() if digest not in (None, reference[path]) and reference[path]]
            problems += [f"{name}: {path} holds other files than on {next(iter(found))}" for path in stale]
        yield Check("inputs shared", tuple(problems), ", ".join(reference))
    problems = []
    for name, there in found.items():
        if over_ssh and not there.sees_token:
            problems.append(f"{name}: does not see what is written to {job.output} here; it must be a shared folder")
        elif not there.can_write:
            problems.append(f"{name}: may not write to {job.output}")
    yield Check("output shared" if over_ssh else "output", tuple(problems), str(job.output))
    needed = job.disk_bytes()
    short = [
        f"{name}: {_decimal(there.free)} are free at {job.output}, and the run's checkpoints need {_decimal(needed)}"
        for name, there in found.items()
        if there.free < needed
    ]
    free = min(there.free for there in found.values())
    yield Check("disk", tuple(short), f"{_decimal(free)} free, {_decimal(needed)} for the run's checkpoints")


def _port_check(found: dict[str, Findings], hint: str) -> Check:
    first, there = next(iter(found.items()))
    problem = there.port_problem
    problems = () if problem is None else (f"{first}: {problem}; {hint}",)
    return Check("master port", problems, f"free on {first}")


def clock_check(found: dict[str, Findings], times: dict[str, float]) -> Check:
    offsets = {name: there.time - times[name] for name, there in found.items()}
    wrong = [
        f"{name}: its clock is {abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} this machine's; set up NTP or chrony"
        for name, offset in offsets.items()
        if abs(offset) > CLOCK_SECONDS
    ]
    return Check("clocks", tuple(wrong), f"within {max(abs(offset) for offset in offsets.values()):.1f} s")


def all_reduce_problems(hosts: Sequence[Host], said: Sequence[str], backend: str) -> list[str]:
    """Who did not take part in an all-reduce that failed; `said` is what each rank printed."""
    names = [host.name for host in hosts for _ in host.slots]
    problems = []
    for sign, lacks in ((MET, "did not reach rank 0"), (JOINED, "reached rank 0 and did not join the others")):
        absent: dict[str, list[int]] = {}
        for rank, (name, text) in enumerate(zip(names, said, strict=True)):
            if sign not in text:
                absent.setdefault(name, []).append(rank)
        problems = [f"{name}: rank {', '.join(map(str, ranks))} {lacks}" for name, ranks in absent.items()]
        if problems:
            break  # whoever waits for these has nothing to answer for
    hint = "NCCL_DEBUG=INFO says more; NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    return [*(problems or ["all ranks joined, and could not add up a number"]), f"{hint} names the network interface to use"]


def place_here_check(job: LaunchedJob) -> Check:
    """Whether the run's output folder can be written and has room, as seen from this machine."""
    here = probe(Question(output=str(job.output)))
    problems = [] if here.can_write else [f"this machine may not write to {job.output}"]
    free, needed = _decimal(here.free), _decimal(job.disk_bytes())
    if here.free < job.disk_bytes():
        problems.append(f"{free} are free at {job.output}, and the run's checkpoints need {needed}")
    return Check("output", tuple(problems), f"{job.output}: {free} free, {needed} for the run's checkpoints")


def tool_check(name: str, why: str) -> Check:
    """Whether a program is on PATH here."""
    problems = () if shutil.which(name) else (f"{name} is not on PATH of this machine; {why}",)
    return Check(name, problems, "installed")


def _decimal(size: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
