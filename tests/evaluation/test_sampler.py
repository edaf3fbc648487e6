from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_plasticity.config.model import Family, ModelConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.sampler import check_prompts, generate
from megatron_plasticity.models.cache import KeyValueCache
from megatron_plasticity.models.huggingface import huggingface_config, to_huggingface
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.transformer import Transformer

VOCABULARY = 61
END = 0


def _model(
    family: Family, seed: int, *, context_length: int = 64, query_heads: int = 4, kv_heads: int = 2, head_dim: int = 8
) -> Transformer:
    config = ModelConfig.model_validate(
        {
            "family": family,
            "layers": 2,
            "hidden_size": query_heads * head_dim,
            "mlp_hidden_size": 40,
            "query_heads": query_heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "vocab_size": VOCABULARY,
            "context_length": context_length,
        }
    )
    model = Transformer(config)
    initialise(model, seed)
    with torch.no_grad():
        model.head.weight.mul_(4)  # pyright: ignore[reportOptionalMemberAccess]  # logits far apart: no ties within rounding
    return model


def _prompts(seed: int, count: int, longest: int = 14) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, VOCABULARY) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def _transformers_greedy(model: Transformer, prompt: list[int], **limits: int) -> list[int]:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = huggingface_config(model.config)
    theirs: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    theirs.load_state_dict(to_huggingface(model.state_dict(), model.config))
    output = theirs.eval().generate(torch.tensor([prompt]), do_sample=False, eos_token_id=END, pad_token_id=END, **limits)
    tokens = output[0, len(prompt) :].tolist()
    return tokens[: tokens.index(END)] if END in tokens else tokens


@pytest.mark.parametrize(
    ("family", "heads"),
    [("llama2", (4, 2, 8)), ("llama2", (2, 1, 6)), ("llama2", (2, 2, 48)), ("olmo2", (4, 4, 8)), ("olmo2", (4, 1, 10))],
)
def test_greedy_equals_transformers_token_for_token(family: Family, heads: tuple[int, int, int]) -> None:
    for seed in range(2):
        query_heads, kv_heads, head_dim = heads
        model = _model(family, seed, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim)
        prompts = _prompts(seed, 6)
        ours = generate(model, prompts, max_new_tokens=24, end_of_text=END, batch_size=4)
        theirs = [_transformers_greedy(model, prompt, max_new_tokens=24) for prompt in prompts]
        assert [row[0] for row in ours] == theirs
        assert len({tuple(tokens) for tokens in theirs}) > 3


def test_end_of_text_ends_a_sequence_as_in_transformers() -> None:
    """Whatever token a free run produces in its middle, made the end of text, ends the sequence there."""
    model = _model("llama2", 3)
    prompts = _prompts(3, 8)
    free = [row[0] for row in generate(model, prompts, max_new_tokens=20, end_of_text=VOCABULARY + 1)]
    for end in {tokens[5] for tokens in free}:
        ended = [row[0] for row in generate(model, prompts, max_new_tokens=20, end_of_text=end, batch_size=5)]
        assert ended == [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in free]


def test_generation_stops_where_the_context_is_full() -> None:
    model = _model("llama2", 1, context_length=16)
    prompts = [[5] * length for length in (15, 9, 3, 14)]
    tokens = [row[0] for row in generate(model, prompts, max_new_tokens=10, end_of_text=VOCABULARY + 1)]
    assert [len(row) for row in tokens] == [1, 7, 10, 2]
    for prompt, row in zip(prompts, tokens, strict=True):
        assert row == _transformers_greedy(model, prompt, max_length=min(16, len(prompt) + 10))


@pytest.mark.parametrize("family", ["llama2", "olmo2"])
def test_samples_depend_neither_on_batch_size_nor_on_company(family: Family) -> None:
    # In fp64 the logits of two batch shapes differ by 1e-15, so that a draw would have to be that near to a boundary to differ.
    model = _model(family, 0).double()
    prompts = _prompts(0, 7)
    settings: dict[str, Any] = {"max_new_tokens": 12, "end_of_text": END, "temperature": 1.0, "seed": 5}
    reference = generate(model, prompts, samples=5, batch_size=1, **settings)
    for batch_size in (2, 3, 16, 100):
        assert generate(model, prompts, samples=5, batch_size=batch_size, **settings) == reference
    fewer = generate(model, prompts[:3], samples=2, **settings)
    assert fewer == [row[:2] for row in reference[:3]]
    samples = [tuple(sample) for row in reference for sample in row]
    assert len(set(samples)) > len(samples) * 0.9
    assert {len(sample) for sample in samples} != {12}  # some end early, so rows did leave the batches
    assert generate(model, prompts, samples=5, **{**settings, "seed": 6}) != reference


def test_greedy_does_not_depend_on_the_batch() -> None:
    model = _model("olmo2", 2)
    prompts = _prompts(2, 9)
    whole = generate(model, prompts, max_new_tokens=15, end_of_text=END, batch_size=64)
    assert whole == generate(model, prompts, max_new_tokens=15, end_of_text=END, batch_size=2)
    assert whole == [generate(model, [prompt], max_new_tokens=15, end_of_text=END)[0] for prompt in prompts]


class _FixedDistribution(nn.Module):
    """Whatever it reads, the next token has the same given logits; it has the parts of a transformer that the sampler touches."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        sizes = {"hidden_size": 2, "mlp_hidden_size": 2, "query_heads": 1, "kv_heads": 1, "head_dim": 2, "context_length": 32}
        self.config = ModelConfig.model_validate({"family": "llama2", "layers": 1, "vocab_size": len(logits), **sizes})
        self.embed = nn.Embedding(len(logits), 2)
        self.logits = torch.tensor(logits)

    def forward(self, tokens: Tensor, cache: KeyValueCache, padding: Tensor | None = None, positions: str = "all") -> Tensor:
        assert tokens.shape[0] == cache.batch
        cache.advance(tokens.shape[1])
        return self.logits.expand(tokens.shape[0], 1, -1)


def _fixed(logits: list[float]) -> Transformer:
    return cast("Transformer", _FixedDistribution(logits))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_tempered_distribution(temperature: float) -> None:
    logits = [-30.0, 1.0, 0.0, 2.0, -1.0, float("-inf")]
    drawn = generate(
        _fixed(logits), [[1]] * 100, max_new_tokens=20, end_of_text=0, samples=10, temperature=temperature, batch_size=500
    )
    tokens = np.concatenate([sample for row in drawn for sample in row])
    expected = torch.softmax(torch.tensor(logits).double() / temperature, 0).numpy()
    shares = np.bincount(tokens, minlength=6) / len(tokens)
    assert len(tokens) == 20_000
    assert np.abs(shares - expected).max() < 0.012  # 3.4 standard deviations of a share of one half
    assert shares[5] == 0  # what is impossible is never drawn


def test_shapes_of_the_result() -> None:
    tokens = generate(_fixed([0.0, 5.0]), [[1], [1, 1]], max_new_tokens=3, end_of_text=7, samples=2)
    assert tokens == [[[1, 1, 1]] * 2] * 2
    assert generate(_fixed([0.0, 5.0]), [[1]], max_new_tokens=3, end_of_text=1) == [[[]]]
    assert generate(_fixed([0.0, 5.0]), [], max_new_tokens=3, end_of_text=1) == []


def test_progress_counts_answers_to_the_end() -> None:
    class Seen:
        def __init__(self) -> None:
            self.done: list[float] = []

        def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
            assert (total, unit) == (12, "answers")
            assert float(info["tokens_per_second"]) > 0
            self.done.append(done)

    seen = Seen()
    generate(
        _model("llama2", 0),
        _prompts(0, 4),
        max_new_tokens=9,
        end_of_text=END,
        samples=3,
        temperature=1.0,
        batch_size=5,
        progress=seen,
    )
    assert seen.done[-1] == 12
    assert seen.done == sorted(set(seen.done))


def test_prompts_that_do_not_fit_are_a_user_error() -> None:
    with pytest.raises(
        UserError, match=r"prompts of task 'passage': 1 of 3 do not fit; the longest has 16 tokens.*context_length is 16"
    ):
        check_prompts([[1], [1] * 16, [1] * 15], 16, what="prompts of task 'passage'")
    with pytest.raises(UserError, match="number 1 is empty"):
        generate(_fixed([0.0, 1.0]), [[1], []], max_new_tokens=1, end_of_text=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_diverged_model_is_a_user_error(temperature: float) -> None:
    with pytest.raises(UserError, match="not finite"):
        generate(_fixed([0.0, float("nan")]), [[1]], max_new_tokens=1, end_of_text=0, temperature=temperature)
