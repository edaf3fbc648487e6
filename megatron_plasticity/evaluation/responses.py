"""What a model answers: two passes over test questions, shared out over the ranks of a launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_plasticity.config.evaluation import EvaluateRecipe
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.evaluation.rewards import RewardScorer
from megatron_plasticity.evaluation.sampling import Finish, Generator, SamplingParameters
from megatron_plasticity.evaluation.streams import question_key
from megatron_plasticity.evaluation.tasks.task import Example
from megatron_plasticity.parallel.grid import ProcessGrid

if TYPE_CHECKING:
    from megatron_plasticity.tracking.progress import Progress

# What the paper's public code sets in both passes.
PAPER_REPETITION_PENALTY = 1.1
PAPER_STOP = ("Human", "Assistant")
PAPER_TOTAL_TOKENS = 2048

_REWARDED_AT_ONCE = 1024
"""Conversations between two signs of life; within them, those of similar length are rewarded together."""


@dataclass(frozen=True)
class Question:
    """A test question as the model sees it."""

    example: Example
    prompt: tuple[int, ...]
    """Ids of the prompt in its template."""
    fits: bool
    """Whether the prompt leaves room for an answer; one that does not is not asked."""

    @property
    def key(self) -> int:
        """What tells this question from others, so that its random numbers do not depend on which others are asked."""
        return question_key(f"{self.example.id}\n{self.example.prompt}")


@dataclass(frozen=True)
class Response:
    """One answer of the model, as text."""

    text: str
    tokens: int
    finish: Finish | Literal["prompt_too_long"]
    reward: float | None = None


NOT_ASKED = Response("", 0, "prompt_too_long")


def room_for_prompts(recipe: EvaluateRecipe, context_length: int) -> int:
    """Tokens that prompt and answer may have together."""
    return min(context_length, PAPER_TOTAL_TOKENS) if recipe.paper_compat else context_length


def sampling_parameters(recipe: EvaluateRecipe, sampled: bool) -> SamplingParameters:
    """Of the greedy or of the sampled pass; the seed of the sampled pass is the recipe's."""
    return SamplingParameters(
        max_new_tokens=recipe.max_new_tokens,
        temperature=recipe.temperature if sampled else 0.0,
        top_p=recipe.top_p if sampled else 1.0,
        top_k=recipe.top_k if sampled else None,
        repetition_penalty=PAPER_REPETITION_PENALTY if recipe.paper_compat else recipe.repetition_penalty,
        stop=PAPER_STOP if recipe.paper_compat else recipe.stop,
        max_total_tokens=PAPER_TOTAL_TOKENS if recipe.paper_compat else None,
        seed=recipe.seed,
    )


def answer_questions(
    generator: Generator,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    samples: int,
    parameters: SamplingParameters,
    scorer: RewardScorer | None,
    grid: ProcessGrid,
    progress: Progress | None,
) -> list[list[Response]] | None:
    """`samples` responses to each question: result[question][sample] on the main process, None on the others. A collective.

    Each data-parallel rank answers, and rewards, every n-th question. A question's responses depend on the seed and the question
    alone, so the number of ranks changes nothing.
    """
    mine = [question for question in questions[grid.data_rank :: grid.data_size] if question.fits]
    generated = generator.generate(
        [question.prompt for question in mine], [question.key for question in mine], samples, parameters, progress
    )
    texts = [[tokenizer.decode(continuation.tokens) for continuation in row] for row in generated]
    rewards = _rewards(scorer, mine, texts, progress)
    answered = [
        [
            Response(text, len(continuation.tokens), continuation.finish, reward)
            for text, continuation, reward in zip(*parts, strict=True)
        ]
        for parts in zip(texts, generated, rewards, strict=True)
    ]
    gathered = grid.gather(answered)
    if gathered is None:
        return None
    of_rank = [iter(rows) for rows in gathered]
    return [
        next(of_rank[number % grid.data_size]) if question.fits else [NOT_ASKED] * samples
        for number, question in enumerate(questions)
    ]


def _rewards(
    scorer: RewardScorer | None, questions: Sequence[Question], texts: Sequence[Sequence[str]], progress: Progress | None
) -> Sequence[Sequence[float | None]]:
    if scorer is None:
        return [[None] * len(row) for row in texts]
    prompts = [question.example.prompt for question, row in zip(questions, texts, strict=True) for _ in row]
    responses = [text for row in texts for text in row]
    found: list[float] = []
    for start in range(0, len(responses), _REWARDED_AT_ONCE):
        part = slice(start, start + _REWARDED_AT_ONCE)
        found += scorer.score(prompts[part], responses[part])
        if progress is not None:  # a large reward model takes hours, in which the run must not seem dead
            progress.update(len(responses), len(responses), "answers")
    scores = iter(found)
    return [[next(scores) for _ in row] for row in texts]
