"""Whole runs: a shipped model's speed, memory and host waits; the same twice; the benches; and what doctor says."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench.data_sheet import peak_flops
from bench.training_setting import UNAVAILABLE
from gpu_checks.machine import FAILED, NOT_HERE, ROOT, SEED, Gpu, Row, is_wait, recipe
from gpu_checks.steps import step_batch

from megatron_plasticity.config.data import CorpusConfig, PythonTextConfig, ReasoningTextConfig, TokenizerConfig
from megatron_plasticity.config.load import load_config
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import PretrainConfig, TrainingRecipe
from megatron_plasticity.data.micro_batch import MicroBatch
from megatron_plasticity.data.prepare import TOKENIZER_FILE, prepare
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import Interrupted
from megatron_plasticity.launch.memory import largest_stage, memory
from megatron_plasticity.models.checkpoint import open_checkpoint
from megatron_plasticity.models.sizes import flops_per_token
from megatron_plasticity.models.transformer import Transformer, local_model
from megatron_plasticity.parallel.grid import ProcessGrid, process_grid
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.training.engine import TrainingEngine
from megatron_plasticity.training.pretrain import pretrain

# --- What the machine is.


def environment(machine: Gpu) -> Iterator[Row]:
    """`doctor` in short."""
    from megatron_plasticity.launch.doctor import findings
    from megatron_plasticity.launch.doctor.examine import examine

    facts = examine()
    if facts.torch is not None:
        versions = f"torch {facts.torch.version}, CUDA {facts.torch.cuda}, cuDNN {facts.torch.cudnn}, NCCL {facts.torch.nccl}"
        yield machine.noted("versions", versions)
        for gpu in facts.torch.gpus[:1]:
            yield machine.noted("GPU", f"{gpu.name}, {gpu.memory / 2**30:.0f} GiB, sm {gpu.capability[0]}{gpu.capability[1]}")
    if facts.kernels is not None:
        packages = [f"{package.name} {package.version or ''}".strip() for package in facts.kernels.flash_packages]
        packages += [f"apex {facts.kernels.apex}"] if facts.kernels.apex else []
        yield machine.noted("packages of kernels", ", ".join(packages) or "none")
    problems = findings.problems(facts)
    yield machine.row("doctor", "; ".join(problems) or "nothing to mend", len(problems), 0, shown="no problem")
    for tip in findings.tips(facts)[:3]:
        yield machine.noted("tip of doctor", tip)


# --- Training of a shipped model: speed, memory, and whether the host waits.


def training(machine: Gpu) -> Iterator[Row]:
    """A few steps of a shipped model, with and without recomputation; compiled it is `train_gpu.py`'s (`benches`)."""
    config = load_config(ModelConfig, ROOT / "configs/models" / f"{machine.trained}.yaml")
    with process_grid(machine.device) as grid:
        for recomputed in (False, True):
            settings = recipe(machine, "bf16", 1, accumulation=2, micro=machine.micro_batch, checkpointing=recomputed)
            yield from _trained(machine, config, settings, grid, f"{machine.trained}{', recomputed' if recomputed else ''}")


def _trained(machine: Gpu, config: ModelConfig, settings: TrainingRecipe, grid: ProcessGrid, what: str) -> Iterator[Row]:
    machine.forget_peak()
    before = machine.in_use()
    model = local_model(config, grid).to(machine.device)
    for parameter in model.parameters():  # cheaper than `initialise`, whose values nothing here depends on
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    engine = TrainingEngine(model, settings, 0.1, grid)
    engine.set_learning_rate(1e-4)
    try:
        batch = step_batch(config, settings, grid)
        first = float(engine.train_batch(batch)) / batch.target_tokens
        for _ in range(2):
            engine.train_batch(batch)
        machine.forget_peak()
        machine.synchronize()
        began = time.perf_counter()
        total = torch.zeros((), device=machine.device)
        for _ in range(machine.timed_steps):
            total = engine.train_batch(batch)
        machine.synchronize()
        rate = machine.timed_steps * batch.input_tokens / (time.perf_counter() - began)
        peak = machine.peak() - before
        yield machine.noted(f"{what}: speed", f"{rate:,.0f} tokens/s{_mfu(machine, config, rate)}")
        loss = float(total) / batch.target_tokens
        yield machine.row(f"{what}: learns", f"loss {first:.3f}, then {loss:.3f}", loss - first, 0, shown="falls")

        predicted = largest_stage(memory(config, settings, 1, machine.device.type)).peak.total  # type: ignore[arg-type]
        difference = peak / predicted - 1
        measured = f"{peak / 2**30:.2f} GiB, predicted {predicted / 2**30:.2f} GiB ({difference:+.1%})"
        yield machine.row(f"{what}: peak memory", measured, abs(difference), 0.05, needs_cuda=True, shown="5 % off plan")

        with machine.host_waits() as said:
            seen: list[int] = []
            engine.train_batch(
                dataclasses.replace(
                    batch, micro_batches=_Watched(batch.micro_batches, lambda: seen.append(sum(map(is_wait, said))))
                )
            )
            seen.append(sum(map(is_wait, said)))
        waits = [after - earlier for earlier, after in itertools.pairwise(seen)]
        texts = "; ".join(dict.fromkeys(str(warning.message).splitlines()[0] for warning in said if is_wait(warning)))
        measured = f"{max(waits[:-1])} in a micro-step, {waits[-1]} in the last with AdamW{f' ({texts})' if texts else ''}"
        too_many = max(*waits[:-1], waits[-1] - WAITS_OF_A_STEP)
        shown = f"0 in a micro-step, {WAITS_OF_A_STEP} in the last"
        yield machine.row(f"{what}: host waits for the GPU", measured, too_many, 0, needs_cuda=True, shown=shown)
    finally:
        engine.close()


WAITS_OF_A_STEP = 4
"""All for the gradient's norm, by the source of DeepSpeed's BF16_Optimizer (0.19.8): a constant is copied to the GPU, and read
back to mark a norm that is not finite; then it asks whether the norm is finite, and whether it is to be clipped. torch's fused
AdamW and our engine have none."""


class _Watched(list[MicroBatch]):
    """Micro-batches that tell when each is taken."""

    def __init__(self, micro_batches: Sequence[MicroBatch], taken: Callable[[], None]) -> None:
        super().__init__(micro_batches)
        self._taken = taken

    def __iter__(self) -> Iterator[MicroBatch]:
        for micro_batch in super().__iter__():
            self._taken()
            yield micro_batch


def _mfu(machine: Gpu, config: ModelConfig, rate: float) -> str:
    """Model FLOPs utilisation (PaLM, 2204.02311, appendix B)."""
    peak = peak_flops(machine.name(), "bf16")
    if peak is None:
        return f", MFU unknown ({machine.name()})"
    return f", MFU {rate * flops_per_token(config, config.context_length) / peak:.1%} of {peak / 1e12:.0f} TFLOP/s"


# --- The same twice.


def repeat(machine: Gpu) -> Iterator[Row]:
    """A run that was stopped goes on bit for bit; greedy samples depend on nothing beside them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        corpus = prepare(
            CorpusConfig(
                name="tiny",
                output=Path(folder) / "corpus",
                python_text=PythonTextConfig(megabytes=0.04),
                reasoning_text=ReasoningTextConfig(documents=200),
                tokenizer=TokenizerConfig(vocab_size=300),
                held_out_fraction=0.1,
            )
        )
        configs = [_small_run(machine, corpus, Path(folder) / name) for name in ("whole", "stopped")]
        whole = pretrain(configs[0], NoProgress())
        with contextlib.suppress(Interrupted):
            pretrain(configs[1], _StopAt(3))
        stopped = pretrain(configs[1], NoProgress())
        weights = [open_checkpoint(run.path).tensors() for run in (whole, stopped)]
        different = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
        checkpoints = [path.name for path in stopped.checkpoints()]
        measured = f"{len(different)} of {len(weights[0])} tensors differ (checkpoints {', '.join(checkpoints)})"
        was_stopped = "step-3" in checkpoints
        yield machine.row(
            "a stopped run goes on bit for bit", measured, len(different) if was_stopped else math.nan, 0, shown="0"
        )
        yield _sampling(machine, open_checkpoint(whole.path).build_model(machine.device), Tokenizer.load(corpus / TOKENIZER_FILE))


def _small_run(machine: Gpu, corpus: Path, output: Path) -> PretrainConfig:
    model = {**machine.model.model_dump(), "vocab_size": 320, "context_length": 32}
    settings = recipe(machine, "bf16", 1, accumulation=2, micro=2).model_dump()
    del settings["seed"]
    settings["engine"]["attention"] = "sdpa-math"  # no other kernel promises a deterministic backward pass everywhere
    settings["logging"] |= {"every_steps": 1, "mlflow": False}
    return PretrainConfig.model_validate(
        {**settings, "name": "small", "output": output, "model": model, "data": {"folder": corpus}, "steps": 6}
    )


class _StopAt(NoProgress):
    """Sends this process, at a step, the signal that a scheduler would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
        if done == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def _sampling(machine: Gpu, model: Transformer, tokenizer: Tokenizer) -> Row:
    from megatron_plasticity.evaluation.sampler import NativeGenerator
    from megatron_plasticity.evaluation.sampling import SamplingParameters

    with torch.no_grad():
        assert model.head.weight is not None
        model.head.weight.mul_(4)  # logits far apart: no ties within rounding
    generator = torch.Generator().manual_seed(SEED)
    prompts = [torch.randint(tokenizer.vocab_size, (3 + i,), generator=generator).tolist() for i in range(6)]
    parameters = SamplingParameters(12)
    texts = []
    for slots in (2, 6):
        found = NativeGenerator(model, tokenizer, slots).generate(prompts, range(len(prompts)), 1, parameters)
        texts.append([row[0].tokens for row in found])
    differ = sum(a != b for a, b in zip(*texts, strict=True))
    for prompt, tokens in zip(prompts, texts[0], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens], device=machine.device))[0]
        chosen = logits.argmax(dim=-1).tolist()[len(prompt) - 1 :]
        differ += chosen[: len(tokens)] != tokens
    measured = f"{differ} of {2 * len(prompts)} comparisons differ (2 and 6 slots; one pass over the whole)"
    return machine.row("greedy samples", measured, differ, 0, shown="0")


# --- Benches of their own.


def benches(machine: Gpu) -> Iterator[Row]:
    """The benches that are made for a GPU, in short."""
    yield from _train_gpu(machine)
    small = ["--layers=1", "--rows=300", "--width=16"] if machine.rehearsal else ["--layers=2", "--rows=2000"]
    yield _probes(machine, _bench("probes.py", *small, "--classes=2", f"--device={machine.device.type}"))


def _probes(machine: Gpu, ended: Ended) -> Row:
    what = "tools/bench/probes.py"
    if ended.code == UNAVAILABLE:
        return Row(what, ended.complaint, "", NOT_HERE)
    # A traceback has exit code 1, too, as a comparison has that is not as wanted.
    if "NOT AS WANTED" in ended.said if ended.code == 1 else ended.code == 0 and "as wanted" in ended.said:
        return machine.row(what, ended.said, ended.code, 0, needs_cuda=True, shown="as wanted")
    return Row(what, ended.described, "", FAILED)


def _train_gpu(machine: Gpu) -> Iterator[Row]:
    tiny = [
        "--rehearse",
        "--model=llama2-debug",
        "--candidates=ours",
        "--no-compile",
        "--steps=4",
        "--warm-up=1",
        "--micro-batch=2",
    ]
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        written = Path(folder) / "train.json"
        ended = _bench("train_gpu.py", "--quick", f"--json={written}", *(tiny if machine.rehearsal else []))
        document = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else None
    yield from _train_gpu_rows(machine, ended, document)


def _train_gpu_rows(machine: Gpu, ended: Ended, document: dict[str, Any] | None) -> Iterator[Row]:
    """Rates need a GPU. That something was measured, and trained what it should, is wanted of any machine."""
    if document is None or ended.code != (0 if document["ok"] else 1):
        yield Row("tools/bench/train_gpu.py", ended.described, "", FAILED)
        return
    for model in document["models"]:
        name = f"train_gpu, {model['model']}"
        if not any(row["status"] == "measured" for row in model["rows"]):
            yield Row(name, f"no row was measured: {model.get('error', ended.described)}", "", FAILED)
        for row in model["rows"]:
            mfu = "MFU unknown" if row["mfu"] is None else f"MFU {row['mfu']:.1%}"
            measured = f"{row['tokens_per_second']:,.0f} tokens/s, {mfu}" if row["status"] == "measured" else row["reason"]
            noted = machine.noted(f"{name}, {row['name']}", f"{row['status']}: {measured}")
            crashed = row["status"] == "not measured" and row["reason"].startswith("failed")
            yield dataclasses.replace(noted, verdict=FAILED) if crashed or row["status"] == "INVALID" else noted
        for verdict in model["verdicts"]:
            is_rate = verdict["what"] != "rows"
            what, wanted = f"{name}: {verdict['what']}", verdict["wanted"]
            yield machine.row(what, verdict["found"], not verdict["met"], 0, needs_cuda=is_rate, shown=wanted)


class Ended(NamedTuple):
    """How a bench has ended."""

    code: int
    said: str
    """Last line of what it printed."""
    complaint: str
    """Last line on standard error."""

    @property
    def described(self) -> str:
        return f"exit code {self.code}: {self.complaint or self.said or 'nothing was said'}"


_SECONDS_TO_END = 5.0


def _bench(script: str, *options: str) -> Ended:
    """Run a bench to its end. If this process is told to end, so is the bench first: it ends what it has started itself."""
    command = [sys.executable, str(ROOT / "tools" / "bench" / script), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        output, errors = process.communicate()
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_END)
            process.kill()
            process.wait()
    said, complaint = ((text.strip().splitlines() or [""])[-1] for text in (output, errors))
    return Ended(process.returncode, said, complaint)
