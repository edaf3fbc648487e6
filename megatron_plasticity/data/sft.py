"""Supervised fine-tuning examples: a prompt in a template, a response that is learned, and an end-of-text token."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_plasticity.data.micro_batch import MicroBatch
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.models.loss import IGNORE

_PROMPT = "{prompt}"
# Examples that go through the tokenizer together: as lists of Python, ids take some hundred bytes each.
_CHUNK = 1024


@dataclass(frozen=True)
class EncodedExample:
    """Prompt, response and end-of-text as ids, cut at the end to the longest length allowed."""

    ids: tuple[int, ...]
    prompt_length: int
    """The first so many ids are the prompt, which is not learned."""

    @property
    def response_length(self) -> int:
        """Number of ids that are learned; 0 when the prompt alone fills the longest length."""
        return len(self.ids) - self.prompt_length

    @property
    def input_length(self) -> int:
        """Number of ids that are read: all but the last, after which nothing is predicted."""
        return len(self.ids) - 1


class EncodedExamples:
    """Examples by index, with all their ids in one array: four bytes a token."""

    def __init__(self, examples: Iterable[EncodedExample]) -> None:
        self._ids, self._ends, self._prompt_lengths = array("i"), array("q", [0]), array("q")
        for example in examples:
            self._ids.extend(example.ids)
            self._ends.append(len(self._ids))
            self._prompt_lengths.append(example.prompt_length)

    def __len__(self) -> int:
        return len(self._prompt_lengths)

    def __getitem__(self, index: int) -> EncodedExample:
        return EncodedExample(tuple(self._ids[self._ends[index] : self._ends[index + 1]]), self._prompt_lengths[index])

    @property
    def input_lengths(self) -> np.ndarray:
        """`EncodedExample.input_length` of each: int64."""
        return np.diff(np.array(self._ends)) - 1


def render_prompt(template: str, prompt: str) -> str:
    """The text before the response. Braces in the prompt are ordinary characters."""
    before, after = template.split(_PROMPT)
    return before + prompt + after


def encode_example(tokenizer: Tokenizer, template: str, prompt: str, response: str, max_length: int) -> EncodedExample:
    """Encode one example. Prompt and response are tokenised apart: the prompt's ids are those that generation starts from."""
    return _join(tokenizer, tokenizer.encode(render_prompt(template, prompt)), tokenizer.encode(response), max_length)


def encode_examples(
    tokenizer: Tokenizer, template: str, pairs: Sequence[tuple[str, str]], max_length: int
) -> Iterator[EncodedExample]:
    """`encode_example` of many (prompt, response) pairs, in their order, through the tokenizer's batch."""
    for start in range(0, len(pairs), _CHUNK):
        chunk = pairs[start : start + _CHUNK]
        prompts = tokenizer.encode_batch([render_prompt(template, prompt) for prompt, _ in chunk])
        responses = tokenizer.encode_batch([response for _, response in chunk])
        for prompt, response in zip(prompts, responses, strict=True):
            yield _join(tokenizer, prompt, response, max_length)


def collate(examples: Sequence[EncodedExample], pad_id: int, multiple_of: int = 1) -> MicroBatch:
    """One example a row: [B, S], S one less than the longest example's ids, or the next multiple of `multiple_of`, as sequence
    parallelism wants it.

    Shorter examples are padded on the right, with `pad_id` in the inputs and IGNORE in the targets, which under causal attention
    leaves the other positions untouched. Targets are the inputs shifted by one, and IGNORE where they belong to the prompt.
    Raises ValueError for an empty batch or when no example has two ids.
    """
    length = _next_multiple(max((example.input_length for example in examples), default=0), multiple_of)
    inputs = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    targets = torch.full((len(examples), length), IGNORE, dtype=torch.int64)
    for row, example in enumerate(examples):
        _write(example, inputs[row], targets[row])
    return MicroBatch(inputs, targets)


def pack(examples: Sequence[EncodedExample], pad_id: int, multiple_of: int = 1) -> MicroBatch:
    """The same examples end to end in one row [1, S], S the sum of their inputs: no padding, but to a multiple of `multiple_of`.

    `segments` says where each example ends, so that the model can keep them apart; what is padded is a segment of its own. Raises
    ValueError as `collate`.
    """
    segments = [example.input_length for example in examples if example.input_length > 0]
    length = _next_multiple(sum(segments), multiple_of)
    inputs = torch.full((1, length), pad_id, dtype=torch.int64)
    targets = torch.full((1, length), IGNORE, dtype=torch.int64)
    start = 0
    for example in examples:
        _write(example, inputs[0, start:], targets[0, start:])
        start += example.input_length
    padding = [length - start] if length > start else []
    return MicroBatch(inputs, targets, (*segments, *padding))


def _write(example: EncodedExample, inputs: Tensor, targets: Tensor) -> None:
    """Put an example at the beginning of two rows that are long enough."""
    ids = torch.tensor(example.ids, dtype=torch.int64)
    inputs[: example.input_length] = ids[:-1]
    first = max(1, example.prompt_length)  # id 0 is nobody's target
    targets[first - 1 : example.input_length] = ids[first:]


def _next_multiple(length: int, multiple_of: int) -> int:
    if length < 1:
        raise ValueError("a batch needs an example of at least two ids")
    return -(-length // multiple_of) * multiple_of


def _join(tokenizer: Tokenizer, prompt: list[int], response: list[int], max_length: int) -> EncodedExample:
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    ids = [*prompt, *response, tokenizer.end_of_text][:max_length]
    return EncodedExample(tuple(ids), min(len(prompt), max_length))
