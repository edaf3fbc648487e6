"""One candidate of `train_gpu.py` in a process of its own: it trains some steps and writes what it measured as JSON.

What `train_gpu.py` starts; run that. All candidates have fp32 master weights, AdamW (torch's, fused on CUDA) with the same
settings on all tensors, clipping at 1, and gradients that are added up over micro-batches. Beyond that each is set as its own
documentation sets it for bf16:

ours: `TrainingEngine`, DeepSpeed ZeRO-1: bf16 weights, fp32 gradients. `ours-eager` has `engine.compile` off.
plain: our module, blocks compiled, and our loss, in twenty lines of torch: bf16 weights, fp32 masters, and fp32 gradients
    to which each micro-batch's are added, which is what DeepSpeed's optimizer does. So what ours takes longer is the engine.
litgpt: as its `pretrain`: Fabric, "bf16-mixed" (fp32 weights under autocast), the whole model compiled, its chunked loss.
transformers: its model and loss under DeepSpeed with the JSON that ours has; `-compiled`: the whole model; `-liger`: with Liger's
    kernels, the fused linear cross-entropy among them, which adds up in fp32 (in bf16 it is known to train worse).
olmo-core: its train module: FSDP over one process, bf16 weights made of fp32 ones, blocks and head compiled, Liger's fused loss
    where that is installed.

z-loss, of OLMo-2, is in ours, the plain loop and OLMo-core; litgpt and transformers have none, which spares them a little work.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from command import no_command
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_peers import (
    MicroBatches,
    batches,
    litgpt_model,
    olmo_core_model,
    olmo_core_weights,
    transformers_model,
)
from training_setting import BETAS, CLIP, OUT_OF_MEMORY, UNAVAILABLE, WEIGHT_DECAY, Setting

from megatron_plasticity.config.deepspeed import deepspeed_json
from megatron_plasticity.data.micro_batch import MicroBatch
from megatron_plasticity.launch.operations import Matmul, operations, step_work
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.parallel.grid import ProcessGrid, process_grid
from megatron_plasticity.training.batches import StepBatch

PACKAGES = ("torch", "deepspeed", "transformers", "litgpt", "lightning", "liger-kernel", "ai2-olmo-core", "triton")


class Unavailable(Exception):
    """A candidate that cannot run here; says why."""


@dataclass(frozen=True)
class Trainer:
    """A candidate that is ready to train."""

    step: Callable[[MicroBatches], Tensor]
    """Takes a global batch, on the CPU; returns its mean cross-entropy, before the step, on the device."""
    remark: str = ""
    """What it uses, where that depends on the machine."""


def main() -> None:
    """Run what the command line names."""
    if len(sys.argv) == 1:
        no_command("train_gpu.py")
    parser = argparse.ArgumentParser(description="A part of train_gpu.py, which starts it.")
    parser.add_argument("what", choices=("prepare", *CANDIDATES))
    parser.add_argument("--setting", required=True, help="JSON of a Setting")
    parser.add_argument("--result", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    setting = Setting(**json.loads(arguments.setting))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # in fp32; litgpt and OLMo-core leave it so
    try:
        if arguments.what == "prepare":
            found = {**machine(setting), **matmul_rates(setting), "expected_first_loss": draw_weights(setting)}
        else:
            with CANDIDATES[arguments.what](setting) as trainer:
                found = {**measure(setting, trainer), "remark": trainer.remark}
    except (ModuleNotFoundError, Unavailable) as error:
        print(f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else error)
        raise SystemExit(UNAVAILABLE) from None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(f"out of memory: {str(error).splitlines()[0]}")
        # Not through the interpreter's end, where libraries would wait for what will not come.
        os._exit(OUT_OF_MEMORY)
    arguments.result.write_text(json.dumps(found), encoding="utf-8")


def is_out_of_memory(error: BaseException) -> bool:
    """torch's own error, or that of a library of NVIDIA's which asks the driver for memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in str(error) for sign in ("CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    )


def measure(setting: Setting, trainer: Trainer) -> dict[str, Any]:
    """Losses and seconds of all steps; peak memory of the timed ones. The device is waited for at the end of each step only."""
    cuda = setting.device == "cuda"
    config = setting.config
    losses, seconds = [], []
    count = setting.warm_up + setting.steps
    for number, batch in enumerate(batches(config.vocab_size, setting.batch, config.context_length, setting.micro_batch, count)):
        if cuda and number == setting.warm_up:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        loss = trainer.step(batch)
        losses.append(float(loss))
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "losses": losses,
        "seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the packages that matter, those that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


# --- What comes before the candidates.


def draw_weights(setting: Setting) -> float:
    """Initial weights as training has them, into the file that all candidates read; returns the loss to expect of them.

    Logits of fresh weights are not 0: with x of root mean square 1 those of a token with row w of the head vary by |w|² from
    position to position, and the loss is ln V + |w|²/2 (the mean of exp of a Gaussian)."""
    model = Transformer(setting.config)
    initialise(model, seed=0)
    head = (model.head.weight if model.head.weight is not None else model.embed.weight).detach()
    save_file(model.state_dict(), setting.weights)
    return math.log(setting.config.vocab_size) + float(head.square().sum(dim=1).mean()) / 2


def machine(setting: Setting) -> dict[str, Any]:
    """GPU, driver and versions."""
    found: dict[str, Any] = {"versions": versions(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    if setting.device != "cuda":
        return {**found, "device": f"CPU, {torch.get_num_threads()} threads", "driver": None}
    properties = torch.cuda.get_device_properties(0)
    with contextlib.suppress(Exception):  # the module is small and the figure is no reason to fail
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        found["driver"] = str(nvml.nvmlSystemGetDriverVersion())
    return {"driver": None, **found, "device": properties.name, "device_bytes": properties.total_memory}


@torch.no_grad()
def matmul_rates(setting: Setting) -> dict[str, Any]:
    """FLOP/s that matrix products keep up: square ones, and the products that the model itself consists of, each weighted by how
    often a step has it. Random values: zeros would need less power, and the GPU would clock higher."""
    cuda = setting.device == "cuda"
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32

    def seconds_of(rows: int, inner: int, columns: int, role: str, at_least: float) -> float:
        # y = x·Wᵀ, the gradient of x, the gradient of W: as autograd lays them out.
        left = torch.randn((inner, rows) if role == "weight" else (rows, inner), device=setting.device, dtype=dtype)
        right = torch.randn((columns, inner) if role == "forward" else (inner, columns), device=setting.device, dtype=dtype)
        left, right = (left.T if role == "weight" else left), (right.T if role == "forward" else right)
        repetitions, elapsed = 2, 0.0
        while True:
            began = time.perf_counter()
            for _ in range(repetitions):
                torch.mm(left, right)
            if cuda:
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - began
            if elapsed >= at_least:
                return elapsed / repetitions
            repetitions = max(repetitions * 2, math.ceil(repetitions * at_least * 1.1 / max(elapsed, 1e-6)))

    size = 8192 if cuda else 512
    square = 2.0 * size**3 / seconds_of(size, size, size, "forward", setting.matmul_seconds)
    work = step_work(setting.config, setting.recipe(compile=True), 1)[0]
    products = Counter(item for item in operations((*work.forward, *work.backward)) if isinstance(item, Matmul))
    each = setting.matmul_seconds / len(products)
    flops = taken = 0.0
    for product, count in products.items():
        flops += count * product.flops
        taken += count * seconds_of(product.rows, product.inner, product.columns, product.role, each)
    return {"square": size, "square_flops": square, "model_flops": flops / taken}


# --- Candidates.


@contextlib.contextmanager
def process_group(setting: Setting) -> Iterator[ProcessGrid]:
    """Of this process alone."""
    device = torch.device(setting.device, 0) if setting.device == "cuda" else torch.device("cpu")
    with process_grid(device) as grid:
        yield grid


def adamw(setting: Setting, parameters: Any) -> torch.optim.AdamW:
    """On all tensors alike, as in the paper's Llama runs."""
    settings: dict[str, Any] = {"lr": setting.learning_rate, "betas": BETAS, "weight_decay": WEIGHT_DECAY}
    return torch.optim.AdamW(parameters, **settings, fused=setting.device == "cuda")


def our_model(setting: Setting) -> Transformer:
    model = Transformer(setting.config)
    model.load_whole(load_file(setting.weights))
    return model


def on_device(setting: Setting, batch: MicroBatches) -> Iterator[tuple[Tensor, Tensor]]:
    for inputs, targets in batch:
        yield inputs.to(setting.device), targets.to(setting.device)


@contextlib.contextmanager
def ours(setting: Setting, compile: bool = True) -> Iterator[Trainer]:
    """Our engine."""
    from megatron_plasticity.training.engine import TrainingEngine

    tokens = setting.tokens
    with process_group(setting) as grid:
        engine = TrainingEngine(our_model(setting), setting.recipe(compile), WEIGHT_DECAY, grid)
        engine.set_learning_rate(setting.learning_rate)

        def step(batch: MicroBatches) -> Tensor:
            parts = [MicroBatch(inputs, targets) for inputs, targets in batch]
            samples = [[0] * len(part.inputs) for part in parts]
            return engine.train_batch(StepBatch(parts, tokens, tokens, tokens * setting.config.context_length, samples)) / tokens

        yield Trainer(step, engine.attention.kernel)


def ours_eager(setting: Setting) -> contextlib.AbstractContextManager[Trainer]:
    """Our engine, without `engine.compile`."""
    return ours(setting, compile=False)


@contextlib.contextmanager
def plain_loop(setting: Setting) -> Iterator[Trainer]:
    """Our module and our loss without DeepSpeed."""
    from megatron_plasticity.models.attention_choice import choose_attention
    from megatron_plasticity.training.objective import Objective

    model = our_model(setting).to(setting.device)
    attention = choose_attention(setting.recipe(compile=True).engine, setting.config, 1, torch.device(setting.device))
    model.use_attention(attention.backend)
    if setting.precision == "bf16":
        model.to(torch.bfloat16)
    model.compile_blocks()
    objective = Objective(model, compiled=True)
    weights = list(model.parameters())
    # In fp32 the weights are their own masters, and autograd adds their gradients up.
    is_mixed = setting.precision == "bf16"
    masters = [weight.detach().float() for weight in weights] if is_mixed else weights
    gradients = [torch.zeros_like(master) for master in masters]
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient
    optimizer = adamw(setting, masters)

    def step(batch: MicroBatches) -> Tensor:
        total = torch.zeros((), device=setting.device, dtype=torch.float64)
        for inputs, targets in on_device(setting, batch):
            loss, cross_entropy = objective(inputs, targets, scale=1 / setting.tokens)
            loss.backward()
            total += cross_entropy
            if is_mixed:
                for gradient, weight in zip(gradients, weights, strict=True):
                    assert weight.grad is not None, "all parameters take part"
                    gradient.add_(weight.grad)
                    weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, CLIP, foreach=True)
        optimizer.step()
        with torch.no_grad():
            for weight, master, gradient in zip(weights, masters, gradients, strict=True):
                if is_mixed:
                    weight.copy_(master)
                gradient.zero_()
        return total / setting.tokens

    yield Trainer(step, attention.kernel)


@contextlib.contextmanager
def litgpt(setting: Setting) -> Iterator[Trainer]:
    """As `litgpt/pretrain.py` of 0.5.13 does it in `main` and `fit`."""
    import lightning  # pyright: ignore[reportMissingImports]
    from litgpt.utils import chunked_cross_entropy  # pyright: ignore[reportMissingImports]

    fabric = lightning.Fabric(
        accelerator=setting.device,
        devices=1,
        strategy="auto",
        precision="bf16-mixed" if setting.precision == "bf16" else "32-true",
    )
    fabric.launch()
    model = fabric.setup(torch.compile(litgpt_model(load_file(setting.weights), setting.config)))
    optimizer = fabric.setup_optimizers(adamw(setting, model.parameters()))

    def step(batch: MicroBatches) -> Tensor:
        total = torch.zeros((), device=fabric.device)
        for number, (inputs, targets) in enumerate(on_device(setting, batch), start=1):
            with fabric.no_backward_sync(model, enabled=number < len(batch)):
                loss = chunked_cross_entropy(model(inputs), targets)
                fabric.backward(loss / len(batch))
            total += loss.detach()
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return total / len(batch)

    yield Trainer(step)


@contextlib.contextmanager
def transformers(setting: Setting, compile: bool = False, **of_the_loss: Any) -> Iterator[Trainer]:
    """transformers' model under DeepSpeed. `of_the_loss` is passed on with the targets."""
    import deepspeed

    with process_group(setting):
        model = transformers_model(load_file(setting.weights), setting.config)
        model = model.to(setting.device)  # before the optimizer sees the parameters
        if compile:
            model.compile(dynamic=False)
        recipe = setting.recipe(compile=False)
        settings = deepspeed_json(recipe.engine, recipe.batch, CLIP, recipe.parallel, 1)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=adamw(setting, model.parameters()), config=settings, dist_init_required=False
        )

        def step(batch: MicroBatches) -> Tensor:
            total = torch.zeros((), device=setting.device)
            for inputs, targets in on_device(setting, batch):
                # `shift_labels` are targets as they stand; without it the loss would shift `labels` by one.
                found = engine(
                    input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False, return_dict=True, **of_the_loss
                )
                engine.backward(found.loss)
                engine.step()
                total += found.loss.detach()
            return total / len(batch)

        yield Trainer(step)


def transformers_compiled(setting: Setting) -> contextlib.AbstractContextManager[Trainer]:
    """As `transformers`, the whole model compiled."""
    return transformers(setting, compile=True)


@contextlib.contextmanager
def transformers_liger(setting: Setting) -> Iterator[Trainer]:
    """As `transformers`, with Liger's kernels for norms, rotary embedding, SwiGLU and the loss."""
    from liger_kernel import transformers as liger  # pyright: ignore[reportMissingImports]

    if setting.device == "cpu":
        raise Unavailable("Liger's kernels need a GPU")
    {"llama2": liger.apply_liger_kernel_to_llama, "olmo2": liger.apply_liger_kernel_to_olmo2}[setting.config.family]()
    with transformers(setting, accum_dtype=torch.float32) as trainer:
        yield trainer


class _Recorder:
    """Stands for OLMo-core's trainer: takes what the train module records, and keeps the loss."""

    def __init__(self) -> None:
        self.loss = torch.zeros(())

    def record_ce_loss(self, value: Tensor, reduce_type: Any = None) -> None:
        self.loss = value

    def record_metric(self, *arguments: Any, **settings: Any) -> None:
        """Its own trainer only keeps them on the device until it logs."""


@contextlib.contextmanager
def olmo_core(setting: Setting) -> Iterator[Trainer]:
    """OLMo-core's train module, as its trainer drives it."""
    from olmo_core.config import DType  # pyright: ignore[reportMissingImports]
    from olmo_core.distributed.parallel import DataParallelType  # pyright: ignore[reportMissingImports]
    from olmo_core.optim import AdamWConfig  # pyright: ignore[reportMissingImports]
    from olmo_core.train.train_module import (  # pyright: ignore[reportMissingImports]
        TransformerDataParallelConfig,
        TransformerTrainModule,
    )
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    config = setting.config
    cuda = setting.device == "cuda"
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    fused = cuda and importlib.util.find_spec("liger_kernel") is not None
    with tempfile.TemporaryDirectory() as folder:
        if cuda:
            torch.cuda.set_device(device)
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
        )
        try:
            module = TransformerTrainModule(
                olmo_core_model(config, fused_loss=fused),
                AdamWConfig(lr=setting.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=cuda),
                rank_microbatch_size=setting.micro_batch * config.context_length,
                max_sequence_length=config.context_length,
                compile_model=True,
                dp_config=TransformerDataParallelConfig(
                    name=DataParallelType.fsdp,
                    param_dtype=DType.bfloat16 if setting.precision == "bf16" else None,
                    reduce_dtype=DType.float32,
                ),
                z_loss_multiplier=config.z_loss_weight or None,
                max_grad_norm=CLIP,
                device=device,
            )
            set_model_state_dict(
                module.model,
                dict(olmo_core_weights(load_file(setting.weights), config)),
                options=StateDictOptions(full_state_dict=True, strict=True),
            )
            recorder = _Recorder()
            module._attach_trainer(recorder)  # type: ignore[arg-type]

            def step(batch: MicroBatches) -> Tensor:
                module.zero_grads()
                inputs, targets = (torch.cat(parts).to(device) for parts in zip(*batch, strict=True))
                module.train_batch({"input_ids": inputs, "labels": targets})
                module.optim_step()
                return recorder.loss

            yield Trainer(step, "Liger's fused loss" if fused else "its own loss")
        finally:
            torch.distributed.destroy_process_group()


CANDIDATES: dict[str, Callable[[Setting], contextlib.AbstractContextManager[Trainer]]] = {
    "ours": ours,
    "ours-eager": ours_eager,
    "plain": plain_loop,
    "litgpt": litgpt,
    "transformers": transformers,
    "transformers-compiled": transformers_compiled,
    "transformers-liger": transformers_liger,
    "olmo-core": olmo_core,
}


if __name__ == "__main__":
    main()
