"""Word problems over small whole numbers (answer kind `number`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from random import Random
from typing import Literal

from megatron_plasticity.data.problems.problem import PEOPLE, Family, Key, Question
from megatron_plasticity.data.problems.split import two_step_windows

THINGS = ("pens", "coins", "shells", "cards", "stones", "books", "cups", "stamps")
_VERBS = {"+": ("buys", "finds", "gets"), "-": ("sells", "loses", "gives away")}
_PAST = {"+": ("bought", "found", "got"), "-": ("sold", "lost", "gave away")}
_LARGEST = 12
_THREE_STEPS = 3000

Term = tuple[Literal["+", "-"], int]


@dataclass(frozen=True)
class Sum:
    """`start`, and two or three numbers to add or take away; never below 0 and never above 12 on the way.

    A single step would be learned by heart from any text; what is held out for tests are combinations of two.
    """

    start: int
    terms: tuple[Term, ...]

    @property
    def keys(self) -> tuple[Key, ...]:
        return two_step_windows(self.values, self.terms)

    @property
    def level(self) -> int:
        """1 for two steps, 2 for three steps between one-digit numbers, 3 for three steps that touch a two-digit number."""
        if len(self.terms) == 2:
            return 1
        return 3 if max(self.values) > 9 else 2

    @property
    def values(self) -> list[int]:
        """The number at the start and after each step."""
        return list(accumulate((number if sign == "+" else -number for sign, number in self.terms), initial=self.start))

    def _sentences(self) -> str:
        return " ".join(
            f"{before} {sign} {number} = {after}."
            for (sign, number), before, after in zip(self.terms, self.values, self.values[1:], strict=False)
        )

    def ask(self, rng: Random) -> Question:
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
            # The ending keeps the calculation apart from one that may follow in the same document.
            return f"{self._sentences()} That makes {self.values[-1]}."
        person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
        deeds = " and ".join(f"{rng.choice(_PAST[sign])} {number}" for sign, number in self.terms)
        return f"{person} had {self.start} {thing} and {deeds}. {self._sentences()} So {person} had {self.values[-1]}."


def _problems() -> Sequence[Sum]:
    signs: tuple[Literal["+", "-"], ...] = ("+", "-")
    steps: list[Term] = [(sign, number) for sign in signs for number in range(1, 10)]
    two = [sum_ for start in range(2, 10) for terms in product(steps, repeat=2) if _stays_small(sum_ := Sum(start, terms))]
    three = [longer for sum_ in two for step in steps if _stays_small(longer := Sum(sum_.start, (*sum_.terms, step)))]
    return two + Random("arithmetic").sample(three, _THREE_STEPS)


def _stays_small(problem: Sum) -> bool:
    return all(0 <= value <= _LARGEST for value in problem.values)


FAMILY = Family("arithmetic", "number", "word problems over small numbers, two or three steps", _problems)
