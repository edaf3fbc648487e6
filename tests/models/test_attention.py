from __future__ import annotations

import sys
import types

import pytest
import torch

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


def test_an_unknown_backend_is_refused_when_the_model_is_built(make_config) -> None:
    with pytest.raises(UserError, match="unknown attention backend 'flash'; choose one of auto, sdpa, eager"):
        Transformer(make_config(), "flash")  # pyright: ignore[reportArgumentType]


def test_without_a_gpu_auto_is_sdpa_and_explicit_names_stay() -> None:
    assert resolved_backend("auto", CPU, torch.bfloat16, 64) == "sdpa"
    assert resolved_backend("sdpa", CPU, torch.float32, 64) == "sdpa"
    assert resolved_backend("eager", CUDA, torch.bfloat16, 64) == "eager"


@pytest.mark.parametrize(
    ("packages", "capability", "dtype", "head_dim", "expected"),
    [
        (("flash_attn_interface", "flash_attn"), 9, torch.bfloat16, 128, "flash-attention-3"),
        (("flash_attn",), 9, torch.bfloat16, 128, "sdpa"),  # cuDNN is faster there
        (("flash_attn_interface", "flash_attn"), 8, torch.float16, 48, "flash-attention-2"),
        (("flash_attn_interface",), 8, torch.bfloat16, 64, "sdpa"),
        (("flash_attn_interface", "flash_attn"), 9, torch.float32, 64, "sdpa"),
        (("flash_attn_interface", "flash_attn"), 9, torch.bfloat16, 264, "sdpa"),
        (("flash_attn_interface", "flash_attn"), 8, torch.bfloat16, 44, "sdpa"),
        ((), 9, torch.bfloat16, 64, "sdpa"),
    ],
)
def test_auto_walks_down_the_ladder(monkeypatch, packages, capability: int, dtype, head_dim: int, expected: str) -> None:
    for name in ("flash_attn_interface", "flash_attn"):
        module = types.SimpleNamespace(flash_attn_func=lambda: None) if name in packages else None
        monkeypatch.setitem(sys.modules, name, module)  # None makes the import fail
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
    attention._flash_function.cache_clear()
    try:
        assert resolved_backend("auto", CUDA, dtype, head_dim) == expected
    finally:
        attention._flash_function.cache_clear()


@pytest.mark.parametrize("returns_a_pair", [False, True])
def test_a_flash_package_gets_its_layout_and_a_mask_goes_round_it(monkeypatch, returns_a_pair: bool) -> None:
    calls = []

    def flash_attn_func(query, key, value, causal):
        calls.append((tuple(query.shape), tuple(key.shape), causal))
        output = by_definition(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)
        return (output, None) if returns_a_pair else output

    monkeypatch.setattr(attention, "_flash_function", lambda name: flash_attn_func)
    monkeypatch.setattr(attention, "resolved_backend", lambda *_: "flash-attention-2")
    tensors = qkv()
    torch.testing.assert_close(attend(*tensors, None, "auto"), by_definition(*tensors))
    assert calls == [((2, 9, 6, 48), (2, 9, 2, 48), True)]
    mask = cache_mask(torch.arange(9).expand(2, 9), width=9)
    attend(*tensors, mask, "auto")
    assert len(calls) == 1
