from __future__ import annotations

import pytest
import torch

from megatron_plasticity.models.cache import KeyValueCache

FAMILIES = pytest.mark.parametrize("family", ["llama2", "olmo2"])
BACKENDS = pytest.mark.parametrize("backend", ["sdpa", "eager"])


@FAMILIES
@BACKENDS
@torch.inference_mode()
def test_decoding_with_a_cache_equals_the_full_pass(make_config, make_model, family: str, backend: str) -> None:
    config = make_config(family=family)
    model = make_model(config, backend)
    tokens = torch.randint(61, (3, 14))
    full = model(tokens)
    cache = KeyValueCache(config, rows=3, width=14)
    pieces = [
        model(tokens[:, start:stop], cache.view(torch.full((3,), start), stop - start, width))
        for start, stop, width in ((0, 6, 6), (6, 10, None), (10, 11, 11), (11, 12, 13), (12, 14, 14))
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=1e-5, atol=5e-6)


@FAMILIES
@BACKENDS
@torch.inference_mode()
def test_every_row_goes_on_from_a_place_of_its_own(make_config, make_model, family: str, backend: str) -> None:
    config = make_config(family=family)
    model = make_model(config, backend)
    tokens, lengths = torch.randint(61, (3, 14)), torch.tensor([9, 6, 1])
    cache = KeyValueCache(config, rows=4, width=14)
    # All rows are read to the length of the longest; what that leaves behind a row's own end is as good as not there.
    model(tokens[:, :9], cache.view(torch.zeros(3, dtype=torch.int64), 9))
    for step in range(5):
        following = tokens[torch.arange(3), lengths + step]
        logits = model(following[:, None], cache.view(lengths + step))
        for row, length in enumerate((lengths + step).tolist()):
            alone = model(tokens[row : row + 1, : length + 1], positions="last")
            torch.testing.assert_close(logits[row], alone[0], rtol=1e-5, atol=5e-6)


@torch.inference_mode()
def test_a_copied_row_goes_on_as_its_source(make_config, make_model) -> None:
    config = make_config()
    model = make_model(config)
    tokens = torch.randint(61, (2, 8))
    prompts, cache = KeyValueCache(config, rows=2, width=7), KeyValueCache(config, rows=5, width=10)
    model(tokens[:, :7], prompts.view(torch.zeros(2, dtype=torch.int64), 7))
    cache.copy_row(0, prompts, 1, length=7)
    cache.copy_row(2, cache, 0, length=7)
    cache.copy_row(3, prompts, 1, length=7)
    cache.copy_row(1, prompts, 0, length=7)
    rows = torch.tensor([1, 0, 1, 1])
    following = model(tokens[rows, 7:], cache.view(torch.full((4,), 7)))
    torch.testing.assert_close(following, model(tokens, positions="last")[rows], rtol=1e-5, atol=5e-6)


@torch.inference_mode()
def test_a_full_cache_says_so(make_config, make_model) -> None:
    config = make_config()
    model, cache = make_model(config), KeyValueCache(config, rows=2, width=4)
    for past, length, width in ((3, 2, None), (2, 1, 2), (4, 1, None)):
        with pytest.raises(IndexError, match="out of bounds"):
            model(torch.zeros(2, length, dtype=torch.int64), cache.view(torch.full((2,), past), length, width))


def test_its_bytes_are_those_of_keys_and_values(make_config) -> None:
    cache = KeyValueCache(make_config(layers=2, kv_heads=2, head_dim=8), rows=3, width=5, dtype=torch.bfloat16)
    assert cache.bytes == 2 * (2 * 3 * 2 * 5 * 8) * 2
