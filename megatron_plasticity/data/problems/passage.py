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

    What is asked for is the object of `person`'s `deed`; if there are two, the first or the last.
    """

    events: tuple[Event, ...]
    person: str
    deed: Deed
    order: Order

    @property
    def key(self) -> Key:
        return ("passage", self.person, self.deed, self.order, *(part for event in self.events for part in event))

    @property
    def level(self) -> int:
        """1 if one person does each deed once, 2 if a deed is done twice, 3 if two people do the same deeds."""
        if len({person for person, _, _ in self.events}) > 1:
            return 3
        return 1 if self.order == "only" else 2

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
    deeds: list[Deed] = rng.sample(list(WHAT), len(WHAT))
    deed = deeds[0]
    order: Order = "only"
    events: list[Event] = []
    if level == 1:
        events.extend((person, each, rng.choice(WHAT[each])) for each in deeds)
    elif level == 2:
        order = rng.choice(("first", "last"))
        events.extend((person, deed, what) for what in rng.sample(WHAT[deed], 2))
        events.extend((person, each, rng.choice(WHAT[each])) for each in deeds[1:3])
    else:
        for each in deeds[:2]:
            events.extend((who, each, what) for who, what in zip((person, other), rng.sample(WHAT[each], 2), strict=True))
    rng.shuffle(events)
    return Passage(tuple(events), person, deed, order)


def _problems() -> Sequence[Passage]:
    rng = Random("passage")
    drawn: dict[Passage, None] = {}
    while len(drawn) < _PROBLEMS:
        drawn[_draw(rng, level=1 + len(drawn) % 3)] = None
    return list(drawn)


FAMILY = Family("passage", "choice", "who does what in four short sentences, four options", _problems)
