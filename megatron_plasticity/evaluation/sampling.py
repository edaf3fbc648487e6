"""What is asked of a generator of text and what comes back, whichever backend it is; and what all backends share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError

if TYPE_CHECKING:
    from megatron_plasticity.tracking.progress import Progress

Finish = Literal["end_of_text", "length", "stop"]


@dataclass(frozen=True)
class SamplingParameters:
    """How to choose tokens and when to stop. The filters apply in transformers' order: repetition penalty, temperature, top-k,
    top-p."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling (1904.09751): the fewest likeliest tokens whose probabilities sum to at least this."""
    top_k: int | None = None
    """Only so many likeliest tokens, and those as likely as the last of them."""
    repetition_penalty: float = 1.0
    """Divides the positive, multiplies the negative logits of every token of prompt and response so far (CTRL, 1909.05858)."""
    stop: tuple[str, ...] = ()
    """Strings that end a response; looked for in the response alone."""
    max_total_tokens: int | None = None
    """Most tokens of prompt and response together, where the model's context does not end before."""
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not self.temperature >= 0:
            problems.append(f"temperature={self.temperature} must be at least 0")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k={self.top_k} must be at least 1; leave it out to keep all tokens")
        if not self.repetition_penalty > 0:
            problems.append(f"repetition_penalty={self.repetition_penalty} must be above 0; 1 is no penalty")
        if "" in self.stop:
            problems.append("stop: an empty string would stop every response at once")
        if problems:
            raise UserError("sampling: " + "; ".join(problems))

    def total_limit(self, context_length: int) -> int:
        """Most tokens of prompt and response together."""
        return context_length if self.max_total_tokens is None else min(context_length, self.max_total_tokens)

    def response_limit(self, prompt: Sequence[int], context_length: int) -> int:
        """Most tokens of a response to this prompt."""
        return min(self.max_new_tokens, self.total_limit(context_length) - len(prompt))


@dataclass(frozen=True)
class Continuation:
    """One response to one prompt."""

    tokens: list[int]
    """Without the end-of-text token; and where a stop string was found, up to the last token that holds nothing of it."""
    finish: Finish
    """`length` is the end of `max_new_tokens`, of `max_total_tokens`, or of the model's context."""


class Generator(Protocol):
    """A model that continues prompts."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        samples: int,
        parameters: SamplingParameters,
        progress: Progress | None = None,
    ) -> list[list[Continuation]]:
        """result[question][sample], of `samples` responses to each prompt.

        `keys[question]` is a number from 0 to 2⁶⁴-1 that belongs to the question (`streams.question_key`): with the seed, the
        number of the sample and the position it determines the random numbers, whatever else is asked, and in whatever order.

        Raises UserError for a prompt that is empty or leaves no room for a token.
        """
        ...


class StopStrings:
    """Finds the first stop string of a response, and the token boundary before it."""

    def __init__(self, stop: Sequence[str], tokenizer: Tokenizer) -> None:
        self._stop = stop
        self._tokenizer = tokenizer
        # A token is a byte or more, so that a stop string lies in so many tokens; one more, since decoders may strip a space
        # from the first.
        self._reach = max((len(text.encode()) for text in stop), default=0) + 1

    def completed(self, tokens: list[int]) -> bool:
        """Whether the last of these tokens completes a stop string.

        Looks at the last tokens only, since it is asked after every token. It misses a string with tokens inside that the
        tokenizer has no text for; `cut` finds it at the end.
        """
        return bool(self._stop) and self._find(tokens[-self._reach :]) is not None and self._find(tokens) is not None

    def cut(self, continuation: Continuation) -> Continuation:
        """Only the tokens before the first that holds anything of a stop string; if there is none, what is given."""
        place = self._find(continuation.tokens) if self._stop else None
        if place is None:
            return continuation
        kept = len(continuation.tokens)
        while len(self._tokenizer.decode(continuation.tokens[:kept])) > place:
            kept -= 1
        return Continuation(continuation.tokens[:kept], "stop")

    def _find(self, tokens: list[int]) -> int | None:
        """Where in the text the first stop string begins."""
        text = self._tokenizer.decode(tokens)
        return min((place for stop in self._stop if (place := text.find(stop)) >= 0), default=None)


def check_prompts(
    prompts: Sequence[Sequence[int]], context_length: int, what: str = "prompts", max_total_tokens: int | None = None
) -> None:
    """Raise UserError unless each prompt has a token and leaves room for one, in the context and, if there is one, below
    `max_total_tokens`; `what` names the prompts in the message."""
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise UserError(f"{what}: number {lengths.index(0)} is empty; a model needs at least one token to continue")
    limit, bound, remedy = context_length, "the model's context_length", "use a model with a longer context"
    if max_total_tokens is not None and max_total_tokens < context_length:
        limit, bound, remedy = max_total_tokens, "max_total_tokens", "raise it"
    too_long = sum(length >= limit for length in lengths)
    if too_long:
        raise UserError(
            f"{what}: {too_long} of {len(lengths)} do not fit; the longest has {max(lengths)} tokens, but {bound} is {limit}, "
            f"and an answer needs at least one token more; {remedy}"
        )
