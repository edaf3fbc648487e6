from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from megatron_plasticity.evaluation.metrics import (
    Outcomes,
    bootstrap_metrics,
    bootstrap_task_metrics,
    cluster_answers,
    group_values,
    question_values,
)


def _equal(pairs: Sequence[tuple[int, str, str]]) -> list[bool]:
    return [a == b for _, a, b in pairs]


def _outcomes(
    greedy: list[bool], answers: list[list[str | None]], truth: list[str], rewards: list[list[float]] | None = None
) -> Outcomes:
    return Outcomes(
        greedy_correct=np.array(greedy),
        sampled_correct=np.array([[answer == right for answer in row] for row, right in zip(answers, truth, strict=True)]),
        clusters=np.array(cluster_answers(answers, _equal)),
        answered=np.array([[answer is not None for answer in row] for row in answers]),
        rewards=None if rewards is None else np.array(rewards),
    )


def _values(outcomes: Outcomes) -> dict[str, float]:
    return {name: metric.value for name, metric in bootstrap_metrics(question_values(outcomes), 0, 0).items()}


def test_clusters_are_numbered_in_sample_order_and_no_answer_stays_alone() -> None:
    answers = [["a", None, "b", "a", None, "b", "a"], [None, "a", "a"], [None], []]
    assert cluster_answers(answers, _equal) == [[0, 1, 2, 0, 3, 2, 0], [0, 1, 1], [0], []]
    assert cluster_answers([], _equal) == []


def test_all_questions_are_compared_at_once() -> None:
    asked: list[list[tuple[int, str, str]]] = []

    def equal(pairs: Sequence[tuple[int, str, str]]) -> list[bool]:
        asked.append(list(pairs))
        return [a == b for _, a, b in pairs]

    assert cluster_answers([["a", "b", "a"], ["c", "c", "d"]], equal) == [[0, 1, 0], [0, 0, 1]]
    assert asked == [[(0, "b", "a"), (0, "a", "a"), (1, "c", "c"), (1, "d", "c")], [], []]


def test_clusters_compare_with_the_first_member() -> None:
    # "close" is not transitive: 2 equals 1 and joins it; 3 equals 2 but not 1, so it founds a cluster.
    def close(pairs: Sequence[tuple[int, str, str]]) -> list[bool]:
        return [abs(int(a) - int(b)) <= 1 for _, a, b in pairs]

    assert cluster_answers([["1", "2", "3"]], close) == [[0, 0, 1]]


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
            "pass@1": (1 / 4 + 2 / 4) / 3,
            "pass@2": (1 / 2 + 5 / 6) / 3,
            "pass@4": 2 / 3,
            "correct_ratio": (1 / 4 + 2 / 4) / 2,  # the third question has no correct sample and does not count
            "orm": (1 / 4 + 6 / 4 + 16 / 4) / 3,
            "format_rate": (1 + 3 / 4 + 3 / 4) / 3,
        }
    )


def test_undefined_metrics_are_absent_and_not_zero() -> None:
    values = _values(_outcomes([False, True], [["b", "b"], ["c", None]], ["a", "a"]))
    assert set(values) == {"greedy", "maj", "pass", "pass@1", "pass@2", "format_rate"}
    assert values["pass"] == 0


def _brute_force(
    greedy: list[bool], answers: list[list[str | None]], truth: list[str], rewards: list[list[float]]
) -> dict[str, float]:
    """The definitions of the paper, written as plain loops over one question after the other."""
    count, samples = len(truth), len(answers[0])
    sizes = {1, 2, 4, samples} - {size for size in (2, 4) if size > samples}
    totals = dict.fromkeys(("greedy", "maj", "rm", "pass", "orm", "format_rate", *(f"pass@{size}" for size in sizes)), 0.0)
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
        for size in sizes:
            draws = list(itertools.combinations(right, size))
            totals[f"pass@{size}"] += sum(map(any, draws)) / len(draws)
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


def test_pass_at_k_of_sixteen_samples_equals_the_count_of_all_draws() -> None:
    correct = np.array([[j < right for j in range(16)] for right in (0, 1, 3, 15, 16)])
    outcomes = Outcomes(correct[:, 0], correct, np.tile(np.arange(16), (5, 1)), np.ones_like(correct))
    values = question_values(outcomes)
    assert [name for name in values if "@" in name] == ["pass@1", "pass@2", "pass@4", "pass@8", "pass@16"]
    for k in (1, 2, 4, 8, 16):
        draws = list(itertools.combinations(range(16), k))
        expected = [sum(min(draw) < right for draw in draws) / len(draws) for right in (0, 1, 3, 15, 16)]
        assert values[f"pass@{k}"] == pytest.approx(expected)
    assert values["pass@16"].tolist() == values["pass"].tolist()


def test_pass_at_k_is_unbiased() -> None:
    draw = np.random.default_rng(0)
    correct = draw.random((20000, 6)) < 0.2
    outcomes = Outcomes(correct[:, 0], correct, np.zeros((20000, 6), int), correct)
    assert question_values(outcomes)["pass@4"].mean() == pytest.approx(1 - 0.8**4, abs=0.01)


def test_a_task_is_the_plain_mean_of_its_test_sets_resampled_within_each() -> None:
    draw = np.random.default_rng(1)
    small, large = (draw.random(10) < 0.9).astype(float), (draw.random(1000) < 0.2).astype(float)
    task = bootstrap_task_metrics({"small": {"greedy": small}, "large": {"greedy": large}}, 2000, seed=5)["greedy"]
    assert task.value == pytest.approx((small.mean() + large.mean()) / 2)
    resamples = np.random.default_rng(0)
    means = [(resamples.choice(small, 10).mean() + resamples.choice(large, 1000).mean()) / 2 for _ in range(4000)]
    assert (task.low, task.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.02)


def test_a_task_with_one_test_set_has_its_metrics() -> None:
    values = {"greedy": np.arange(20) % 3 / 2.0, "correct_ratio": np.where(np.arange(20) > 15, 0.5, np.nan)}
    assert bootstrap_task_metrics({"only": values}, 100, 3) == bootstrap_metrics(values, 100, 3)


def test_a_task_has_no_metric_that_a_test_set_lacks() -> None:
    sets = {"a": {"greedy": np.ones(3), "rm": np.ones(3)}, "b": {"greedy": np.zeros(2), "rm": np.full(2, np.nan)}}
    assert {name: metric.value for name, metric in bootstrap_task_metrics(sets, 10, 0).items()} == {"greedy": 0.5}
    assert bootstrap_task_metrics({}, 10, 0) == {}


def test_models_are_compared_on_the_same_resamples() -> None:
    # B is A and one question more in every resample: with paired resamples both ends of the interval move by the same.
    a = np.array([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    for seed in range(5):
        first, second = (bootstrap_metrics({"greedy": values}, 200, seed)["greedy"] for values in (a, a + 0.25))
        assert (second.low, second.high) == pytest.approx((first.low + 0.25, first.high + 0.25))  # pyright: ignore[reportOptionalOperand]


def test_groups_have_their_own_scores() -> None:
    values = {"greedy": np.array([1.0, 0, 1, 1]), "maj": np.array([0.0, 0, 1, np.nan]), "pass": np.ones(4)}
    assert group_values(values, ["level 2", "level 1", "level 2", ""]) == {
        "level 1": {"questions": 1, "greedy": 0, "maj": 0},
        "level 2": {"questions": 2, "greedy": 1, "maj": 0.5},
    }
    assert group_values(values, ["", "", "", "x"], ["maj"]) == {"x": {"questions": 1}}
