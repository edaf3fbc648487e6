"""Short passages about who is where, with a question and four options (answer kind `choice`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from megatron_plasticity.data.problems.problem import PEOPLE, Family, Key, Question, inline_choice, lettered, place

SPOTS = ("park", "school", "market", "barn", "kitchen", "garden", "library", "station")
OBJECTS = ("kite", "ball", "lamp", "key", "hat", "map")
_PROBLEMS = 9000

Event = tuple[str, Literal["goes", "takes"], str]


@dataclass(frozen=True)
class Passage:
    """Events in the order in which they happen, and the person or object that is looked for."""

    events: tuple[Event, ...]
    sought: str

    @property
    def key(self) -> Key:
        return ("passage", self.sought, *(part for event in self.events for part in event))

    @property
    def level(self) -> int:
        """1 for a person who goes once, 2 for one who moves on, 3 for an object, which is where its holder is."""
        if self.sought in OBJECTS:
            return 3
        return 2 if sum(person == self.sought for person, _, _ in self.events) > 1 else 1

    @property
    def spot(self) -> str:
        """Where what is looked for is at the end."""
        return self._spot_of(self.sought)

    def _spot_of(self, sought: str) -> str:
        holder = next((person for person, verb, what in self.events if verb == "takes" and what == sought), sought)
        return next(what for person, verb, what in reversed(self.events) if person == holder and verb == "goes")

    @property
    def _wrong(self) -> list[str]:
        """The three other spots of the passage, so that a spot's being mentioned gives nothing away."""
        spots = dict.fromkeys(what for _, verb, what in self.events if verb == "goes")
        return [f"the {spot}" for spot in spots if spot != self.spot]

    def ask(self, rng: Random, position: int) -> Question:
        passage = _story(self.events, {"goes": "goes to", "takes": "takes"})
        right = f"the {self.spot}"
        options, letter = place(right, self._wrong, rng, position)
        return Question(
            prompt=f"{passage}\nWhere is {_named(self.sought)}?\n{lettered(options)}",
            response=f"{right}. Therefore, the answer is {letter}.",
            answer=letter,
            choices=options,
        )

    def tell(self, rng: Random) -> str:
        story = _story(self.events, {"goes": "went to", "takes": "took"})
        others = [person for person in dict.fromkeys(person for person, _, _ in self.events) if person != self.sought]
        sought = [*rng.sample(others, len(others)), self.sought]
        ends = "So " + ", ".join(f"{_named(name)} is in the {self._spot_of(name)}" for name in sought) + "."
        if rng.random() < 0.4:
            ends += " " + inline_choice(f"the {self.spot}", self._wrong, rng)
        return f"{story} {ends}"


def _named(sought: str) -> str:
    return f"the {sought}" if sought in OBJECTS else sought


def _story(events: Sequence[Event], verbs: dict[str, str]) -> str:
    return " ".join(f"{person} {verbs[verb]} the {what}." for person, verb, what in events)


def _draw(rng: Random, level: int) -> Passage:
    people, spots = rng.sample(PEOPLE, 4), rng.sample(SPOTS, 4)
    seeker = people[0]
    if level == 1:
        events: list[Event] = [(person, "goes", spot) for person, spot in zip(people, spots, strict=True)]
        rng.shuffle(events)
        return Passage(tuple(events), seeker)
    if level == 2:
        events = [(person, "goes", spot) for person, spot in zip(people[:3], spots, strict=False)]
        rng.shuffle(events)
        first = next(i for i, event in enumerate(events) if event[0] == seeker)
        events.insert(rng.randrange(first + 1, len(events) + 1), (seeker, "goes", spots[3]))
        return Passage(tuple(events), seeker)
    held = rng.choice(OBJECTS)
    events = [(person, "goes", spot) for person, spot in zip(people, spots, strict=True)]
    rng.shuffle(events)
    events.insert(rng.randrange(len(events) + 1), (seeker, "takes", held))
    return Passage(tuple(events), held)


def _problems() -> Sequence[Passage]:
    rng = Random("passage")
    drawn: dict[Passage, None] = {}
    while len(drawn) < _PROBLEMS:
        drawn[_draw(rng, level=1 + len(drawn) % 3)] = None
    return list(drawn)


FAMILY = Family("passage", "choice", "who and what is where after three to five short sentences, four options", _problems)
