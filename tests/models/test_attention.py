from __future__ import annotations

import importlib
import importlib.metadata
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from megatron_plasticity.errors import UserError
from megatron_plasticity.models import attention
from megatron_plasticity.models.attention import attend, attention_weights, cache_mask, resolved_backend
from megatron_plasticity.models.transformer import Transformer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def qkv(query_heads: int = 6, kv_heads: int = 2, head_dim: int = 48) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, query_heads, 9, head_dim), torch.randn(2, kv_heads, 9, head_dim), torch.randn(2, kv_heads, 9, head_dim)


def by_definition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention one head and one query at a time, in fp64."""
    query, key, value = query.double(), key.double(), value.double()
    output = torch.zeros_like(query)
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for s in range(query.shape[2]):
                scores = key[b, h // group, : s + 1] @ query[b, h, s] / query.shape[-1] ** 0.5
                output[b, h, s] = scores.softmax(0) @ value[b, h // group, : s + 1]
    return output.float()


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("shape", [(6, 2, 48), (4, 4, 8), (4, 1, 24)])
def test_every_backend_computes_the_definition(backend, shape: tuple[int, int, int]) -> None:
    tensors = qkv(*shape)
    torch.testing.assert_close(attend(*tensors, None, backend), by_definition(*tensors), rtol=1e-5, atol=2e-6)


def test_weights_are_causal_probabilities_that_give_the_output() -> None:
    query, key, value = qkv()
    weights = attention_weights(query, key)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, 9))
    assert weights.triu(1).eq(0).all()
    torch.testing.assert_close(
        weights @ value.repeat_interleave(3, dim=1), by_definition(query, key, value), rtol=1e-5, atol=2e-6
    )


def test_a_cache_shows_each_query_its_own_past() -> None:
    mask = cache_mask(torch.tensor([[0, 1], [2, 3]]), width=5)
    assert mask.shape == (2, 1, 2, 5)
    t, f = True, False
    assert mask[:, 0].tolist() == [[[t, f, f, f, f], [t, t, f, f, f]], [[t, t, t, f, f], [t, t, t, t, f]]]


@pytest.mark.parametrize("queries", [1, 3])
def test_with_a_mask_sdpa_equals_eager(queries: int) -> None:
    query, key, value = qkv()
    query = query[:, :, :queries]
    mask = cache_mask(torch.tensor([[4], [8]]).expand(2, queries), width=9)
    torch.testing.assert_close(
        attend(query, key, value, mask, "sdpa"), attend(query, key, value, mask, "eager"), rtol=1e-5, atol=2e-6
    )


HEADS = [(24, 4, 4), (32, 4, 1), (48, 6, 2), (64, 4, 2), (80, 4, 4), (96, 4, 2), (128, 4, 4), (64, 32, 4)]
"""Head dimension, query heads, key/value heads."""
# bf16 has 8 bits: gradients are sums of products of rounded probabilities.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "sdpa-flash", "sdpa-math", "eager"])
def test_forward_and_backward_equal_fp64(backend, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    head_dim, query_heads, kv_heads = heads
    generator = torch.Generator().manual_seed(head_dim)

    def made(n: int) -> torch.Tensor:
        return torch.randn(1, n, 40, head_dim, generator=generator).to(dtype)

    tensors, upstream = [made(query_heads), made(kv_heads), made(kv_heads)], made(query_heads)
    found = with_gradients(tensors, upstream, None, backend)
    exact = with_gradients([tensor.double() for tensor in tensors], upstream.double(), None, "eager")
    for what, ours, reference in zip(("output", "dq", "dk", "dv"), found, exact, strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - reference).norm() / reference.norm()
        assert error < TOLERANCE[dtype], f"{what}: {error:.1e}"


def with_gradients(tensors: list[torch.Tensor], upstream: torch.Tensor, mask, backend) -> list[Any]:
    """Output, and gradients of query, key and value."""
    query, key, value = (tensor.clone().requires_grad_() for tensor in tensors)
    output = attend(query, key, value, mask, backend)
    output.backward(upstream)
    return [output.detach(), query.grad, key.grad, value.grad]


@pytest.mark.parametrize("backend", ["auto", "sdpa-flash", "sdpa-math", "eager"])
def test_packed_texts_attend_to_themselves_alone(backend) -> None:
    tensors = qkv()
    segments = (4, 1, 4)
    whole = attend(*tensors, segments, backend)
    start = 0
    for length in segments:
        query, key, value = (tensor[:, :, start : start + length] for tensor in tensors)
        alone = by_definition(query, key, value)
        torch.testing.assert_close(whole[:, :, start : start + length], alone, rtol=1e-5, atol=2e-6)
        start += length


@pytest.mark.parametrize("backend", ["sdpa-math", "flash-attention-3"])
def test_a_backend_by_name_does_not_break_a_compiled_graph(backend, monkeypatch) -> None:
    def flash_attn_func(query, key, value, causal):
        return F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=causal, enable_gqa=True
        ).transpose(1, 2)

    monkeypatch.setattr(attention, "_loaded", {"flash-attention-3": flash_attn_func})
    tensors = qkv()
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, None, backend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), by_definition(*tensors), rtol=1e-5, atol=2e-6)


def test_an_unknown_backend_is_refused_when_the_model_is_built(make_config) -> None:
    with pytest.raises(UserError, match="unknown attention backend 'flash'; choose one of auto, flash-attention-4"):
        Transformer(make_config(), "flash")  # pyright: ignore[reportArgumentType]


def test_a_package_that_is_not_there_is_named(monkeypatch) -> None:
    monkeypatch.setattr(attention, "_loaded", {})
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(UserError, match="attention backend flash-attention-3 is not installed"):
        attend(*qkv(), None, "flash-attention-3")


def test_without_a_gpu_auto_is_sdpa_and_explicit_names_stay() -> None:
    assert resolved_backend("auto", CPU, torch.bfloat16, 64) == "sdpa"
    assert resolved_backend("sdpa", CPU, torch.float32, 64) == "sdpa"
    assert resolved_backend("eager", CUDA, torch.bfloat16, 64) == "eager"


@pytest.fixture
def packages(monkeypatch) -> Callable[..., None]:
    """Makes a GPU of this capability, and FlashAttention packages of these modules, FlashAttention-4 in a version."""

    def make(capability: int, modules: Sequence[str], version: str = "4.0.0b18") -> None:
        for name in ("flash_attn_interface", "flash_attn", "flash_attn.cute"):
            module = types.SimpleNamespace(flash_attn_func=lambda: None) if name in modules else None
            monkeypatch.setitem(sys.modules, name, module)  # None makes the import fail
        if "flash_attn.cute" in modules and "flash_attn" not in modules:  # the folder around it, without FlashAttention-2
            monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(__path__=[]))
        monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
        monkeypatch.setattr(attention, "_loaded", {})

    return make


ALL = ("flash_attn_interface", "flash_attn", "flash_attn.cute")


@pytest.mark.parametrize(
    ("modules", "capability", "dtype", "head_dim", "expected"),
    [
        (ALL, 9, torch.bfloat16, 128, "flash-attention-3"),
        (("flash_attn",), 9, torch.bfloat16, 128, "sdpa"),  # cuDNN is faster there
        (ALL, 8, torch.float16, 48, "flash-attention-2"),
        (("flash_attn_interface",), 8, torch.bfloat16, 64, "sdpa"),
        (ALL, 9, torch.float32, 64, "sdpa"),
        (ALL, 9, torch.bfloat16, 264, "sdpa"),
        (ALL, 8, torch.bfloat16, 44, "sdpa"),
        ((), 9, torch.bfloat16, 64, "sdpa"),
        (("flash_attn.cute",), 9, torch.bfloat16, 64, "flash-attention-4"),
        (("flash_attn.cute",), 9, torch.bfloat16, 48, "sdpa"),  # its backward pass does not compile
        (("flash_attn.cute",), 9, torch.bfloat16, 160, "sdpa"),
        (ALL, 10, torch.bfloat16, 96, "flash-attention-4"),
        (("flash_attn.cute",), 8, torch.bfloat16, 64, "sdpa"),
        (ALL, 12, torch.bfloat16, 64, "sdpa"),
    ],
)
def test_auto_walks_down_the_ladder(packages, modules, capability: int, dtype, head_dim: int, expected: str) -> None:
    packages(capability, modules)
    assert resolved_backend("auto", CUDA, dtype, head_dim) == expected


@pytest.mark.parametrize(("version", "fits"), [("4.0.0b4", False), ("4.0.0b5", True), ("4.0.0b18", True), ("4.0.0b19", False)])
def test_flash_attention_4_is_taken_in_versions_that_are_known(packages, version: str, fits: bool) -> None:
    packages(9, ["flash_attn.cute"], version)
    assert (resolved_backend("auto", CUDA, torch.bfloat16, 64) == "flash-attention-4") == fits


def test_a_deterministic_run_takes_no_package(packages) -> None:
    packages(9, ALL)
    torch.use_deterministic_algorithms(True)
    try:
        assert resolved_backend("auto", CUDA, torch.bfloat16, 64) == "sdpa"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_package_that_raises_on_import_is_passed_by(packages, monkeypatch) -> None:
    packages(9, ["flash_attn.cute"])
    found = importlib.import_module

    def broken(name: str):
        if name == "flash_attn_interface":
            raise RuntimeError("undefined symbol")
        return found(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    assert resolved_backend("auto", CUDA, torch.bfloat16, 64) == "flash-attention-4"
    assert attention.flash_misfit(attention.FLASH_PACKAGES[0], CUDA, torch.bfloat16, 64) == "does not load: undefined symbol"


@pytest.mark.parametrize("returns_a_pair", [False, True])
def test_a_flash_package_gets_its_layout_and_a_mask_goes_round_it(monkeypatch, returns_a_pair: bool) -> None:
    calls = []

    def flash_attn_func(query, key, value, causal):
        calls.append((tuple(query.shape), tuple(key.shape), causal))
        output = by_definition(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)
        return (output, None) if returns_a_pair else output

    monkeypatch.setattr(attention, "_loaded", {"flash-attention-2": flash_attn_func})
    monkeypatch.setattr(attention, "resolved_backend", lambda *_: "flash-attention-2")
    tensors = qkv()
    torch.testing.assert_close(attend(*tensors, None, "auto"), by_definition(*tensors))
    assert calls == [((2, 9, 6, 48), (2, 9, 2, 48), True)]
    mask = cache_mask(torch.arange(9).expand(2, 9), width=9)
    attend(*tensors, mask, "auto")
    assert len(calls) == 1
