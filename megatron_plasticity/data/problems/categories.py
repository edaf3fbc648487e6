"""Multiple choice over the facts of the closed world (answer kind `choice`, four options).

The split is by the fact that is asked for. Training questions name facts of the train side only, right and wrong options alike,
so the facts behind a test question can be known from the pretraining corpus and from nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from megatron_plasticity.data.problems.problem import Family, Key, Question, article, lettered, place
from megatron_plasticity.data.problems.split import on_test_side
from megatron_plasticity.data.problems.world import RELATIONS, THINGS, Relation, Thing

NAME = "categories"
_WRONG_OPTIONS = 3
_QUESTIONS_PER_FACT = 30


@dataclass(frozen=True)
class FactQuestion:
    """Which of four things has the value that `thing` has for `relation`? Only `thing` has it."""

    relation: Relation
    thing: Thing
    others: tuple[Thing, ...]

    @property
    def key(self) -> Key:
        return _fact_key(self.relation, self.thing)

    @property
    def level(self) -> int:
        """1 for kinds, which several words suggest; 2 and 3 for drawn facts about frequent and about rarer things."""
        if self.relation == "kind":
            return 1
        return 2 if THINGS.index(self.thing) < len(THINGS) // 2 else 3

    def _property(self) -> str:
        value = self.thing.value(self.relation)
        return {"kind": article(value), "colour": value, "place": f"from the {value}"}[self.relation]

    def _search(self, rng: Random, position: int) -> tuple[tuple[str, ...], str, str]:
        """The options, the letter of the right one, and the facts of the options up to the right one."""
        things = {thing.name: thing for thing in (self.thing, *self.others)}
        options, letter = place(self.thing.name, [other.name for other in self.others], rng, position)
        last = options.index(self.thing.name) + 1
        return options, letter, lettered([things[name].fact(self.relation) for name in options[:last]], " ")

    def ask(self, rng: Random, position: int) -> Question:
        options, letter, facts = self._search(rng, position)
        return Question(
            prompt=f"Which of these is {self._property()}?\n{lettered(options)}",
            response=f"{facts} The answer is {letter}",
            answer=letter,
            choices=options,
        )

    def tell(self, rng: Random) -> str:
        options, letter, facts = self._search(rng, rng.randrange(len(self.others) + 1))
        return f"{lettered(options, ' ')}: one is {self._property()}. {facts} So it is {letter}."


def _fact_key(relation: Relation, thing: Thing) -> Key:
    return (NAME, relation, thing.name)


def _problems() -> Sequence[FactQuestion]:
    rng = Random(NAME)
    problems: dict[FactQuestion, None] = {}
    for relation in RELATIONS:
        for side in (False, True):
            things = [thing for thing in THINGS if on_test_side(_fact_key(relation, thing)) == side]
            for thing in things:
                candidates = [other for other in things if other.value(relation) != thing.value(relation)]
                for _ in range(_QUESTIONS_PER_FACT):
                    others = sorted(rng.sample(candidates, _WRONG_OPTIONS), key=lambda other: other.name)
                    problems[FactQuestion(relation, thing, tuple(others))] = None
    return list(problems)


FAMILY = Family(NAME, "choice", "multiple choice over kinds, colours and places of a closed world", _problems)
