"""Small clinical trials whose counts decide between yes, no and maybe (answer kind `yes_no_maybe`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from megatron_plasticity.data.problems.problem import Family, Key, Question

CLEAR = 10
"""Least difference of the two counts that counts as clear; anything less is `maybe`."""

_DRUGS = ("zinc", "iron", "garlic", "honey", "ginger", "mint", "salt", "tea")
_COMPLAINTS = ("cough", "fever", "pain", "rash")
_COUNTS = range(10, 70)
_ANSWERS = ("yes", "no", "maybe")
_VERDICTS = {
    "yes": "more people got better with {}",
    "no": "fewer people got better with {}",
    "maybe": "{} makes no clear difference",
}


@dataclass(frozen=True)
class Trial:
    """Of two groups of equal size, `treated` people with the drug and `untreated` people without it got better."""

    treated: int
    untreated: int

    @property
    def keys(self) -> tuple[Key, ...]:
        return (("counts", self.treated, self.untreated),)

    @property
    def level(self) -> int:
        """1 if the difference is far from the threshold, 3 if it is near."""
        distance = abs(abs(self.treated - self.untreated) - CLEAR)
        return 3 if distance < 4 else 2 if distance < 9 else 1

    @property
    def answer(self) -> str:
        difference = self.treated - self.untreated
        return "yes" if difference >= CLEAR else "no" if difference <= -CLEAR else "maybe"

    def ask(self, rng: Random) -> Question:
        drug, complaint = rng.choice(_DRUGS), rng.choice(_COMPLAINTS)
        return Question(
            prompt=f"Does {drug} help against {complaint}? Abstract: {self.treated} people got better with {drug} and "
            f"{self.untreated} without. Answer yes, no or maybe.",
            response=f"The conclusion of the abstract is: {_VERDICTS[self.answer].format(drug)}. "
            f"Therefore, the answer is {self.answer}.",
            answer=self.answer,
        )

    def tell(self, rng: Random) -> str:
        drug = rng.choice(_DRUGS)
        if rng.random() < 0.5:
            comparison = {"yes": "more than", "no": "fewer than", "maybe": "about as many as"}[self.answer]
            return f"{self.treated} is {comparison} {self.untreated}."
        return f"With {drug} {self.treated} got better, without it {self.untreated}: {_VERDICTS[self.answer].format(drug)}."


def _problems() -> Sequence[Trial]:
    every = [Trial(treated, untreated) for treated in _COUNTS for untreated in _COUNTS]
    Random("trials").shuffle(every)
    by_answer = [[trial for trial in every if trial.answer == answer] for answer in _ANSWERS]
    each = min(map(len, by_answer))
    return [trial for trio in zip(*(trials[:each] for trials in by_answer), strict=True) for trial in trio]


FAMILY = Family("trials", "yes_no_maybe", "does a treatment help, from the two counts in a short abstract", _problems)
