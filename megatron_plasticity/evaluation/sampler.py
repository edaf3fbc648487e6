"""Batched generation with a key/value cache: greedy, or n independent samples per prompt.

Prompts are left-padded to one length, so that all rows of a batch write the same cache column. A prompt is read once per batch
and its cache row is repeated for its samples; rows that have ended leave the batch. Sampling is by inverse transform: the token
is the first whose cumulative probability exceeds a uniform number that belongs to (seed, question, sample, position) alone
(`streams.py`), so a sample depends neither on the batch size nor on what else is in its batch (up to the last bits of the
logits, which matrix multiplication may round differently for another batch shape). The repetition penalty of 1.1 and the stop
strings of the paper's public code are left out on purpose: the penalty changes the model that is measured, and stop strings cut
prose short.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.streams import stream_states, uniforms
from megatron_plasticity.models.cache import KeyValueCache
from megatron_plasticity.models.transformer import Transformer

if TYPE_CHECKING:
    from megatron_plasticity.tracking.progress import Progress

_KEEP_ENDED = 0.125
"""Ended rows leave the batch once they make up this share of it: dropping rows copies the cache, at about the cost of a step."""


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_of_text: int,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[list[list[int]]]:
    """Continue each prompt: result[question][sample] is a list of token ids without the final `end_of_text`.

    Temperature 0 is greedy decoding. A sequence ends at `end_of_text`, after `max_new_tokens`, or when prompt and continuation
    fill the model's context. `batch_size` counts sequences (a question with 16 samples counts 16). Runs on the model's device
    and in its number format.

    Raises UserError for an empty prompt, for one that leaves no room in the context, and for logits that are not numbers.
    """
    check_prompts(prompts, model.config.context_length)
    jobs = [(question, sample) for question in range(len(prompts)) for sample in range(samples)]
    jobs.sort(key=lambda job: -len(prompts[job[0]]))  # equal lengths side by side: little padding, and the largest batch first
    results: list[list[list[int]]] = [[[] for _ in range(samples)] for _ in prompts]
    meter = _Meter(progress, len(jobs))
    with torch.inference_mode():
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            decoder = _Decoder(model, prompts, batch, max_new_tokens, end_of_text, temperature, seed)
            for (question, sample), tokens in zip(batch, decoder.run(meter), strict=True):
                results[question][sample] = tokens
    return results


def check_prompts(prompts: Sequence[Sequence[int]], context_length: int, what: str = "prompts") -> None:
    """Raise UserError unless each prompt has a token and leaves room for one in the context; `what` names them in the message."""
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise UserError(f"{what}: number {lengths.index(0)} is empty; a model needs at least one token to continue")
    too_long = sum(length >= context_length for length in lengths)
    if too_long:
        raise UserError(
            f"{what}: {too_long} of {len(lengths)} do not fit; the longest has {max(lengths)} tokens, but the model's "
            f"context_length is {context_length}, and an answer needs at least one token more; use a model with a longer context"
        )


class _Meter:
    """Tells the progress how many sequences have ended, and how fast tokens come."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._done = self._tokens = 0
        self._start = time.monotonic()

    def count(self, ended: int, tokens: int) -> None:
        self._done += ended
        self._tokens += tokens
        if self._progress is not None and ended:
            rate = self._tokens / max(time.monotonic() - self._start, 1e-9)
            self._progress.update(self._done, self._total, "answers", tokens_per_second=rate)


class _Decoder:
    """One batch of (question, sample) pairs, from the prompts to the last token."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        batch: Sequence[tuple[int, int]],
        max_new_tokens: int,
        end_of_text: int,
        temperature: float,
        seed: int,
    ) -> None:
        self._model = model
        self._device = model.embed.weight.device
        self._end_of_text = end_of_text
        self._temperature = temperature
        questions, samples = np.array(batch).T
        # Distinct questions in the order of the rows, so that with one sample each a row's prompt has the row's number.
        place = {question: number for number, question in enumerate(dict.fromkeys(questions.tolist()))}
        self._prompts = [prompts[question] for question in place]
        self._prompt_of_row = torch.tensor([place[question] for question in questions.tolist()])
        self._states = stream_states(seed, questions, samples)
        room = model.config.context_length - np.array([len(prompts[question]) for question in questions])
        self._limits = np.minimum(room, max_new_tokens)
        self._tokens = np.full((len(batch), int(self._limits.max())), end_of_text)

    def run(self, meter: _Meter) -> list[list[int]]:
        """The continuation of each row."""
        rows = np.arange(len(self._tokens))  # which of the batch's rows are being decoded
        alive = np.ones(len(rows), dtype=bool)
        cache, logits = self._read_prompts()
        for position in range(self._tokens.shape[1]):
            chosen = self._choose(logits, rows, position)
            self._tokens[rows[alive], position] = chosen[alive]
            before = int(alive.sum())
            alive &= (chosen != self._end_of_text) & (position + 1 < self._limits[rows])
            remaining = int(alive.sum())
            meter.count(before - remaining, before)
            if not remaining:
                break
            if remaining <= (1 - _KEEP_ENDED) * len(rows):
                cache.select(torch.from_numpy(np.flatnonzero(alive)).to(self._device))
                rows, chosen, alive = rows[alive], chosen[alive], np.ones(remaining, dtype=bool)
            logits = self._model(torch.from_numpy(chosen).to(self._device)[:, None], cache=cache, positions="last")[:, 0]
        # Ends are written as `end_of_text`, which nothing follows, so the other tokens of a row are its continuation.
        lengths = (self._tokens != self._end_of_text).sum(axis=1)
        return [tokens[:length].tolist() for tokens, length in zip(self._tokens, lengths, strict=True)]

    def _read_prompts(self) -> tuple[KeyValueCache, Tensor]:
        """Read each distinct prompt once. The cache with one row per sequence, and the next token's logits [rows, vocab_size]."""
        lengths = torch.tensor([len(prompt) for prompt in self._prompts])
        longest = int(lengths.max())
        tokens = torch.zeros((len(self._prompts), longest), dtype=torch.int64)
        for row, prompt in enumerate(self._prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        cache = KeyValueCache(
            self._model.config,
            len(self._prompts),
            longest + self._tokens.shape[1] - 1,  # the last new token is never read
            device=self._device,
            dtype=self._model.embed.weight.dtype,
        )
        padding = None if bool((lengths == longest).all()) else (longest - lengths).to(self._device)
        logits = self._model(tokens.to(self._device), cache=cache, padding=padding, positions="last")[:, 0]
        if len(self._prompt_of_row) > len(self._prompts):
            prompt_of_row = self._prompt_of_row.to(self._device)
            cache.select(prompt_of_row)
            logits = logits.index_select(0, prompt_of_row)
        return cache, logits

    def _choose(self, logits: Tensor, rows: NDArray[np.intp], position: int) -> NDArray[np.int64]:
        """The next token of each row, from logits [rows, vocab_size]."""
        if self._temperature == 0:
            best = logits.max(dim=-1)
            scale, chosen = best.values, best.indices
        else:
            cumulative = torch.softmax(logits.float() / self._temperature, dim=-1).cumsum(dim=-1, dtype=torch.float64)
            scale = cumulative[:, -1]
            target = torch.from_numpy(uniforms(self._states[rows], position)).to(self._device) * scale
            chosen = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
        if not bool(torch.isfinite(scale).all()):
            raise UserError("the model's logits are not finite numbers: its weights are damaged or its training has diverged")
        return chosen.cpu().numpy()
