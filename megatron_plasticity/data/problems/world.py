"""The closed world: a hundred named things, each with a kind, a colour and a place.

Kinds are what the words mean in English; colours and places are drawn once and for all, so they can be known from the corpus
only. Things early in `THINGS` are talked about more often than later ones (Zipf-like), which grades how well a fact is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Literal

from megatron_plasticity.data.problems.problem import article, capitalised

Relation = Literal["kind", "colour", "place"]
RELATIONS: tuple[Relation, ...] = ("kind", "colour", "place")

_MEMBERS = {
    "bird": "sparrow eagle owl crow heron goose swan robin finch hawk",
    "fish": "trout salmon carp pike cod tuna herring perch eel shark",
    "tree": "oak elm pine birch maple willow cedar ash fir larch",
    "tool": "hammer saw drill spade rake file axe wrench chisel plane",
    "fruit": "apple plum pear grape lemon melon fig cherry peach mango",
    "flower": "rose tulip lily daisy iris orchid poppy violet aster lotus",
    "insect": "ant bee wasp moth beetle cricket fly flea gnat locust",
    "gem": "ruby pearl opal topaz amber jade garnet quartz onyx diamond",
    "vegetable": "carrot potato onion bean pea leek radish turnip cabbage parsnip",
    "boat": "canoe kayak ferry raft yacht barge tanker dinghy gondola tug",
}
COLOURS = ("red", "blue", "green", "brown", "black", "white", "yellow", "grey")
PLACES = ("valley", "island", "village", "coast", "desert", "forest", "harbour", "mountain")


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
            return f"{capitalised(article(self.name))} is {article(self.kind)}."
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
    """A thing, early ones up to six times as often as late ones."""
    return rng.choices(THINGS, cum_weights=_CUMULATIVE_WEIGHTS)[0]


def tell_thing(thing: Thing, rng: Random) -> str:
    """Some facts of one thing, in words that vary."""
    name, kind, colour, place = thing.name, thing.kind, thing.colour, thing.place
    forms = (
        f"{thing.fact('kind')} {thing.fact('colour')} {thing.fact('place')}",
        f"{thing.fact('colour')} {thing.fact('kind')}",
        f"{thing.fact('place')} {thing.fact('colour')}",
        f"The {name} is {article(kind)} from the {place}.",
        f"The {colour} {name} is {article(kind)}.",
        f"The {colour} {name} comes from the {place}.",
        f"What colour is the {name}? It is {colour}.",
        f"Where is the {name} from? It is from the {place}.",
        f"What is {article(name)}? {thing.fact('kind')}",
    )
    return rng.choice(forms)
