"""Write the tables of docs/planning.md from the cost model, so that they cannot say anything the code does not.

With `--check` nothing is changed, and the exit code is 1 if the document is not current.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_plasticity.config.files import write_text_atomic
from megatron_plasticity.config.load import load_config
from megatron_plasticity.config.model import Family, ModelConfig
from megatron_plasticity.config.training import BatchConfig, EngineConfig, OptimizerConfig, PretrainConfig, TrainingRecipe
from megatron_plasticity.launch.cost import step_time
from megatron_plasticity.launch.hardware import DEVICES, H100, H200, Device, Hardware, assumptions
from megatron_plasticity.launch.operations import FUSED, Kernels
from megatron_plasticity.launch.plan import Layout, Machine, best_layouts, hours_text
from megatron_plasticity.models.sizes import flops_per_token, parameter_count

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs/planning.md"
GPUS = (8, 32, 128, 512, 1024)
# The run that a row starts from, and its model if it is another one.
RUNS: dict[str, tuple[str, str | None]] = {
    "Llama-2 0.5B": ("llama2-0.5b-20x", None),
    "Llama-2 1B": ("llama2-1b-20x", None),
    "Llama-2 4B": ("llama2-4b-20x", None),
    "Llama-2 13B": ("llama2-4b-20x", "llama2-13b"),
    "OLMo-2 1B": ("olmo2-1b-20x", None),
    "OLMo-2 13B": ("olmo2-1b-20x", "olmo2-13.7b"),
}
# FlashAttention-2, which most of them ran, reaches a third of an H100's peak at most (2407.08608, section 1).
_FLASH_2 = replace(H100, attention_share_64=0.33, attention_share_128=0.36)


@dataclass(frozen=True)
class Published:
    """What somebody else's trainer reached, and the shape of its model in terms of ours."""

    trainer: str
    tokens_per_second: float
    """Per GPU."""
    gpus: int
    micro: int
    accumulation: int
    zero_stage: int
    shape: tuple[Family, int, int, int, int, int, int, int, bool]
    """Family, layers, hidden size, MLP width, query heads, key/value heads, vocabulary, context, tied."""
    fused: bool = True
    device: Device = _FLASH_2
    source: str = ""

    @property
    def model(self) -> ModelConfig:
        family, layers, hidden, mlp, query_heads, kv_heads, vocabulary, context, tied = self.shape
        return ModelConfig.model_validate(
            {
                "family": family,
                "layers": layers,
                "hidden_size": hidden,
                "mlp_hidden_size": mlp,
                "query_heads": query_heads,
                "kv_heads": kv_heads,
                "head_dim": hidden // query_heads,
                "vocab_size": vocabulary,
                "context_length": context,
                "tied_embeddings": tied,
            }
        )

    @property
    def predicted(self) -> float:
        """Tokens per second and GPU."""
        batch = self.micro * self.accumulation * self.gpus
        recipe = TrainingRecipe(
            optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1),
            batch=BatchConfig(global_batch_size=batch, micro_batch_size=self.micro),
            engine=EngineConfig(zero_stage=self.zero_stage),  # type: ignore[arg-type]
        )
        seconds = step_time(self.model, recipe, self.gpus, Hardware(self.device), FUSED if self.fused else Kernels()).total
        return batch * self.model.context_length / seconds / self.gpus


# An MLP with GELU and 4d columns is taken for SwiGLU's three matrices of 8d/3, which multiply as much.
_FOUNDRY = "its scripts/train/benchmarking/README.md"
_MPT_1B = ("llama2", 24, 2048, 5504, 16, 16, 50368, 2048, True)
_MPT_13B = ("llama2", 40, 5120, 13696, 40, 40, 50368, 2048, True)
_LLAMA3_8B = ("llama2", 32, 4096, 14336, 32, 8, 128256, 8192, False)
_META = replace(_FLASH_2, memory=2.4e12)
PUBLISHED = (
    Published("LLM-Foundry", 68_551, 16, 24, 1, 3, ("llama2", 24, 1536, 4096, 12, 12, 50368, 2048, True), source=_FOUNDRY),
    Published("LLM-Foundry", 45_455, 8, 14, 1, 3, _MPT_1B, source=_FOUNDRY),
    Published("LLM-Foundry", 44_402, 64, 20, 1, 3, _MPT_1B, source=_FOUNDRY),
    Published("LLM-Foundry", 24_142, 16, 10, 3, 3, ("llama2", 32, 2560, 6784, 20, 20, 50368, 2048, True), source=_FOUNDRY),
    Published("LLM-Foundry", 10_643, 8, 6, 1, 3, ("llama2", 32, 4096, 10880, 32, 32, 50368, 2048, True), source=_FOUNDRY),
    Published("LLM-Foundry", 4_792, 8, 2, 1, 3, _MPT_13B, source=_FOUNDRY),
    Published("LLM-Foundry", 4_800, 64, 2, 1, 3, _MPT_13B, source=_FOUNDRY),
    Published(
        "llm.c",
        46_800,
        8,
        16,
        4,
        1,
        ("llama2", 48, 1600, 4288, 25, 25, 50304, 1024, True),
        device=H100,
        source="GPT-2 1.56B; micro-batch assumed",
    ),
    Published(
        "OLMo-core",
        46_000,
        8,
        8,
        8,
        3,
        ("olmo2", 16, 2048, 8192, 16, 16, 100352, 4096, False),
        source="OLMo-2 1B; GPUs and micro-batch assumed",
    ),
    Published(
        "torchtitan, eager",
        5_762,
        8,
        2,
        1,
        3,
        _LLAMA3_8B,
        False,
        _META,
        "its benchmarks/llama3_h100_202412; 500 W, 2.4 TB/s, some recomputation",
    ),
    Published("torchtitan, compiled", 6_667, 8, 2, 1, 3, _LLAMA3_8B, True, _META, "the same"),
)


def main(arguments: list[str] | None = None) -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/planning.md from the cost model.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the document is not current")
    check = parser.parse_args(arguments).check
    old = DOCUMENT.read_text(encoding="utf-8")
    new = filled(old)
    if new == old:
        return 0
    if check:
        print(f"{DOCUMENT.name} is not current: run python tools/planning_tables.py", file=sys.stderr)
        return 1
    write_text_atomic(DOCUMENT, new)
    print(f"wrote {DOCUMENT.name}")
    return 0


def filled(text: str) -> str:
    """The document with every table between its marks anew."""
    tables = {
        "predicted": predicted_table,
        "kernels": kernels_table,
        "published": published_table,
        "assumptions": assumptions_table,
    }
    for name, table in tables.items():
        marks = f"<!-- {name}: written by tools/planning_tables.py -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
        assert len(pattern.findall(text)) == 1, name
        block = "\n".join([marks[0], *table(), marks[1]])
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def predicted_table() -> Iterator[str]:
    """The best layout of each model for each number of GPUs."""
    yield "| model | GPUs | pipe×data×tensor | ZeRO | micro | accum | step | tokens/s | MFU | hours to 20 tokens per parameter |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    machine = Machine(H100.gibibytes, hardware=Hardware())
    for name, (run, model) in RUNS.items():
        config = load_config(PretrainConfig, ROOT / f"configs/runs/{run}.yaml")
        if model is not None:
            shape = load_config(ModelConfig, ROOT / f"configs/models/{model}.yaml")
            config = config.model_copy(update={"model": shape, "batch": BatchConfig(global_batch_size=1024, micro_batch_size=1)})
        for gpus in GPUS:
            found = best_layouts(config, gpus, machine, count=1)
            yield f"| {name} | {gpus} | {_layout(found[0], machine)} |" if found else f"| {name} | {gpus} |" + " – |" * 8


def kernels_table() -> Iterator[str]:
    """One H200: PyTorch's kernels one by one, compiled, and with merged projections."""
    yield "| one H200 | sequences | as shipped | matmul, attention, memory | `engine.compile` | projections merged too |"
    yield "|---|---|---|---|---|---|"
    hardware = Hardware(H200)
    for name, micro in {"Llama-2 0.5B": 32, "Llama-2 1B": 16, "Llama-2 4B": 8, "OLMo-2 1B": 8}.items():
        config = load_config(PretrainConfig, ROOT / f"configs/runs/{RUNS[name][0]}.yaml", [f"batch.micro_batch_size={micro}"])
        flops = flops_per_token(config.model, config.model.context_length)
        variants = (Kernels(), Kernels(blocks=True, loss=True), FUSED)
        times = [step_time(config.model, config, 1, hardware, kernels) for kernels in variants]
        rates = [config.tokens_per_step / time.total for time in times]
        cells = [f"{_three_digits(rate):,.0f} ({rate * flops / H200.bf16:.0%})" for rate in rates]
        shares = ", ".join(f"{part / times[0].total:.0%}" for part in (times[0].matmul, times[0].attention, times[0].memory))
        yield f"| {name} | {micro} | {cells[0]} | {shares} | {cells[1]} | {cells[2]} |"


def _layout(layout: Layout, machine: Machine) -> str:
    parallel, config = layout.parallel, layout.config
    seconds = layout.step_seconds(machine)
    tokens = config.tokens_per_step / seconds
    mfu = tokens * flops_per_token(config.model, config.model.context_length) / layout.gpus / H100.bf16
    hours = 20 * parameter_count(config.model).total / tokens / 3600
    again = ", recomputed" if config.engine.activation_checkpointing else ""
    return " | ".join(
        (
            f"{parallel.pipeline}×{layout.data}×{parallel.tensor}",
            f"{layout.zero_stage}{again}",
            f"{config.batch.micro_batch_size}",
            f"{layout.accumulation}",
            f"{seconds:.3g} s",
            f"{_three_digits(tokens):,.0f}",
            f"{mfu:.0%}",
            hours_text(hours),
        )
    )


def _three_digits(value: float) -> float:
    return round(value, 2 - math.floor(math.log10(value)))


def published_table() -> Iterator[str]:
    """Predictions for others' trainers, and what they published."""
    yield "| trainer | parameters | GPUs | kernels | tokens/s per GPU, published | model | ratio | |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in PUBLISHED:
        predicted = row.predicted
        size = parameter_count(row.model).total / 1e9
        yield (
            f"| {row.trainer} | {size:.2f} B | {row.gpus} | {'fused' if row.fused else 'single'} | {row.tokens_per_second:,} | "
            f"{_three_digits(predicted):,.0f} | {predicted / row.tokens_per_second:.2f} | {row.source} |"
        )


def assumptions_table() -> Iterator[str]:
    """Every figure of the model."""
    yield "| | figure | value | what it is | source |"
    yield "|---|---|---|---|---|"
    seen: set[tuple[str, str]] = set()
    for device in DEVICES.values():
        for figure in assumptions(Hardware(device)):
            same_as_h100 = device is not H100 and getattr(device, figure.name, None) == getattr(H100, figure.name, None)
            if (figure.part, figure.name) in seen or same_as_h100:
                continue
            seen.add((figure.part, figure.name))
            yield f"| {figure.part} | `{figure.name}` | {figure.value} | {figure.meaning} | {figure.source} |"


if __name__ == "__main__":
    sys.exit(main())
