"""The machine under test, and rows of the table."""

from __future__ import annotations

import contextlib
import gc
import math
import resource
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import TrainingRecipe

OK, FAILED, SLOW, NOT_HERE, NOTED, NEEDS_CUDA = "ok", "FAILED", "SLOW", "not here", "noted", "needs CUDA"
ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# bf16 has 8 bits: one rounding is up to 0.4 %, and of a sum of rounded products about as much is left.
ERROR = {"bf16": 1e-2, "fp32": 1e-5}
SEED = 1


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    measured: str
    limit: str
    verdict: str


class Gpu:
    """The machine under test, and how large things are on it."""

    device = torch.device("cuda", 0)
    rehearsal = False
    heads = ((32, 4),)
    """Query and key/value heads that are tried with every head dimension."""
    more_heads: Mapping[int, tuple[int, int]] = MappingProxyType({64: (32, 32), 128: (32, 32)})
    lengths = (576, 1024)
    """The first leaves 64 when divided by 128, where cuDNN has had faults."""
    loss_shape = (20_480, 1536, 32_000)
    """Tokens, width, vocabulary: five pieces of rows, and logits that would be more than all else together."""
    vector = 1_000_003
    model = ModelConfig.model_validate(
        {
            "family": "llama2",
            "layers": 4,
            "hidden_size": 384,
            "mlp_hidden_size": 1056,
            "query_heads": 8,
            "kv_heads": 2,
            "head_dim": 48,
            "vocab_size": 4096,
            "context_length": 256,
        }
    )
    compiler = "inductor"
    compiled_layouts: tuple[tuple[str, int], ...] = (("bf16", 1), ("bf16", 3), ("fp32", 0))
    rank_layouts: tuple[dict[str, Any], ...] = ({"tensor": 2}, {"zero_stage": 1}, {"zero_stage": 3}, {"pipeline": 2})
    trained = "llama2-0.5b"
    micro_batch = 8
    timed_steps = 8

    def row(self, check: str, measured: str, value: float, limit: float, *, needs_cuda: bool = False, shown: str = "") -> Row:
        """Ok if the value is at most the limit; NaN is not. A rehearsal says nothing of what `needs_cuda`."""
        verdict = OK if value <= limit else FAILED
        return Row(check, measured, shown or f"{limit:.0e}", NEEDS_CUDA if needs_cuda and self.rehearsal else verdict)

    def missing(self, check: str, why: str) -> Row:
        """Of what this machine does not have."""
        return Row(check, why, "", NEEDS_CUDA if self.rehearsal else NOT_HERE)

    def noted(self, check: str, measured: str) -> Row:
        """A figure of a GPU without a limit."""
        return Row(check, measured, "", NEEDS_CUDA if self.rehearsal else NOTED)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def forget_peak(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def in_use(self) -> int:
        """Bytes."""
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """Most bytes in use since `forget_peak`."""
        return torch.cuda.max_memory_allocated()

    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    @contextlib.contextmanager
    def host_waits(self) -> Iterator[list[Any]]:
        """Warnings of the block, those of `is_wait` among them."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield said
            finally:
                torch.cuda.set_sync_debug_mode("default")


class Rehearsal(Gpu):
    """A CPU in its place: the same lines run, on tiny shapes."""

    device = torch.device("cpu")
    rehearsal = True
    heads = ((4, 2),)
    more_heads = MappingProxyType({64: (2, 2)})
    lengths = (192,)
    loss_shape = (2300, 16, 61)
    vector = 1003
    model = ModelConfig.model_validate(
        {
            **Gpu.model.model_dump(),
            "layers": 2,
            "hidden_size": 32,
            "mlp_hidden_size": 48,
            "query_heads": 4,
            "head_dim": 8,
            "vocab_size": 64,
            "context_length": 32,
        }
    )
    compiler = "aot_eager"  # does all but to write code, which would take long
    compiled_layouts = (("fp32", 1),)
    rank_layouts = ({"tensor": 2},)
    trained = "llama2-debug"
    micro_batch = 1
    timed_steps = 2

    def synchronize(self) -> None:
        pass

    def forget_peak(self) -> None:
        gc.collect()

    def in_use(self) -> int:
        return self.peak()

    def peak(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def name(self) -> str:
        return "no GPU"

    @contextlib.contextmanager
    def host_waits(self) -> Iterator[list[Any]]:
        yield []


def recipe(
    machine: Gpu,
    precision: str,
    zero_stage: int,
    *,
    accumulation: int = 1,
    micro: int = 4,
    compile: bool = False,
    checkpointing: bool = False,
    parallel: Mapping[str, int] | None = None,
) -> TrainingRecipe:
    """Of a run with one data-parallel rank."""
    return TrainingRecipe.model_validate(
        {
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1},
            "batch": {"global_batch_size": micro * accumulation, "micro_batch_size": micro},
            "engine": {
                "precision": precision,
                "zero_stage": zero_stage,
                "compile": compile,
                "activation_checkpointing": checkpointing,
            },
            "parallel": dict(parallel or {}),
            "device": machine.device.type,
        }
    )


def is_wait(warning: warnings.WarningMessage) -> bool:
    """Whether it says that the host has waited for the GPU."""
    return "synchronizing CUDA operation" in str(warning.message)


def largest(*errors: float) -> float:
    """The largest, or NaN if one is."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def relative(ours: Tensor, exact: Tensor) -> float:
    """‖ours − exact‖ / ‖exact‖ in fp64; NaN if anything is."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm())
