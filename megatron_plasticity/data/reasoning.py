"""Procedural documents for pretraining: facts of the closed world, worked problems of the train side, short reviews."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from megatron_plasticity.config.data import ReasoningTextConfig
from megatron_plasticity.data.documents import Document
from megatron_plasticity.data.problems.problem import LETTERS
from megatron_plasticity.data.problems.registry import problems
from megatron_plasticity.data.problems.split import on_test_side
from megatron_plasticity.data.problems.world import THINGS, Thing, draw_thing, tell_thing
from megatron_plasticity.data.reviews import draw_review

SOURCE = "reasoning"

# Shares of the documents by what they are mostly about.
_WEIGHTS = {
    "facts": 8,
    "recall": 4,
    "categories": 4,
    "arithmetic": 4,
    "algebra": 2,
    "trials": 1,
    "passage": 4,
    "steps": 3,
    "reviews": 1,
}
# Share of the problems that are put as a task puts them; the others are told in prose.
_ASKED = 0.4
_WORDS = (40, 90)
_THINGS = 4


def _piece_of(topic: str, things: Sequence[Thing], rng: Random) -> str:
    if topic == "facts":
        return tell_thing(rng.choice(things), rng)
    if topic == "recall":
        return _recall(rng)
    if topic == "reviews":
        review = draw_review(rng, positive=rng.random() < 0.5)
        while on_test_side(review.key):
            review = draw_review(rng, positive=rng.random() < 0.5)
        return f"{review.text} {review.verdict(rng)}"
    problem = rng.choice(problems(topic, "train"))
    if rng.random() < _ASKED:
        question = problem.ask(rng)
        return f"{question.prompt} {question.response}"
    return problem.tell(rng)


def _recall(rng: Random) -> str:
    """Pairs, then the same pairs in another order: every second word of the second half can be looked up in the first.

    A model this small learns to look things up in its context, which most tasks need, from little else in so short a training.
    """
    words = rng.sample([thing.name for thing in THINGS], 4)
    again = rng.sample(words, len(words))
    if rng.random() < 0.5:
        values = dict(zip(words, LETTERS, strict=False))
        listed = " ".join(f"{values[word]}. {word}" for word in words)
    else:
        values = {word: str(rng.randrange(20)) for word in words}
        listed = ", ".join(f"{word} {values[word]}" for word in words) + "."
    return f"{listed} " + " ".join(f"The {word} is {values[word]}." for word in again)


def reasoning_document(index: int, seed: int) -> Document:
    """Document number `index`: several facts and worked problems, mostly of one topic."""
    rng = Random(f"{seed}/reasoning/{index}")
    topic, other = rng.choices(list(_WEIGHTS), weights=list(_WEIGHTS.values()), k=2)
    # A document comes back to the same few things, so that what it said before helps to foretell what it says next.
    things = [draw_thing(rng) for _ in range(_THINGS)]
    goal = rng.randrange(*_WORDS)
    pieces: list[str] = []
    while sum(len(piece.split()) for piece in pieces) < goal:
        pieces.append(_piece_of(topic if rng.random() < 0.75 else other, things, rng))
    return Document(rng.choice((" ", "\n")).join(pieces), SOURCE)


def reasoning_documents(config: ReasoningTextConfig, seed: int) -> Iterator[Document]:
    """`config.documents` documents of 60 to 200 tokens; each depends on the seed and its own number only.

    Every problem in them is on the train side of its family (`problems.registry.is_test`).
    """
    for index in range(config.documents):
        yield reasoning_document(index, seed)
