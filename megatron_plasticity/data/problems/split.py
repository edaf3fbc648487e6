"""Which side of the train/test split a problem is on: a pure function of its content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from megatron_plasticity.data.problems.problem import Key

Side = Literal["train", "test"]

_TEST_SHARE = 1 / 6


def on_test_side(key: Key) -> bool:
    """Whether the content `key` is for tests only. One key in six is, by SHA-256, on every machine alike."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") < _TEST_SHARE * 2**64


def side_of(keys: Sequence[Key]) -> Side | None:
    """The side of a problem with these keys, or None if it may be on neither.

    The first key decides what a test problem is. A training problem has no key at all on the test side; one whose later keys
    alone are there would show in training what test problems ask, and is left out.
    """
    if on_test_side(keys[0]):
        return "test"
    return None if any(map(on_test_side, keys)) else "train"


def two_step_windows(values: Sequence[int], steps: Sequence[tuple[Literal["+", "-"], int]]) -> tuple[Key, ...]:
    """The keys of a calculation with two or more steps: each two consecutive steps, with the value before them.

    `values` are the value at the start and after each step, as long as `steps` or longer. Single steps are too few to be held
    out. Families that share this function share its split, so that neither one's training works out the other's test problems.
    """
    return tuple(("sum", before, *first, *second) for before, first, second in zip(values, steps, steps[1:], strict=False))
