"""A process of `side_by_side.py`: trains its models, one after another or as a stack, whenever it is told to.

The setting comes as JSON on the command line. Once ready it prints a line; for each line of its input it trains for a turn and
prints what that took. What goes wrong is printed too, as one line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import command

LEARNING_RATE = 1e-3
HEAD_DIM = 32
WARM_UP = 2


def work(setting: dict[str, Any]) -> None:
    """Get ready and say so; then train for a turn at each line that comes in, and tell."""
    answer, sys.stdout = sys.stdout, sys.stderr
    try:
        import torch

        torch.set_num_threads(setting["threads"])
        trainers = make_trainers(setting)
        for number in range(WARM_UP):
            for train in trainers:
                train([batch(setting, number)])
        print("{}", file=answer, flush=True)
        step = WARM_UP
        for _ in sys.stdin:
            batches = [batch(setting, number) for number in range(step, step + setting["steps"])]
            step += setting["steps"]
            used = time.process_time()
            losses = {str(model): found for train in trainers for model, found in train(batches).items()}
            print(json.dumps({"processor_seconds": time.process_time() - used, "losses": losses}), file=answer, flush=True)
    except Exception as error:  # whatever it is, one line of it belongs in the table
        reason = " ".join(str(error).split())[:300] or "no reason given"
        print(json.dumps({"failed": f"{type(error).__name__}: {reason}"}), file=answer, flush=True)


def batch(setting: dict[str, Any], number: int) -> Any:
    """Tokens [batch, length + 1] of a step: the same in all ways. They come round, so that there is something to learn."""
    import torch

    generator = torch.Generator().manual_seed(number % 4)
    return torch.randint(setting["vocab_size"], (setting["batch"], setting["length"] + 1), generator=generator)


def weight_decay(model: int) -> float:
    """λ of a model: 0.5, 2, 8, 32, and again. A few steps at such values are enough to tell models apart that were mixed up."""
    return 0.5 * 4 ** (model % 4)


Trainer = Callable[[Sequence[Any]], dict[int, list[float]]]
"""Takes a step with each batch; returns the losses of each model it trains."""


def make_trainers(setting: dict[str, Any]) -> list[Trainer]:
    """One for each model of the process, or one for their stack."""
    if setting.get("stacked"):
        return [_stack(setting)]
    return [_single(setting, model) for model in setting["models"]]


def _objective(setting: dict[str, Any], model: int) -> Any:
    from megatron_plasticity.config.model import ModelConfig
    from megatron_plasticity.models.initialisation import initialise
    from megatron_plasticity.models.transformer import Transformer
    from megatron_plasticity.training.objective import Objective

    heads = setting["hidden_size"] // HEAD_DIM
    shape = {"query_heads": heads, "kv_heads": heads, "head_dim": HEAD_DIM, "mlp_hidden_size": setting["hidden_size"] * 11 // 4}
    same = {key: setting[key] for key in ("layers", "hidden_size", "vocab_size")}
    config = ModelConfig.model_validate({"family": "llama2", **same, **shape, "context_length": setting["length"]})
    transformer = Transformer(config)
    initialise(transformer, seed=model)
    return Objective(transformer, setting.get("compiled", False))


def _single(setting: dict[str, Any], model: int) -> Trainer:
    import torch

    objective = _objective(setting, model)
    if setting.get("compiled"):
        objective.model.compile_blocks()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=LEARNING_RATE, weight_decay=weight_decay(model))

    def step(tokens: Any) -> float:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        loss = objective(inputs, targets, scale=1 / targets.numel()).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return lambda batches: {model: [step(tokens) for tokens in batches]}


def _stack(setting: dict[str, Any]) -> Trainer:
    import torch
    from torch.func import functional_call, stack_module_state, vmap

    objectives = [_objective(setting, model) for model in setting["models"]]
    parameters, buffers = stack_module_state(objectives)
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=0.0)
    kept = torch.tensor([1 - LEARNING_RATE * weight_decay(model) for model in setting["models"]])

    class Hidden(torch.nn.Module):
        """What the head reads."""

        def __init__(self) -> None:
            super().__init__()
            self.model = objectives[0].model.to("meta")

        def forward(self, inputs: Any) -> Any:
            return self.model.hidden(inputs)

    skeleton = Hidden()
    _attend_to_all_models_at_once()

    def hidden_of_all(parameters: Any, inputs: Any) -> Any:
        return vmap(lambda one, buffers: functional_call(skeleton, (one, buffers), (inputs,)))(parameters, buffers)

    if setting.get("compiled"):
        hidden_of_all = torch.compile(hidden_of_all, dynamic=False)

    def step(tokens: Any) -> list[float]:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        hidden = hidden_of_all(parameters, inputs)
        # Our loss makes few rows of logits at a time, which vmap cannot see through.
        pairs = zip(hidden, parameters["model.head.weight"], strict=True)
        losses = torch.stack([objectives[0].loss(x, weight, targets, 1 / targets.numel()).total for x, weight in pairs])
        losses.sum().backward()
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.mul_(kept.view(-1, *[1] * (parameter.dim() - 1)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return losses.tolist()

    def train(batches: Sequence[Any]) -> dict[int, list[float]]:
        of_steps = [step(tokens) for tokens in batches]
        return dict(zip(setting["models"], map(list, zip(*of_steps, strict=True)), strict=True))

    return train


def _attend_to_all_models_at_once() -> None:
    """vmap has no rule for SDPA on a CPU and calls it model by model: here models become rows of the batch."""
    import torch
    from torch.nn import functional as F

    of_one = F.scaled_dot_product_attention

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(query: Any, key: Any, value: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return of_one(query, key, value, is_causal=True)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            """Nothing: differentiated is what the rule below does."""

        @staticmethod
        def vmap(info: Any, in_dims: Any, *tensors: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            assert in_dims == (0, 0, 0), in_dims
            return of_one(*(x.flatten(0, 1) for x in tensors), is_causal=True).unflatten(0, (info.batch_size, -1)), 0

    F.scaled_dot_product_attention = lambda query, key, value, **_: Attend.apply(query, key, value)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        command.no_command("side_by_side.py")
    work(json.loads(sys.argv[1]))
