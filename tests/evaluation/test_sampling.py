from __future__ import annotations

import pytest

from megatron_plasticity.data.tokenizer import Tokenizer, train_byte_bpe
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.sampling import Continuation, SamplingParameters, StopStrings, check_prompts


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_byte_bpe(["the answer is. Human: the answer is.\n\nHuman: the answer"] * 20, 300)


def test_a_stop_string_is_cut_before_the_first_token_that_holds_any_of_it(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the answer is.\n\nHuman: the")
    whole = Continuation(tokens, "length")
    assert [tokenizer.decode([token]) for token in tokens] == ["the", " answer", " is", ".", "\n", "\n", "Human", ":", " the"]
    for stop in (("Human:",), ("Human", ": the"), ("never", "uman: the")):
        assert StopStrings(stop, tokenizer).cut(whole) == Continuation(tokens[:6], "stop")
    # The token that holds a part of the stop string goes as a whole.
    assert StopStrings(("nswer",), tokenizer).cut(whole) == Continuation(tokens[:1], "stop")
    assert StopStrings(("t",), tokenizer).cut(whole) == Continuation([], "stop")
    assert StopStrings(("nothing of it",), tokenizer).cut(whole) is whole
    assert StopStrings((), tokenizer).cut(whole) is whole


def test_every_cut_is_the_longest_that_holds_nothing_of_the_stop_string(tokenizer: Tokenizer) -> None:
    text = "the naïve answer is. 12 → 👍🏽 the Human: yes\n\nHuman: the answer"
    tokens = tokenizer.encode(text)
    for stop in ("ï", "12 →", "👍", "🏽 the", "Human", "\n\n", "e a", "s"):
        kept = StopStrings((stop,), tokenizer).cut(Continuation(tokens, "length")).tokens
        before = text[: text.index(stop)]
        assert before.startswith(tokenizer.decode(kept)) or tokenizer.decode(kept).rstrip("\ufffd") == before[: len(kept)]
        assert kept == tokens[: len(kept)]
        longer = tokenizer.decode(tokens[: len(kept) + 1])
        assert len(longer) > len(before)


@pytest.mark.parametrize("stop", ["ï", "12 →", "👍", "🏽 the", "Human", "\n\nHuman: the", "e a", "s"])
def test_a_stop_string_is_noticed_with_the_token_that_completes_it(tokenizer: Tokenizer, stop: str) -> None:
    tokens = tokenizer.encode("the naïve answer is. 12 → 👍🏽 the Human: yes\n\nHuman: the answer")
    strings = StopStrings((stop, "no such thing"), tokenizer)
    first = next(count for count in range(1, len(tokens) + 1) if stop in tokenizer.decode(tokens[:count]))
    assert [strings.completed(tokens[:count]) for count in range(first + 1)] == [False] * first + [True]


def test_without_stop_strings_nothing_is_decoded() -> None:
    strings = StopStrings((), None)  # pyright: ignore[reportArgumentType]
    assert not strings.completed([1, 2])
    assert strings.cut(Continuation([1, 2], "length")).tokens == [1, 2]


def test_limits_of_a_response() -> None:
    parameters = SamplingParameters(max_new_tokens=10, max_total_tokens=12)
    assert [parameters.response_limit([0] * length, 20) for length in (1, 2, 3, 11)] == [10, 10, 9, 1]
    assert parameters.response_limit([0] * 3, 8) == 5
    assert SamplingParameters(max_new_tokens=10).response_limit([0] * 12, 20) == 8


def test_impossible_parameters_are_listed_together() -> None:
    with pytest.raises(
        UserError, match=r"max_new_tokens=0.*temperature=-1.*top_p=0.*top_k=0.*repetition_penalty=0.*empty string"
    ):
        SamplingParameters(0, -1, 0, 0, 0, ("",))
    with pytest.raises(UserError, match="temperature=nan"):
        SamplingParameters(1, float("nan"))


def test_prompts_that_do_not_fit_are_a_user_error() -> None:
    with pytest.raises(
        UserError, match=r"prompts of task 'passage': 1 of 3 do not fit; the longest has 16 tokens.*context_length is 16"
    ):
        check_prompts([[1], [1] * 16, [1] * 15], 16, what="prompts of task 'passage'")
    with pytest.raises(UserError, match=r"2 of 3 do not fit.*max_total_tokens is 15"):
        check_prompts([[1], [1] * 16, [1] * 15], 20, max_total_tokens=15)
    check_prompts([[1] * 15], 16, max_total_tokens=16)
    with pytest.raises(UserError, match="number 1 is empty"):
        check_prompts([[1], []], 16)
