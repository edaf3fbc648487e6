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
    """`left·x + shift = right·x + total`, `left > right ≥ 0`; `shift` may be negative."""

    left: int
    shift: int
    right: int
    total: int

    @property
    def key(self) -> Key:
        return (self.left, self.shift, self.right, self.total)

    @property
    def level(self) -> int:
        """1 for one step with a whole result, 2 for two steps, 3 for a fraction or an unknown on both sides."""
        if self.right or (self.total - self.shift) % (self.left - self.right):
            return 3
        return 2 if self.left > 1 and self.shift else 1

    @property
    def solution(self) -> tuple[int, int]:
        """Numerator and denominator in lowest terms."""
        top, bottom = self.total - self.shift, self.left - self.right
        divisor = gcd(top, bottom)
        return top // divisor, bottom // divisor

    def _equation(self, unknown: str) -> str:
        def side(factor: int, constant: int) -> str:
            if not factor:
                return str(constant)
            term = unknown if factor == 1 else f"{factor}{unknown}"
            return term + (f" {'+' if constant > 0 else '-'} {abs(constant)}" if constant else "")

        return f"{side(self.left, self.shift)} = {side(self.right, self.total)}"

    def _work(self, unknown: str) -> list[str]:
        factor, rest = self.left - self.right, self.total - self.shift
        term = unknown if factor == 1 else f"{factor}{unknown}"
        steps = []
        if self.right:
            steps.append(f"{self.left}{unknown} - {self.right}{unknown} = {term}.")
        if self.shift:
            steps.append(f"{term} = {self.total} {'-' if self.shift > 0 else '+'} {abs(self.shift)} = {rest}.")
        if factor > 1:
            top, bottom = self.solution
            steps.append(f"{unknown} = {rest}/{factor}" + (f" = {_plain(top, bottom)}." if bottom != factor else "."))
        return steps

    def ask(self, rng: Random, position: int = 0) -> Question:
        unknown = rng.choice(_UNKNOWNS)
        top, bottom = self.solution
        answer = str(top) if bottom == 1 else rf"\frac{{{top}}}{{{bottom}}}"
        request = rng.choice(("Solve {}.", "Find {unknown} if {}.")).format(self._equation(unknown), unknown=unknown)
        return Question(request, " ".join(self._work(unknown)) + rf" \boxed{{{answer}}}", answer)

    def tell(self, rng: Random) -> str:
        unknown = rng.choice(_UNKNOWNS)
        result = _plain(*self.solution)
        opening, closing = rng.choice(
            (
                (f"Take the equation {self._equation(unknown)}.", f"The unknown {unknown} is {result}."),
                (f"We know that {self._equation(unknown)}.", f"So {unknown} must be {result}."),
            )
        )
        return " ".join((opening, *self._work(unknown), closing))


def _plain(top: int, bottom: int) -> str:
    return str(top) if bottom == 1 else f"{top}/{bottom}"


def _problems() -> Sequence[Equation]:
    one_step = [Equation(1, shift, 0, x + shift) for x in range(1, 20) for shift in range(-9, 13) if shift and x + shift > 0]
    one_step += [Equation(factor, 0, 0, factor * x) for factor in range(2, 10) for x in range(1, 13)]
    two_steps = [
        Equation(factor, shift, 0, factor * x + shift)
        for factor in range(2, 8)
        for x in range(1, 11)
        for shift in range(-9, 13)
        if shift and factor * x + shift > 0
    ]
    fractions = [Equation(factor, 0, 0, total) for factor in range(2, 13) for total in range(1, 25) if total % factor]
    both_sides = [
        Equation(left, shift, right, (left - right) * x + shift)
        for left in range(3, 8)
        for right in range(1, left)
        for x in range(1, 9)
        for shift in range(1, 9)
    ]
    return one_step + two_steps + fractions + both_sides


FAMILY = Family("algebra", "maths", "linear equations with whole and fractional solutions", _problems)
