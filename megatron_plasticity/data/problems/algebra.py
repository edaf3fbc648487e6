r"""Linear equations in one unknown (answer kind `maths`: the response ends with `\boxed{…}`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from random import Random

from megatron_plasticity.data.problems.problem import Family, Key, Question

_UNKNOWNS = ("x", "y", "n")


@dataclass(frozen=True)
class Equation:
    """`factor·x + shift = total`; `shift` may be negative."""

    factor: int
    shift: int
    total: int

    @property
    def key(self) -> Key:
        return ("equation", self.factor, self.shift, self.total)

    @property
    def level(self) -> int:
        """1 for one step with a whole result, 2 for two steps, 3 for a fraction in lowest terms."""
        if self.solution[1] > 1:
            return 3
        return 2 if self.factor > 1 and self.shift else 1

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

    def ask(self, rng: Random, position: int = 0) -> Question:
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
    shifts = range(-9, 10)
    one_step = [Equation(1, shift, x + shift) for x in range(1, 20) for shift in shifts if shift]
    one_step += [Equation(factor, 0, factor * x) for factor in range(2, 10) for x in range(1, 10)]
    two_steps = [
        Equation(factor, shift, factor * x + shift) for factor in range(2, 10) for x in range(1, 10) for shift in shifts if shift
    ]
    fractions = [
        Equation(factor, shift, rest + shift)
        for factor in range(2, 10)
        for rest in range(1, 16)
        for shift in shifts
        if gcd(factor, rest) == 1
    ]
    return [equation for equation in one_step + two_steps + fractions if equation.total > 0]


FAMILY = Family("algebra", "maths", "linear equations with whole and fractional solutions", _problems)
