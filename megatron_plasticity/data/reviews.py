"""Short reviews with negation and contrast, whose verdict no single word gives away.

Each review states two opinions about a thing of the closed world. An opinion is an adjective, perhaps negated; a contrast word
says which of the two opinions weighs more. Adjectives, negations, orders and contrasts are drawn independently of the verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from megatron_plasticity.data.problems.problem import PEOPLE, Key
from megatron_plasticity.data.problems.world import THINGS, Thing

_GOOD = ("good", "strong", "fresh", "lovely", "clean", "useful")
_BAD = ("bad", "weak", "stale", "ugly", "dirty", "useless")
_ENDINGS = ("said {}", "wrote {}", "thought {}", "told us {}")


@dataclass(frozen=True)
class Review:
    """`person`'s two opinions, of which the second weighs more, about `thing`; each opinion is (adjective, negated)."""

    thing: Thing
    person: str
    weaker: tuple[str, bool]
    stronger: tuple[str, bool]
    form: int

    @property
    def key(self) -> Key:
        """What decides the verdict, without the thing and the person."""
        return ("review", *self.weaker, *self.stronger, self.form)

    @property
    def positive(self) -> bool:
        adjective, negated = self.stronger
        return (adjective in _GOOD) != negated

    @property
    def text(self) -> str:
        """The review; it ends with who wrote it, so its last words tell nothing about the verdict."""
        minor, major = (f"{'not ' if negated else ''}{adjective}" for adjective, negated in (self.weaker, self.stronger))
        name = self.thing.name
        body = (
            f"The {name} is {minor}, but it is {major}",
            f"The {name} is {major}, although it is {minor}",
            f"Although the {name} is {minor}, it is {major}",
            f"It is {major}, even if the {name} is {minor}",
        )[self.form]
        return f"{body}, {_ENDINGS[self.form].format(self.person)}."

    def verdict(self, rng: Random) -> str:
        """A sentence that follows from the review, as the pretraining corpus continues it."""
        good = (f"{self.person} is happy with it.", f"So {self.person} likes the {self.thing.name}.")
        bad = (f"{self.person} is unhappy with it.", f"So {self.person} dislikes the {self.thing.name}.")
        return rng.choice(good if self.positive else bad)


FORMS = 4


def draw_review(rng: Random, positive: bool) -> Review:
    """A review with the given verdict; the weaker opinion is of the other polarity, or in one case in four of the same."""

    def opinion(favourable: bool) -> tuple[str, bool]:
        negated = rng.random() < 0.5
        return rng.choice(_GOOD if favourable != negated else _BAD), negated

    weaker = opinion(positive if rng.random() < 0.25 else not positive)
    return Review(rng.choice(THINGS), rng.choice(PEOPLE), weaker, opinion(positive), rng.randrange(FORMS))
