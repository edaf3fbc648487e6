"""Supervised fine-tuning examples: a prompt in a template, a response that is learned, and an end-of-text token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.models.loss import IGNORE

_PROMPT = "{prompt}"


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


def render_prompt(template: str, prompt: str) -> str:
    """The text before the response. Braces in the prompt are ordinary characters."""
    before, after = template.split(_PROMPT)
    return before + prompt + after


def encode_example(tokenizer: Tokenizer, template: str, prompt: str, response: str, max_length: int) -> EncodedExample:
    """Encode one example. Prompt and response are tokenised apart: the prompt's ids are those that generation starts from."""
    return _join(tokenizer, tokenizer.encode(render_prompt(template, prompt)), tokenizer.encode(response), max_length)


def encode_examples(
    tokenizer: Tokenizer, template: str, pairs: Sequence[tuple[str, str]], max_length: int
) -> list[EncodedExample]:
    """`encode_example` of many (prompt, response) pairs, in their order, through the tokenizer's batch."""
    prompts = tokenizer.encode_batch([render_prompt(template, prompt) for prompt, _ in pairs])
    responses = tokenizer.encode_batch([response for _, response in pairs])
    return [_join(tokenizer, prompt, response, max_length) for prompt, response in zip(prompts, responses, strict=True)]


def collate(examples: Sequence[EncodedExample], pad_id: int, multiple_of: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a batch: two int64 tensors [B, S], S one less than the longest example's ids, or the next multiple of
    `multiple_of`, as sequence parallelism wants it.

    Shorter examples are padded on the right, with `pad_id` in the inputs and IGNORE in the targets, which under causal attention
    leaves the other positions untouched. Targets are the inputs shifted by one, and IGNORE where they belong to the prompt.
    Raises ValueError for an empty batch or when no example has two ids.
    """
    length = max((len(example.ids) for example in examples), default=0) - 1
    if length < 1:
        raise ValueError("a batch needs an example of at least two ids")
    length = -(-length // multiple_of) * multiple_of
    inputs = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    targets = torch.full((len(examples), length), IGNORE, dtype=torch.int64)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.ids, dtype=torch.int64)
        inputs[row, : len(ids) - 1] = ids[:-1]
        first = max(1, example.prompt_length)  # id 0 is nobody's target
        targets[row, first - 1 : len(ids) - 1] = ids[first:]
    return inputs, targets


def _join(tokenizer: Tokenizer, prompt: list[int], response: list[int], max_length: int) -> EncodedExample:
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    ids = [*prompt, *response, tokenizer.end_of_text][:max_length]
    return EncodedExample(tuple(ids), min(len(prompt), max_length))
