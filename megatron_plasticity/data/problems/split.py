"""Which side of the train/test split a problem is on: a pure function of its content."""

from __future__ import annotations

import hashlib

from megatron_plasticity.data.problems.problem import Key

_TEST_SHARE = 1 / 6


def on_test_side(key: Key) -> bool:
    """Whether the content `key` is for tests only. One key in six is, by SHA-256, on every machine alike."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") < _TEST_SHARE * 2**64
