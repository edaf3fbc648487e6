"""Break training in every way that clusters do, and check that nothing is lost and nothing is different.

    python tools/chaos.py                        # all, several minutes on two cores
    python tools/chaos.py --only kills signals   # some
    python tools/chaos.py --kills 100 --seed 7

A small model is trained undisturbed on the CPU first. Each disturbed run of the same config must end with the same metrics (all
but times), weights, moments, activations and results, bit for bit, or must stop on every process with a message that names the
cause.
Exit code: 0 if the whole table is clean, 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums are split over threads
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from megatron_plasticity.config.data import CorpusConfig, PythonTextConfig, ReasoningTextConfig, TokenizerConfig
from megatron_plasticity.config.evaluation import EvaluateConfig
from megatron_plasticity.config.files import sha256_file
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.errors import LostProcess, UserError
from megatron_plasticity.launch.command import free_port
from megatron_plasticity.launch.workers import start_worker, worker_context
from megatron_plasticity.tracking.metrics import read_metrics
from megatron_plasticity.tracking.run_folder import RunFolder

STEPS = 24
CHECKPOINTS, EVALUATIONS, CAPTURES = 4, 6, 8
"""Steps between them."""
GRACE_SECONDS = 30.0
"""What schedulers leave between the signal and the kill."""
SECONDS_TO_END = 60.0
"""After a process or a node is lost."""
PHASES = {
    "a step": ("megatron_plasticity.training.engine", "TrainingEngine.train_batch"),
    "a checkpoint": ("megatron_plasticity.training.session", "save_checkpoint"),
    "an evaluation": ("megatron_plasticity.training.pretrain", "mean_cross_entropy"),
    "a capture": ("megatron_plasticity.training.activations", "Capture.after_step"),
    "the last words": ("megatron_plasticity.tracking.run_folder", "RunFolder.mark_done"),
}
ON_TWO_RANKS = {"batch": {"global_batch_size": 8, "micro_batch_size": 2}}
PRELOAD = ["megatron_plasticity.training.pretrain", "megatron_plasticity.evaluation.job"]


class Broken(Exception):
    """What should not have happened."""


# --- What happens inside a worker. A disturbance is a name and its arguments, since functions of this file travel by name.


def work(config: Any, disturbance: tuple[str, dict[str, Any]] | None) -> None:
    """In a worker: the run of `config`, disturbed."""
    from megatron_plasticity.evaluation.job import evaluate
    from megatron_plasticity.tracking.progress import NoProgress
    from megatron_plasticity.training.pretrain import pretrain

    if disturbance is not None:
        name, arguments = disturbance
        DISTURBANCES[name](**arguments)
    if isinstance(config, EvaluateConfig):
        evaluate(config, NoProgress())
    else:
        pretrain(config, NoProgress())


def _wrap(module: str, name: str, around: Callable[[Callable[..., Any], int], Callable[..., Any]]) -> None:
    """Replace a function by `around(function, number of the call)`."""
    import importlib

    *owner, attribute = name.split(".")
    place: Any = importlib.import_module(module)
    for part in owner:
        place = getattr(place, part)
    true = getattr(place, attribute)
    calls = 0

    def replacement(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        return around(true, calls)(*arguments, **keywords)

    setattr(place, attribute, replacement)


def time_phases(into: str) -> None:
    """Note how often each phase is entered and how long it takes, for choosing a moment in it."""
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def timed(phase: str) -> Callable[[Callable[..., Any], int], Callable[..., Any]]:
        def around(true: Callable[..., Any], number: int) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                began = time.perf_counter()
                try:
                    return true(*arguments, **keywords)
                finally:
                    seconds[phase].append(time.perf_counter() - began)
                    Path(into).write_text(json.dumps(seconds), encoding="utf-8")

            return call

        return around

    for phase, (module, name) in PHASES.items():
        _wrap(module, name, timed(phase))


def kill_in(phase: str, call: int, delay: float) -> None:
    """kill -9 this process `delay` seconds after the phase is entered for the `call`-th time."""

    def around(true: Callable[..., Any], number: int) -> Callable[..., Any]:
        if number == call:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return true

    _wrap(*PHASES[phase], around)


def send_at(step: int, number: int) -> None:
    """A signal to this process in the middle of a step."""

    def around(true: Callable[..., Any], call: int) -> Callable[..., Any]:
        if call == step:
            os.kill(os.getpid(), number)
        return true

    _wrap(*PHASES["a step"], around)


def spoil_loss(step: int, rank: int) -> None:
    """On one rank the loss of one sequence is not a number in one step, also when it is looked at again."""
    import torch

    from megatron_plasticity.models.loss import TrainingLoss
    from megatron_plasticity.training.engine import TrainingEngine
    from megatron_plasticity.training.objective import Objective

    if int(os.environ.get("RANK", "0")) != rank:
        return
    steps = 0
    true_train, true_loss = TrainingEngine.train_batch, Objective.loss
    spoilt: list[Any] = []

    def train_batch(self: TrainingEngine, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            spoilt.append(batch.micro_batches[0].targets[-1])
        return true_train(self, batch)

    def loss(self: Objective, hidden: Any, weight: Any, targets: Any, *others: Any) -> TrainingLoss:
        factor = torch.ones(())
        for row in spoilt:
            if (targets == row).all(dim=-1).any():
                factor = factor * math.nan
        return TrainingLoss(*(part * factor for part in true_loss(self, hidden, weight, targets, *others)))

    TrainingEngine.train_batch = train_batch  # type: ignore[method-assign]
    Objective.loss = loss  # type: ignore[method-assign,assignment]


def spike(step: int) -> None:
    """A learning rate ten thousand times too high in one step."""

    def around(true: Callable[..., float], call: int) -> Callable[..., float]:
        return lambda *arguments: (1e4 if call == step else 1.0) * true(*arguments)

    _wrap("megatron_plasticity.training.loop", "learning_rate_at", around)


def hang(step: int, rank: int) -> None:
    """One rank never comes to the collective of a step."""

    def around(true: Callable[..., Any], call: int) -> Callable[..., Any]:
        return sleep_for_ever if call == step and os.environ.get("RANK") == str(rank) else true

    _wrap(*PHASES["a step"], around)


def sleep_for_ever(*arguments: Any) -> None:
    """The line that the message should lead to."""
    time.sleep(3600)


DISTURBANCES: dict[str, Callable[..., None]] = {
    function.__name__: function for function in (time_phases, kill_in, send_at, spoil_loss, spike, hang)
}


# --- Runs.


@dataclass
class Chaos:
    """The runs of one call of this tool, in a folder of their own."""

    folder: Path
    kills: int
    seed: int
    context: BaseContext = field(default_factory=lambda: worker_context(PRELOAD, cuda=False))

    def config(self, name: str, **changes: Any) -> PretrainConfig:
        """The run that is disturbed, in a folder called `name`."""
        return PretrainConfig.model_validate(
            {
                "name": "chaos",
                "output": str(self.folder / name),
                "model": {
                    "family": "llama2",
                    "vocab_size": 300,
                    "hidden_size": 32,
                    "layers": 2,
                    "query_heads": 4,
                    "kv_heads": 4,
                    "head_dim": 8,
                    "mlp_hidden_size": 64,
                    "context_length": 128,
                },
                "data": {"folder": str(self.corpus), "held_out_sequences": 16},
                "optimizer": {"learning_rate": 5e-3, "weight_decay": 0.1},
                "batch": {"global_batch_size": 8, "micro_batch_size": 4},
                "engine": {"zero_stage": 1, "precision": "fp32"},
                "steps": STEPS,
                "evaluate_every_steps": EVALUATIONS,
                "checkpoint": {"every_steps": CHECKPOINTS},
                "capture": {"every_steps": CAPTURES, "sequences": 8, "points": ["layers.*.resid_post"]},
                "logging": {"every_steps": 1, "norms_every_steps": 5, "mlflow": False},
                "device": "cpu",
                **changes,
            }
        )

    @cached_property
    def undisturbed_on_two_ranks(self) -> Mapping[str, Any]:
        return outcome(self.finish(self.config("two-ranks", **ON_TWO_RANKS), ranks=2))

    @property
    def corpus(self) -> Path:
        return next((self.folder / "corpus").glob("chaos-*"))

    def prepare(self) -> None:
        from megatron_plasticity.data.prepare import prepare

        prepare(
            CorpusConfig(
                name="chaos",
                output=self.folder / "corpus",
                python_text=PythonTextConfig(megabytes=0.05),
                reasoning_text=ReasoningTextConfig(documents=200),
                tokenizer=TokenizerConfig(vocab_size=300),
                held_out_fraction=0.1,
            )
        )

    def start(self, config: Any, disturbance: tuple[str, dict[str, Any]] | None = None, ranks: int = 1) -> list[BaseProcess]:
        """The processes of a run; with several ranks as a launcher starts them."""
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if ranks > 1 else {}
        processes = []
        for rank in range(ranks):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            log = Path(config.output) / f"log-{rank}"
            processes.append(
                start_worker(
                    self.context, work, (config, disturbance), name=f"rank-{rank}", log=log, threads=1, environment=environment
                )
            )
        return processes

    def run(
        self, config: Any, disturbance: tuple[str, dict[str, Any]] | None = None, ranks: int = 1, seconds: float = 300.0
    ) -> list[int]:
        """Run to the end; the exit codes."""
        return ended(self.start(config, disturbance, ranks), seconds)

    def finish(self, config: Any, ranks: int = 1) -> RunFolder:
        """Run, undisturbed, until it is done."""
        codes = self.run(config, ranks=ranks)
        if any(codes):
            raise Broken(f"the run did not go on: exit codes {codes}\n{log_of(config)[-1500:]}")
        return folder_of(config)


def ended(processes: list[BaseProcess], seconds: float) -> list[int]:
    """The exit codes of processes that end within `seconds`; the others are killed."""
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if any(process.exitcode is None for process in processes):
            raise Broken(f"still running after {seconds:.0f} s")
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in processes]


def wait_for(config: Any, file: str, processes: list[BaseProcess], seconds: float = 120.0) -> None:
    """Wait until the run folder has such a file."""
    deadline = time.monotonic() + seconds
    while not list(Path(config.output).glob(f"pretrain-chaos-*/{file}")):
        expect(all(process.exitcode is None for process in processes), f"it ended by itself\n{log_of(config)[-1500:]}")
        expect(time.monotonic() < deadline, f"no {file} after {seconds:.0f} s")
        time.sleep(0.01)


def folder_of(config: Any) -> RunFolder:
    kind = "evaluate" if isinstance(config, EvaluateConfig) else "pretrain"
    return RunFolder.open(next(path for path in Path(config.output).glob(f"{kind}-chaos-*") if path.is_dir()))


def log_of(config: Any) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(Path(config.output).glob("log-*")))


def outcome(folder: RunFolder) -> dict[str, Any]:
    """All that must not depend on what happened on the way."""
    clock = ("time", "train/tokens_per_second")
    rows = [{key: value for key, value in row.items() if key not in clock} for row in read_metrics(folder.metrics_path)]
    held = {"metrics": rows, "results": folder.results}
    for place in ("checkpoints", "activations"):
        for file in sorted((folder.path / place).rglob("*.safetensors")):
            # A resumed run takes a step's activations again: which take it is may differ.
            held[re.sub(r"/take-\d+/", "/", str(file.relative_to(folder.path)))] = sha256_file(file)
    for name in ("ledger.json", "samples.parquet"):
        if (folder.path / name).is_file():
            held[name] = sha256_file(folder.path / name)
    return held


def compare(expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises Broken at the first difference."""
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise Broken(f"{name} differs from the undisturbed run's")


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise Broken(what)


# --- The scenarios. Each returns what it saw, or raises Broken.


def kills(chaos: Chaos, undisturbed: Mapping[str, Any]) -> str:
    """kill -9 at random moments of every phase, then the same command again."""
    times = json.loads((chaos.folder / "phases.json").read_text(encoding="utf-8"))
    draw = random.Random(chaos.seed)
    plans = []
    for number in range(chaos.kills):
        phase = list(PHASES)[number % len(PHASES)]
        call = draw.randint(1, len(times[phase]))
        plans.append((number, phase, call, draw.uniform(0, 1.2 * times[phase][call - 1])))

    def trial(plan: tuple[int, str, int, float]) -> int:
        number, phase, call, delay = plan
        config = chaos.config(f"kill-{number}")
        try:
            codes = chaos.run(config, ("kill_in", {"phase": phase, "call": call, "delay": delay}))
            expect(codes in ([-signal.SIGKILL], [0]), f"exit code {codes} instead of the kill")
            compare(undisturbed, outcome(chaos.finish(config)))
        except Broken as error:
            raise Broken(f"killed {delay * 1000:.1f} ms into {phase}, call {call}: {error}") from None
        shutil.rmtree(config.output)
        return codes[0]

    codes = _side_by_side(trial, plans)
    landed = sum(code != 0 for code in codes)
    expect(landed >= 0.6 * len(codes), f"only {landed} of {len(codes)} kills came before the end")
    return f"{landed} kills landed, of {len(codes)}: steps, checkpoints, evaluations, captures, the end; all equal"


def kills_of_evaluations(chaos: Chaos, undisturbed: Mapping[str, Any]) -> str:
    """kill -9 while answers are sampled and graded."""
    model = folder_of(chaos.config("undisturbed")).path

    def config(name: str) -> EvaluateConfig:
        return EvaluateConfig.model_validate(
            {
                "name": "chaos",
                "output": str(chaos.folder / name),
                "run": str(model),
                "tasks": [{"name": "arithmetic", "test_examples": 40}],
                "samples": 4,
                "max_new_tokens": 12,
                "batch_size": 16,
                "device": "cpu",
            }
        )

    began = time.monotonic()
    expected = outcome(chaos.finish(config("evaluated")))
    whole = time.monotonic() - began
    draw = random.Random(chaos.seed)
    delays = [draw.uniform(0.1 * whole, whole) for _ in range(max(1, chaos.kills // 6))]

    def trial(numbered: tuple[int, float]) -> bool:
        number, delay = numbered
        disturbed = config(f"evaluate-{number}")
        (process,) = chaos.start(disturbed)
        process.join(delay)
        process.kill()
        process.join()
        compare(expected, outcome(chaos.finish(disturbed)))
        return process.exitcode != 0

    landed = sum(_side_by_side(trial, list(enumerate(delays))))
    expect(landed >= 0.6 * len(delays), f"only {landed} of {len(delays)} kills came before the end")
    return f"{landed} kills landed, of {len(delays)}; scores and samples equal"


def signals(chaos: Chaos, undisturbed: Mapping[str, Any]) -> str:
    """SIGTERM, SIGUSR1 and Ctrl-C: save and exit within the grace time, then go on."""
    seen = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        config = chaos.config(number.name)
        began = time.monotonic()
        codes = chaos.run(config, ("send_at", {"step": 7, "number": int(number)}), seconds=GRACE_SECONDS)
        expect(codes == [128 + number], f"{number.name}: exit code {codes}")
        folder = folder_of(config)
        expect(folder.state.status == "interrupted", f"{number.name}: the state is {folder.state.status}")
        expect((folder.path / "checkpoints" / "step-7" / "COMPLETE").is_file(), f"{number.name}: no checkpoint of its step")
        seen.append(f"{number.name} {time.monotonic() - began:.1f} s")
        found = outcome(chaos.finish(config))
        compare(undisturbed, {key: value for key, value in found.items() if not key.startswith("checkpoints/step-7/")})
    return f"saved, ended, went on equal; from start to end: {', '.join(seen)}"


def damaged_checkpoints(chaos: Chaos, undisturbed: Mapping[str, Any]) -> str:
    """The latest checkpoint is spoilt in several ways: it is recognised, and the one before is used."""

    def flip_a_byte(checkpoint: Path) -> None:
        file = checkpoint / "exp_avg-00001.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)

    def cut_short(checkpoint: Path) -> None:
        file = checkpoint / "weights-00001.safetensors"
        os.truncate(file, file.stat().st_size // 2)

    def lose_a_file(checkpoint: Path) -> None:
        (checkpoint / "model.json").unlink()

    def leave_half_written(checkpoint: Path) -> None:
        (checkpoint / "COMPLETE").unlink()

    ways = (flip_a_byte, cut_short, lose_a_file, leave_half_written)

    def trial(damage: Callable[[Path], None]) -> None:
        config = chaos.config(damage.__name__)
        codes = chaos.run(config, ("kill_in", {"phase": "a step", "call": 15, "delay": 0.0}))
        expect(codes == [-signal.SIGKILL], f"exit code {codes}")
        latest = folder_of(config).checkpoints()[-1]
        damage(latest)
        compare(undisturbed, outcome(chaos.finish(config)))
        warned = [line for line in log_of(config).splitlines() if line.startswith("warning") and latest.name in line]
        expect(bool(warned), f"{damage.__name__}: nobody was warned of {latest.name}")

    _side_by_side(trial, list(ways))
    return f"{', '.join(way.__name__.replace('_', ' ') for way in ways)}: warned, went on from the one before, equal"


def non_finite(chaos: Chaos, undisturbed: Mapping[str, Any]) -> str:
    """A loss that is not a number on one of two ranks: all stop with one message, or all skip the step."""
    disturbance = ("spoil_loss", {"step": 5, "rank": 1})
    stopping = chaos.config("nan-stop", **ON_TWO_RANKS)
    codes = chaos.run(stopping, disturbance, ranks=2, seconds=SECONDS_TO_END)
    expect(codes == [UserError.exit_code] * 2, f"exit codes {codes}\n{log_of(stopping)[-1500:]}")
    error = folder_of(stopping).state.error or ""
    expect("step 5" in error and "(data-parallel rank 1)" in error, f"the message names no sample: {error}")
    expect(folder_of(stopping).checkpoints()[-1].name == "step-4", "something was saved after the step")
    engine = {"zero_stage": 1, "precision": "fp32", "non_finite": "skip"}
    skipping = chaos.config("nan-skip", **ON_TWO_RANKS, engine=engine)
    # The spoilt sequence returns in no other step: the corpus is longer than the run.
    codes = chaos.run(skipping, disturbance, ranks=2)
    expect(codes == [0, 0], f"exit codes {codes}\n{log_of(skipping)[-1500:]}")
    skipped = folder_of(skipping).results["skipped_steps"]
    expect(skipped == [5], f"skipped {skipped}")
    # A run that goes on from a checkpoint after the skipped step: Adam has counted one step less.
    resumed = chaos.config("nan-skip-resumed", **ON_TWO_RANKS, engine=engine)
    shutil.copytree(folder_of(skipping).path, Path(resumed.output) / folder_of(skipping).path.name)
    folder = folder_of(resumed)
    for path in folder.checkpoints()[2:]:
        shutil.rmtree(path)
    for name in ("results.json", "state.json"):
        (folder.path / name).unlink()
    shutil.rmtree(folder.path / "activations")
    sides = (outcome(folder_of(skipping)), outcome(chaos.finish(resumed, ranks=2)))
    compare(*({name: value for name, value in side.items() if "activations" not in name} for side in sides))
    return f"stopped on both ranks: “{error.split('. ')[1]}”; or skipped on both, also after a resume"


def loss_spike(chaos: Chaos, undisturbed: Mapping[str, Any]) -> str:
    """A step that throws the loss up is reported, and stands in the results."""
    config = chaos.config("spike")
    codes = chaos.run(config, ("spike", {"step": 14}))
    expect(codes == [0], f"exit code {codes}")
    found = folder_of(config).results["loss_spikes"]
    expect(bool(found) and min(found) in (15, 16), f"spikes at steps {found}")
    expect(undisturbed["results"]["loss_spikes"] == [], "a false alarm in the undisturbed run")
    warning = next(line for line in log_of(config).splitlines() if "stands out" in line)
    return warning.removeprefix("warning: ")


def full_disk(chaos: Chaos, undisturbed: Mapping[str, Any]) -> str:
    """The disk is full in the middle: a clear end, nothing half-written, and on it goes when there is room."""
    disk = chaos.folder / "full"
    disk.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk]).returncode == 0
    if not mounted:
        return "skipped: needs root, to mount a small disk"
    try:
        config = chaos.config("full")
        codes = chaos.run(config)
        expect(codes == [UserError.exit_code], f"exit code {codes}\n{log_of(config)[-1500:]}")
        message = next(line for line in reversed(log_of(config).splitlines()) if line.startswith("error: "))
        expect(str(disk) in message, f"the message names no path: {message}")
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        compare(undisturbed, outcome(chaos.finish(config)))
    finally:
        subprocess.run(["umount", "-l", disk], check=False)
    return f"“{message.removeprefix('error: ').replace(str(chaos.folder), '…')[:150]}”; with room: equal"


def lost_rank(chaos: Chaos, undisturbed: Mapping[str, Any]) -> str:
    """kill -9 of one rank of two, each in turn: the other ends within a minute with the reason; the same command goes on."""
    seen = []
    for victim in (0, 1):
        config = chaos.config(f"lost-{victim}", **ON_TWO_RANKS)
        processes = chaos.start(config, ranks=2)
        wait_for(config, "checkpoints/step-*/COMPLETE", processes)
        processes[victim].kill()
        began = time.monotonic()
        codes = ended(processes, SECONDS_TO_END)
        if codes[victim] == 0:
            raise Broken("it was done before the kill")
        expect(codes[1 - victim] == LostProcess.exit_code, f"exit codes {codes}\n{log_of(config)[-1500:]}")
        expect(f"rank {victim} on" in log_of(config), "nobody says which rank is gone")
        seen.append(f"{time.monotonic() - began:.1f} s")
        compare(chaos.undisturbed_on_two_ranks, outcome(chaos.finish(config, ranks=2)))
    return f"the other rank ended after {' and '.join(seen)}, and says who is gone; equal afterwards"


def frozen_rank(chaos: Chaos, undisturbed: Mapping[str, Any]) -> str:
    """A rank that neither ends nor says anything, as when its node or network is gone: the main thread of the other waits in a
    collective, where no error reaches it, and is ended all the same."""
    config = chaos.config("frozen", **ON_TWO_RANKS)
    processes = chaos.start(config, ranks=2)
    wait_for(config, "checkpoints/step-*/COMPLETE", processes)
    frozen = processes[1]
    assert frozen.pid is not None
    os.kill(frozen.pid, signal.SIGSTOP)
    began = time.monotonic()
    processes[0].join(SECONDS_TO_END)
    took, code = time.monotonic() - began, processes[0].exitcode
    frozen.kill()
    ended(processes, 10.0)
    expect(code == LostProcess.exit_code, f"exit code {code} after {took:.0f} s\n{log_of(config)[-1500:]}")
    error = folder_of(config).state.error or ""
    expect("rank 1" in error and "no sign of life" in error, f"the state says: {error}")
    compare(chaos.undisturbed_on_two_ranks, outcome(chaos.finish(config, ranks=2)))
    return f"the other ended after {took:.0f} s: “{error}”; equal afterwards"


def hung_rank(chaos: Chaos, undisturbed: Mapping[str, Any]) -> str:
    """One rank hangs before a collective: all end, and the message leads to the line where it hangs."""
    config = chaos.config("hung", **ON_TWO_RANKS, parallel={"timeout_minutes": 0.1})
    codes = chaos.run(config, ("hang", {"step": 6, "rank": 1}), ranks=2, seconds=6 + SECONDS_TO_END)
    expect(codes == [LostProcess.exit_code] * 2, f"exit codes {codes}\n{log_of(config)[-1500:]}")
    error = folder_of(config).state.error or ""
    first, second = error.splitlines()[1:]
    expect("rank 1" in first and "rank 0" in second and "waiting for others" in second, error)
    expect("sleep_for_ever" in log_of(config), "the stack of the slow rank is not in its log")
    compare(chaos.undisturbed_on_two_ranks, outcome(chaos.finish(chaos.config("hung", **ON_TWO_RANKS), ranks=2)))
    return f"“{first.strip()}”; its stack is in its log; equal afterwards"


def dead_tracking_server(chaos: Chaos, undisturbed: Mapping[str, Any]) -> str:
    """MLflow is not there: training is what it would have been, and a later sync brings all of it."""
    from megatron_plasticity.tracking.mlflow_mirror import MlflowMirror, mirror_in_background

    config = chaos.config("no-server")
    Path(config.output).mkdir()
    warnings: list[str] = []
    uri = f"http://user:planted-secret@127.0.0.1:{free_port()}"  # pragma: allowlist secret
    dead = MlflowMirror(Path(config.output), "chaos", uri=uri)
    processes = chaos.start(config)
    wait_for(config, "state.json", processes)
    with mirror_in_background(dead, folder_of(config).path, interval=0.1, final_seconds=5.0, warn=warnings.append):
        codes = ended(processes, 300.0)
    expect(codes == [0], f"exit code {codes}")
    expect(len(warnings) == 1 and "planted-secret" not in warnings[0], f"warnings: {warnings}")
    compare(undisturbed, outcome(folder_of(config)))
    store = MlflowMirror(Path(config.output), "chaos", uri=f"sqlite:///{config.output}/mlflow.db")
    for _ in range(2):  # the second has nothing to send
        store.sync(folder_of(config).path)
    from mlflow import MlflowClient

    client = MlflowClient(store.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("chaos").experiment_id])  # type: ignore[union-attr]
    rows = {row["step"]: row["train/loss"] for row in read_metrics(folder_of(config).metrics_path) if "train/loss" in row}
    points = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "train/loss")}
    expect(points == rows, "points are missing in MLflow, or there twice")
    return "one warning, without the password; equal; a sync brought every point once"


SCENARIOS = (
    kills,
    kills_of_evaluations,
    signals,
    damaged_checkpoints,
    non_finite,
    loss_spike,
    full_disk,
    lost_rank,
    frozen_rank,
    hung_rank,
    dead_tracking_server,
)


def _side_by_side(trial: Callable[[Any], Any], plans: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(trial, plans))


def main(arguments: list[str] | None = None) -> int:
    names = [scenario.__name__ for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SCENARIO", help=", ".join(names))
    parser.add_argument("--kills", type=int, default=30, help="random moments at which training is killed [30]")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments [0]")
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary, _without_tracking_server():
        chaos = Chaos(Path(temporary), parsed.kills, parsed.seed)
        chaos.prepare()
        timed = ("time_phases", {"into": str(chaos.folder / "phases.json")})
        config = chaos.config("undisturbed")
        codes = chaos.run(config, timed)
        if codes != [0]:
            print(log_of(config), file=sys.stderr)
            return 1
        undisturbed = outcome(folder_of(config))
        failures = 0
        for scenario in SCENARIOS:
            if scenario.__name__ not in parsed.only:
                continue
            began = time.monotonic()
            try:
                verdict, seen = "ok", scenario(chaos, undisturbed)
            except Exception as error:
                seen = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
                verdict, failures = "BROKEN", failures + 1
            verdict = "-" if seen.startswith("skipped") else verdict
            name = scenario.__name__.replace("_", " ")
            print(f"{name:22} {verdict:7} {time.monotonic() - began:6.1f} s  {seen}", flush=True)
    return 1 if failures else 0


@contextlib.contextmanager
def _without_tracking_server() -> Iterator[None]:
    """A server that the environment names must not receive these runs."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_TRACKING")]:
        del os.environ[name]
    yield


if __name__ == "__main__":
    sys.exit(main())
