"""Word problems over small whole numbers (answer kind `number`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Literal

from megatron_plasticity.data.problems.problem import PEOPLE, Family, Key, Question

THINGS = ("pens", "coins", "shells", "cards", "stones", "books", "cups", "stamps")
_VERBS = {"+": ("buys", "finds", "gets"), "-": ("sells", "loses", "gives away")}
_PAST = {"+": ("bought", "found", "got"), "-": ("sold", "lost", "gave away")}
_LARGEST = 24

Term = tuple[Literal["+", "-"], int]


@dataclass(frozen=True)
class Sum:
    """`start ± first ± second`, never below 0 and never above 24 on the way.

    A single step would be learned by heart from any text; what is held out for tests is the combination of two.
    """

    start: int
    terms: tuple[Term, Term]

    @property
    def key(self) -> Key:
        return ("sum", self.start, *(part for term in self.terms for part in term))

    @property
    def level(self) -> int:
        """1 if all numbers on the way have one digit, 2 if the largest is below 15, 3 above that."""
        largest = max(self.values)
        return 1 if largest < 10 else 2 if largest < 15 else 3

    @property
    def values(self) -> list[int]:
        """The number at the start and after each step."""
        return list(accumulate((number if sign == "+" else -number for sign, number in self.terms), initial=self.start))

    def _sentences(self) -> str:
        return " ".join(
            f"{before} {sign} {number} = {after}."
            for (sign, number), before, after in zip(self.terms, self.values, self.values[1:], strict=False)
        )

    def ask(self, rng: Random, position: int = 0) -> Question:
        person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
        story = [f"{person} has {self.start} {thing}."]
        story += [f"{person} {rng.choice(_VERBS[sign])} {number}." for sign, number in self.terms]
        return Question(
            prompt=" ".join(story) + f" How many {thing} does {person} have now?",
            response=f"{self._sentences()} The answer is {self.values[-1]}",
            answer=str(self.values[-1]),
        )

    def tell(self, rng: Random) -> str:
        if rng.random() < 0.5:
            return self._sentences()
        person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
        deeds = " and ".join(f"{rng.choice(_PAST[sign])} {number}" for sign, number in self.terms)
        return f"{person} had {self.start} {thing} and {deeds}. {self._sentences()} So {person} had {self.values[-1]}."


def _problems() -> Sequence[Sum]:
    signs: tuple[Literal["+", "-"], ...] = ("+", "-")
    steps: list[Term] = [(sign, number) for sign in signs for number in range(1, 10)]
    every = [Sum(start, (first, second)) for start in range(2, 16) for first in steps for second in steps]
    return [problem for problem in every if all(0 <= value <= _LARGEST for value in problem.values)]


FAMILY = Family("arithmetic", "number", "word problems over small numbers, two steps each", _problems)
