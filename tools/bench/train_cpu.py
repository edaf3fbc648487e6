"""Training speed on a CPU: our engine and our model beside transformers' model and litgpt's, on the same weights and batches.

    python tools/bench/train_cpu.py [--precision bf16] [--threads 2] [--no-compile] [--litgpt-python /path/to/python]

Every candidate runs in a process of its own, which takes warm-up steps and then timed ones; candidates take turns, forwards and
backwards, so that drift of the machine shows. A row counts only if its losses are those of ours: same weights, same batches,
AdamW with the same settings, clipping at 1. In bf16 ours has bf16 weights with fp32 masters under DeepSpeed, and the others have
fp32 weights under autocast, as their users would. litgpt, the paper's own trainer, is taken from --litgpt-python, or from this
Python if it is there (`pip install --no-deps litgpt lightning lightning-utilities jsonargparse`).

Ours as written stands beside the others as written, and ours with `engine.compile` beside theirs under `torch.compile`, which
takes a minute or two to begin and needs a C++ compiler. Each row has the median step of its turn as tokens per second, with the
slowest and the fastest step. Ratios are those of the best turns to the best of the others, by wall time and by processor time:
other work on the machine can hit one of them harder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from command import at_least, multiple_of, parser, positive, run, verdict
from training_setting import BETAS, CLIP, WEIGHT_DECAY

TARGET = 1.0
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}
LEARNING_RATE = 1e-3
HEAD_DIM = 32
COMPILED = ", compiled"
OURS, ALONE, OTHERS = "ours", "our model, bare loop", ("transformers", "litgpt")
SETTINGS = (
    "precision", "threads", "layers", "hidden_size", "vocab_size", "length", "batch", "micro_batch", "warm_up", "steps"
)  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """What a candidate measured in one turn."""

    losses: list[float]
    """Of all steps, those of the warm-up included."""
    tokens_per_second: float
    """Of the median step, as is the next."""
    per_processor_second: float
    lowest: float
    """Tokens per second of the slowest timed step."""
    highest: float


def main() -> int:
    """Run all candidates and print the table; 1 if ours is slower than the best of the others, or that could not be told."""
    reader = parser(__doc__, "ours is slower, that could not be told, or a row is not valid")
    add = reader.add_argument
    add("--precision", choices=tuple(LOSS_TOLERANCE), default="fp32", help="number format [fp32]")
    add("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="threads of torch [all cores]")
    add("--layers", type=positive, default=6, help="[6]")
    add("--hidden-size", type=multiple_of(HEAD_DIM), default=256, help=f"a multiple of {HEAD_DIM}, the size of a head [256]")
    add("--vocab-size", type=at_least(2), default=8192, help="[8192]")
    add("--length", type=positive, default=256, help="tokens of a sequence [256]")
    add("--batch", type=positive, default=8, help="sequences of a step [8]")
    add("--micro-batch", type=positive, default=4, help="sequences of a forward pass [4]")
    add("--warm-up", type=at_least(0), default=3, help="steps that are not timed [3]")
    add("--steps", type=positive, default=12, help="steps that are timed [12]")
    add("--turns", type=positive, default=2, help="turns of all candidates [2]")
    add("--no-compile", action="store_true", help="only the candidates as written")
    add("--litgpt-python", default=sys.executable, metavar="PYTHON", help="interpreter that has litgpt [this one]")
    add("--candidate", choices=CANDIDATES, help=argparse.SUPPRESS)
    arguments = reader.parse_args()
    if arguments.batch % arguments.micro_batch:
        reader.error(f"--batch {arguments.batch}: expected a multiple of --micro-batch, {arguments.micro_batch}")
    if shutil.which(arguments.litgpt_python) is None:
        reader.error(f"--litgpt-python {arguments.litgpt_python}: no such program")
    if arguments.candidate:
        answer(arguments)
        return 0
    return compare(arguments)


def compare(arguments: argparse.Namespace) -> int:
    """Measure the candidates turn by turn, and judge them."""
    names = [name for name in CANDIDATES if not (arguments.no_compile and name.endswith(COMPILED))]
    turns: dict[str, list[Turn]] = {}
    problems: dict[str, str] = {}
    for number in range(arguments.turns):
        for name in names[:: -1 if number % 2 else 1]:
            if name in problems:
                continue
            found = measured(name, arguments)
            if isinstance(found, str):
                problems[name] = found
                continue
            turns.setdefault(name, []).append(found)
            print(row(name, found), flush=True)
    lines, good = judged(turns, problems, arguments.precision, compiled=not arguments.no_compile)
    print("\n".join(lines), flush=True)
    return 0 if good else 1


def row(name: str, turn: Turn) -> str:
    """A candidate's line of the table."""
    spread = f"({turn.lowest:,.0f}–{turn.highest:,.0f})"
    return (
        f"{name:22} {turn.tokens_per_second:10,.0f} tokens/s {spread:18} {turn.per_processor_second:10,.0f} per processor second"
        f"  last loss {turn.losses[-1]:.4f}"
    )


def judged(
    turns: Mapping[str, Sequence[Turn]], problems: Mapping[str, str], precision: str, compiled: bool
) -> tuple[list[str], bool]:
    """What there is to say of the turns of each candidate and of those that have `problems`, and whether all is as wanted."""
    lines = [
        f"{'failed in a later turn' if name in turns else 'not measured'}: {name}: {problem}"
        for name, problem in problems.items()
    ]
    whole = {name: turns[name] for name in CANDIDATES if name in turns and name not in problems}
    reference = next(iter(whole), None)
    valid: dict[str, Sequence[Turn]] = {}
    for name, found in whole.items():
        difference = greatest_difference(found, whole[reference or name][0])
        if difference <= LOSS_TOLERANCE[precision]:
            valid[name] = found
        else:
            lines.append(f"INVALID: the losses of {name} are off by {difference:.2g} from those of {reference}")
    good = len(valid) == len(whole)
    for suffix, label in (("", "as written"), (COMPILED, "compiled"))[: 2 if compiled else 1]:
        ours = valid.get(OURS + suffix)
        others = {name: valid[name] for name in (peer + suffix for peer in OTHERS) if name in valid}
        if ours is None or not others:
            missing = OURS + suffix if ours is None else "the others"
            lines.append(f"{label}: {verdict(False, f'no valid row of {missing}')}")
            good = False
            continue
        ratios = []
        for measure, unit in (("tokens_per_second", "wall time"), ("per_processor_second", "processor time")):
            best = {name: max(getattr(turn, measure) for turn in found) for name, found in others.items()}
            strongest = max(best, key=best.__getitem__)
            own = max(getattr(turn, measure) for turn in ours)
            ratios.append(own / best[strongest])
            line = f"{label}, by {unit}: ours is {ratios[-1]:.2f} of the best of the others, {strongest}"
            if not suffix and ALONE in valid:
                line += f", and {own / max(getattr(turn, measure) for turn in valid[ALONE]):.2f} of our model alone"
            lines.append(line)
        lines.append(f"{label}: {verdict(min(ratios) >= TARGET, f'at least {TARGET:g} of the others, by both')}")
        good = good and min(ratios) >= TARGET
    return lines, good


def greatest_difference(turns: Sequence[Turn], reference: Turn) -> float:
    """The greatest difference of a loss from the reference's at the same step; infinite if one is not finite."""
    pairs = [pair for turn in turns for pair in zip(turn.losses, reference.losses, strict=True)]
    differences = [abs(loss - wanted) for loss, wanted in pairs]
    return max(difference if difference == difference else float("inf") for difference in differences)


def measured(name: str, arguments: argparse.Namespace) -> Turn | str:
    """What a candidate measured in a process of its own, or why it could not."""
    python = arguments.litgpt_python if name.startswith("litgpt") else sys.executable
    settings = [f"--{key.replace('_', '-')}={getattr(arguments, key)}" for key in SETTINGS]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(arguments.threads),
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # its own processes would run beside what is timed
    }
    ended = subprocess.run(
        [python, __file__, *settings, f"--candidate={name}"], capture_output=True, text=True, env=environment, check=False
    )
    if ended.returncode or not ended.stdout.strip():
        return (ended.stderr.strip().splitlines() or [""])[-1] or f"exit code {ended.returncode}"
    found = json.loads(ended.stdout.splitlines()[-1])
    return found["failed"] if "failed" in found else Turn(**found)


# --- In a candidate's process.


def answer(arguments: argparse.Namespace) -> None:
    """Print the candidate's turn, or in a line why there is none, as JSON."""
    try:
        found = asdict(CANDIDATES[arguments.candidate](arguments))
    except Exception as error:  # whatever it is, one line of it belongs in the table
        reason = " ".join(str(error).strip().split("\n\n")[0].split())[:300] or "no reason given"
        found = {"failed": f"{type(error).__name__}: {reason}"}
    print(json.dumps(found))


def model_config(arguments: argparse.Namespace) -> Any:
    from megatron_plasticity.config.model import ModelConfig

    return ModelConfig.model_validate(
        {
            "family": "llama2",
            "layers": arguments.layers,
            "hidden_size": arguments.hidden_size,
            "mlp_hidden_size": arguments.hidden_size * 11 // 4,
            "query_heads": arguments.hidden_size // HEAD_DIM,
            "kv_heads": arguments.hidden_size // HEAD_DIM,
            "head_dim": HEAD_DIM,
            "vocab_size": arguments.vocab_size,
            "context_length": arguments.length,
        }
    )


def our_model(arguments: argparse.Namespace) -> Any:
    from megatron_plasticity.models.initialisation import initialise
    from megatron_plasticity.models.transformer import Transformer

    model = Transformer(model_config(arguments))
    initialise(model, seed=0)
    return model


def timed(arguments: argparse.Namespace, step: Callable[[list[tuple[Any, Any]]], float]) -> Turn:
    """`step` takes a global batch and returns its mean loss."""
    import torch
    from training_peers import batches

    torch.set_num_threads(arguments.threads)
    losses, seconds, processor = [], [], []
    count = arguments.warm_up + arguments.steps
    for batch in batches(arguments.vocab_size, arguments.batch, arguments.length, arguments.micro_batch, count):
        wall, used = time.perf_counter(), time.process_time()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - wall)
        processor.append(time.process_time() - used)
    tokens = arguments.batch * arguments.length
    seconds, processor = seconds[arguments.warm_up :], processor[arguments.warm_up :]
    return Turn(
        losses,
        tokens_per_second=tokens / statistics.median(seconds),
        per_processor_second=tokens / statistics.median(processor),
        lowest=tokens / max(seconds),
        highest=tokens / min(seconds),
    )


def ours(arguments: argparse.Namespace, compile: bool = False) -> Turn:
    """Our engine: DeepSpeed, AdamW in decay groups."""
    import torch

    from megatron_plasticity.config.training import TrainingRecipe
    from megatron_plasticity.data.micro_batch import MicroBatch
    from megatron_plasticity.parallel.grid import process_grid
    from megatron_plasticity.training.batches import StepBatch
    from megatron_plasticity.training.engine import TrainingEngine

    recipe = TrainingRecipe.model_validate(
        {
            "optimizer": {"learning_rate": LEARNING_RATE, "betas": BETAS, "weight_decay": WEIGHT_DECAY, "gradient_clip": CLIP},
            "batch": {"global_batch_size": arguments.batch, "micro_batch_size": arguments.micro_batch},
            "engine": {"zero_stage": 0, "precision": arguments.precision, "compile": compile},
            "device": "cpu",
        }
    )
    tokens = arguments.batch * arguments.length
    with contextlib.redirect_stdout(sys.stderr), process_grid(torch.device("cpu")) as grid:
        engine = TrainingEngine(our_model(arguments), recipe, WEIGHT_DECAY, grid)
        engine.set_learning_rate(LEARNING_RATE)

        def step(batch: list[tuple[Any, Any]]) -> float:
            parts = [MicroBatch(inputs, targets) for inputs, targets in batch]
            samples = [[0] * len(part.inputs) for part in parts]
            return float(engine.train_batch(StepBatch(parts, tokens, tokens, tokens * arguments.length, samples))) / tokens

        return timed(arguments, step)


def bare_loop(arguments: argparse.Namespace, model: Any, loss_sum: Callable[[Any, Any], Any]) -> Turn:
    """Forward, backward, clip, AdamW. `loss_sum` gives the summed cross-entropy of inputs and targets."""
    import torch

    # All tensors decay, as in the paper's Llama runs.
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    tokens = arguments.batch * arguments.length
    precision = torch.autocast("cpu", torch.bfloat16) if arguments.precision == "bf16" else contextlib.nullcontext()

    def step(batch: list[tuple[Any, Any]]) -> float:
        total = 0.0
        for inputs, targets in batch:
            with precision:
                loss = loss_sum(inputs, targets) / tokens
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return timed(arguments, step)


def our_model_alone(arguments: argparse.Namespace) -> Turn:
    """Our model and loss without DeepSpeed."""
    from megatron_plasticity.training.objective import Objective

    objective = Objective(our_model(arguments))
    return bare_loop(arguments, objective, lambda inputs, targets: objective(inputs, targets).total)


def transformers_model(arguments: argparse.Namespace, compile: bool = False) -> Turn:
    """transformers' Llama with SDPA."""
    import torch
    import training_peers
    from torch.nn import functional as F

    source = our_model(arguments)
    model = training_peers.transformers_model(source.state_dict(), source.config)
    model = torch.compile(model) if compile else model

    def loss_sum(inputs: Any, targets: Any) -> Any:
        logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")

    return bare_loop(arguments, model, loss_sum)


def litgpt_model(arguments: argparse.Namespace, compile: bool = False) -> Turn:
    """litgpt's GPT and its chunked cross-entropy, as its `pretrain` uses them; compiled it is the whole model, as there."""
    import torch
    import training_peers
    from litgpt.utils import chunked_cross_entropy  # pyright: ignore[reportMissingImports]

    source = our_model(arguments)
    model = training_peers.litgpt_model(source.state_dict(), source.config)
    model = torch.compile(model) if compile else model
    return bare_loop(arguments, model, lambda inputs, targets: chunked_cross_entropy(model(inputs), targets) * targets.numel())


CANDIDATES: dict[str, Callable[[argparse.Namespace], Turn]] = {
    OURS: ours,
    f"{OURS}{COMPILED}": partial(ours, compile=True),
    ALONE: our_model_alone,
    "transformers": transformers_model,
    f"transformers{COMPILED}": partial(transformers_model, compile=True),
    "litgpt": litgpt_model,
    f"litgpt{COMPILED}": partial(litgpt_model, compile=True),
}


if __name__ == "__main__":
    run(main)
