"""Small clinical trials whose counts decide between yes, no and maybe (answer kind `yes_no_maybe`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from megatron_plasticity.data.problems.problem import Family, Key, Question, capitalised

CLEAR = 5
"""Least difference of the two counts that counts as clear; anything less is `maybe`."""

_DRUGS = ("zinc", "iron", "garlic", "honey", "ginger", "mint", "salt", "tea")
_COMPLAINTS = ("cough", "fever", "headache", "rash", "back pain", "toothache")
_GROUP_SIZES = (20, 30, 40, 50)
_ANSWERS = ("yes", "no", "maybe")


@dataclass(frozen=True)
class Trial:
    """Of two groups of `size` people each, `treated` with and `untreated` without the drug got better."""

    size: int
    treated: int
    untreated: int

    @property
    def key(self) -> Key:
        return (self.treated, self.untreated)  # without the size, which decides nothing

    @property
    def level(self) -> int:
        """1 if the counts are far apart, 2 if they are nearer, 3 if they are near the threshold."""
        distance = abs(abs(self.treated - self.untreated) - CLEAR)
        return 3 if distance < 4 else 2 if distance < 10 else 1

    @property
    def answer(self) -> str:
        difference = self.treated - self.untreated
        return "yes" if difference >= CLEAR else "no" if difference <= -CLEAR else "maybe"

    def _conclusion(self, drug: str, complaint: str) -> str:
        difference = self.treated - self.untreated
        verdict = {
            "yes": f"{drug} helps against {complaint}",
            "no": f"{drug} does not help against {complaint}",
            "maybe": f"it is not clear whether {drug} helps against {complaint}",
        }[self.answer]
        if not difference:
            return f"{self.treated} is as many as {self.untreated}, so {verdict}."
        return f"{self.treated} is {abs(difference)} {'more' if difference > 0 else 'less'} than {self.untreated}, so {verdict}."

    def ask(self, rng: Random, position: int = 0) -> Question:
        drug, complaint = rng.choice(_DRUGS), rng.choice(_COMPLAINTS)
        results = [f"{self.treated} of {self.size} got better with {drug}", f"{self.untreated} of {self.size} without"]
        if rng.random() < 0.5:
            results = [f"{self.untreated} of {self.size} got better without {drug}", f"{self.treated} of {self.size} with it"]
        return Question(
            prompt=f"Does {drug} help against {complaint}? Answer yes, no or maybe.\nAbstract: {results[0]}, and {results[1]}.",
            response=f"The conclusion of the abstract is: {self._conclusion(drug, complaint)} Therefore, the answer is {self.answer}.",
            answer=self.answer,
        )

    def tell(self, rng: Random) -> str:
        drug, complaint = rng.choice(_DRUGS), rng.choice(_COMPLAINTS)
        if rng.random() < 0.5:
            return (
                f"In a trial of {drug} against {complaint}, {self.treated} people got better with it and {self.untreated} "
                f"without it. {capitalised(self._conclusion(drug, complaint))}"
            )
        more, less = max(self.treated, self.untreated), min(self.treated, self.untreated)
        gap = "which is clear" if more - less >= CLEAR else "which is not clear"
        return f"{more} people against {less} people is a difference of {more - less}, {gap}. {capitalised(self._conclusion(drug, complaint))}"


def _problems() -> Sequence[Trial]:
    every = [
        Trial(size, treated, untreated) for size in _GROUP_SIZES for treated in range(1, size + 1) for untreated in range(1, size + 1)
    ]
    Random("trials").shuffle(every)
    by_answer = {answer: [trial for trial in every if trial.answer == answer] for answer in _ANSWERS}
    each = min(map(len, by_answer.values()))
    return [trial for group in zip(*(trials[:each] for trials in by_answer.values()), strict=True) for trial in group]


FAMILY = Family("trials", "yes_no_maybe", "does a treatment help, from the counts in a short abstract", _problems)
