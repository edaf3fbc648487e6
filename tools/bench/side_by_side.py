"""Many small models, which differ in λ and seed alone, on one CPU: which way of training them all is soonest done.

    python tools/bench/side_by_side.py [--models 4] [--hidden-sizes 32 64 128 256] [--compile]

The ways: processes side by side, which share the cores and the models evenly, in as many waves as that takes (this is what
`study run` does); one model after the other on all cores; all models at once as parameters stacked in one process
(`torch.func.vmap`); and processes side by side with a stack each. With --compile, each under `torch.compile` too.

Measured are training steps alone: forward, loss, backward and torch's AdamW in fp32, of our own model and loss in a bare loop.
Batches, process starts, compilation and the first two steps lie before, and there is no DeepSpeed, evaluation, capture or
checkpoint. The processes of a way begin a turn together, and it lasts until the last of them is done, idle cores at its end
included. Ways take turns, forwards and backwards; rates are medians over turns, and ratios are medians of the ratio to side by
side in the same turn, each with its least and greatest. Processor time stands beside wall time. A way counts only if the loss of
each model at each step is the one that it has side by side, within 1e-4.

`study run` trains side by side since a run then keeps its own optimizer, checkpoints, logs and failures, runs of unlike shapes
and lengths share a machine, and DeepSpeed knows no stacked models. A stack must be much faster to be worth losing that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from command import multiple_of, parser, positive, run
from side_by_side_training import HEAD_DIM

LOSS_TOLERANCE = 1e-4
TRAINING = Path(__file__).with_name("side_by_side_training.py")


class Failed(Exception):
    """A process of a way could not go on; the message is one line."""


class Turn(NamedTuple):
    """One turn of a way."""

    seconds: float
    processor_seconds: float
    losses: dict[str, list[float]]
    """Of each model, at each step."""


def main() -> int:
    """Measure and print each size; 1 if a way failed, or computed other losses."""
    reader = parser(__doc__, "a way failed, or computed other losses")
    reader.add_argument("--models", type=positive, default=4, help="values of λ [4]")
    reader.add_argument(
        "--hidden-sizes", type=multiple_of(HEAD_DIM), nargs="+", default=[32, 64, 128, 256], help="[32 64 128 256]"
    )
    reader.add_argument("--layers", type=positive, default=4, help="[4]")
    reader.add_argument("--vocab-size", type=positive, default=2048, help="[2048]")
    reader.add_argument("--length", type=positive, default=128, help="tokens of a sequence [128]")
    reader.add_argument("--batch", type=positive, default=8, help="sequences of a step, of each model [8]")
    reader.add_argument("--steps", type=positive, default=4, help="steps of each model in a turn [4]")
    reader.add_argument("--turns", type=positive, default=5, help="turns of each way [5]")
    reader.add_argument("--compile", action="store_true", help="also under torch.compile, which takes minutes to begin")
    arguments = reader.parse_args()
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    if load > 0.25 * cores:
        print(f"Other work runs on this machine (load {load:.1f}). It hits ways with several threads hardest:")
        print("their threads wait for one another at every operation. Compare those with one thread each.")
    return max([compare(arguments, size) for size in arguments.hidden_sizes])


def ways(models: int, cores: int, compiled: bool) -> dict[str, list[dict[str, Any]]]:
    """Each way → what each of its processes trains, and with how many threads; the first is the reference."""
    count = min(cores, models)
    every = list(range(models))
    whole = [{"models": every, "threads": cores}]
    parts = [{"models": every[rank::count], "threads": cores // count} for rank in range(count)]
    found: dict[str, list[dict[str, Any]]] = {"side by side": parts}
    if count > 1:
        found["one after the other"] = whole
    found["stacked"] = [{**own, "stacked": True} for own in whole]
    if 1 < count < models:
        found["stacks side by side"] = [{**own, "stacked": True} for own in parts]
    if compiled:
        found |= {f"{name}, compiled": [{**own, "compiled": True} for own in processes] for name, processes in found.items()}
    return found


def compare(arguments: argparse.Namespace, hidden_size: int) -> int:
    """Measure all ways at one size and print them."""
    setting = {key: getattr(arguments, key) for key in ("layers", "vocab_size", "length", "batch", "steps")}
    turns: dict[str, list[Turn]] = {}
    problems: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        started: dict[str, Processes] = {}
        for name, processes in ways(arguments.models, len(os.sched_getaffinity(0)), arguments.compile).items():
            name = f"{name} ({len(processes)} × {processes[0]['threads']})"
            started[name] = stack.enter_context(Processes([{**setting, "hidden_size": hidden_size, **own} for own in processes]))
        for number in range(-1, arguments.turns):  # at first all become ready
            for name in list(started)[:: -1 if number % 2 else 1]:
                if name in problems:
                    continue
                try:
                    if number < 0:
                        started[name].answers()
                    else:
                        turns.setdefault(name, []).append(started[name].turn())
                except Failed as failure:
                    problems[name] = f"not measured: {failure}"
    print(f"\nhidden size {hidden_size}, {arguments.layers} layers, {arguments.models} models (processes × threads)", flush=True)
    reference = next(iter(started))
    for name in turns:
        if name not in problems and reference not in problems:
            difference = greatest_difference(turns[name], turns[reference])
            if not difference <= LOSS_TOLERANCE:
                problems[name] = f"INVALID: its losses are off by {difference:.2g} from those of {reference}"
    tokens = arguments.models * arguments.steps * arguments.batch * arguments.length
    ratios = print_table({name: turns[name] for name in started if name not in problems}, reference, tokens)
    for name, problem in problems.items():
        print(f"  {name}: {problem}")
    if ratios:
        print(f"  {verdict(ratios)}", flush=True)
    return 1 if problems else 0


def greatest_difference(one: Sequence[Turn], other: Sequence[Turn]) -> float:
    """The greatest difference between the losses of two ways, over turns, models and steps; infinite if one is not finite."""
    pairs = [
        (loss, same)
        for a, b in zip(one, other, strict=True)
        for model in {*a.losses, *b.losses}
        for loss, same in zip(a.losses[model], b.losses[model], strict=True)
    ]
    differences = [abs(loss - same) for loss, same in pairs]
    return max(difference if difference == difference else float("inf") for difference in differences)


def print_table(turns: dict[str, list[Turn]], reference: str, tokens: int) -> dict[str, list[float]]:
    """Print a line for each way; returns its ratios of wall time to the reference, of each turn (none without the reference)."""
    ratios: dict[str, list[float]] = {}
    for name, found in turns.items():
        rates = [tokens / turn.seconds for turn in found]
        line = f"  {name:28} {statistics.median(rates):8,.0f} tokens/s ({min(rates):,.0f}–{max(rates):,.0f})"
        of_processor = [tokens / turn.processor_seconds for turn in found]
        after = f"{statistics.median(of_processor):8,.0f} per processor second"
        if reference in turns:
            pairs = list(zip(turns[reference], found, strict=True))
            ratios[name] = [base.seconds / turn.seconds for base, turn in pairs]
            line += f"  ratio {_spread(ratios[name])}"
            after += f"  ratio {_spread([base.processor_seconds / turn.processor_seconds for base, turn in pairs])}"
        print(f"{line}; {after}", flush=True)
    return ratios


def verdict(ratios: dict[str, list[float]]) -> str:
    """Which way profits most, and which the turns do not tell from it."""
    best = max(ratios, key=lambda name: statistics.median(ratios[name]))
    close = [name for name, found in ratios.items() if name != best and max(found) >= min(ratios[best])]
    doubt = f"; the turns overlap with: {'; '.join(close)}" if close else ""
    return f"→ most by wall time: {best}, {statistics.median(ratios[best]):.2f}{doubt}"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


class Processes:
    """The processes of a way. They train on in each turn, and stand still between turns."""

    def __init__(self, settings: Sequence[dict[str, Any]]) -> None:
        self._processes = [self._start(setting) for setting in settings]

    @staticmethod
    def _start(setting: dict[str, Any]) -> subprocess.Popen[str]:
        paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        # torch.compile's own processes would run beside what is timed.
        own = {"OMP_NUM_THREADS": str(setting["threads"]), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, str(TRAINING), json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **own, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def answers(self) -> list[dict[str, Any]]:
        """What each process says next. Raises Failed if one cannot go on."""
        found = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise Failed(f"a process ended with exit code {process.wait()}")
            found.append(json.loads(line))
            if "failed" in found[-1]:
                raise Failed(found[-1]["failed"])
        return found

    def turn(self) -> Turn:
        """Let all of them go at once, until the last is done. Raises Failed as `answers`."""
        began = time.perf_counter()
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # `answers` finds out why
                process.stdin.write("go\n")
                process.stdin.flush()
        found = self.answers()
        seconds = time.perf_counter() - began
        losses = {model: of_steps for answer in found for model, of_steps in answer["losses"].items()}
        return Turn(seconds, sum(answer["processor_seconds"] for answer in found), losses)


if __name__ == "__main__":
    run(main)
