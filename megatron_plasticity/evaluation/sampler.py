"""Continuous batching on our own model, for every head size: greedy, or independent samples per prompt.

A fixed number of slots decodes side by side, each at a place of its own in its own sequence; a slot whose sequence has ended gets
the next one at once. A prompt is read once, and its keys and values are copied to the slots of its samples: those of all its
tokens but the last, which is the first that a slot decodes, so that all logits come out of one kind of step.

The random numbers belong to (seed, key of the question, sample, position) alone (`streams.py`), so a response depends neither on
the number of slots nor on what else is asked, or in what order (up to the last bits of the logits, which matrix multiplication
may round differently for another batch shape).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.evaluation.sampling import Continuation, Finish, SamplingParameters, StopStrings, check_prompts
from megatron_plasticity.evaluation.streams import stream_states, uniforms
from megatron_plasticity.evaluation.token_choice import choose
from megatron_plasticity.models.cache import KeyValueCache
from megatron_plasticity.models.transformer import Transformer

if TYPE_CHECKING:
    from megatron_plasticity.tracking.progress import Progress

_COLUMNS = 64
"""Attention reads the cache up to the longest live sequence, rounded up to a multiple of this."""


class NativeGenerator:
    """A `sampling.Generator` of our own model, on its device and in its number format.

    It takes the memory of a key/value cache of `slots` rows and one more, each for the longest prompt and response.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, slots: int, compiled: bool = False, compiler: str = "inductor"
    ) -> None:
        """With `compiled`, a step is one graph of `torch.compile` with the backend `compiler`, whose shapes never change: its
        cache is as wide as `max_total_tokens` (or else the model's context), and it computes all slots and columns of it."""
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._slots = slots
        self._compiled = compiled
        self._step = torch.compile(_step, fullgraph=True, dynamic=False, backend=compiler) if compiled else _step

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        samples: int,
        parameters: SamplingParameters,
        progress: Progress | None = None,
    ) -> list[list[Continuation]]:
        """As `sampling.Generator` has it. Raises UserError also for logits that are not numbers."""
        context_length = self._model.config.context_length
        check_prompts(prompts, context_length, max_total_tokens=parameters.max_total_tokens)
        sequences = _sequences(prompts, keys, samples, parameters, context_length)
        if sequences:
            cache = self._cache(sequences, parameters)
            decoder = _Decoder(self._model, self._tokenizer, self._step, cache, self._compiled, sequences, parameters)
            decoder.run(_Meter(progress, len(sequences)))
        results: list[list[Continuation]] = [[] for _ in prompts]
        for sequence in sorted(sequences, key=lambda sequence: sequence.sample):
            assert sequence.continuation is not None
            results[sequence.question].append(sequence.continuation)
        return results

    def _cache(self, sequences: Sequence[_Sequence], parameters: SamplingParameters) -> KeyValueCache:
        if self._compiled:
            return _new_cache(self._model, self._slots, parameters.total_limit(self._model.config.context_length))
        # The last token of a response is never read.
        width = max(len(sequence.prompt) + sequence.limit - 1 for sequence in sequences)
        return _new_cache(self._model, min(self._slots, len(sequences)), width)


@dataclass
class _Sequence:
    """One prompt and one response to it, as far as it has come."""

    question: int
    sample: int
    prompt: Sequence[int]
    limit: int
    """Most tokens of the response."""
    stream: int
    """Starting state of its random numbers."""
    tokens: list[int] = field(default_factory=list)
    continuation: Continuation | None = None

    @property
    def past(self) -> int:
        """Tokens of prompt and response that the cache holds before a step: all but the last."""
        return len(self.prompt) + len(self.tokens) - 1

    @property
    def last(self) -> int:
        return self.tokens[-1] if self.tokens else self.prompt[-1]


def _sequences(
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    samples: int,
    parameters: SamplingParameters,
    context_length: int,
) -> list[_Sequence]:
    """All sequences, in the order in which they get slots: the samples of a question one after the other, so that one prompt at a
    time need be kept; long prompts first, so that attention soon reads less of the cache."""
    sequences = []
    for question in sorted(range(len(prompts)), key=lambda question: -len(prompts[question])):
        prompt = prompts[question]
        limit = parameters.response_limit(prompt, context_length)
        streams = stream_states(parameters.seed, [keys[question]] * samples, range(samples))
        sequences += [_Sequence(question, sample, prompt, limit, stream) for sample, stream in enumerate(streams.tolist())]
    return sequences


class _Decoder:
    """The slots and what is in them. Live sequences are always in the first slots, so that a step can leave out the others."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        step: Callable[..., Tensor],
        cache: KeyValueCache,
        static: bool,
        sequences: Sequence[_Sequence],
        parameters: SamplingParameters,
    ) -> None:
        self._model = model
        self._end_of_text = tokenizer.end_of_text
        self._stop_strings = StopStrings(parameters.stop, tokenizer)
        self._step = step
        self._cache = cache
        self._static = static
        self._waiting = deque(sequences)
        self._parameters = parameters
        self._device = model.embed.weight.device
        self._live: list[_Sequence] = []
        # The prompt that was read last, and which question's it is.
        self._prompt = _new_cache(model, 1, max(len(sequence.prompt) for sequence in sequences))
        self._prompt_of: int | None = None
        self._seen = None
        if parameters.repetition_penalty != 1:
            self._seen = torch.zeros(cache.rows, model.config.vocab_size, dtype=torch.bool, device=self._device)

    def run(self, meter: _Meter) -> None:
        """Give every sequence its continuation."""
        for slot in range(min(self._cache.rows, len(self._waiting))):
            self._place(slot, self._waiting.popleft())
        while self._live:
            chosen = self._decode()
            ended = [slot for slot, token in enumerate(chosen) if self._ends(self._live[slot], token)]
            meter.count(len(ended), len(chosen))
            # From the back, so that the sequence that `_free` moves is not one that has ended as well.
            for slot in reversed(ended):
                self._free(slot)

    def _decode(self) -> list[int]:
        """The next token of each live sequence."""
        live = self._live
        rows = self._cache.rows if self._static else len(live)
        inputs = torch.zeros(2, rows, dtype=torch.int64)
        inputs[:, : len(live)] = torch.tensor([[sequence.last for sequence in live], [sequence.past for sequence in live]])
        tokens, past = inputs.to(self._device)
        width = self._cache.width
        if not self._static:
            longest = max(sequence.past for sequence in live) + 1
            width = min(width, -(-longest // _COLUMNS) * _COLUMNS)
        logits = self._step(self._model, self._cache, tokens, past, width)[: len(live)]
        numbers = uniforms(
            np.array([sequence.stream for sequence in live], dtype=np.uint64), [len(sequence.tokens) for sequence in live]
        )
        seen = None if self._seen is None else self._seen[: len(live)]
        chosen = choose(logits, self._parameters, torch.from_numpy(numbers).to(self._device), seen)
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        return chosen.tolist()

    def _ends(self, sequence: _Sequence, token: int) -> bool:
        """Add the token to the sequence; if that is its end, make its continuation."""
        finish: Finish | None = None
        if token == self._end_of_text:
            finish = "end_of_text"
        else:
            sequence.tokens.append(token)
            if len(sequence.tokens) == sequence.limit:
                finish = "length"
            elif self._stop_strings.completed(sequence.tokens):
                finish = "stop"
        if finish is not None:
            sequence.continuation = self._stop_strings.cut(Continuation(sequence.tokens, finish))
        return finish is not None

    def _free(self, slot: int) -> None:
        """Refill the slot; if nothing waits any more, move the last live sequence into it."""
        if self._waiting:
            self._place(slot, self._waiting.popleft())
            return
        sequence = self._live.pop()
        last = len(self._live)
        if slot < last:
            self._live[slot] = sequence
            self._cache.copy_row(slot, self._cache, last, sequence.past)
            if self._seen is not None:
                self._seen[slot] = self._seen[last]

    def _place(self, slot: int, sequence: _Sequence) -> None:
        """Put a sequence that has only its prompt into the slot, which is free or the next after the live ones."""
        if self._prompt_of != sequence.question:
            self._read(sequence.prompt)
            self._prompt_of = sequence.question
        self._live[slot : slot + 1] = [sequence]
        self._cache.copy_row(slot, self._prompt, 0, sequence.past)
        if self._seen is not None:
            self._seen[slot] = False
            self._seen[slot, torch.tensor(sequence.prompt, device=self._device)] = True

    def _read(self, prompt: Sequence[int]) -> None:
        """Fill the prompt's cache."""
        tokens = torch.tensor([prompt[:-1]], dtype=torch.int64, device=self._device)
        if tokens.numel():
            nothing = torch.zeros(1, dtype=torch.int64, device=self._device)
            self._model(tokens, self._prompt.view(nothing, len(tokens[0]), len(tokens[0])), positions="last")


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


def _step(model: Transformer, cache: KeyValueCache, tokens: Tensor, past: Tensor, width: int) -> Tensor:
    """Logits [B, vocab_size] after `tokens` [B] that follow `past` [B] others in the first B rows of the cache."""
    return model(tokens[:, None], cache.view(past, 1, width), positions="last")[:, 0]


def _new_cache(model: Transformer, rows: int, width: int) -> KeyValueCache:
    weight = model.embed.weight
    return KeyValueCache(model.config, rows, width, device=weight.device, dtype=weight.dtype)
