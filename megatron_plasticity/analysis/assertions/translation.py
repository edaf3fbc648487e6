"""What a λ of the paper means in a run of another length or learning rate.

The paper's statements speak of λ = 0.1 and of λ = 10. How strongly λ decays depends on the learning rate and on the number of
steps: what a run has in common with a longer one is its AdamW timescale 1/(learning rate · λ · steps), the share of the run that
its weights remember (Wang and Aitchison, 2405.13698). A run with the timescale τ decays as strongly as a run by a recipe of the
paper does with λ = 1/(τ · learning rate · steps) of that recipe.

The paper's recipes differ in learning rate · steps, at 20 tokens per parameter from 2.4 to 5.7, and its statement about λ = 0.1
is about all of them. So a λ of ours becomes a range of λ of the paper, one end per extreme recipe, and counts as above 0.1
only if the whole range is. A run that has the learning rate and the steps of a recipe keeps its λ.

That the timescale is what carries over is a conjecture, supported by the near constant best timescale over OLMo's two lengths
(0.29 and 0.25). It leaves out the shape of the learning-rate schedule, the batch size and which tensors decay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SAME_RECIPE = 0.05
"""Relative difference in learning rate · steps up to which a run counts as done by a recipe: rounding of steps and of tokens."""
_SAME_MODEL = 0.05
"""Relative difference in parameters up to which models count as equally large, and as one of the paper's."""
_ABOUT = 1.25
"""Factor within which a number of tokens per parameter is about 20, or about 140: the best timescale moves with it, and no claim
is made for lengths in between."""
_ROUNDING = 1e-6
SHORT, LONG = 20.0, 140.0
"""Tokens per parameter of the paper's runs."""


@dataclass(frozen=True)
class Recipe:
    """A setting of the paper (2602.11137): learning rate and steps are certain, see configs/runs."""

    name: str
    parameters: float
    tokens_per_parameter: float
    learning_rate: float
    steps: int

    @property
    def rate_times_steps(self) -> float:
        return self.learning_rate * self.steps


RECIPES = (
    Recipe("Llama-0.5B", 500_921_856, SHORT, 2.5e-4, 9_537),
    Recipe("Llama-1B", 1_000_564_736, SHORT, 2.0e-4, 19_073),
    Recipe("Llama-4B", 4_000_288_768, SHORT, 1.5e-4, 38_147),
    Recipe("OLMo-1B at 20 tokens per parameter", 1_484_916_736, SHORT, 4e-4, 14_305),
    Recipe("OLMo-1B at 140 tokens per parameter", 1_484_916_736, LONG, 4e-4, 100_136),
)
NOT_STRICT = "Llama-4B"
"""The one setting of the paper in which both best λ are the same, at the end of its grid."""


@dataclass(frozen=True)
class Range:
    """λ of the paper that decay as strongly as one of ours."""

    low: float
    high: float

    def above(self, weight_decay: float) -> bool:
        return self.low > weight_decay * (1 + _ROUNDING)

    def at_most(self, weight_decay: float) -> bool:
        return self.high <= weight_decay * (1 + _ROUNDING)

    def at_least(self, weight_decay: float) -> bool:
        return self.low >= weight_decay * (1 - _ROUNDING)

    def __str__(self) -> str:
        low, high = f"{self.low:.2g}", f"{self.high:.2g}"
        return low if low == high else f"{low} to {high}"


@dataclass(frozen=True)
class Setting:
    """What the base models of a group have in common but for λ. What is not known is None."""

    timescales: Mapping[float, float | None]
    """λ → AdamW timescale, a share of the run; None for λ = 0, and where it is not known."""
    parameters: float | None = None
    tokens_per_parameter: float | None = None

    @property
    def recipe(self) -> Recipe | None:
        """The paper's setting that this one is, by size and length."""
        return next((r for r in RECIPES if self._is_as_large_as(r) and self.is_about(r.tokens_per_parameter)), None)

    def is_about(self, tokens_per_parameter: float) -> bool:
        known = self.tokens_per_parameter
        return known is not None and tokens_per_parameter / _ABOUT <= known <= tokens_per_parameter * _ABOUT

    def same_model(self, other: Setting) -> bool:
        """Whether both have equally many parameters."""
        if self.parameters is None or other.parameters is None:
            return False
        return abs(self.parameters / other.parameters - 1) <= _SAME_MODEL

    def in_the_paper(self, weight_decay: float) -> Range | None:
        """λ of the paper's runs of this length (of those of 20 tokens per parameter, unless it is about 140) that decay as
        strongly; None if the timescale of a λ > 0 is not known and the models are none of the paper's."""
        if weight_decay == 0:
            return Range(0.0, 0.0)
        length = LONG if self.is_about(LONG) else SHORT
        recipes = [recipe for recipe in RECIPES if recipe.tokens_per_parameter == length]
        timescale = self.timescales.get(weight_decay)
        if timescale is None:
            # Of public checkpoints λ is known, but neither learning rate nor steps: those are the paper's if the model is.
            return Range(weight_decay, weight_decay) if self.recipe else None
        own = 1 / (timescale * weight_decay)
        if any(abs(own / recipe.rate_times_steps - 1) <= _SAME_RECIPE for recipe in recipes):
            return Range(weight_decay, weight_decay)
        found = [1 / (timescale * recipe.rate_times_steps) for recipe in recipes]
        return Range(min(found), max(found))

    def that_are(self, weight_decays: Sequence[float], relation: str, bound: float) -> list[float]:
        """Those of `weight_decays` whose whole range is `above`, `at_most` or `at_least` the paper's λ `bound`."""
        ranges = {decay: self.in_the_paper(decay) for decay in weight_decays}
        return [decay for decay, found in ranges.items() if found is not None and getattr(found, relation)(bound)]

    def _is_as_large_as(self, recipe: Recipe) -> bool:
        return self.parameters is not None and abs(self.parameters / recipe.parameters - 1) <= _SAME_MODEL
