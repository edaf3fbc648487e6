"""Short passages about what people do, with a question and four options (answer kind `choice`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from megatron_plasticity.data.problems.problem import PEOPLE, Family, Key, Question, in_order, inline_choice, lettered

Deed = Literal["go", "take", "eat", "meet"]
Order = Literal["only", "first", "last"]

WHAT: dict[Deed, tuple[str, ...]] = {
    "go": ("park", "school", "market", "barn", "kitchen", "garden", "library", "station"),
    "take": ("kite", "ball", "lamp", "key", "hat", "map", "rope", "bag"),
    "eat": ("bread", "cheese", "soup", "rice", "cake", "salad", "fish", "honey"),
    "meet": ("doctor", "farmer", "baker", "teacher", "painter", "sailor", "driver", "singer"),
}
_PRESENT = {"go": "goes to", "take": "takes", "eat": "eats", "meet": "meets"}
_PAST = {"go": "went to", "take": "took", "eat": "ate", "meet": "met"}
_QUESTIONS = {"go": "Where does {} go", "take": "What does {} take", "eat": "What does {} eat", "meet": "Who does {} meet"}
_PAST_QUESTIONS = {deed: question.replace("does", "did") for deed, question in _QUESTIONS.items()}
_WRONG_OPTIONS = 3
_PROBLEMS = 9000

Event = tuple[str, Deed, str]


@dataclass(frozen=True)
class Passage:
    """Events (person, deed, object) in their order.

    What is asked for is the object of `person`'s `deed`; if there are two, the first or the last. Somebody else does the same, so
    that three objects at least are options, and looking for an option that the passage mentions does not find the answer.
    """

    events: tuple[Event, ...]
    person: str
    deed: Deed
    order: Order

    @property
    def keys(self) -> tuple[Key, ...]:
        return (("passage", self.person, self.deed, self.order, *(part for event in self.events for part in event)),)

    @property
    def level(self) -> int:
        """1 if `person` does the deed once, 2 if twice, 3 if the other person does it twice as well."""
        if self.order == "only":
            return 1
        return 3 if all(deed == self.deed for _, deed, _ in self.events) else 2

    @property
    def right(self) -> str:
        """The object that is asked for."""
        found = self._objects(self.person, self.deed)
        return found[-1] if self.order == "last" else found[0]

    def _objects(self, person: str, deed: Deed) -> list[str]:
        return [what for who, done, what in self.events if (who, done) == (person, deed)]

    def _wrong(self, rng: Random) -> list[str]:
        """Objects of the same deed: those that the passage has as well, then others."""
        mentioned = [what for _, deed, what in self.events if deed == self.deed and what != self.right]
        others = [what for what in WHAT[self.deed] if what not in mentioned and what != self.right]
        return (mentioned + rng.sample(others, len(others)))[:_WRONG_OPTIONS]

    def ask(self, rng: Random) -> Question:
        story = " ".join(f"{person} {_PRESENT[deed]} the {what}." for person, deed, what in self.events)
        asked = _QUESTIONS[self.deed].format(self.person) + ("" if self.order == "only" else f" {self.order}")
        options, letter = in_order(self.right, self._wrong(rng))
        return Question(
            prompt=f"{story}\n{asked}?\n{lettered(options)}",
            response=f"{self.right}. Therefore, the answer is {letter}.",
            answer=letter,
            choices=options,
        )

    def tell(self, rng: Random) -> str:
        story = [f"{person} {_PAST[deed]} the {what}." for person, deed, what in self.events]
        answers = []
        for person, deed in dict.fromkeys(event[:2] for event in self.events):
            found = self._objects(person, deed)
            orders = ("",) if len(found) == 1 else (" first", " last")
            asked = _PAST_QUESTIONS[deed].format(person)
            answers += [f"{asked}{order}? The {what}." for order, what in zip(orders, found, strict=True)]
        sentences = story + rng.sample(answers, len(answers))
        if rng.random() < 0.5:
            asked = _PAST_QUESTIONS[self.deed].format(self.person) + ("" if self.order == "only" else f" {self.order}")
            sentences.append(f"{asked}? {inline_choice(self.right, self._wrong(rng), rng)}")
        return " ".join(sentences)


def _draw(rng: Random, level: int) -> Passage:
    person, other = rng.sample(PEOPLE, 2)
    deeds: list[Deed] = list(WHAT)
    deed, another = rng.sample(deeds, 2)
    order: Order = "only" if level == 1 else rng.choice(("first", "last"))
    people = {1: (person, other, other), 2: (person, person, other), 3: (person, person, other, other)}[level]
    events: list[Event] = [(who, deed, what) for who, what in zip(people, rng.sample(WHAT[deed], len(people)), strict=True)]
    if level < 3:
        events.append((person, another, rng.choice(WHAT[another])))
    rng.shuffle(events)
    return Passage(tuple(events), person, deed, order)


def _problems() -> Sequence[Passage]:
    rng = Random("passage")
    drawn: dict[Passage, None] = {}
    while len(drawn) < _PROBLEMS:
        drawn[_draw(rng, level=1 + len(drawn) % 3)] = None
    return list(drawn)


FAMILY = Family("passage", "choice", "who does what in four short sentences, four options", _problems)
