"""What a family of procedural problems is.

A problem is its *content* (operands, facts, events). It can be asked as a task asks it, and told as a pretraining document
tells it; the wording of both is drawn from a generator that is given. The side of the train/test split depends on the keys of
the content and never on the wording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from megatron_plasticity.config.tasks import AnswerKind

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
    def keys(self) -> tuple[Key, ...]:
        """What the train/test split hashes (`split.side_of`). A key is the sort of content, then the content itself, or a part of
        it that training must not share with test problems; most problems have a single one."""
        ...

    @property
    def level(self) -> int:
        """Difficulty, 1 (easy) to 3."""
        ...

    def ask(self, rng: Random) -> Question:
        """The problem as a question, in a task's wording."""
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


def in_order(right: str, wrong: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Options in numerical or alphabetical order, and the letter of the right one.

    In this order a letter says something about its option, so that a model which knows the answer, but has not learned to look a
    letter up, does better than one that knows nothing: the scores of small models are graded.
    """
    options = sorted((right, *wrong), key=lambda option: (int(option), "") if option.isdigit() else (0, option))
    return tuple(options), LETTERS[options.index(right)]


def lettered(options: Sequence[str], separator: str = "\n") -> str:
    """Options as `A. first`, `B. second`, …"""
    return separator.join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def inline_choice(right: str, wrong: Sequence[str], rng: Random) -> str:
    """A sentence that names a few options by letter and picks the right one, to be met in pretraining."""
    options, letter = in_order(right, rng.sample(list(wrong), min(3, len(wrong))))
    return f"Of {lettered(options, ' ')} it is {right}, so {letter}."


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
