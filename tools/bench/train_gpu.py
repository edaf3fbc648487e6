"""Training speed on one GPU: our engine beside the trainers that one would take instead, on the same weights and batches.

    python tools/bench/train_gpu.py [--model llama2-0.5b …] [--candidates litgpt …] [--python litgpt=/path/to/python …]
    python tools/bench/train_gpu.py --quick        # ours and the plain loop on the 0.5B model, within 90 s
    python tools/bench/train_gpu.py --rehearse     # everything that is installed, on a CPU, with tiny models

For each model of configs/models: first the rate that matrix products keep up on this GPU, then every candidate in a fresh
process, ours first and last, so that drift of the machine shows. Five steps warm up, fifteen are timed, the median counts; the
device is waited for at the end of each step only. `train_gpu_candidates.py` says how each candidate is set.

A row is INVALID, and counts for nothing, unless its first loss is that of fresh weights and its last one that of ours, both to
0.05: then it trains the same model on the same tokens. Fresh weights give ln V only if all logits are 0; with ours they vary, and
the loss is ln V plus half their variance, which is computed from the weights that all candidates start from.

Micro-batches are the largest that are expected to fit without recomputation. A candidate for which one does not fit gets half of
it and so on; the sequences of a step stay the same, and its row says so. PYTORCH_CUDA_ALLOC_CONF is expandable_segments:True for
all unless you set it.

MFU is PaLM's (2204.02311, appendix B): 6 FLOPs per parameter that is multiplied and token, and attention in full, over the peak
of the data sheet. Peak memory is what torch's allocator gave out during the timed steps; `plan` predicts it for our engine.

Verdicts: MFU against the targets for an H200, at least 1.1 times the tokens/s of the best of the others, at most 2 % below the
plain loop, memory within 5 % of what `plan` says. Exit code 0 if all that was measured is as wanted, 1 if not, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from data_sheet import device_of, peak_flops
from training_setting import OUT_OF_MEMORY, UNAVAILABLE, Setting

from megatron_plasticity.config.load import load_config
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.errors import Interrupted, UserError, ending_the_process
from megatron_plasticity.launch.hardware import H200
from megatron_plasticity.launch.memory import largest_stage, memory
from megatron_plasticity.models.sizes import flops_per_token, parameter_count

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "configs" / "models"
WORKER = Path(__file__).resolve().parent / "train_gpu_candidates.py"

PEERS = ("litgpt", "transformers", "transformers-compiled", "transformers-liger", "olmo-core")
OWN = ("ours", "ours-eager", "plain")
CANDIDATES = (*OWN, *PEERS)
AGAIN = "ours, again"


@dataclass(frozen=True)
class Goal:
    """What we want of a model on an H200."""

    mfu: float
    stretch: float
    micro_batch: int
    """Sequences that are expected to fit into its memory without recomputation."""


GOALS = {
    "llama2-0.5b": Goal(0.42, 0.47, 32),
    "llama2-1b": Goal(0.47, 0.52, 16),
    "llama2-4b": Goal(0.53, 0.58, 8),
    "olmo2-1b": Goal(0.47, 0.52, 8),
}
REHEARSED = ("llama2-debug", "olmo2-debug")
LARGEST_REHEARSED = 20_000_000
"""Parameters."""
LEAST_RATIO, MOST_OVERHEAD, MOST_MEMORY_ERROR = 1.1, 0.02, 0.05
LOSS_TOLERANCE = {"bf16": 0.05, "fp32": 1e-3}
FIRST_LOSS_TOLERANCE = 0.05
DRIFT = 0.03
QUICK_SECONDS = 85.0

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID")


@dataclass
class Row:
    """One candidate's line of the table."""

    name: str
    status: Literal["measured", "INVALID", "not measured"]
    reason: str = ""
    """Why it is not measured or not valid."""
    tokens_per_second: float = 0.0
    mfu: float | None = None
    share_of_matmul: float = 0.0
    """FLOP/s as for MFU, over those that square matrix products kept up in this run."""
    peak_bytes: float | None = None
    planned_bytes: float | None = None
    micro_batch: int = 0
    wanted_micro_batch: int = 0
    remark: str = ""
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """A statement that was wanted of the rows."""

    what: str
    found: str
    wanted: str
    met: bool


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    models: dict[str, ModelConfig]
    candidates: tuple[str, ...]
    """Without ours, which is always there."""
    pythons: dict[str, str]
    device: Literal["cuda", "cpu"]
    precision: Literal["bf16", "fp32"]
    micro_batch: int | None
    accumulation: int
    warm_up: int
    steps: int
    repeats: bool
    """Whether ours is measured again at the end."""
    compiled: bool
    time_limit: float
    deadline: float
    """On the clock of `time.monotonic`."""
    scratch: Path
    json: Path | None


class OutOfMemory(Exception):
    """A candidate does not fit with this micro-batch."""


class NotMeasured(Exception):
    """A candidate could not be measured; says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Raises UserError for what cannot be run, before anything is measured."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", metavar="MODEL", help=f"names in configs/models, or files [{' '.join(GOALS)}]")
    add("--candidates", nargs="+", metavar="NAME", help=f"of {' '.join(CANDIDATES)} [all]; ours is always measured")
    add("--python", nargs="+", default=[], metavar="NAME=PATH", help="interpreter that has what a candidate needs [this one]")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="number format [bf16]")
    add("--micro-batch", type=int, help="sequences of a forward pass [by model: 32, 16, 8 and 8 of those above, 8 of others]")
    add("--accumulation", type=int, help="micro-batches of a step [2]")
    add("--warm-up", type=int, help="steps that are not timed [5]")
    add("--steps", type=int, help="steps that are timed [15]")
    add("--no-compile", action="store_true", help="switch torch.compile off in all candidates")
    add("--time-limit", type=float, default=900.0, metavar="SECONDS", help="of each candidate [900]")
    add("--quick", action="store_true", help="ours and the plain loop, llama2-0.5b, 3 + 7 steps, within 90 seconds in all")
    add("--rehearse", action="store_true", help="run on the CPU with tiny models: shows that all works, no speed")
    add("--scratch", type=Path, default=Path(tempfile.gettempdir()), metavar="FOLDER", help="for the initial weights [/tmp]")
    add("--json", type=Path, metavar="FILE", help="write all that was measured there as well")
    plan = checked(parser.parse_args(arguments), began)
    reports: list[dict[str, Any]] = []
    for name in plan.models:
        reports.append(report(name, plan))
        if plan.json is not None:  # after each, so that a command that is stopped leaves what it found
            plan.json.parent.mkdir(parents=True, exist_ok=True)
            ok = len(reports) == len(plan.models) and all(entry["ok"] for entry in reports)
            everything = {"ok": ok, "rehearsal": plan.device == "cpu", "models": reports}
            plan.json.write_text(json.dumps(everything, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return 0 if all(entry["ok"] for entry in reports) else 1


def checked(arguments: argparse.Namespace, began: float = 0.0) -> Plan:
    """The plan of a command that `began` at that time, or a UserError that lists all that is wrong with the command line."""
    problems: list[str] = []
    rehearse, quick = arguments.rehearse, arguments.quick
    names = arguments.model or (REHEARSED if rehearse else ("llama2-0.5b",) if quick else tuple(GOALS))
    models: dict[str, ModelConfig] = {}
    for name in names:
        shipped = MODELS / f"{name}.yaml"
        try:
            models[Path(name).stem if name.endswith(".yaml") else name] = load_config(
                ModelConfig, Path(name) if name.endswith(".yaml") else shipped
            )
        except UserError as error:
            problems.append(f"--model {name}: {error}")
    for name, model in models.items():
        if model.tied_embeddings:
            problems.append(f"--model {name}: ties its embeddings, which the other trainers are not set up for here")
        count = parameter_count(model).total
        if rehearse and count > LARGEST_REHEARSED:
            problems.append(
                f"--rehearse: {name} has {count:,} parameters, and a rehearsal on a CPU takes models of up to "
                f"{LARGEST_REHEARSED:,}, such as {' and '.join(REHEARSED)}"
            )
    chosen = arguments.candidates or (("plain",) if quick else CANDIDATES)
    unknown = [name for name in chosen if name not in CANDIDATES]
    problems += [f"--candidates {name}: not one of {', '.join(CANDIDATES)}" for name in unknown]
    pythons: dict[str, str] = {}
    for given in arguments.python:
        name, _, path = given.partition("=")
        if name not in PEERS:
            problems.append(f"--python {given}: expected NAME=PATH with a NAME of {', '.join(PEERS)}")
        elif not (path and os.access(path, os.X_OK) and Path(path).is_file()):
            problems.append(f"--python {given}: {path or 'no path'} is no program that can be started")
        else:
            pythons[name] = path
    for option, least in (("micro_batch", 1), ("accumulation", 1), ("warm_up", 1), ("steps", 1), ("time_limit", 1)):
        value = getattr(arguments, option)
        if value is not None and not value >= least:
            problems.append(f"--{option.replace('_', '-')} {value:g}: at least {least}")
    largest = max((4 * parameter_count(model).total for model in models.values()), default=0)
    if not arguments.scratch.is_dir():
        problems.append(f"--scratch {arguments.scratch}: no such folder")
    elif (free := shutil.disk_usage(arguments.scratch).free) < largest:
        problems.append(
            f"--scratch {arguments.scratch}: has {free / 1e9:.1f} GB free, and initial weights take {largest / 1e9:.1f} GB; "
            "name a folder on another disk"
        )
    if arguments.json is not None and arguments.json.is_dir():
        problems.append(f"--json {arguments.json}: is a folder; name a file")
    if not rehearse and not problems and not _sees_cuda():
        problems.append("torch sees no CUDA device here; --rehearse runs the same on a CPU with tiny models")
    if problems:
        raise UserError("\n  ".join(["train_gpu.py cannot start:", *problems]) if len(problems) > 1 else problems[0])
    return Plan(
        models=models,
        candidates=tuple(name for name in CANDIDATES if name in chosen and name != "ours"),
        pythons=pythons,
        device="cpu" if rehearse else "cuda",
        precision=arguments.precision,
        micro_batch=arguments.micro_batch or (4 if rehearse else None),
        accumulation=arguments.accumulation or (1 if quick and not rehearse else 2),
        warm_up=arguments.warm_up or (3 if quick else 5),
        steps=arguments.steps or (7 if quick else 15),
        repeats=not quick,
        compiled=not arguments.no_compile,
        time_limit=arguments.time_limit,
        deadline=began + QUICK_SECONDS if quick and not rehearse else math.inf,
        scratch=arguments.scratch,
        json=arguments.json,
    )


def _sees_cuda() -> bool:
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asks the driver, and leaves the GPU to the candidates
    import torch

    return torch.cuda.is_available()


# --- One model.


def report(name: str, plan: Plan) -> dict[str, Any]:
    """Measure all candidates on one model; print the table and the verdicts, and return all of it."""
    model, goal = plan.models[name], GOALS.get(name)
    micro_batch = plan.micro_batch or (goal.micro_batch if goal else 8)
    with tempfile.TemporaryDirectory(prefix="train-gpu-", dir=plan.scratch) as folder:
        setting = Setting(
            model=model.model_dump(mode="json"),
            device=plan.device,
            precision=plan.precision,
            micro_batch=micro_batch,
            batch=micro_batch * plan.accumulation,
            warm_up=plan.warm_up,
            steps=plan.steps,
            # Large enough for the loss to fall within so few steps, small enough for rounding not to grow.
            learning_rate=1e-4 if plan.device == "cuda" else 3e-3,
            weights=str(Path(folder) / "weights.safetensors"),
            matmul_seconds=0.2 if plan.device == "cpu" else 1.5 if math.isfinite(plan.deadline) else 3.0,
        )
        try:
            machine, _ = start_fitting("prepare", setting, plan, Path(folder))
        except NotMeasured as error:
            print(f"{name}: nothing could be measured: {error}\n", flush=True)
            return {"model": name, "error": str(error), "rows": [], "verdicts": [], "ok": False}
        for line in headline(name, model, setting, machine, plan):
            print(line, flush=True)
        names = ["ours", *plan.candidates, *([AGAIN] if plan.repeats else [])]
        rows: list[Row] = []
        for candidate in names:
            row = measured(candidate, setting, plan, Path(folder), machine)
            rows = judged([*rows, row], machine["expected_first_loss"], plan.precision)
            print(line_of(rows[-1]), flush=True)
    found = verdicts(rows, goal if plan.device == "cuda" and device_of(machine["device"]) is H200 else None)
    if plan.device == "cpu":
        found = [verdict for verdict in found if verdict.what == "rows"]
    for remark in remarks(rows) if plan.device == "cuda" else ():
        print(remark)
    for verdict in found:
        met = "as wanted" if verdict.met else "NOT AS WANTED"
        print(f"{met:13}  {verdict.what}: {verdict.found} (wanted: {verdict.wanted})")
    print(flush=True)
    return {
        "model": name,
        "setting": {key: value for key, value in asdict(setting).items() if key != "weights"},
        "machine": machine,
        "rows": [_as_json(row) for row in rows],
        "verdicts": [asdict(verdict) for verdict in found],
        "ok": all(verdict.met for verdict in found),
    }


def _as_json(row: Row) -> dict[str, Any]:
    """Losses that are not finite, which JSON has no number for, are null."""
    return {**asdict(row), "losses": [loss if math.isfinite(loss) else None for loss in row.losses]}


def headline(name: str, model: ModelConfig, setting: Setting, machine: dict[str, Any], plan: Plan) -> list[str]:
    """Model, machine, rates of matrix products, and the head of the table."""
    versions = " · ".join(f"{package} {version}" for package, version in machine["versions"].items())
    peak = peak_flops(machine["device"], plan.precision)
    square, own = machine["square_flops"] / 1e12, machine["model_flops"] / 1e12
    of_peak = f", {square / peak * 1e12:.0%} of the data sheet's {peak / 1e12:.0f}" if peak else ""
    rehearsal = "REHEARSAL ON A CPU: rates say nothing about a GPU. " if plan.device == "cpu" else ""
    return [
        f"{rehearsal}{name}: {parameter_count(model).total:,} parameters, {plan.precision}, {plan.accumulation} × "
        f"{setting.micro_batch} sequences of {model.context_length} tokens a step, {plan.warm_up} + {plan.steps} steps"
        f"{'' if plan.compiled else ', torch.compile OFF in all'}",
        f"{machine['device']}, driver {machine['driver'] or '–'}, CUDA {machine['cuda'] or '–'}, cuDNN {machine['cudnn'] or '–'}",
        versions,
        f"matrix products keep up {square:,.3g} TFLOP/s at {machine['square']}³{of_peak}, {own:,.3g} in the shapes of this model",
        f"{'candidate':22} {'tokens/s':>10} {'MFU':>6} {'of matmul':>9} {'peak GiB':>8} {'plan':>6} {'micro':>5} "
        f"{'first loss':>10} {'last':>7}",
    ]


def measured(name: str, setting: Setting, plan: Plan, folder: Path, machine: dict[str, Any]) -> Row:
    """The row of a candidate."""
    try:
        found, micro_batch = start_fitting("ours" if name == AGAIN else name, setting, plan, folder)
    except NotMeasured as error:
        return Row(name, "not measured", str(error))
    config = setting.config
    rate = setting.tokens / statistics.median(found["seconds"][setting.warm_up :])
    flops = rate * flops_per_token(config, config.context_length)
    peak = peak_flops(machine["device"], plan.precision)
    is_ours = name in ("ours", "ours-eager", AGAIN)
    return Row(
        name,
        "measured",
        tokens_per_second=rate,
        mfu=flops / peak if peak else None,
        share_of_matmul=flops / machine["square_flops"],
        peak_bytes=found["peak_bytes"],
        planned_bytes=planned_bytes(replace(setting, micro_batch=micro_batch), name != "ours-eager") if is_ours else None,
        micro_batch=micro_batch,
        wanted_micro_batch=setting.micro_batch,
        remark=found["remark"],
        losses=found["losses"],
        seconds=found["seconds"],
        versions=found["versions"],
    )


def planned_bytes(setting: Setting, compile: bool) -> float:
    """Peak that `plan` predicts for our engine."""
    device = "cuda" if setting.device == "cuda" else "cpu"
    return largest_stage(memory(setting.config, setting.recipe(compile), 1, device)).peak.total


def start_fitting(what: str, setting: Setting, plan: Plan, folder: Path) -> tuple[dict[str, Any], int]:
    """What a process found with the largest of the micro-batch, half of it, and so on that fits, and that micro-batch. Raises
    NotMeasured."""
    micro_batch = setting.micro_batch
    while True:
        try:
            return start(what, replace(setting, micro_batch=micro_batch), plan, folder), micro_batch
        except OutOfMemory:
            if micro_batch % 2:  # has no half of which a step could be made up
                raise NotMeasured(f"out of memory even with a micro-batch of {micro_batch}") from None
            micro_batch //= 2


def start(what: str, setting: Setting, plan: Plan, folder: Path) -> dict[str, Any]:
    """What a process of its own found. Raises OutOfMemory and NotMeasured."""
    left = min(plan.time_limit, plan.deadline - time.monotonic())
    if left <= 0:
        raise NotMeasured(f"the {QUICK_SECONDS:.0f} s of --quick are over")
    result, log = folder / "result.json", folder / "log"
    result.unlink(missing_ok=True)
    python = plan.pythons.get(what, sys.executable)
    command = [python, str(WORKER), what, "--setting", json.dumps(asdict(setting)), "--result", str(result)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=_environment(plan), start_new_session=True
        )
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            raise NotMeasured(f"not done after {left:.0f} s") from None
        finally:
            # Its compiler's processes too, which outlive one that was interrupted.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"exit code {code}"]
    if code == OUT_OF_MEMORY:
        raise OutOfMemory(lines[-1])
    if code == UNAVAILABLE:
        raise NotMeasured(lines[-1])
    if code:
        raise NotMeasured(f"failed: {_reason(lines)}")
    return json.loads(result.read_text(encoding="utf-8"))


def _reason(lines: list[str]) -> str:
    """The line of a log that names the error, which is not always the last."""
    named = [line for line in lines if line.removeprefix("[rank0]: ").split(":")[0].endswith(("Error", "Exception"))]
    return (named or lines)[-1].removeprefix("[rank0]: ")[:300]


def _environment(plan: Plan) -> dict[str, str]:
    """The same for all candidates; without a launcher's variables, which would have them wait for other ranks."""
    kept = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    kept.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    kept |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if plan.device == "cpu":
        kept |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if not plan.compiled:
        kept["TORCHDYNAMO_DISABLE"] = "1"
    return kept


# --- What the rows say.


def judged(rows: Sequence[Row], expected_first_loss: float, precision: str) -> list[Row]:
    """The rows, with those INVALID that trained another model, on other data, or otherwise than ours."""
    tolerance = LOSS_TOLERANCE[precision]
    reference = next((row.losses for row in rows if row.name == "ours" and row.losses), None)
    found = []
    for row in rows:
        if row.status == "not measured":
            found.append(row)
            continue
        reasons = []
        if not all(map(math.isfinite, row.losses)):
            reasons.append("a loss is not finite")
        elif abs(row.losses[0] - expected_first_loss) > FIRST_LOSS_TOLERANCE:
            reasons.append(f"first loss {row.losses[0]:.4f}, of fresh weights {expected_first_loss:.4f}")
        if reference is None:
            reasons.append("ours was not measured, so there are no losses to compare")
        elif not abs(row.losses[-1] - reference[-1]) <= tolerance:
            reasons.append(f"last loss {row.losses[-1]:.4f}, ours {reference[-1]:.4f}")
        elif row.losses[0] - row.losses[-1] < FIRST_LOSS_TOLERANCE:
            reasons.append(f"the loss did not fall ({row.losses[0]:.4f} → {row.losses[-1]:.4f})")
        found.append(replace(row, status="INVALID" if reasons else "measured", reason="; ".join(reasons)))
    return found


def our_rate(rows: Sequence[Row]) -> float | None:
    """Tokens/s of ours, the mean of first and last."""
    rates = [row.tokens_per_second for row in rows if row.name in ("ours", AGAIN) and row.status == "measured"]
    return statistics.fmean(rates) if rates else None


def verdicts(rows: Sequence[Row], goal: Goal | None) -> list[Verdict]:
    """What was wanted, as far as there are rows to tell. `goal` is None where no target is set: another model, another GPU."""
    valid = {row.name: row for row in rows if row.status == "measured"}
    invalid = [row.name for row in rows if row.status == "INVALID"]
    found = [
        Verdict(
            "rows",
            f"INVALID: {', '.join(invalid)}" if invalid else "ours was not measured" if "ours" not in valid else "all valid",
            "ours measured, none INVALID",
            not invalid and "ours" in valid,
        )
    ]
    ours = our_rate(rows)
    if ours is None or "ours" not in valid:
        return found
    first = valid["ours"]
    if goal is not None and first.mfu is not None:
        mfu = first.mfu * ours / first.tokens_per_second
        wanted = f"{goal.mfu:.0%}, stretch {goal.stretch:.0%}"
        found.append(Verdict("MFU", f"{mfu:.1%}", wanted, mfu >= goal.mfu))
    peers = {name: valid[name].tokens_per_second for name in PEERS if name in valid}
    if peers:
        best = max(peers, key=peers.__getitem__)
        ratio = ours / peers[best]
        wanted = f"at least {LEAST_RATIO:g}"
        found.append(
            Verdict(f"tokens/s over those of the best of the others, {best}", f"{ratio:.2f}", wanted, ratio >= LEAST_RATIO)
        )
    if "plain" in valid:
        overhead = 1 - ours / valid["plain"].tokens_per_second
        found.append(
            Verdict("what the engine costs", f"{overhead:.1%}", f"at most {MOST_OVERHEAD:.0%}", overhead <= MOST_OVERHEAD)
        )
    if first.peak_bytes is not None and first.planned_bytes:
        error = first.peak_bytes / first.planned_bytes - 1
        wanted = f"within {MOST_MEMORY_ERROR:.0%}"
        found.append(Verdict("peak memory over that of plan", f"{error:+.1%}", wanted, abs(error) <= MOST_MEMORY_ERROR))
    return found


def remarks(rows: Sequence[Row]) -> list[str]:
    """What to know when reading the table."""
    found = []
    rates = [row.tokens_per_second for row in rows if row.name in ("ours", AGAIN) and row.status == "measured"]
    if len(rates) == 2:
        drift = rates[1] / rates[0] - 1
        found.append(f"drift: ours at the end {drift:+.1%}" + (" — TOO MUCH to trust small ratios" if abs(drift) > DRIFT else ""))
    sizes = {row.micro_batch for row in rows if row.status == "measured"}
    if len(sizes) > 1:
        found.append("micro-batches differ: each candidate has the largest that fits, of the same sequences per step")
    if all(row.status != "measured" for row in rows if row.name in PEERS):
        found.append("no other trainer was measured, so there is no ratio to the best of them")
    return found


def line_of(row: Row) -> str:
    """The row for a person."""
    if row.status == "not measured":
        return f"{row.name:22} not measured: {row.reason}"
    mfu = f"{row.mfu:.1%}" if row.mfu is not None else "–"
    peak = f"{row.peak_bytes / 2**30:.1f}" if row.peak_bytes is not None else "–"
    planned = f"{row.planned_bytes / 2**30:.1f}" if row.planned_bytes is not None else "–"
    notes = [f"INVALID: {row.reason}"] if row.status == "INVALID" else []
    if row.micro_batch != row.wanted_micro_batch:
        notes.append(f"out of memory with {row.wanted_micro_batch}")
    notes += [row.remark] if row.remark else []
    return (
        f"{row.name:22} {row.tokens_per_second:>10,.0f} {mfu:>6} {row.share_of_matmul:>9.1%} {peak:>8} {planned:>6} "
        f"{row.micro_batch:>5} {row.losses[0]:>10.4f} {row.losses[-1]:>7.4f}  {'; '.join(notes)}"
    ).rstrip()


def _unwind(number: int, frame: FrameType | None) -> None:
    """SIGTERM as Ctrl-C: a candidate has a session of its own, where no signal reaches it, and ends in `start`."""
    raise Interrupted(f"stopped by {signal.Signals(number).name}", number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _unwind)
    with ending_the_process():
        sys.exit(main())
