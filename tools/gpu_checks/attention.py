"""Every attention backend that is here, against attention by definition in fp64."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from gpu_checks.machine import DTYPES, ERROR, SEED, SLOW, Gpu, Row, largest, relative
from torch import Tensor

from megatron_plasticity.config.training import AttentionBackend, EngineConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.attention import Segments, attend
from megatron_plasticity.models.attention_choice import choose_attention

# --- Attention.


def exact_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments | None = None) -> Tensor:
    """By definition, in the number format of the input; each segment by itself."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    positions = torch.arange(query.shape[2], device=query.device)
    seen = positions[:, None] >= positions[None]
    if segments is not None:
        text = torch.repeat_interleave(torch.tensor(segments, device=query.device))
        seen &= text[:, None] == text[None]
    scores = (query @ key.transpose(2, 3)) / math.sqrt(query.shape[3])
    return scores.masked_fill(~seen, -math.inf).softmax(dim=-1) @ value


@dataclass
class _Case:
    """Query, key, value and the output's gradient, exact in bf16; and output and gradients in fp64."""

    what: str
    inputs: list[Tensor]
    exact: list[Tensor]

    @classmethod
    def of(
        cls, device: torch.device, heads: tuple[int, int], head_dim: int, length: int, segments: Segments | None = None
    ) -> _Case:
        generator = torch.Generator().manual_seed(SEED)
        shapes = [(2, n, length, head_dim) for n in (heads[0], heads[1], heads[1], heads[0])]
        inputs = [torch.randn(shape, generator=generator).bfloat16().to(device) for shape in shapes]
        doubles = [tensor.double() for tensor in inputs]
        exact = with_gradients(doubles, lambda q, k, v: exact_attention(q, k, v, segments))
        return cls(f"head dim {head_dim}, {heads[0]}/{heads[1]}, length {length}", inputs, exact)

    def errors(self, dtype: torch.dtype, function: Callable[..., Tensor]) -> tuple[float, float]:
        """Relative errors of the output, and the largest of the three gradients'."""
        found = with_gradients([tensor.to(dtype) for tensor in self.inputs], function)
        errors = [relative(ours, exact) for ours, exact in zip(found, self.exact, strict=True)]
        return errors[0], largest(*errors[1:])


def with_gradients(inputs: Sequence[Tensor], function: Callable[..., Tensor]) -> list[Tensor]:
    """Output, and gradients of all inputs but the last, which is the output's own gradient."""
    # In the memory layout of the model's tensors.
    leaves = [tensor.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in inputs[:-1]]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs[-1])]


def attention(machine: Gpu) -> Iterator[Row]:
    """Every backend that fits, forward and backward, against fp64."""
    for precision in DTYPES:
        choice = choose_attention(EngineConfig(precision=precision), machine.model, 1, machine.device)  # type: ignore[arg-type]
        row = machine.noted(f"attention that training takes, {precision}", choice.slow or choice.kernel)
        yield dataclasses.replace(row, verdict=SLOW) if choice.slow else row
    worst: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    unfit: dict[tuple[str, str], str] = {}
    for head_dim, length in itertools.product((24, 32, 48, 64, 80, 96, 128), machine.lengths):
        for heads in dict.fromkeys((*machine.heads, machine.more_heads.get(head_dim, machine.heads[0]))):
            case = _Case.of(machine.device, heads, head_dim, length)
            for name, precision in itertools.product(_named_backends(), DTYPES):
                why = _misfit(machine, name, precision, heads, head_dim)
                if why is not None:
                    unfit[name, precision] = why
                    continue
                errors = case.errors(DTYPES[precision], functools.partial(attend, mask=None, backend=name))
                worst.setdefault((name, precision), []).append((*errors, case.what))
    for name, precision in itertools.product(_named_backends(), DTYPES):
        cases = worst.get((name, precision))
        if cases is None:
            yield machine.missing(f"attention, {name}, {precision}", unfit[name, precision])
            continue
        forward, backward, where = max(cases, key=lambda case: math.inf if math.isnan(sum(case[:2])) else max(case[:2]))
        measured = f"forward {forward:.1e}, backward {backward:.1e} ({where}; {len(cases)} cases)"
        limit = 1e-4 if (name, precision) == ("sdpa-efficient", "fp32") else ERROR[precision]  # its products are in TF32, thrice
        yield machine.row(f"attention, {name}, {precision}", measured, largest(forward, backward), limit)
    yield from _packed_attention(machine, [name for name in _named_backends() if (name, "bf16") in worst])
    yield _masked_attention(machine)


def _named_backends() -> list[AttentionBackend]:
    return [name for name in get_args(AttentionBackend) if name != "auto"]


def _misfit(machine: Gpu, name: AttentionBackend, precision: str, heads: tuple[int, int], head_dim: int) -> str | None:
    query, kv = heads
    shape = {"query_heads": query, "kv_heads": kv, "head_dim": head_dim, "hidden_size": query * head_dim}
    model = machine.model.model_copy(update=shape)
    try:
        choose_attention(EngineConfig.model_validate({"attention": name, "precision": precision}), model, 1, machine.device)
    except UserError as error:
        return str(error).removeprefix(f"engine.attention: {name} ").removesuffix("; use engine.attention: auto")
    return None


def _packed_attention(machine: Gpu, names: Sequence[AttentionBackend]) -> Iterator[Row]:
    segments = (64, 28, 100)
    case = _Case.of(machine.device, machine.heads[0], 64, sum(segments), segments)
    for name in names:
        forward, backward = case.errors(torch.bfloat16, functools.partial(attend, mask=segments, backend=name))
        measured = f"forward {forward:.1e}, backward {backward:.1e} (texts of {', '.join(map(str, segments))} tokens)"
        yield machine.row(f"packed texts, {name}, bf16", measured, largest(forward, backward), ERROR["bf16"])


def _masked_attention(machine: Gpu) -> Row:
    """With a mask tensor and 64 left of 128, which cuDNN's backward pass answers with NaN (pytorch#196678)."""
    case = _Case.of(machine.device, machine.heads[0], 64, 192)
    mask = torch.ones(1, 1, 192, 192, dtype=torch.bool, device=machine.device).tril()
    forward, backward = case.errors(torch.bfloat16, lambda q, k, v: attend(q, k, v, mask, "sdpa"))
    measured = f"forward {forward:.1e}, backward {backward:.1e} (length 192)"
    return machine.row("attention with a mask tensor, bf16", measured, largest(forward, backward), ERROR["bf16"])
