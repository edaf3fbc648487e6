r"""Linear equations in one unknown (answer kind `maths`: the response ends with `\boxed{…}`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from random import Random

from megatron_plasticity.data.problems.problem import Family, Key, Question

_LARGEST = 18
_LARGEST_FACTOR = 14
_UNKNOWNS = ("x", "y", "n")


@dataclass(frozen=True)
class Equation:
    """`factor·x + shift = total`; `shift` may be negative, `total` and `total - shift` lie between 1 and 18.

    The solution is a whole number or a fraction in lowest terms as it stands.
    """

    factor: int
    shift: int
    total: int

    @property
    def keys(self) -> tuple[Key, ...]:
        return (("equation", self.factor, self.shift, self.total),)

    @property
    def level(self) -> int:
        """1 for one step, 2 for two steps to a fraction that needs no more work, 3 for two steps to a whole number."""
        if self.factor == 1 or not self.shift:
            return 1
        return 2 if self.solution[1] > 1 else 3

    @property
    def solution(self) -> tuple[int, int]:
        """Numerator and denominator in lowest terms."""
        top = self.total - self.shift
        divisor = gcd(top, self.factor)
        return top // divisor, self.factor // divisor

    def _term(self, unknown: str) -> str:
        return unknown if self.factor == 1 else f"{self.factor}{unknown}"

    def _equation(self, unknown: str) -> str:
        shift = f" {'+' if self.shift > 0 else '-'} {abs(self.shift)}" if self.shift else ""
        return f"{self._term(unknown)}{shift} = {self.total}"

    def _work(self, unknown: str) -> list[str]:
        rest = self.total - self.shift
        steps = []
        if self.shift:
            sign = "-" if self.shift > 0 else "+"
            steps.append(f"{self._term(unknown)} = {self.total} {sign} {abs(self.shift)} = {rest}.")
        if self.factor > 1:
            top, bottom = self.solution
            steps.append(f"{unknown} = {rest}/{self.factor}" + (f" = {top}." if bottom == 1 else "."))
        return steps

    def ask(self, rng: Random) -> Question:
        unknown = rng.choice(_UNKNOWNS)
        top, bottom = self.solution
        answer = str(top) if bottom == 1 else rf"\frac{{{top}}}{{{bottom}}}"
        request = rng.choice(("Solve {}.", "Find {unknown} if {}.")).format(self._equation(unknown), unknown=unknown)
        return Question(request, " ".join(self._work(unknown)) + rf" \boxed{{{answer}}}", answer)

    def tell(self, rng: Random) -> str:
        unknown = rng.choice(_UNKNOWNS)
        opening = rng.choice(("Take {}.", "We know that {}.")).format(self._equation(unknown))
        return " ".join((opening, *self._work(unknown)))


def _problems() -> Sequence[Equation]:
    every = [
        Equation(factor, shift, total)
        for factor in range(1, _LARGEST_FACTOR + 1)
        for shift in range(-9, 10)
        for total in range(1, _LARGEST + 1)
        if (factor > 1 or shift) and 0 < total - shift <= _LARGEST
    ]
    return [equation for equation in every if equation.solution[1] in (1, equation.factor)]


FAMILY = Family("algebra", "maths", "linear equations with whole and fractional solutions", _problems)
