"""Whether the best λ of one group is another than that of a second one, and what the two groups differ in.

The answer is given twice: for λ itself, and for the AdamW timescale 1/(learning rate · λ · steps), which is what runs of unlike
length have in common (2405.13698). A λ is known no better than the grid allows, and grids differ; so a best λ has moved only if
the brackets of both (see `Choice.bracket`) do not overlap. Each set of candidates misses the best λ of its grid in at most 5 % of
studies, so that a movement is told where there is none in at most 10 %, for each pair of groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from megatron_plasticity.study.report.comparison.facts import Facts, count_text, family_text, ratio_text
from megatron_plasticity.study.report.comparison.findings import Choice, GroupFindings
from megatron_plasticity.study.report.comparison.terms import differences

Judge = Literal["loss", "score"]
Scale = Literal["weight decay", "timescale"]
Question = Literal["tokens", "family", "size", "seed", "other"]
Movement = Literal[
    "larger", "smaller", "larger by a grid step", "smaller by a grid step", "the same", "not told apart", "not known"
]

_SAME_SIZE = 1.05
"""Factor within which models count as equally large, as in the paper's statements."""
_SAME_LENGTH = 1.25
"""Factor within which numbers of tokens per parameter are about the same, likewise."""
_ALIKE_SIZE = 2.0
"""Factor within which models of two families are compared: families do not come in equal sizes. Our own choice."""
_OF_SEED = ("seed", "data.seed")


@dataclass(frozen=True)
class Pair:
    """Two groups; the second has more tokens per parameter, or is larger, if they differ in that."""

    first: GroupFindings
    second: GroupFindings
    question: Question
    also: tuple[str, ...]
    """What else differs, with both values."""

    def movement(self, judge: Judge, scale: Scale) -> Movement:
        """Of the best λ, or of its timescale, from the first group to the second."""
        one, other = (found.by_loss if judge == "loss" else found.by_score for found in (self.first, self.second))
        if one is None or other is None:
            return "not known"
        if scale == "weight decay":
            return _movement(one, other)
        one, other = strengths_of(one, self.first.group.timescales), strengths_of(other, self.second.group.timescales)
        if one is None or other is None:
            return "not known"
        # A larger strength is a shorter timescale.
        turned: dict[Movement, Movement] = {
            "larger": "smaller",
            "smaller": "larger",
            "larger by a grid step": "smaller by a grid step",
            "smaller by a grid step": "larger by a grid step",
        }
        found = _movement(one, other)
        return turned.get(found, found)


def strengths_of(choice: Choice, timescales: dict[float, float | None]) -> Choice | None:
    """A choice in 1/timescale in place of λ; None where the timescale of a λ above 0 is not known."""

    def strength(decay: float) -> float | None:
        if decay == 0:
            return 0.0
        timescale = timescales.get(decay)
        return None if timescale is None else 1 / timescale

    grid = [strength(decay) for decay in choice.grid]
    if None in grid:
        return None
    known = {decay: value for decay, value in zip(choice.grid, grid, strict=True) if value is not None}
    return Choice(
        tuple(known.values()),
        known[choice.best],
        tuple(known[decay] for decay in choice.ties),
        None if choice.candidates is None else tuple(known[decay] for decay in choice.candidates),
    )


def _movement(one: Choice, other: Choice) -> Movement:
    if one.bracket is None or other.bracket is None or one.candidates is None or other.candidates is None:
        return "not known"
    if min(len(one.grid), len(other.grid)) < 2:
        return "not known"
    if _at_most(one.bracket[1], other.bracket[0]):
        return "larger"
    if _at_most(other.bracket[1], one.bracket[0]):
        return "smaller"
    # Of unlike grids, candidates differ even where the best does not.
    if not all(_has(choice.grid, value) for choice in (one, other) for value in (*one.candidates, *other.candidates)):
        return "not told apart"
    if len(one.candidates) == len(other.candidates) == 1 and _equal(one.best, other.best):
        return "the same"
    if _less(max(one.candidates), min(other.candidates)):
        return "larger by a grid step"
    if _less(max(other.candidates), min(one.candidates)):
        return "smaller by a grid step"
    return "not told apart"


def _equal(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9)


def _at_most(one: float, other: float) -> bool:
    return one <= other or _equal(one, other)


def _less(one: float, other: float) -> bool:
    return one < other and not _equal(one, other)


def _has(grid: Sequence[float], value: float) -> bool:
    return any(_equal(value, other) for other in grid)


def pairs_of(found: Sequence[GroupFindings]) -> list[Pair]:
    """Every two groups, with what they differ in, those that answer a question first."""
    order: list[Question] = ["tokens", "family", "size", "seed", "other"]
    pairs = [_pair(one, other) for one, other in combinations(found, 2)]
    return sorted(pairs, key=lambda pair: order.index(pair.question))


def _pair(one: GroupFindings, other: GroupFindings) -> Pair:
    facts, further = one.group.facts, other.group.facts
    length, size = _ratio(facts.tokens_per_parameter, further.tokens_per_parameter), _ratio(facts.parameters, further.parameters)
    families = facts.family is not None and further.family is not None
    same_family = families and facts.family == further.family
    question: Question = "other"
    if same_family and _within(size, _SAME_SIZE) and _beyond(length, _SAME_LENGTH):
        question = "tokens"
    elif families and not same_family and _within(size, _ALIKE_SIZE) and _within(length, _SAME_LENGTH):
        question = "family"
    elif same_family and _beyond(size, _SAME_SIZE) and _within(length, _SAME_LENGTH):
        question = "size"
    elif same_family and _within(size, _SAME_SIZE) and _within(length, _SAME_LENGTH):
        other_paths = {path for path in _differing(facts, further) if path not in _OF_SEED}
        same_text = facts.corpus_sha256 == further.corpus_sha256
        known = bool(facts.settings and further.settings)
        question = "seed" if known and same_text and not other_paths and _differing(facts, further) else "other"
    swap = (question == "tokens" and length is not None and length < 1) or (question == "size" and size is not None and size < 1)
    first, second = (other, one) if swap else (one, other)
    finetuning = differences(first.finetuned, second.finetuned) if first.finetuned and second.finetuned else []
    return Pair(first, second, question, (*_also(first.group.facts, second.group.facts, question), *finetuning))


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if not one or not other else other / one


def _within(ratio: float | None, factor: float) -> bool:
    return ratio is not None and 1 / factor <= ratio <= factor


def _beyond(ratio: float | None, factor: float) -> bool:
    return ratio is not None and not _within(ratio, factor)


def _differing(one: Facts, other: Facts) -> list[str]:
    paths = dict.fromkeys([*one.settings, *other.settings])
    return [path for path in paths if one.settings.get(path) != other.settings.get(path)]


def _also(one: Facts, other: Facts, question: Question) -> list[str]:
    """What differs beside that which the question is about."""
    found = []
    if question == "other" and one.family != other.family:
        found.append(f"family {family_text(one.family)} against {family_text(other.family)}")
    if question in ("family", "other") and not _within(_ratio(one.parameters, other.parameters), _SAME_SIZE):
        found.append(f"parameters {count_text(one.parameters)} against {count_text(other.parameters)}")
    if question == "other" and not _within(_ratio(one.tokens_per_parameter, other.tokens_per_parameter), _SAME_LENGTH):
        lengths = (ratio_text(each.tokens_per_parameter) for each in (one, other))
        found.append(f"tokens per parameter {' against '.join(lengths)}")
    if one.corpus_sha256 is None or other.corpus_sha256 is None:
        found.append("corpus not known")
    elif one.corpus_sha256 != other.corpus_sha256:
        found.append(f"corpus {one.corpus or '?'} against {other.corpus or '?'}")
    if one.tokenizer_sha256 is None or other.tokenizer_sha256 is None:
        found.append("tokenizer not known")
    elif one.tokenizer_sha256 != other.tokenizer_sha256:
        found.append("tokenizer")
    if not one.settings or not other.settings:
        return [*found, "settings of pretraining not known"]
    shape = question in ("family", "size", "other")
    for path in _differing(one, other):
        if path == "model.family" or (shape and path.startswith("model.") and path != "model.context_length"):
            continue
        found.append(f"{path} {one.settings.get(path, 'default')} against {other.settings.get(path, 'default')}")
    return found
