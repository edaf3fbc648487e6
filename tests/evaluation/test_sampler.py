from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_plasticity.config.model import Family, ModelConfig
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.sampler import NativeGenerator
from megatron_plasticity.evaluation.sampling import Continuation, SamplingParameters
from megatron_plasticity.evaluation.streams import question_key
from megatron_plasticity.models.cache import CacheView
from megatron_plasticity.models.huggingface import huggingface_config, to_huggingface
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.transformer import Transformer

VOCABULARY = 61
END = 0
NEVER = VOCABULARY + 1


class Letters:
    """A tokenizer whose token 1 is A, 2 is B, …"""

    def __init__(self, end_of_text: int) -> None:
        self.end_of_text = end_of_text

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(64 + token) for token in ids)


def _generator(model: Transformer, slots: int = 4, end: int = END, **settings: Any) -> NativeGenerator:
    return NativeGenerator(model, cast("Tokenizer", Letters(end)), slots, **settings)


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
    """Of different lengths, and of tokens END too: it ends nothing in a prompt."""
    draw = random.Random(seed)
    return [[draw.randrange(VOCABULARY) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def _transformers_greedy(model: Transformer, prompt: list[int], **settings: Any) -> list[int]:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = huggingface_config(model.config)
    theirs: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    theirs.load_state_dict(to_huggingface(model.state_dict(), model.config))
    tokens = torch.tensor([prompt])
    mask = torch.ones_like(tokens)
    output = (
        theirs.eval()
        .generate(tokens, attention_mask=mask, do_sample=False, eos_token_id=END, pad_token_id=END, **settings)[0, len(prompt) :]
        .tolist()
    )
    return output[: output.index(END)] if END in output else output


@pytest.mark.parametrize("penalty", [1.0, 1.1])
@pytest.mark.parametrize(
    ("family", "heads"),
    [
        ("llama2", (4, 2, 8)),
        ("llama2", (2, 1, 6)),
        ("llama2", (2, 2, 48)),
        ("llama2", (4, 1, 24)),
        ("olmo2", (4, 4, 8)),
        ("olmo2", (4, 2, 24)),
        ("olmo2", (4, 1, 10)),
    ],
)
def test_greedy_equals_transformers_token_for_token(family: Family, heads: tuple[int, int, int], penalty: float) -> None:
    for seed in range(2):
        query_heads, kv_heads, head_dim = heads
        model = _model(family, seed, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim)
        prompts = _prompts(seed, 6)
        ours = _generator(model).generate(prompts, range(6), 2, SamplingParameters(24, repetition_penalty=penalty))
        theirs = [_transformers_greedy(model, prompt, max_new_tokens=24, repetition_penalty=penalty) for prompt in prompts]
        assert [[continuation.tokens for continuation in row] for row in ours] == [[tokens] * 2 for tokens in theirs]
        assert len({tuple(tokens) for tokens in theirs}) > 3


def test_end_of_text_ends_a_sequence() -> None:
    """Whatever token a free run produces in its middle, made the end of text, ends the sequence there."""
    model = _model("llama2", 3)
    prompts, parameters = _prompts(3, 8), SamplingParameters(20)
    free = [row[0].tokens for row in _generator(model, end=NEVER).generate(prompts, range(8), 1, parameters)]
    for end in {tokens[5] for tokens in free}:
        ended = [row[0] for row in _generator(model, 5, end).generate(prompts, range(8), 1, parameters)]
        assert ended == [
            Continuation(tokens[: tokens.index(end)], "end_of_text") if end in tokens else Continuation(tokens, "length")
            for tokens in free
        ]


def test_generation_stops_where_the_context_or_the_total_is_full() -> None:
    prompts = [[5] * length for length in (15, 9, 3, 14)]
    for context_length, total in ((16, None), (40, 16), (16, 40)):
        model = _model("llama2", 1, context_length=context_length)
        parameters = SamplingParameters(10, max_total_tokens=total)
        rows = [row[0] for row in _generator(model, end=NEVER).generate(prompts, range(4), 1, parameters)]
        assert [len(row.tokens) for row in rows] == [1, 7, 10, 2]
        assert {row.finish for row in rows} == {"length"}
        for prompt, row in zip(prompts, rows, strict=True):
            assert row.tokens == _transformers_greedy(model, prompt, max_length=min(16, len(prompt) + 10))


def test_stop_strings_end_a_response_at_a_token_boundary_and_not_in_the_prompt() -> None:
    model = _model("llama2", 3)
    prompts = _prompts(3, 8)
    letters = Letters(NEVER)
    free = [row[0].tokens for row in _generator(model, end=NEVER).generate(prompts, range(8), 1, SamplingParameters(20))]
    stop = tuple(letters.decode(tokens[6:8]) for tokens in free[:4])
    for number in range(4):
        prompts.append([*free[number][6:8], *prompts[number]])  # a stop string in the prompt
    free = [row[0].tokens for row in _generator(model, end=NEVER).generate(prompts, range(12), 1, SamplingParameters(20))]
    found = [row[0] for row in _generator(model, end=NEVER).generate(prompts, range(12), 1, SamplingParameters(20, stop=stop))]
    for tokens, continuation in zip(free, found, strict=True):
        text = letters.decode(tokens)
        place = min((text.index(string) for string in stop if string in text), default=None)
        assert continuation == Continuation(tokens[:place], "length" if place is None else "stop")
    assert {continuation.finish for continuation in found} == {"length", "stop"}
    assert [continuation.finish for continuation in found[:4]] == ["stop"] * 4


@pytest.mark.parametrize("family", ["llama2", "olmo2"])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9, "top_k": 30, "repetition_penalty": 1.2, "stop": ("B",)}])
def test_responses_depend_neither_on_slots_nor_on_order_nor_on_company(family: Family, filters: dict[str, Any]) -> None:
    # In fp64 the logits of two batch shapes differ by 1e-15, so that a draw would have to be that near to a boundary to differ.
    model = _model(family, 0).double()
    prompts = _prompts(0, 7)
    keys = [question_key(f"question {number}") for number in range(7)]
    parameters = SamplingParameters(12, temperature=1.0, seed=5, **filters)
    reference = _generator(model, 1).generate(prompts, keys, 5, parameters)
    for slots in (2, 3, 16, 64):
        assert _generator(model, slots).generate(prompts, keys, 5, parameters) == reference
    for order in ([6, 0, 3, 2, 1, 5, 4], [4, 2], [1]):
        found = _generator(model, 3).generate([prompts[i] for i in order], [keys[i] for i in order], 2, parameters)
        assert found == [reference[i][:2] for i in order]
    samples = [continuation for row in reference for continuation in row]
    assert len({tuple(sample.tokens) for sample in samples}) > len(samples) * (0.9 if not filters else 0.5)
    assert len({len(sample.tokens) for sample in samples}) > 3  # some end early, so slots were refilled
    other_seed = SamplingParameters(12, temperature=1.0, seed=6, **filters)
    assert _generator(model).generate(prompts, keys, 5, other_seed) != reference
    assert _generator(model).generate(prompts, range(7), 5, parameters) != reference


def test_greedy_does_not_depend_on_the_slots() -> None:
    model, prompts, parameters = _model("olmo2", 2), _prompts(2, 9), SamplingParameters(15)
    whole = _generator(model, 64).generate(prompts, range(9), 1, parameters)
    assert whole == _generator(model, 2).generate(prompts, range(9), 1, parameters)
    alone = [_generator(model).generate([prompt], [0], 1, parameters)[0] for prompt in prompts]
    assert whole == alone


def test_a_prompt_is_read_once_for_all_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("llama2", 0)
    read: list[tuple[int, ...]] = []
    forward = model.forward

    def counting(tokens: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        read.append(tuple(tokens.shape))
        return forward(tokens, *arguments, **settings)

    monkeypatch.setattr(model, "forward", counting)
    _generator(model, 3).generate([[1] * 5, [2] * 9, [3]], range(3), 4, SamplingParameters(6, temperature=1.0))
    prefills = [shape for shape in read if shape[1] > 1]
    assert prefills == [(1, 8), (1, 4)]  # all but the last token; long ones first; a single token needs no reading
    assert max(shape[0] for shape in read) == 3


class _FixedDistribution(nn.Module):
    """Whatever it reads, the next token has the same given logits; it has the parts of a transformer that the sampler touches."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        sizes = {"hidden_size": 2, "mlp_hidden_size": 2, "query_heads": 1, "kv_heads": 1, "head_dim": 2, "context_length": 32}
        self.config = ModelConfig.model_validate({"family": "llama2", "layers": 1, "vocab_size": len(logits), **sizes})
        self.embed = nn.Embedding(len(logits), 2)
        self.logits = torch.tensor(logits)

    def forward(self, tokens: Tensor, cache: CacheView, positions: str) -> Tensor:
        assert tokens.shape == cache.positions.shape
        return self.logits.expand(tokens.shape[0], 1, -1)


def _fixed(logits: list[float]) -> Transformer:
    return cast("Transformer", _FixedDistribution(logits))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 0.5}, 5),
        ({"temperature": 1.0}, 5),
        ({"temperature": 2.0}, 5),
        ({"temperature": 1.0, "top_k": 3}, 3),
        ({"temperature": 1.0, "top_p": 0.9}, 3),
    ],
)
def test_samples_follow_the_distribution(settings: dict[str, Any], kept: int) -> None:
    """Chi-squared over 20,000 tokens, against the softmax of the `kept` likeliest."""
    logits = [-1.5, 1.0, 0.0, 2.0, -1.0, float("-inf")]
    parameters = SamplingParameters(20, **settings)
    found = _generator(_fixed(logits), 500, NEVER).generate([[1]] * 100, range(100), 10, parameters)
    tokens = np.concatenate([sample.tokens for row in found for sample in row])
    assert len(tokens) == 20_000
    scores = torch.tensor(logits).double() / settings["temperature"]
    expected = scores.masked_fill(scores < scores.sort(descending=True).values[kept - 1], float("-inf")).softmax(0).numpy()
    counts, expected = np.bincount(tokens, minlength=6), expected * len(tokens)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_squared = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_squared < {5: 23.5, 3: 18.4}[kept]  # one in 10,000 is above, of so many tokens less one


def test_a_repetition_penalty_counts_prompt_and_response() -> None:
    """The likeliest token that was not there yet goes before likelier ones that were."""
    logits = [3.0, 2.9, 2.8, 2.7, -0.1]
    parameters = SamplingParameters(6, repetition_penalty=1.5)
    found = _generator(_fixed(logits), 2, NEVER).generate([[0], [1, 4], [2]], range(3), 1, parameters)
    assert [row[0].tokens for row in found] == [[1, 2, 3, 0, 0, 0], [0, 2, 3, 0, 0, 0], [0, 1, 3, 0, 0, 0]]


def test_shapes_of_the_result() -> None:
    fixed = _fixed([0.0, 5.0])
    found = _generator(fixed, end=7).generate([[1], [1, 1]], [0, 1], 2, SamplingParameters(3))
    assert found == [[Continuation([1, 1, 1], "length")] * 2] * 2
    assert _generator(fixed, end=1).generate([[1]], [0], 1, SamplingParameters(3)) == [[Continuation([], "end_of_text")]]
    assert _generator(fixed, end=7).generate([[1]], [0], 1, SamplingParameters(1)) == [[Continuation([1], "length")]]
    assert _generator(fixed, end=1).generate([], [], 3, SamplingParameters(3)) == []
    everything_at_once = _generator(fixed, 3, end=1).generate([[1, 1]] * 5, range(5), 4, SamplingParameters(3))
    assert everything_at_once == [[Continuation([], "end_of_text")] * 4] * 5


def test_progress_counts_answers_to_the_end() -> None:
    class Seen:
        def __init__(self) -> None:
            self.done: list[float] = []

        def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
            assert (total, unit) == (12, "answers")
            assert float(info["tokens_per_second"]) > 0
            self.done.append(done)

    seen = Seen()
    _generator(_model("llama2", 0), 5).generate(_prompts(0, 4), range(4), 3, SamplingParameters(9, 1.0), seen)
    assert seen.done[-1] == 12
    assert seen.done == sorted(set(seen.done))


def test_prompts_that_do_not_fit_are_a_user_error() -> None:
    generator = _generator(_fixed([0.0, 1.0]))
    with pytest.raises(UserError, match="number 1 is empty"):
        generator.generate([[1], []], [0, 1], 1, SamplingParameters(1))
    with pytest.raises(UserError, match="max_total_tokens is 4"):
        generator.generate([[1] * 4], [0], 1, SamplingParameters(1, max_total_tokens=4))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_diverged_model_is_a_user_error(temperature: float) -> None:
    with pytest.raises(UserError, match="not finite"):
        _generator(_fixed([0.0, float("nan")])).generate([[1]], [0], 1, SamplingParameters(1, temperature))


def _unique_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("family", "compiler"), [*itertools.product(["llama2", "olmo2"], ["eager", "aot_eager"])])
def test_a_compiled_step_is_one_graph_whatever_is_asked(family: Family, compiler: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # pyright: ignore[reportAttributeAccessIssue]
    model, keys = _model(family, 0), range(5)
    compiled, plain = _generator(model, 4, compiled=True, compiler=compiler), _generator(model, 4)
    for seed, longest, parameters in (
        (0, 14, SamplingParameters(12, 1.0)),
        (1, 40, SamplingParameters(20)),
        (2, 3, SamplingParameters(3, 0.8, 0.9, 20, 1.1)),
    ):
        prompts = _prompts(seed, 5, longest)
        assert compiled.generate(prompts, keys, 3, parameters) == plain.generate(prompts, keys, 3, parameters)
    assert _unique_graphs() == 1


@pytest.mark.slow
def test_the_default_compiler_gives_the_same_tokens() -> None:
    torch._dynamo.reset()
    model, prompts, parameters = _model("llama2", 0), _prompts(0, 5), SamplingParameters(12, 1.0)
    found = _generator(model, 4, compiled=True).generate(prompts, range(5), 3, parameters)
    assert found == _generator(model, 4).generate(prompts, range(5), 3, parameters)
