from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from megatron_plasticity.evaluation.metrics import Outcomes, bootstrap_metrics, cluster_answers, question_values


def _equal(a: str, b: str) -> bool:
    return a == b


def _outcomes(
    greedy: list[bool], answers: list[list[str | None]], truth: list[str], rewards: list[list[float]] | None = None
) -> Outcomes:
    return Outcomes(
        greedy_correct=np.array(greedy),
        sampled_correct=np.array([[answer == right for answer in row] for row, right in zip(answers, truth, strict=True)]),
        clusters=np.array([cluster_answers(row, _equal) for row in answers]),
        answered=np.array([[answer is not None for answer in row] for row in answers]),
        rewards=None if rewards is None else np.array(rewards),
    )


def _values(outcomes: Outcomes) -> dict[str, float]:
    return {name: metric.value for name, metric in bootstrap_metrics(question_values(outcomes), 0, 0).items()}


def test_clusters_are_numbered_in_sample_order_and_no_answer_stays_alone() -> None:
    assert cluster_answers(["a", None, "b", "a", None, "b", "a"], _equal) == [0, 1, 2, 0, 3, 2, 0]


def test_clusters_compare_with_the_first_member() -> None:
    # "close" is not transitive: 2 equals 1 and joins it; 3 equals 2 but not 1, so it founds a cluster.
    def close(a: str, b: str) -> bool:
        return abs(int(a) - int(b)) <= 1

    assert cluster_answers(["1", "2", "3"], close) == [0, 0, 1]


def test_majority_ties_go_to_the_earliest_cluster() -> None:
    outcomes = _outcomes(
        [False] * 4, [["a", "b", "b", "a"], ["a", "b", "b", "c"], [None, None, "a", "b"], ["b", None, None, None]], ["a"] * 4
    )
    assert question_values(outcomes)["maj"].tolist() == [1, 0, 0, 0]


def test_many_samples_without_an_answer_are_no_majority() -> None:
    outcomes = _outcomes([False], [[None, None, None, "a", "a"]], ["a"])
    assert _values(outcomes)["maj"] == 1


def test_hand_made_case() -> None:
    answers: list[list[str | None]] = [["a", "b", "b", "b"], ["a", "a", None, "c"], ["x", "y", "z", None]]
    outcomes = _outcomes([True, False, False], answers, ["a"] * 3, [[1, 0, 0, 0], [0, 1, 2, 3], [4, 4, 4, 4]])
    assert _values(outcomes) == pytest.approx(
        {
            "greedy": 1 / 3,
            "maj": 1 / 3,
            "rm": 1 / 3,
            "pass": 2 / 3,
            "correct_ratio": (1 / 4 + 2 / 4) / 2,  # the third question has no correct sample and does not count
            "orm": (1 / 4 + 6 / 4 + 16 / 4) / 3,
            "format_rate": (1 + 3 / 4 + 3 / 4) / 3,
        }
    )


def test_undefined_metrics_are_absent_and_not_zero() -> None:
    values = _values(_outcomes([False, True], [["b", "b"], ["c", None]], ["a", "a"]))
    assert set(values) == {"greedy", "maj", "pass", "format_rate"}
    assert values["pass"] == 0


def _brute_force(
    greedy: list[bool], answers: list[list[str | None]], truth: list[str], rewards: list[list[float]]
) -> dict[str, float]:
    """The definitions of the paper, written as plain loops over one question after the other."""
    count, samples = len(truth), len(answers[0])
    totals = dict.fromkeys(("greedy", "maj", "rm", "pass", "orm", "format_rate"), 0.0)
    ratios = []
    for i in range(count):
        right = [answer == truth[i] for answer in answers[i]]
        groups: list[list[int]] = []
        for j, answer in enumerate(answers[i]):
            home = [group for group in groups if answer is not None and answers[i][group[0]] == answer]
            if home:
                home[0].append(j)
            else:
                groups.append([j])
        largest = groups[0]
        for group in groups[1:]:
            if len(group) > len(largest):
                largest = group
        best = 0
        for j in range(samples):
            if rewards[i][j] > rewards[i][best]:
                best = j
        totals["greedy"] += greedy[i]
        totals["maj"] += right[largest[0]]
        totals["rm"] += right[best]
        totals["pass"] += any(right)
        totals["orm"] += sum(rewards[i]) / samples
        totals["format_rate"] += sum(answer is not None for answer in answers[i]) / samples
        if any(right):
            ratios.append(sum(right) / samples)
    metrics = {name: total / count for name, total in totals.items()}
    return metrics | ({"correct_ratio": sum(ratios) / len(ratios)} if ratios else {})


def test_metrics_equal_a_brute_force_implementation_on_random_inputs() -> None:
    draw = random.Random(0)
    without_ratio = 0
    for _ in range(300):
        count, samples = draw.randint(1, 6), draw.randint(1, 7)
        vocabulary: list[str | None] = [None, "a", "b", "c", "d"][: draw.randint(2, 5)]
        answers = [[draw.choice(vocabulary) for _ in range(samples)] for _ in range(count)]
        truth = [draw.choice(["a", "b", "z"]) for _ in range(count)]
        greedy = [draw.random() < 0.5 for _ in range(count)]
        rewards = [[float(draw.randint(-2, 2)) for _ in range(samples)] for _ in range(count)]
        expected = _brute_force(greedy, answers, truth, rewards)
        without_ratio += "correct_ratio" not in expected
        assert _values(_outcomes(greedy, answers, truth, rewards)) == pytest.approx(expected)
    assert without_ratio > 10  # the undefined case was met


def test_bootstrap_equals_a_loop_over_the_same_resamples() -> None:
    values = np.array([0.25, math.nan, 0.75, math.nan, 1.0])
    metric = bootstrap_metrics({"correct_ratio": values}, 500, seed=3)["correct_ratio"]
    counts = np.random.default_rng(3).multinomial(5, [0.2] * 5, size=500)
    means = []
    for row in counts:
        drawn = [value for value, times in zip(values, row, strict=True) for _ in range(times) if not math.isnan(value)]
        if drawn:
            means.append(sum(drawn) / len(drawn))
    assert len(means) < 500  # some resamples hold undefined questions only
    assert metric.value == pytest.approx(2 / 3)
    assert (metric.low, metric.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))


def test_bootstrap_interval_has_its_nominal_coverage() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        metric = bootstrap_metrics({"greedy": (draw.random(100) < 0.3).astype(float)}, 400, seed=trial)["greedy"]
        assert metric.low is not None
        assert metric.high is not None
        covered += metric.low <= 0.3 <= metric.high
    assert 0.90 < covered / 300 < 0.985


def test_bootstrap_is_seeded_and_may_be_left_out() -> None:
    values = {"greedy": np.arange(20) % 3 / 2.0}
    assert bootstrap_metrics(values, 100, 1) == bootstrap_metrics(values, 100, 1)
    assert bootstrap_metrics(values, 100, 1) != bootstrap_metrics(values, 100, 2)
    assert bootstrap_metrics(values, 0, 1)["greedy"].as_json() == {
        "value": pytest.approx(values["greedy"].mean()),
        "low": None,
        "high": None,
    }


@pytest.mark.parametrize("make", [lambda: np.array([]), lambda: np.array([math.nan, math.nan])])
def test_metrics_of_nothing_are_absent(make: Callable[[], np.ndarray]) -> None:
    assert bootstrap_metrics({"greedy": make()}, 10, 0) == {}
