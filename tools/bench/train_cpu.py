"""Training speed on a CPU: our engine and our model beside transformers' model and litgpt's, on the same weights and batches.

    python tools/bench/train_cpu.py [--precision bf16] [--threads 2] [--litgpt-python /path/to/python]

Every candidate runs in a process of its own, which takes warm-up steps and then timed ones; candidates take turns, ours first and
last, so that drift of the machine shows. A row counts only if its losses are those of the others: same weights, same batches,
AdamW with the same settings, clipping at 1. In bf16 ours has bf16 weights with fp32 masters under DeepSpeed, and the others have
fp32 weights under autocast, as their users would. litgpt, the paper's own trainer, is taken from --litgpt-python, or from this
Python if it is there (`pip install --no-deps litgpt lightning lightning-utilities jsonargparse`). Prints tokens per second, and
the ratio to the best of the others; that of processor time stands beside it, since other work on the machine can hit one of them
harder.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training_setting import BETAS, CLIP, WEIGHT_DECAY

TARGET = 1.0
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}
LEARNING_RATE = 1e-3


def main() -> int:
    """Run all candidates and print the table; 1 if ours is slower than the best of the others, or a row is not valid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="number format [fp32]")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of torch [all cores]")
    parser.add_argument("--layers", type=int, default=6, help="[6]")
    parser.add_argument("--hidden-size", type=int, default=256, help="[256]")
    parser.add_argument("--vocab-size", type=int, default=8192, help="[8192]")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence [256]")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step [8]")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of a forward pass [4]")
    parser.add_argument("--warm-up", type=int, default=3, help="steps that are not timed [3]")
    parser.add_argument("--steps", type=int, default=12, help="steps that are timed [12]")
    parser.add_argument("--turns", type=int, default=2, help="turns of all candidates [2]")
    parser.add_argument("--litgpt-python", default=sys.executable, metavar="PYTHON", help="interpreter that has litgpt")
    parser.add_argument("--candidate", choices=CANDIDATES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.candidate:
        print(json.dumps(CANDIDATES[arguments.candidate](arguments)))
        return 0
    return compare(arguments)


def compare(arguments: argparse.Namespace) -> int:
    names = [name for name in CANDIDATES if name != "ours"]
    turns: dict[str, list[dict[str, Any]]] = {}
    problems: list[str] = []
    for turn in range(arguments.turns):
        order = ["ours", *names] if turn == 0 else [*reversed(names), "ours"]
        for name in order:
            if any(problem.startswith(name) for problem in problems):
                continue
            found = run(name, arguments)
            if isinstance(found, str):
                problems.append(f"{name}: {found}")
                continue
            turns.setdefault(name, []).append(found)
            print(f"{name:22} {found['tokens_per_second']:10,.0f} tokens/s  {found['per_processor_second']:10,.0f} per processor "
                  f"second  last loss {found['losses'][-1]:.4f}", flush=True)  # fmt: skip
    for problem in problems:
        print(f"not measured: {problem}")
    reference = turns["ours"][0]["losses"]
    invalid = [
        name
        for name, found in turns.items()
        if max(abs(a - b) for a, b in zip(found[0]["losses"], reference, strict=True)) > LOSS_TOLERANCE[arguments.precision]
    ]
    for name in invalid:
        print(f"INVALID: the losses of {name} are others than ours: {turns[name][0]['losses'][-1]:.4f}, {reference[-1]:.4f}")
    ratios = []
    for measure, unit in (("tokens_per_second", "wall time"), ("per_processor_second", "processor time")):
        best = {name: max(turn[measure] for turn in found) for name, found in turns.items()}
        others = {name: rate for name, rate in best.items() if name in OTHERS and name not in invalid}
        strongest = max(others, key=others.__getitem__)
        ratios.append(best["ours"] / others[strongest])
        alone = best["ours"] / best["our model, bare loop"]
        compiled = best["ours, compiled"] / others[strongest]
        print(
            f"by {unit} ours is {ratios[-1]:.2f} of the best of the others, {strongest} (compiled {compiled:.2f}), and "
            f"{alone:.2f} of our model alone"
        )
    verdict = "as wanted" if min(ratios) >= TARGET else "TOO SLOW"
    print(f"{verdict} (target {TARGET:g} of the others, by both)")
    return 0 if min(ratios) >= TARGET and not invalid else 1


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any] | str:
    """What a candidate measured in a process of its own, or why it could not."""
    python = arguments.litgpt_python if name == "litgpt" else sys.executable
    settings = [f"--{key.replace('_', '-')}={value}" for key, value in vars(arguments).items() if key != "candidate"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(arguments.threads),
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    ended = subprocess.run(
        [python, __file__, *settings, f"--candidate={name}"], capture_output=True, text=True, env=environment, check=False
    )
    if ended.returncode:
        return (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
    return json.loads(ended.stdout.splitlines()[-1])


# --- In a candidate's process.


def model_config(arguments: argparse.Namespace) -> Any:
    from megatron_plasticity.config.model import ModelConfig

    return ModelConfig.model_validate(
        {
            "family": "llama2",
            "layers": arguments.layers,
            "hidden_size": arguments.hidden_size,
            "mlp_hidden_size": arguments.hidden_size * 11 // 4,
            "query_heads": arguments.hidden_size // 32,
            "kv_heads": arguments.hidden_size // 32,
            "head_dim": 32,
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


def timed(arguments: argparse.Namespace, step: Callable[[list[tuple[Any, Any]]], float]) -> dict[str, Any]:
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
    return {
        "losses": losses,
        "tokens_per_second": tokens / statistics.median(seconds[arguments.warm_up :]),
        "per_processor_second": tokens / statistics.median(processor[arguments.warm_up :]),
    }


def ours_compiled(arguments: argparse.Namespace) -> dict[str, Any]:
    """Our engine with `engine.compile`."""
    return ours(arguments, compile=True)


def ours(arguments: argparse.Namespace, compile: bool = False) -> dict[str, Any]:
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


def bare_loop(arguments: argparse.Namespace, model: Any, loss_sum: Callable[[Any, Any], Any]) -> dict[str, Any]:
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


def our_model_alone(arguments: argparse.Namespace) -> dict[str, Any]:
    """Our model and loss without DeepSpeed."""
    from megatron_plasticity.training.objective import Objective

    objective = Objective(our_model(arguments))
    return bare_loop(arguments, objective, lambda inputs, targets: objective(inputs, targets).total)


def transformers_model(arguments: argparse.Namespace) -> dict[str, Any]:
    """transformers' Llama with SDPA."""
    import training_peers
    from torch.nn import functional as F

    source = our_model(arguments)
    model = training_peers.transformers_model(source.state_dict(), source.config)

    def loss_sum(inputs: Any, targets: Any) -> Any:
        logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")

    return bare_loop(arguments, model, loss_sum)


def litgpt_model(arguments: argparse.Namespace) -> dict[str, Any]:
    """litgpt's GPT and its chunked cross-entropy, as its `pretrain` uses them."""
    import training_peers
    from litgpt.utils import chunked_cross_entropy  # pyright: ignore[reportMissingImports]

    source = our_model(arguments)
    model = training_peers.litgpt_model(source.state_dict(), source.config)
    return bare_loop(arguments, model, lambda inputs, targets: chunked_cross_entropy(model(inputs), targets) * targets.numel())


CANDIDATES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "ours": ours,
    "ours, compiled": ours_compiled,
    "our model, bare loop": our_model_alone,
    "transformers": transformers_model,
    "litgpt": litgpt_model,
}
OTHERS = ("transformers", "litgpt")


if __name__ == "__main__":
    sys.exit(main())
