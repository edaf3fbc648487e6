"""The six families and their split into a train side and a test side."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from random import Random

from megatron_plasticity.data.problems import algebra, arithmetic, categories, passage, steps, trials
from megatron_plasticity.data.problems.problem import Family, Problem
from megatron_plasticity.data.problems.split import Side, side_of
from megatron_plasticity.errors import UserError

LEAST_TRAIN, LEAST_TEST = 2000, 300

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        arithmetic.FAMILY,
        algebra.FAMILY,
        categories.FAMILY,
        trials.FAMILY,
        passage.FAMILY,
        steps.FAMILY,
    )
}


def is_test(problem: Problem) -> bool:
    """Whether a problem belongs to the test side, decided by the hash of its content and never by its wording."""
    return side_of(problem.keys) == "test"


@cache
def problems(family: str, side: Side) -> tuple[Problem, ...]:
    """All the problems of a family on one side, distinct, always in the same order.

    Where the answer is yes, no or maybe, each answer is right equally often; the last problems of the others are left out.
    """
    chosen = tuple(p for p in FAMILIES[family].problems() if side_of(p.keys) == side)
    if FAMILIES[family].answer_kind == "yes_no_maybe":
        chosen = tuple(problem for turn in _in_turn(chosen) for problem in turn)
    least = LEAST_TRAIN if side == "train" else LEAST_TEST
    assert len(chosen) >= least, f"{family} has {len(chosen)} {side} problems, fewer than {least}"
    return chosen


def draw_problems(family: str, side: Side, count: int, seed: int) -> list[Problem]:
    """`count` distinct problems in an order drawn from `seed`; a smaller count gives the beginning of a larger one.

    Where the answer is yes, no or maybe, the answers take turns: their numbers differ by one at most, whatever the count.
    Raises `UserError` if the side has fewer.
    """
    available = problems(family, side)
    if count > len(available):
        raise UserError(
            f"task {family!r} has {len(available)} distinct {side} problems, {count} were asked for: "
            f"lower {side}_examples to at most {len(available)}"
        )
    rng = Random(f"{seed}/{family}/{side}")
    drawn = rng.sample(available, len(available))
    if FAMILIES[family].answer_kind == "yes_no_maybe":
        # Each turn in an order of its own, so that a question's number does not give away its answer.
        drawn = [problem for turn in _in_turn(drawn) for problem in rng.sample(turn, len(turn))]
    return drawn[:count]


def _in_turn(problems: Iterable[Problem]) -> list[tuple[Problem, ...]]:
    """Turns of one problem for each answer, in the order given, until an answer runs out."""
    by_answer: dict[str, list[Problem]] = {}
    for problem in problems:
        by_answer.setdefault(problem.ask(Random(0)).answer, []).append(problem)
    return list(zip(*by_answer.values(), strict=False))
