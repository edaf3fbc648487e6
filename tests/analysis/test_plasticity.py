from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_plasticity.analysis.paired_losses import SequenceLosses
from megatron_plasticity.analysis.plasticity import (
    GridPoint,
    TaskOutcome,
    area_under_curve,
    best_weight_decay,
    correlations,
    discordant_pairs,
    log_positions,
    loss_curve_shape,
    mean_curve,
    plasticity,
    sign_test,
    task_curve,
)
from megatron_plasticity.errors import UserError


def answers(share: float, questions: int = 100) -> list[float]:
    return [float(index < round(share * questions)) for index in range(questions)]


def grid(scores: dict[float, float], losses: dict[float, float] | None = None) -> list[GridPoint]:
    losses = losses or {}
    return [GridPoint(decay, losses.get(decay), {"sums": TaskOutcome(answers(score))}) for decay, score in scores.items()]


def test_area_is_the_mean_height_over_the_logarithm() -> None:
    assert area_under_curve([0.1, 1, 10], [2, 2, 2]) == pytest.approx(2)
    assert area_under_curve([0.1, 1, 10], [0, 1, 0]) == pytest.approx(0.5)
    assert area_under_curve([1, 10, 1000], [0, 3, 0]) == pytest.approx(1.5)
    assert area_under_curve([0.1, 1, 1000], [0, 0, 4]) == pytest.approx((3 * 2) / 4)
    assert area_under_curve([0.1], [1]) is None


def test_zero_stands_one_typical_step_left() -> None:
    assert log_positions([0, 0.01, 0.1, 10]) == pytest.approx([-3.5, -2, -1, 1])
    assert log_positions([0, 0.1]) == pytest.approx([-2, -1])
    assert log_positions([0]) == [0]
    assert area_under_curve([0, 0.1, 1], [4, 0, 0]) == pytest.approx(1)


def test_gain_is_paired_with_the_base_model_on_the_same_questions() -> None:
    correct, base = answers(0.6), answers(0.4)  # each question that the base model solves stays solved
    point = GridPoint(0.1, 2.0, {"sums": TaskOutcome(correct, base)})
    row = plasticity([point], resamples=500)["tasks"]["sums"]["scores"][0]
    assert row["base_score"] == pytest.approx(0.4)
    assert row["gain"]["value"] == pytest.approx(0.2)
    assert row["gain"]["low"] > 0.1  # unpaired, the standard error would be 0.07
    assert row["score"]["low"] < 0.6 < row["score"]["high"]


def test_areas_of_score_and_gain_have_intervals() -> None:
    points = [
        GridPoint(decay, None, {"sums": TaskOutcome(answers(score), answers(0.1))})
        for decay, score in ((0.1, 0.2), (1.0, 0.6), (10.0, 0.2))
    ]
    area = plasticity(points, resamples=300)["tasks"]["sums"]["area"]
    assert area["score"]["value"] == pytest.approx(0.4)
    assert area["gain"]["value"] == pytest.approx(0.3)
    for estimate in area.values():
        assert estimate["low"] < estimate["value"] < estimate["high"]


def test_what_is_unknown_is_absent() -> None:
    points = [
        GridPoint(0.1, None, {"sums": TaskOutcome(answers(0.5))}),
        GridPoint(1.0, 2.0, {"sums": None}),
        GridPoint(3.0, math.nan, {}),
    ]
    result = plasticity(points, resamples=50)
    json.dumps(result, allow_nan=False)
    task = result["tasks"]["sums"]
    assert task["missing"] == [1.0, 3.0]
    assert set(task["scores"][0]) == {"weight_decay", "score"}
    assert task["area"] == {}
    assert task["correlation"] == {"points": 0}
    assert task["discordant"] == {"pairs": 0, "discordant": []}
    assert "advantage" not in task
    assert result["loss_curve"]["missing"] == [0.1, 3.0]
    nothing = plasticity([GridPoint(0.1, None, {}), GridPoint(1.0, None, {})])
    assert nothing["tasks"] == {}
    assert "mean" not in nothing


def test_best_weight_decay_names_its_uncertainty() -> None:
    clear = best_weight_decay(task_curve(grid({0.1: 0.1, 1.0: 0.9, 10.0: 0.2}), "sums", 400, 0))
    assert (clear["weight_decay"], clear["low"], clear["high"], clear["ties"]) == (1.0, 1.0, 1.0, [])
    assert clear["distribution"] == [
        {"weight_decay": 0.1, "share": 0.0}, {"weight_decay": 1.0, "share": 1.0}, {"weight_decay": 10.0, "share": 0.0},
    ]  # fmt: skip
    generator = np.random.default_rng(0)
    noise = [GridPoint(decay, None, {"sums": TaskOutcome(generator.integers(0, 2, 100).tolist())}) for decay in (0.1, 1.0, 10.0)]
    unclear = best_weight_decay(task_curve(noise, "sums", 400, 0))
    assert unclear["low"] < unclear["high"]
    assert sum(entry["share"] for entry in unclear["distribution"]) == pytest.approx(1)


def test_ties_are_named_and_share_their_resamples() -> None:
    same = best_weight_decay(task_curve(grid({0.1: 0.5, 1.0: 0.5, 10.0: 0.2}), "sums", 200, 0))
    assert (same["weight_decay"], same["ties"]) == (0.1, [1.0])
    assert [entry["share"] for entry in same["distribution"]] == pytest.approx([0.5, 0.5, 0])


def test_questions_are_resampled_together_for_all_weight_decays() -> None:
    """One model solves one question more than the other: paired, the sign of the difference never turns."""
    curve = task_curve(grid({0.1: 0.50, 1.0: 0.51}), "sums", 1000, 0)
    assert (curve.resampled[:, 1] >= curve.resampled[:, 0]).all()
    assert best_weight_decay(curve)["distribution"][1]["share"] > 0.5


def test_order_of_cells_and_of_other_tasks_does_not_matter() -> None:
    points = grid({0.1: 0.4, 1.0: 0.6, 10.0: 0.5}, {0.1: 2.0, 1.0: 2.1, 10.0: 2.6})
    more = [GridPoint(p.weight_decay, p.held_out_loss, {"words": TaskOutcome(answers(0.3)), **p.tasks}) for p in reversed(points)]
    assert plasticity(points)["tasks"]["sums"] == plasticity(more)["tasks"]["sums"]


def test_discordant_pairs_are_worse_in_loss_and_better_in_score() -> None:
    points = grid({0.1: 0.40, 1.0: 0.60, 10.0: 0.40}, {0.1: 2.0, 1.0: 2.1, 10.0: 2.6})
    result = discordant_pairs(task_curve(points, "sums", 999, 0), {0.1: 2.0, 1.0: 2.1, 10.0: 2.6})
    assert result["pairs"] == 3
    (pair,) = result["discordant"]  # 10.0 only equals 0.1 in score, and loses to 1.0 in both
    assert (pair["better_loss"], pair["better_score"]) == (0.1, 1.0)
    assert pair["loss_difference"] == pytest.approx(0.1)
    assert pair["score_difference"]["value"] == pytest.approx(0.2)
    assert 0.1 < pair["score_difference"]["low"] < 0.2 < pair["score_difference"]["high"] < 0.3
    assert pair["bootstrap_p"] == pytest.approx(2 / 1000)
    assert pair["sign_p"] == pytest.approx(2 * 0.5**20)


def test_chance_differences_have_large_p_values() -> None:
    better, worse = answers(0.0), answers(0.0)
    better[:11], worse[11:20] = [1.0] * 11, [1.0] * 9
    points = [GridPoint(0.1, 2.0, {"sums": TaskOutcome(worse)}), GridPoint(1.0, 2.1, {"sums": TaskOutcome(better)})]
    (pair,) = plasticity(points)["tasks"]["sums"]["discordant"]["discordant"]
    assert pair["sign_p"] == pytest.approx(stats.binomtest(11, 20).pvalue)
    assert pair["bootstrap_p"] > 0.4
    assert pair["score_difference"]["low"] < 0 < pair["score_difference"]["high"]


def test_sign_test_leaves_out_zeros() -> None:
    assert sign_test(np.zeros(5)) == 1
    assert sign_test(np.array([1, 0, 0, 1, 1, 1, 0])) == pytest.approx(2 * 0.5**4)
    assert sign_test(np.array([0.25, -0.5])) == 1


def test_advantage_of_choosing_by_score() -> None:
    points = grid({0.1: 0.40, 1.0: 0.60}, {0.1: 2.0, 1.0: 2.1})
    advantage = plasticity(points)["tasks"]["sums"]["advantage"]
    assert (advantage["by_loss"], advantage["by_score"]) == (0.1, 1.0)
    assert advantage["value"] == pytest.approx(0.2)
    assert advantage["low"] > 0.1
    # The λ with the lowest loss has no score: there is nothing to compare with.
    unfinished = [GridPoint(0.01, 1.0, {}), *points]
    assert "advantage" not in plasticity(unfinished)["tasks"]["sums"]


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    return pearson(x.argsort().argsort(), y.argsort().argsort())  # no ties here


def test_correlations_and_their_leave_one_out_range() -> None:
    losses, scores = [2.0, 2.1, 2.2, 3.0, 2.4], [0.5, 0.4, 0.45, 0.1, 0.3]
    result = correlations(losses, scores)
    assert result["points"] == 5
    for name, function in (("pearson", pearson), ("spearman", spearman)):
        left = [function(np.delete(losses, i), np.delete(scores, i)) for i in range(5)]
        whole = function(np.array(losses), np.array(scores))
        assert result[name] == pytest.approx({"value": whole, "low": min(left), "high": max(left)})
    assert set(correlations([1, 2, 3], [3, 2, 1])["pearson"]) == {"value"}
    assert correlations([1, 2], [3, 2]) == {"points": 2}
    assert correlations([1, 2, 3, 4], [5, 5, 5, 5]) == {"points": 4}
    # One λ makes the whole correlation: without it the scores are equal, and that subset has none.
    outlier = correlations([1, 2, 3, 4], [5, 5, 5, 1])
    assert outlier["pearson"]["high"] < 0


def test_mean_is_over_tasks_at_the_weight_decays_that_all_have() -> None:
    points = [
        GridPoint(
            0.1, 2.0, {"sums": TaskOutcome(answers(0.2), answers(0.1)), "words": TaskOutcome(answers(0.6, 50), answers(0.1, 50))}
        ),
        GridPoint(1.0, 2.1, {"sums": TaskOutcome(answers(0.4), answers(0.1)), "words": TaskOutcome(answers(0.8, 50))}),
        GridPoint(10.0, 2.6, {"sums": TaskOutcome(answers(0.9))}),
    ]
    mean = plasticity(points)["mean"]
    assert [(row["weight_decay"], row["score"]["value"]) for row in mean["scores"]] == [
        (0.1, pytest.approx(0.4)),
        (1.0, pytest.approx(0.6)),
    ]
    assert mean["missing"] == [10.0]
    assert mean["scores"][0]["gain"]["value"] == pytest.approx(0.3)
    assert "gain" not in mean["scores"][1]
    assert "gain" not in mean["area"]
    assert "sign_p" not in mean["discordant"]["discordant"][0]
    assert mean_curve([]) is None


def test_other_test_questions_are_refused() -> None:
    points = [
        GridPoint(0.1, 2.0, {"sums": TaskOutcome(answers(0.5))}),
        GridPoint(1.0, 2.0, {"sums": TaskOutcome(answers(0.5, 50))}),
    ]
    with pytest.raises(UserError, match=r"'sums': λ=1 answered 50 test questions and λ=0.1 100"):
        plasticity(points)
    with pytest.raises(ValueError, match="no test questions"):
        plasticity([GridPoint(0.1, 2.0, {"sums": TaskOutcome([])})])
    with pytest.raises(ValueError, match="once"):
        plasticity([GridPoint(0.1, 2.0, {}), GridPoint(0.1, 2.0, {})])


@pytest.mark.parametrize(
    ("losses", "inside", "statement", "one_valley"),
    [
        ([3.0, 2.0, 1.0, 2.0], True, "lowest at λ = 1, inside the grid (0 to 10)", True),
        ([3.0, 1.0, 2.0, 1.5], True, "lowest at λ = 0.1, inside", False),
        ([1.0, 2.0, 3.0, 4.0], False, "lowest at λ = 0, the smallest of the grid: it has no minimum inside.", True),
        ([4.0, 3.0, 2.0, 1.0], False, "lowest at λ = 10, the largest of the grid: it has no minimum inside; the best", True),
        ([1.0, 1.0, 2.0, 3.0], False, "lowest at λ = 0, the smallest", True),
        ([3.0, 2.0, 1.0, 1.0], False, "lowest at λ = 10, the largest", True),
        ([1.0, 2.0, 2.0, 1.0], False, "equally low at both ends", False),
        ([2.0, 1.0, 1.0, 2.0], True, "lowest at λ = 0.1, inside", True),
        ([3.0, None, 1.0, 2.0], True, "No loss is known at λ = 0.1.", True),
        ([3.0, 2.0, 1.0, math.nan], False, "No loss is known at λ = 10.", True),
        ([3.0, None, None, 2.0], False, "known at 2 λ only", True),
    ],
)  # fmt: skip
def test_shape_of_the_loss_curve(losses: list[float | None], inside: bool, statement: str, one_valley: bool) -> None:
    shape = loss_curve_shape([0, 0.1, 1, 10], losses)
    assert shape["inside"] is inside
    assert statement in shape["statement"]
    assert shape["one_valley"] is one_valley


def test_shape_tells_the_rise_on_both_sides() -> None:
    shape = loss_curve_shape([0.1, 1, 10], [2.5, 2.0, 4.0])
    assert (shape["minimum_at"], shape["minimum_loss"], shape["rise_below"], shape["rise_above"]) == (1, 2.0, 0.5, 2.0)
    assert loss_curve_shape([0.1, 1], [None, None])["statement"] == "No held-out loss is known, so there is no curve."
    with pytest.raises(ValueError, match="ascending"):
        loss_curve_shape([1, 0.1], [1, 2])


def test_different_questions_are_refused_where_their_hash_is_known() -> None:
    def point(decay: float, digest: str | None, base: str | None = None) -> GridPoint:
        return GridPoint(decay, None, {"sums": TaskOutcome(answers(0.5), answers(0.1), digest, base)})

    plasticity([point(0, "a", "a"), point(1, "a"), point(2, None)], resamples=20)
    with pytest.raises(UserError, match="λ=0 and λ=1 are different"):
        plasticity([point(0, "a"), point(1, "b")], resamples=20)
    with pytest.raises(UserError, match="before and after fine-tuning at λ=0"):
        plasticity([point(0, "a", "b")], resamples=20)


def test_losses_of_single_sequences_are_compared() -> None:
    points = [
        GridPoint(decay, None, {}, SequenceLosses([1.0, 2.0], [2.0 + decay, 3.0 + decay], (0, 1), (0, 1))) for decay in (0.0, 1.0)
    ]
    assert plasticity(points, resamples=20)["paired_losses"]["neighbours"][0]["gap"]["value"] == pytest.approx(1)
    assert "paired_losses" not in plasticity(points[:1], resamples=20)


# --- test sets and variants ---


def test_test_sets_count_alike_whatever_their_size() -> None:
    outcome = TaskOutcome([1.0] * 10 + [0.0] * 90, [0.0] * 100, strata=(10, 90))
    curve = task_curve([GridPoint(0.1, None, {"sums": outcome})], "sums", 50, 0)
    assert curve.scores == pytest.approx([0.5])
    assert curve.resampled == pytest.approx(np.full((50, 1), 0.5)), "resamples are drawn within each set"
    assert curve.correct is None, "questions of different weights have no sign test"


def test_one_stratum_is_as_good_as_none() -> None:
    def found(strata: tuple[int, ...]) -> dict[str, Any]:
        scores = {0.1: 0.3, 1.0: 0.6}
        points = [GridPoint(d, None, {"sums": TaskOutcome(answers(s), strata=strata)}) for d, s in scores.items()]
        return plasticity(points, resamples=40)

    assert found(()) == found((100,))


def test_the_interval_of_a_stratified_mean_is_that_of_its_sets() -> None:
    generator = np.random.default_rng(1)
    small, large = (generator.random(20) < 0.5).astype(float), (generator.random(500) < 0.5).astype(float)
    outcome = TaskOutcome([*small, *large], strata=(20, 500))
    curve = task_curve([GridPoint(0.1, None, {"sums": outcome})], "sums", 4000, 0)
    expected = np.sqrt(small.var() / 20 + large.var() / 500) / 2
    assert curve.resampled.std() == pytest.approx(expected, rel=0.05)


def test_other_test_sets_are_not_comparable() -> None:
    points = [GridPoint(d, None, {"sums": TaskOutcome(answers(0.5), strata=k)}) for d, k in ((0.1, (40, 60)), (1.0, (60, 40)))]
    with pytest.raises(UserError, match=r"test sets at λ=0\.1 and at λ=1 are different"):
        task_curve(points, "sums", 10, 0)


def variants(scores: dict[str, dict[float, float]], task: str = "sums") -> list[GridPoint]:
    """Variant → λ → score."""
    decays = sorted({decay for found in scores.values() for decay in found})
    return [
        GridPoint(
            decay,
            None,
            {
                f"{task}, {variant}": TaskOutcome(answers(found[decay]), task=task, variant=variant)
                for variant, found in scores.items()
                if decay in found
            },
        )
        for decay in decays
    ]


def test_variants_of_a_task_are_resampled_together() -> None:
    same = {0.1: 0.3, 1.0: 0.6}
    result = plasticity(variants({"a": same, "b": same, "c": same}), resamples=200)
    alone = plasticity(variants({"a": same}), resamples=200)
    for row, expected in zip(result["mean"]["scores"], alone["mean"]["scores"], strict=True):
        assert row["score"] == pytest.approx(expected["score"]), "three copies of one measurement say no more than it"
    assert result["task_means"]["sums"]["scores"] == result["mean"]["scores"]


def test_whether_the_order_of_weight_decays_survives() -> None:
    rising, falling = {0.1: 0.2, 0.5: 0.4, 1.0: 0.6}, {0.1: 0.6, 0.5: 0.4, 1.0: 0.2}
    found = plasticity(variants({"a": rising, "b": falling, "c": {0.1: 0.3, 1.0: 0.5}}), resamples=100)["variants"]
    assert {name: each["best"]["weight_decay"] for name, each in found.items()} == {"a": 1.0, "b": 0.1, "c": 1.0}
    assert found["b"]["rank_correlation"] == pytest.approx(-1)
    assert "rank_correlation" not in found["a"]
    assert "rank_correlation" not in found["c"], "two λ have no rank correlation"
    assert found["b"]["score"]["value"] == pytest.approx(0.6)


def test_one_variant_is_not_compared() -> None:
    assert not {"variants", "task_means"} & plasticity(grid({0.1: 0.3, 1.0: 0.5}), resamples=20).keys()
