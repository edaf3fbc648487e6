"""Many small models, which differ in λ alone, on one CPU: how to train them soonest.

    python tools/bench/side_by_side.py [--models 4] [--layers 4 --hidden-size 128]

Three ways, each a bare loop over our own model with the same batches: one model after the other on all cores; a process per core,
each with one thread, models side by side, which is what `study run` does; and all models at once as stacked parameters in one
process (`torch.func.vmap`). Prints tokens per second over all models, and ratios to one after the other. AdamW is torch's in all;
stacked parameters have a group per model only in thought: λ enters as a column, which changes no cost.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Measure the three ways in turns and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=4, help="values of λ [4]")
    parser.add_argument("--layers", type=int, default=4, help="[4]")
    parser.add_argument("--hidden-size", type=int, default=128, help="[128]")
    parser.add_argument("--vocab-size", type=int, default=2048, help="[2048]")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence [128]")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step, of each model [16]")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each model, after two [10]")
    parser.add_argument("--turns", type=int, default=3, help="turns; the best of each way counts [3]")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(one_model(arguments, threads=1))
        return
    cores = len(os.sched_getaffinity(0))
    tokens = arguments.batch * arguments.length
    ways: dict[str, Callable[[], float]] = {
        f"one after the other, {cores} threads": lambda: tokens / one_model(arguments, cores),
        f"side by side, {cores} processes of 1 thread": lambda: cores * tokens / statistics.mean(_side_by_side(arguments, cores)),
        f"stacked, {cores} threads": lambda: arguments.models * tokens / stacked(arguments, cores),
    }
    best = {name: max(rate() for _ in range(arguments.turns)) for name, rate in ways.items()}
    reference = next(iter(best.values()))
    for name, rate in best.items():
        print(f"{name:40} {rate:10,.0f} tokens/s   {rate / reference:.2f}")


def _model(arguments: argparse.Namespace, seed: int) -> Any:
    from megatron_plasticity.config.model import ModelConfig
    from megatron_plasticity.models.initialisation import initialise
    from megatron_plasticity.models.transformer import Transformer

    config = ModelConfig.model_validate(
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
    model = Transformer(config)
    initialise(model, seed)
    return model


def _timed(arguments: argparse.Namespace, threads: int, step: Callable[[Any], None]) -> float:
    """Seconds of a step, the median."""
    import torch

    torch.set_num_threads(threads)
    seconds = []
    for number in range(arguments.steps + 2):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(arguments.vocab_size, (arguments.batch, arguments.length + 1), generator=generator)
        began = time.perf_counter()
        step(tokens)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def one_model(arguments: argparse.Namespace, threads: int) -> float:
    """Seconds of a step of one model."""
    import torch

    from megatron_plasticity.models.loss import token_loss

    model = _model(arguments, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(tokens: Any) -> None:
        token_loss(model(tokens[:, :-1]), tokens[:, 1:]).cross_entropy.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _timed(arguments, threads, step)


def _side_by_side(arguments: argparse.Namespace, processes: int) -> list[float]:
    settings = [f"--{key.replace('_', '-')}={value}" for key, value in vars(arguments).items() if key != "alone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, __file__, *settings, "--alone"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(processes)]
    return [float(process.communicate()[0]) for process in started]


def stacked(arguments: argparse.Namespace, threads: int) -> float:
    """Seconds of a step of all models at once."""
    import torch
    from torch.func import functional_call, stack_module_state, vmap
    from torch.nn import functional as F

    models = [_model(arguments, seed) for seed in range(arguments.models)]
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    skeleton = models[0].to("meta")

    def loss(parameters_of_one: Any, buffers_of_one: Any, tokens: Any) -> Any:
        logits = functional_call(skeleton, (parameters_of_one, buffers_of_one), (tokens[:, :-1],))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def step(tokens: Any) -> None:
        vmap(loss, in_dims=(0, 0, None))(parameters, buffers, tokens).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _timed(arguments, threads, step)


if __name__ == "__main__":
    main()
