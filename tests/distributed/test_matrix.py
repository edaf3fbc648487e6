"""The table of layouts holds what it promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from tests.distributed.matrix import LAYOUTS, Layout

Value = tuple[str, object]

AXES: dict[str, Callable[[Layout], object]] = {
    "family": lambda layout: layout.family,
    "pipeline": lambda layout: layout.pipeline,
    "data": lambda layout: layout.data,
    "tensor": lambda layout: layout.tensor,
    "sequence": lambda layout: layout.sequence,
    "kv_heads": lambda layout: layout.kv_heads,
    "zero_stage": lambda layout: layout.zero_stage,
    "dtype": lambda layout: layout.dtype,
    "accumulation": lambda layout: layout.accumulation,
    "checkpointing": lambda layout: layout.checkpointing,
    "tied": lambda layout: layout.tied,
    "stages": lambda layout: "stated" if layout.layers_per_stage else "balanced",
    "rows": lambda layout: layout.rows,
    "scope": lambda layout: layout.scope,
    "clip": lambda layout: layout.clip,
}
PROCESSES = 8


def values_of(layout: Layout) -> list[Value]:
    return [(axis, value(layout)) for axis, value in AXES.items()]


def can_go_together(one: Value, other: Value) -> bool:
    """Whether any layout on so many processes may have both values; `one` comes first in `AXES`."""
    (axis, value), (other_axis, other_value) = one, other
    if {axis, other_axis} <= {"pipeline", "data", "tensor"}:
        return int(value) * int(other_value) <= PROCESSES  # type: ignore[call-overload]
    return (axis, value, other_axis, other_value) not in {
        ("pipeline", 2, "zero_stage", 2),
        ("pipeline", 2, "zero_stage", 3),
        ("pipeline", 4, "zero_stage", 2),
        ("pipeline", 4, "zero_stage", 3),
        ("pipeline", 1, "stages", "stated"),
        ("tensor", 1, "sequence", True),
        # and what follows from these: stages are stated for pipelines only
        ("zero_stage", 2, "stages", "stated"),
        ("zero_stage", 3, "stages", "stated"),
    }


def test_every_two_values_that_can_go_together_do() -> None:
    together = {pair for layout in LAYOUTS for pair in itertools.combinations(values_of(layout), 2)}
    values = {axis: {value(layout) for layout in LAYOUTS} for axis, value in AXES.items()}
    wanted = {
        ((axis, value), (other_axis, other_value))
        for (axis, own), (other_axis, others) in itertools.combinations(values.items(), 2)
        for value in own
        for other_value in others
        if can_go_together((axis, value), (other_axis, other_value))
    }
    assert wanted - together == set()


def test_each_axis_takes_all_its_values() -> None:
    for axis, expected in {
        "family": {"llama2", "olmo2"},
        "pipeline": {1, 2, 4},
        "data": {1, 2, 4},
        "tensor": {1, 2, 4},
        "zero_stage": {0, 1, 2, 3},
        "dtype": {"fp32", "bf16"},
        "rows": {"equal", "varied"},
        "scope": {"all", "no_token_embedding", "matrices"},
    }.items():
        assert {AXES[axis](layout) for layout in LAYOUTS} == expected


def test_rows_are_different_layouts_on_two_to_eight_processes() -> None:
    assert len({layout.id for layout in LAYOUTS}) == len(LAYOUTS) >= 45
    assert {layout.processes for layout in LAYOUTS} == {2, 4, PROCESSES}
    assert 14 <= sum(layout.quick for layout in LAYOUTS) <= 18


def test_heads_are_split_evenly_one_each_and_replicated() -> None:
    """For both families: under QK-norm replicated key heads bring replicated gains."""
    for family in ("llama2", "olmo2"):
        ratios = {layout.tensor / layout.kv_heads for layout in LAYOUTS if layout.family == family and layout.tensor > 1}
        assert {0.5, 1.0, 2.0} <= ratios
