"""Fine-tuning examples: only the response and the end of the text are learned."""

from __future__ import annotations

import tracemalloc

import pytest
import torch

from megatron_plasticity.data import sft
from megatron_plasticity.data.sft import (
    EncodedExample,
    EncodedExamples,
    collate,
    encode_example,
    encode_examples,
    pack,
    render_prompt,
)
from megatron_plasticity.data.tokenizer import Tokenizer, train_byte_bpe
from megatron_plasticity.models.loss import IGNORE

TEMPLATE = "Human: {prompt}\nAssistant:"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_byte_bpe(["Human: what is it?\nAssistant: It is a matrix."] * 20, 300)


def test_an_example_is_prompt_response_and_end(tokenizer: Tokenizer) -> None:
    example = encode_example(tokenizer, TEMPLATE, "what is it?", " It is.", 100)
    prompt, response = example.ids[: example.prompt_length], example.ids[example.prompt_length :]
    assert tokenizer.decode(prompt) == "Human: what is it?\nAssistant:"
    assert tokenizer.decode(response[:-1]) == " It is."
    assert response[-1] == tokenizer.end_of_text
    assert example.response_length == len(response)


def test_the_prompt_is_tokenised_apart(tokenizer: Tokenizer) -> None:
    # Without the cut, ":" and the letters after it could merge and the prompt's ids would not be those of generation.
    example = encode_example(tokenizer, "{prompt}", "what i", "s it?", 100)
    assert example.ids[: example.prompt_length] == tuple(tokenizer.encode("what i"))
    assert list(example.ids[:-1]) != tokenizer.encode("what is it?")


def test_braces_and_control_tokens_are_text(tokenizer: Tokenizer) -> None:
    assert render_prompt("{a} {prompt} {", "{prompt} {x}") == "{a} {prompt} {x} {"
    example = encode_example(tokenizer, TEMPLATE, "<|endoftext|>", "<|endoftext|>", 1000)
    assert example.ids.count(tokenizer.end_of_text) == 1


def test_truncation_is_at_the_end(tokenizer: Tokenizer) -> None:
    whole = encode_example(tokenizer, TEMPLATE, "what is it?", " It is a matrix.", 1000)
    cut = encode_example(tokenizer, TEMPLATE, "what is it?", " It is a matrix.", len(whole.ids) - 2)
    assert cut == EncodedExample(whole.ids[:-2], whole.prompt_length)
    assert encode_example(tokenizer, TEMPLATE, "what is it?", " It is a matrix.", len(whole.ids)) == whole
    prompt_only = encode_example(tokenizer, TEMPLATE, "what is it?", " It is a matrix.", 3)
    assert prompt_only == EncodedExample(whole.ids[:3], 3)
    assert prompt_only.response_length == 0
    with pytest.raises(ValueError, match="max_length"):
        encode_example(tokenizer, TEMPLATE, "a", "b", 1)


def test_many_equal_one_by_one(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft, "_CHUNK", 2)
    pairs = [("what?", " a"), ("", ""), ("it", " matrix" * 20)]
    one_by_one = [encode_example(tokenizer, TEMPLATE, *pair, 30) for pair in pairs]
    assert list(encode_examples(tokenizer, TEMPLATE, pairs, 30)) == one_by_one


def test_many_examples_are_held_in_few_bytes() -> None:
    """As tuples of Python numbers an id takes some hundred bytes, and a data set of 10⁸ tokens 10 GB."""
    count, length = 200, 500
    tracemalloc.start()
    examples = EncodedExamples(EncodedExample(tuple(range(1000 * i, 1000 * i + length)), i % 3) for i in range(count))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 6 * count * length
    assert len(examples) == count
    assert examples[7] == EncodedExample(tuple(range(7000, 7000 + length)), 1)
    assert examples.input_lengths.tolist() == [length - 1] * count


def test_collation_masks_prompt_and_padding() -> None:
    examples = [EncodedExample((1, 2, 3, 4, 5), 3), EncodedExample((6, 7, 8), 1), EncodedExample((9, 10), 2)]
    batch = collate(examples, pad_id=0)
    inputs, targets = batch.inputs, batch.targets
    assert batch.segments is None
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist() == [[1, 2, 3, 4], [6, 7, 0, 0], [9, 0, 0, 0]]
    no = IGNORE
    assert targets.tolist() == [[no, no, 4, 5], [7, 8, no, no], [no, no, no, no]]


def test_every_response_id_is_learned_once(tokenizer: Tokenizer) -> None:
    examples = list(encode_examples(tokenizer, TEMPLATE, [("what?", " a matrix"), ("is it?", "")], 100))
    targets = collate(examples, pad_id=tokenizer.end_of_text).targets
    for row, example in zip(targets, examples, strict=True):
        assert row[row != IGNORE].tolist() == list(example.ids[example.prompt_length :])


def test_a_response_without_a_prompt_starts_at_its_second_id() -> None:
    batch = collate([EncodedExample((1, 2, 3), 0)], pad_id=0)
    assert (batch.inputs.tolist(), batch.targets.tolist()) == ([[1, 2]], [[2, 3]])


def test_batches_that_cannot_be(tokenizer: Tokenizer) -> None:
    for examples in ([], [EncodedExample((1,), 1)]):
        for batch_of in (collate, pack):
            with pytest.raises(ValueError, match="at least two ids"):
                batch_of(examples, pad_id=0)


def test_packing_puts_examples_end_to_end() -> None:
    """The same inputs and targets as in rows of their own, and where each example ends; what fills up is a segment too."""
    examples = [EncodedExample((1, 2, 3, 4, 5), 3), EncodedExample((6, 7, 8), 1), EncodedExample((9, 10), 2)]
    no = IGNORE
    packed = pack(examples, pad_id=0)
    assert packed.inputs.tolist() == [[1, 2, 3, 4, 6, 7, 9]]
    assert packed.targets.tolist() == [[no, no, 4, 5, 7, 8, no]]
    assert packed.segments == (4, 2, 1)
    filled = pack(examples, pad_id=0, multiple_of=4)
    assert filled.inputs.tolist() == [[1, 2, 3, 4, 6, 7, 9, 0]]
    assert filled.targets.tolist() == [[no, no, 4, 5, 7, 8, no, no]]
    assert filled.segments == (4, 2, 1, 1)


def test_an_example_of_one_id_takes_no_place_in_a_pack() -> None:
    packed = pack([EncodedExample((1,), 1), EncodedExample((2, 3), 1)], pad_id=0)
    assert (packed.inputs.tolist(), packed.targets.tolist(), packed.segments) == ([[2]], [[3]], (1,))
