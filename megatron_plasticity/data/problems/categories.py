"""Multiple choice over the facts of the closed world (answer kind `choice`, four options).

The split is by fact, so that the facts behind test questions can be known from the pretraining corpus and from nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random

from megatron_plasticity.data.problems.problem import Family, Key, Question, in_order, inline_choice, lettered
from megatron_plasticity.data.problems.world import RELATIONS, THINGS, VALUES, Relation, Thing

_WRONG_OPTIONS = 3
_QUESTIONS_PER_FACT = 20


@dataclass(frozen=True)
class FactQuestion:
    """Which of four values does `thing` have for `relation`?"""

    relation: Relation
    thing: Thing
    wrong: tuple[str, ...]

    @property
    def keys(self) -> tuple[Key, ...]:
        return (("categories", self.relation, self.thing.name),)

    @property
    def level(self) -> int:
        """1 for kinds, which several words suggest; 2 and 3 for drawn facts about frequent and about rarer things."""
        if self.relation == "kind":
            return 1
        return 2 if THINGS.index(self.thing) < len(THINGS) // 2 else 3

    def ask(self, rng: Random) -> Question:
        options, letter = in_order(self.thing.value(self.relation), self.wrong)
        asked = {"kind": "What is the {}?", "colour": "What colour is the {}?", "place": "Where is the {} from?"}[self.relation]
        return Question(
            prompt=f"{asked.format(self.thing.name)}\n{lettered(options)}",
            response=f"{self.thing.fact(self.relation)} The answer is {letter}",
            answer=letter,
            choices=options,
        )

    def tell(self, rng: Random) -> str:
        return f"{self.thing.fact(self.relation)} {inline_choice(self.thing.value(self.relation), self.wrong, rng)}"


def _problems() -> Sequence[FactQuestion]:
    rng = Random("categories")
    problems = []
    for relation in RELATIONS:
        for thing in THINGS:
            every = list(combinations([value for value in VALUES[relation] if value != thing.value(relation)], _WRONG_OPTIONS))
            problems += [FactQuestion(relation, thing, wrong) for wrong in rng.sample(every, _QUESTIONS_PER_FACT)]
    return problems


FAMILY = Family("categories", "choice", "multiple choice over kinds, colours and places of a closed world", _problems)
