"""The closed world: forty-eight named things, each with a kind, a colour and a place.

Kinds are what the words mean in English; colours and places are drawn once and for all, so they can be known from the corpus
only. Things early in `THINGS` are talked about more often than later ones (Zipf-like), which grades how well a fact is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Literal

from megatron_plasticity.data.problems.problem import article

Relation = Literal["kind", "colour", "place"]
RELATIONS: tuple[Relation, ...] = ("kind", "colour", "place")

_MEMBERS = {
    "bird": "sparrow eagle owl crow goose swan",
    "fish": "trout salmon carp pike cod tuna",
    "tree": "oak elm pine birch maple willow",
    "tool": "hammer saw drill spade rake axe",
    "fruit": "apple plum pear grape lemon melon",
    "flower": "rose tulip lily daisy iris poppy",
    "insect": "ant bee wasp moth beetle flea",
    "gem": "ruby pearl opal topaz amber diamond",
}
COLOURS = ("red", "blue", "green", "brown", "black", "white", "yellow", "grey")
PLACES = ("valley", "island", "village", "coast", "desert", "forest", "harbour", "mountain")

VALUES: dict[Relation, tuple[str, ...]] = {"kind": tuple(_MEMBERS), "colour": COLOURS, "place": PLACES}


@dataclass(frozen=True)
class Thing:
    name: str
    kind: str
    colour: str
    place: str

    def value(self, relation: Relation) -> str:
        return {"kind": self.kind, "colour": self.colour, "place": self.place}[relation]

    def fact(self, relation: Relation) -> str:
        """The fact as one sentence, always in the same words."""
        if relation == "kind":
            return f"The {self.name} is {article(self.kind)}."
        if relation == "colour":
            return f"The {self.name} is {self.colour}."
        return f"The {self.name} is from the {self.place}."


def _make_things() -> tuple[Thing, ...]:
    rng = Random("closed world")
    names = [(name, kind) for kind, members in _MEMBERS.items() for name in members.split()]
    rng.shuffle(names)
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    places = [PLACES[i % len(PLACES)] for i in range(len(names))]
    rng.shuffle(colours)
    rng.shuffle(places)
    return tuple(Thing(*name, colour, place) for name, colour, place in zip(names, colours, places, strict=True))


THINGS = _make_things()
_CUMULATIVE_WEIGHTS = tuple(accumulate(1 / (rank + 20) for rank in range(len(THINGS))))


def draw_thing(rng: Random) -> Thing:
    """A thing, early ones up to three times as often as late ones."""
    return rng.choices(THINGS, cum_weights=_CUMULATIVE_WEIGHTS)[0]


def tell_thing(thing: Thing, rng: Random) -> str:
    """A fact or two of one thing, in words that vary."""
    name, kind, colour, place = thing.name, thing.kind, thing.colour, thing.place
    facts = [thing.fact(relation) for relation in RELATIONS]
    forms = (
        *facts,
        " ".join(rng.sample(facts, 2)),
        f"The {name} is {article(kind)} from the {place}.",
        f"The {colour} {name} is {article(kind)}.",
        f"The {colour} {name} comes from the {place}.",
        f"What kind of thing is the {name}? {facts[0]}",
        f"Which colour has the {name}? {facts[1]}",
        f"Where does the {name} come from? {facts[2]}",
    )
    return rng.choice(forms)
