from __future__ import annotations

import os
import time

import pytest

from megatron_plasticity.evaluation.math_pool import MathPool


def _behave(a: str, b: str) -> bool:
    """Stands for a comparison that can hang, die or fail; it runs in the worker processes."""
    if a == "hang":
        time.sleep(600)
    if a == "die":
        os._exit(1)
    if a == "fail":
        raise RuntimeError(b)
    if a == "memory":
        return bool(bytearray(8 * 1024**3))
    return a == b


@pytest.mark.parametrize("workers", [1, 2])
def test_a_comparison_that_hangs_dies_or_fails_is_not_equal_and_the_others_go_on(workers: int) -> None:
    pairs = [("1", "1"), ("hang", ""), ("1", "2"), ("die", ""), ("2", "2"), ("fail", ""), ("memory", ""), ("3", "3")]
    pool = MathPool(workers, time_limit=1.5, compare=_behave)
    start = time.monotonic()
    try:
        assert pool.equal_all(pairs) == [a == b for a, b in pairs]
        assert time.monotonic() - start < 120
        assert pool.equal_all([("4", "4"), ("4", "5")]) == [True, False]  # the pool can be used again
    finally:
        pool.close()


def test_a_text_that_hangs_costs_its_time_once() -> None:
    pool = MathPool(1, time_limit=1.0, compare=_behave)
    start = time.monotonic()
    try:
        assert pool.equal_all([("hang", str(number)) for number in range(40)]) == [False] * 40
        assert pool.equal_all([("hang", "x"), ("x", "x")]) == [False, True]
        assert time.monotonic() - start < 35
        assert pool._endless == {"hang"}
    finally:
        pool.close()


def test_an_idle_worker_that_is_killed_is_replaced() -> None:
    pool = MathPool(1, compare=_behave)
    try:
        assert pool.equal_all([("1", "1")]) == [True]
        pool._workers[0]._process.kill()
        pool._workers[0]._process.join()
        assert pool.equal_all([("1", "1"), ("1", "2")]) == [True, False]
    finally:
        pool.close()


def test_more_workers_start_only_when_there_is_much_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = MathPool(2, compare=_behave)
    try:
        assert pool.equal_all([("1", "1"), ("1", "2"), ("2", "2")]) == [True, False, True]
        assert len(pool._workers) == 1
        monkeypatch.setattr("megatron_plasticity.evaluation.math_pool.SECONDS_ALONE", 0.0)
        assert pool.equal_all([("1", "1"), ("1", "2"), ("2", "2")]) == [True, False, True]
        assert len(pool._workers) == 2
    finally:
        pool.close()


def test_no_pairs_start_no_process() -> None:
    pool = MathPool(compare=_behave)
    assert pool.equal_all([]) == []
    assert pool._workers == []
