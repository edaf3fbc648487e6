"""What a family of procedural problems is.

A problem is its *content* (operands, facts, events). It can be asked as a task asks it, and told as a pretraining document
tells it; the wording of both is drawn from a generator that is given. Two problems with equal keys belong to the same side
of the train/test split whatever their wording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol

AnswerKind = Literal["number", "maths", "choice", "yes_no_maybe"]
Key = tuple[str | int, ...]

LETTERS = "ABCDEFGH"
PEOPLE = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hal")


@dataclass(frozen=True)
class Question:
    """A problem as a task asks it."""

    prompt: str
    response: str
    """Chain of thought that ends with the answer."""
    answer: str
    choices: tuple[str, ...] = ()
    """Texts of the options A, B, …, for multiple choice."""


class Problem(Protocol):
    @property
    def key(self) -> Key:
        """What the train/test split hashes: the sort of content, then the content itself, or the part of it that a test problem
        must not share with training."""
        ...

    @property
    def level(self) -> int:
        """Difficulty, 1 (easy) to 3."""
        ...

    def ask(self, rng: Random, position: int) -> Question:
        """The problem as a question. With options, the right one stands at `position` modulo their number."""
        ...

    def tell(self, rng: Random) -> str:
        """The problem as one or two worked sentences of prose, in a form that no task uses."""
        ...


@dataclass(frozen=True)
class Family:
    """A family of problems, one answer kind."""

    name: str
    answer_kind: AnswerKind
    description: str
    problems: Callable[[], Sequence[Problem]]
    """All the problems of the family, distinct, always in the same order."""


def place(right: str, wrong: Sequence[str], rng: Random, position: int) -> tuple[tuple[str, ...], str]:
    """Options with the right one at `position` modulo their number and the wrong ones shuffled around it; and its letter."""
    options = rng.sample(list(wrong), len(wrong))
    position %= len(options) + 1
    options.insert(position, right)
    return tuple(options), LETTERS[position]


def lettered(options: Sequence[str], separator: str = "\n") -> str:
    """Options as `A. first`, `B. second`, …"""
    return separator.join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def inline_choice(right: str, wrong: Sequence[str], rng: Random) -> str:
    """A sentence that names a few options by letter and picks the right one, to be met in pretraining."""
    options, letter = place(right, rng.sample(list(wrong), min(3, len(wrong))), rng, rng.randrange(4))
    return f"Of {lettered(options, ' ')} it is {right}, so {letter}."


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
