"""Word problems over one- and two-digit whole numbers (answer kind `number`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from megatron_plasticity.data.problems.problem import PEOPLE, Family, Key, Question, worked

THINGS = ("pens", "coins", "shells", "cards", "stones", "books", "cups", "stamps")
_VERBS = {"+": ("buys", "finds", "gets"), "-": ("sells", "loses", "gives away")}
_PAST = {"+": ("bought", "found", "got"), "-": ("sold", "lost", "gave away")}
_LARGEST = 99

Term = tuple[Literal["+", "-"], int]


@dataclass(frozen=True)
class Sum:
    """`start ± first ± second…`, never below zero and never above 99 on the way."""

    start: int
    terms: tuple[Term, ...]

    @property
    def key(self) -> Key:
        (sign, number), *rest = self.terms
        if sign == "+" and not rest:  # 3 + 5 is the same sum as 5 + 3
            return ("+", *sorted((self.start, number)))
        return (self.start, *(part for term in self.terms for part in term))

    @property
    def level(self) -> int:
        """1 for one step with a one-digit number, 2 with a two-digit number, 3 for two steps."""
        return 3 if len(self.terms) > 1 else 2 if self.terms[0][1] > 9 else 1

    def _work(self) -> tuple[list[str], int]:
        value, sentences = self.start, []
        for sign, number in self.terms:
            sentence, value = worked(value, sign, number)
            sentences.append(sentence)
        return sentences, value

    def ask(self, rng: Random, position: int = 0) -> Question:
        person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
        story = [f"{person} has {self.start} {thing}."]
        story += [f"{person} {rng.choice(_VERBS[sign])} {number}." for sign, number in self.terms]
        sentences, value = self._work()
        return Question(
            prompt=" ".join(story) + f" How many {thing} does {person} have now?",
            response=" ".join(sentences) + f" The answer is {value}",
            answer=str(value),
        )

    def tell(self, rng: Random) -> str:
        sentences, value = self._work()
        whole = f"{self.start} " + " ".join(f"{sign} {number}" for sign, number in self.terms)
        if rng.random() < 0.5:
            return f"To work out {whole}: {' '.join(sentences)} So {whole} = {value}."
        person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
        deeds = " and then ".join(f"{rng.choice(_PAST[sign])} {number}" for sign, number in self.terms)
        return f"{person} had {self.start} {thing} and {deeds}. {' '.join(sentences)} That leaves {person} with {value} {thing}."


def _stays_in_range(problem: Sum) -> bool:
    value = problem.start
    for sign, number in problem.terms:
        value += number if sign == "+" else -number
        if not 0 <= value <= _LARGEST:
            return False
    return True


def _problems() -> Sequence[Sum]:
    signs: tuple[Literal["+", "-"], ...] = ("+", "-")
    one_digit = [Sum(start, ((sign, number),)) for start in range(2, 50) for sign in signs for number in range(2, 10)]
    two_digits = [Sum(start, ((sign, number),)) for start in range(12, 80) for sign in signs for number in range(11, 40)]
    two_steps = [
        Sum(start, ((first, number), (second, other)))
        for start in range(5, 30)
        for first in signs
        for number in range(3, 10)
        for second in signs
        for other in range(2, 10, 3)
    ]
    return [problem for problem in one_digit + two_digits + two_steps if _stays_in_range(problem)]


FAMILY = Family("arithmetic", "number", "word problems over one- and two-digit numbers, one or two steps", _problems)
