"""Chains of two to four instructions on a number, with four to eight options (answer kind `choice`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from megatron_plasticity.data.problems.problem import Family, Key, Question, in_order, inline_choice, lettered
from megatron_plasticity.data.problems.split import two_step_windows

_LARGEST = 12
_OF_A_LENGTH = 2000
_OPTIONS = {2: 4, 3: 6, 4: 8}

Step = tuple[Literal["add", "take", "double"], int]


@dataclass(frozen=True)
class Chain:
    """`start`, then each step in turn; every value on the way lies between 0 and 12."""

    start: int
    steps: tuple[Step, ...]

    @property
    def keys(self) -> tuple[Key, ...]:
        return two_step_windows(self.values, self._signed)

    @property
    def level(self) -> int:
        """1, 2 or 3 for two, three or four steps."""
        return len(self.steps) - 1

    @property
    def values(self) -> list[int]:
        """The value at the start and after each step."""
        values = [self.start]
        for verb, number in self.steps:
            values.append({"add": values[-1] + number, "take": values[-1] - number, "double": 2 * values[-1]}[verb])
        return values

    @property
    def _signed(self) -> list[tuple[Literal["+", "-"], int]]:
        """The steps as sums write them; doubling adds the value to itself."""
        return [
            ("-" if verb == "take" else "+", before if verb == "double" else number)
            for (verb, number), before in zip(self.steps, self.values, strict=False)
        ]

    def _sentences(self) -> list[str]:
        return [
            f"{before} {sign} {number} = {after}."
            for (sign, number), before, after in zip(self._signed, self.values, self.values[1:], strict=False)
        ]

    def _wrong(self, rng: Random) -> list[str]:
        """Other values that such a chain may end with."""
        others = [str(value) for value in range(_LARGEST + 1) if value != self.values[-1]]
        return rng.sample(others, _OPTIONS[len(self.steps)] - 1)

    def ask(self, rng: Random) -> Question:
        said = {"add": "Add {}.", "take": "Take away {}.", "double": "Double it."}
        orders = " ".join(said[verb].format(number) for verb, number in self.steps)
        options, letter = in_order(str(self.values[-1]), self._wrong(rng))
        return Question(
            prompt=f"Start with {self.start}. {orders} What is the result?\n{lettered(options)}",
            response=f"{' '.join(self._sentences())} The answer is {letter}",
            answer=letter,
            choices=options,
        )

    def tell(self, rng: Random) -> str:
        said = {"add": "add {}", "take": "take away {}", "double": "double it"}
        orders = ", ".join(said[verb].format(number) for verb, number in self.steps)
        told = f"From {self.start}, {orders}: {' '.join(self._sentences())}"
        return f"{told} {inline_choice(str(self.values[-1]), self._wrong(rng), rng)}"


def _problems() -> Sequence[Chain]:
    steps: list[Step] = [("add", number) for number in range(1, 10)]
    steps.extend(("take", number) for number in range(1, 10))
    steps.append(("double", 0))
    chains = [chain for start in range(1, 10) for step in steps if _stays_small(chain := Chain(start, (step,)))]
    rng, every = Random("steps"), []
    for _ in _OPTIONS:
        chains = [
            longer for chain in chains for step in steps if _stays_small(longer := Chain(chain.start, (*chain.steps, step)))
        ]
        chains = rng.sample(chains, min(_OF_A_LENGTH, len(chains)))
        every += chains
    return every


def _stays_small(chain: Chain) -> bool:
    return all(0 <= value <= _LARGEST for value in chain.values)


FAMILY = Family("steps", "choice", "two to four instructions on a number, four to eight options", _problems)
