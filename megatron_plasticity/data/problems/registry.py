"""The six families and their split into a train side and a test side."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Literal

from megatron_plasticity.data.problems import algebra, arithmetic, categories, passage, steps, trials
from megatron_plasticity.data.problems.problem import Family, Problem
from megatron_plasticity.data.problems.split import on_test_side
from megatron_plasticity.errors import UserError

Side = Literal["train", "test"]

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
    return on_test_side(problem.key)


@cache
def problems(family: str, side: Side) -> tuple[Problem, ...]:
    """All the problems of a family on one side, distinct, always in the same order."""
    chosen = tuple(p for p in FAMILIES[family].problems() if is_test(p) == (side == "test"))
    least = LEAST_TRAIN if side == "train" else LEAST_TEST
    assert len(chosen) >= least, f"{family} has {len(chosen)} {side} problems, fewer than {least}"
    return chosen


def draw_problems(family: str, side: Side, count: int, seed: int) -> list[Problem]:
    """`count` distinct problems in an order drawn from `seed`; a smaller count gives the beginning of a larger one.

    Raises `UserError` if the side has fewer.
    """
    available = problems(family, side)
    if count > len(available):
        raise UserError(
            f"task {family!r} has {len(available)} distinct {side} problems, {count} were asked for: "
            f"lower {side}_examples to at most {len(available)}"
        )
    order = Random(f"{seed}/{family}/{side}").sample(range(len(available)), len(available))
    return [available[index] for index in order[:count]]
