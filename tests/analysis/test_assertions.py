"""The paper's statements on invented studies: one on which each holds, one on which it does not, one that leaves it open."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_plasticity.analysis.assertions.curves import Curve, curve, curve_over_units, difference, flatness, trend
from megatron_plasticity.analysis.assertions.internals import probes_rise, pseudo_rank_falls
from megatron_plasticity.analysis.assertions.losses import (
    LossGroup,
    gap_falls,
    loss_is_u_shaped,
    optimum_drops_in_longer_runs,
    u_shape,
)
from megatron_plasticity.analysis.assertions.scores import (
    correlation_is_unstable,
    downstream_optimum_is_larger,
    order_survives_finetuning,
    order_survives_pretraining_rate,
    worse_loss_better_score,
)
from megatron_plasticity.analysis.assertions.strength import flat_below_and_collapse_above
from megatron_plasticity.analysis.assertions.translation import Setting
from megatron_plasticity.analysis.assertions.verdict import STATEMENTS, Assertion, combined, in_order

YES, NO, OPEN = "holds", "does not hold", "cannot be said"
SWEPT = ("optimizer.learning_rate", "batch.global_batch_size", "optimizer.weight_decay")


def noisy(values: Mapping[float, float], noise: float = 0.001, seed: int = 0) -> Curve:
    """A curve whose resamples scatter by `noise` around its values; λ stay in the order given until `curve` sorts them."""
    generator = np.random.default_rng(seed)
    # Drawn in the order of λ, so that the order in which they are given changes nothing.
    draws = {decay: generator.normal(0, noise, 1000) for decay in sorted(values)}
    return curve(list(values), list(values.values()), np.column_stack([values[d] + draws[d] for d in values]))


def setting(decays: Sequence[float], tokens_per_parameter: float | None = 20, rate_times_steps: float = 2.38425) -> Setting:
    """By default with learning rate and steps of Llama-0.5B, so that λ is that of the paper, but of another size."""
    timescales = {decay: 1 / (decay * rate_times_steps) if decay else None for decay in decays}
    return Setting(timescales, 1.4e6, tokens_per_parameter)


U = {0.01: 2.70, 0.1: 2.66, 0.5: 2.60, 1.0: 2.62, 3.0: 2.80}


def u_shaped(values: Mapping[float, float], tokens_per_parameter: float | None = 20, noise: float = 0.001) -> Assertion:
    return loss_is_u_shaped(noisy(values, noise), setting(list(values), tokens_per_parameter))


def test_a1_the_loss_is_u_shaped_above_a_tenth() -> None:
    assert u_shaped(U).verdict == YES
    assert "λ = 0.5" in u_shaped(U).evidence
    at_a_tenth = {0.01: 2.70, 0.1: 2.60, 0.5: 2.66, 1.0: 2.72}
    assert u_shaped(at_a_tenth).verdict == NO
    with_a_hump = {0.01: 2.62, 0.1: 2.70, 0.5: 2.60, 1.0: 2.66, 3.0: 2.80}
    assert u_shaped(with_a_hump).verdict == NO
    assert u_shaped({0.0: 2.60, 0.1: 2.62, 0.5: 2.70, 1.0: 2.80}).verdict == NO, "the optimum is no weight decay"


def test_a1_is_open_where_noise_or_the_grid_leaves_it_open() -> None:
    assert u_shaped(U, noise=0.1).verdict == OPEN
    falling = u_shaped({0.01: 2.70, 0.1: 2.66, 0.5: 2.63, 1.0: 2.60})
    assert falling.verdict == OPEN
    assert "Extend the grid" in falling.evidence
    assert u_shaped({0.01: 2.62, 0.05: 2.60, 0.1: 2.64}).verdict == OPEN, "no λ above 0.1"
    assert u_shaped({0.3: 2.62, 0.5: 2.60, 1: 2.64}).verdict == OPEN, "no λ of at most 0.1"
    assert loss_is_u_shaped(None, setting([0.1])).verdict == OPEN
    assert loss_is_u_shaped(curve(list(U), list(U.values())), setting(list(U))).verdict == OPEN, "no noise is known"


@pytest.mark.parametrize("tokens_per_parameter", [None, 2.3, 140])
def test_a1_is_about_twenty_tokens_per_parameter(tokens_per_parameter: float | None) -> None:
    found = u_shaped(U, tokens_per_parameter)
    assert found.verdict == OPEN
    assert "tokens per parameter" in found.evidence
    assert "lowest at λ = 0.5" in found.evidence


def test_a_hump_as_small_as_a_seed_makes_does_not_refute() -> None:
    values = {0.001: 2.660, 0.01: 2.664, 0.1: 2.66, 0.5: 2.60, 1.0: 2.66}
    assert difference(noisy(values, 1e-4), 0.001, 0.01).sign == 1
    assert u_shaped(values, noise=1e-4).verdict == YES


def long_and_short(long: Mapping[float, float], short: Mapping[float, float] = U, noise: float = 0.001) -> Assertion:
    return optimum_drops_in_longer_runs(
        [
            LossGroup("steps = 100136", noisy(long, noise), setting(list(long), 140, 40.0544)),
            LossGroup("steps = 9537", noisy(short, noise), setting(list(short), 20)),
        ]
    )


def test_a2_the_optimum_drops_in_longer_runs() -> None:
    assert long_and_short({0.01: 2.55, 0.1: 2.50, 0.3: 2.51, 1.0: 2.6}).verdict == YES
    assert long_and_short({0.01: 2.55, 0.1: 2.53, 0.3: 2.50, 1.0: 2.6}).verdict == NO, "0.3 is not about 0.1"
    as_short = {0.01: 2.58, 0.1: 2.5, 0.5: 2.55, 1: 2.6, 3: 2.7}
    assert long_and_short({0.1: 2.5, 0.3: 2.6, 0.01: 2.6}, as_short).verdict == NO, "it was there before"
    assert long_and_short({0.01: 2.55, 0.1: 2.50, 0.3: 2.51, 1.0: 2.6}, noise=0.05).verdict == OPEN
    assert long_and_short({0.5: 2.50, 1.0: 2.6}).verdict == OPEN, "no λ is about 0.1"


def test_a2_takes_two_lengths_of_one_model() -> None:
    one = LossGroup("", noisy(U), setting(list(U)))
    found = optimum_drops_in_longer_runs([one])
    assert found.verdict == OPEN
    assert "This study has 20 tokens per parameter" in found.evidence
    larger = LossGroup("", noisy(U), Setting(setting(list(U)).timescales, 5e8, 140))
    assert optimum_drops_in_longer_runs([one, larger]).verdict == OPEN
    assert optimum_drops_in_longer_runs([]).verdict == OPEN


SCORES_LATER = {0.01: 0.30, 0.1: 0.34, 0.5: 0.40, 1.0: 0.45, 3.0: 0.36}
SCORES_SAME = {0.01: 0.30, 0.1: 0.34, 0.5: 0.45, 1.0: 0.40, 3.0: 0.36}
SCORES_EARLIER = {0.01: 0.30, 0.1: 0.45, 0.5: 0.40, 1.0: 0.38, 3.0: 0.36}


def optima(
    scores: Mapping[float, float], noise: float = 0.005, losses: Mapping[float, float] = U, parameters: float = 1.4e6
) -> Assertion:
    return downstream_optimum_is_larger(
        noisy(losses), noisy(scores, noise), Setting(setting(list(losses)).timescales, parameters, 20)
    )


def test_a3_the_best_by_score_is_at_least_the_best_by_loss() -> None:
    assert optima(SCORES_LATER).verdict == YES
    assert optima(SCORES_SAME).verdict == YES
    assert optima(SCORES_EARLIER).verdict == NO
    two_larger = {0.01: 0.30, 0.1: 0.34, 0.5: 0.36, 1.0: 0.45, 3.0: 0.44}
    assert optima(two_larger, noise=0.01).verdict == YES, "noise between two larger λ does not matter as long as both are"
    assert optima({**two_larger, 0.01: 0.44}, noise=0.01).verdict == OPEN, "a smaller λ may be the best"
    two_losses = {**U, 1.0: 2.6005}
    assert optima(SCORES_LATER, losses=two_losses).verdict == YES, "the loss may be lowest at 1, where the score is best"
    assert optima(SCORES_SAME, losses=two_losses).verdict == OPEN, "the loss may be lowest at 1, the score is best at 0.5"
    assert optima(SCORES_EARLIER, noise=0.1).verdict == OPEN
    assert downstream_optimum_is_larger(None, noisy(SCORES_SAME), setting([0.1])).verdict == OPEN
    assert downstream_optimum_is_larger(noisy(U), None, setting([0.1])).verdict == OPEN


def test_a3_is_strict_for_four_settings_of_the_paper() -> None:
    assert optima(SCORES_SAME, parameters=500_921_856).verdict == NO
    assert optima(SCORES_LATER, parameters=500_921_856).verdict == YES
    assert optima(SCORES_SAME, parameters=4_000_288_768).verdict == YES, "Llama-4B is not one of them"


def test_a3_equality_at_an_end_of_the_grid_says_nothing() -> None:
    at_the_end = {0.1: 2.7, 0.5: 2.65, 1.0: 2.6}
    assert optima({0.1: 0.3, 0.5: 0.35, 1.0: 0.4}, losses=at_the_end).verdict == OPEN
    at_the_start = {0.1: 2.6, 0.5: 2.65, 1.0: 2.7}
    assert optima({0.1: 0.4, 0.5: 0.35, 1.0: 0.3}, losses=at_the_start).verdict == OPEN
    assert optima({0.1: 0.3, 0.5: 0.35, 1.0: 0.4}, losses=at_the_start).verdict == YES
    inside = {0.1: 2.6002, 0.5: 2.6, 1.0: 2.7}
    found = optima({0.1: 0.3, 0.5: 0.4, 1.0: 0.3}, losses=inside)
    assert found.verdict == YES, "an end that the loss may choose within noise is not its choice"
    assert "end of the grid" not in found.evidence


def test_a4_a_worse_loss_with_a_better_score() -> None:
    found = worse_loss_better_score(noisy(U), noisy(SCORES_LATER, 0.005))
    assert found.verdict == YES
    assert "λ = 3 has 0.1000 nats more loss than λ = 0.01 and scores 6.0 points more" in found.evidence
    agreeing = {decay: 3 - loss for decay, loss in U.items()}
    assert worse_loss_better_score(noisy(U), noisy(agreeing, 0.001)).verdict == NO
    assert worse_loss_better_score(noisy(U), noisy(agreeing, 0.1)).verdict == OPEN
    assert worse_loss_better_score(noisy(U), noisy(SCORES_LATER, 0.1)).verdict == OPEN
    assert worse_loss_better_score(noisy(U, 1), noisy(SCORES_LATER, 0.005)).verdict == OPEN, "the losses are not told apart"
    assert worse_loss_better_score(None, noisy(SCORES_LATER)).verdict == OPEN
    assert worse_loss_better_score(noisy(U), None).verdict == OPEN


def test_losses_that_differ_by_less_than_a_seed_makes_settle_nothing() -> None:
    shallow = {0.01: 2.609, 0.1: 2.606, 0.5: 2.600, 1.0: 2.605, 3.0: 2.608}
    assert difference(noisy(shallow, 1e-5), 0.5, 3.0).sign == 1
    assert u_shaped(shallow, noise=1e-5).verdict == OPEN
    low = {0.01: 2.605, 0.1: 2.600, 0.5: 2.605, 1.0: 2.609}
    assert u_shaped(low, noise=1e-5).verdict == OPEN, "an optimum at 0.1 that a seed may make refutes nothing"
    assert worse_loss_better_score(noisy(shallow, 1e-5), noisy(SCORES_LATER, 0.005)).verdict == OPEN
    agreeing = {decay: 3 - 10 * loss for decay, loss in shallow.items()}
    assert worse_loss_better_score(noisy(shallow, 1e-5), noisy(agreeing, 1e-5)).verdict == OPEN


def test_a4_corrects_for_the_number_of_pairs() -> None:
    """A difference of 2.2 standard errors is one in one pair, and none among 45."""
    scores, noise = {0.5: 0.400, 1.0: 0.400 + 2.2 * 0.01 * math.sqrt(2)}, 0.01
    assert worse_loss_better_score(noisy({0.5: 2.6, 1.0: 2.7}), noisy(scores, noise)).verdict == YES
    many = {0.001 * 2**k: 2.6 - 0.001 * k for k in range(8)}
    assert (
        worse_loss_better_score(
            noisy({0.5: 2.5, 1.0: 2.7, **many}, 1e-5), noisy({**scores, **dict.fromkeys(many, 0.4)}, noise)
        ).verdict
        == OPEN
    )


def accuracies(*slopes: float) -> dict[str, dict[int, Curve]]:
    decays = [0.0, 0.1, 0.3, 0.6, 1.0, 3.0]
    return {"topic": {k: curve(decays, [0.5 + slope * n for n in range(6)]) for k, slope in enumerate(slopes)}}


def test_a5_probes_rise_at_each_layer() -> None:
    assert probes_rise(accuracies(0.01, 0.02, 0.03)).verdict == YES
    assert probes_rise(accuracies(0.01, 0.02, -0.05)).verdict == NO, "the mean falls"
    assert probes_rise(accuracies(0.05, 0.05, -0.001)).verdict == NO, "one layer falls"
    flat = probes_rise(accuracies(0.01, 0.0, 0.02))
    assert flat.verdict == OPEN
    assert "2 of 3" in flat.evidence
    without = probes_rise("No probes.")
    assert (without.verdict, without.evidence) == (OPEN, "No probes.")
    four = {"topic": {0: curve([0, 0.1, 0.5, 1], [0.1, 0.2, 0.3, 0.4])}}
    assert "4 λ" in probes_rise(four).evidence
    assert probes_rise(four).verdict == OPEN


def test_a5_a_layer_that_falls_is_one_of_many() -> None:
    """Of five λ a perfect order has p = 1/120: below 0.025 over two layers, above it over four."""
    decays = [0.0, 0.1, 0.3, 0.6, 1.0]
    rising, falling = [0.1, 0.3, 0.5, 0.7, 0.9], [0.5, 0.49, 0.48, 0.47, 0.46]

    def layers(count: int) -> dict[str, dict[int, Curve]]:
        return {"topic": {layer: curve(decays, rising if layer else falling) for layer in range(count)}}

    assert probes_rise(layers(2)).verdict == NO
    assert probes_rise(layers(4)).verdict == OPEN
    by_name = {f"topic {k}": table for k, table in enumerate(layers(4)["topic"].values())}
    assert probes_rise({name: {0: table} for name, table in by_name.items()}).verdict == OPEN, "as of means over layers"


def heads(by_decay: Sequence[float], spread: float = 1.0) -> Curve:
    generator = np.random.default_rng(3)
    decays = [0.0, 0.1, 0.5, 1.0, 3.0]
    return curve_over_units(
        {d: (rank + generator.normal(0, spread, 64)).tolist() for d, rank in zip(decays, by_decay, strict=True)}
    )


def test_a6_qk_falls_and_vp_is_flat() -> None:
    falling, rising, level = heads([40, 36, 30, 25, 20]), heads([20, 25, 30, 36, 40]), heads([42, 42.5, 42, 41.5, 42])
    assert pseudo_rank_falls(falling, level, 48).verdict == YES
    assert pseudo_rank_falls(rising, level, 48).verdict == NO
    assert pseudo_rank_falls(falling, heads([42, 41, 36, 30, 28]), 48).verdict == NO
    assert pseudo_rank_falls(heads([30, 30.1, 29.9, 30, 30.1], 8), level, 48).verdict == OPEN
    assert pseudo_rank_falls(falling, heads([42, 42, 42, 42, 38], 30), 48).verdict == OPEN, "too noisy to be called flat"
    assert pseudo_rank_falls("Nothing was analysed.", level, 48).evidence == "Nothing was analysed."
    without_width = pseudo_rank_falls(falling, heads([42, 41, 36, 30, 28]), None)
    assert without_width.verdict == OPEN
    assert "width of a head" in without_width.evidence
    assert pseudo_rank_falls(rising, level, None).verdict == NO, "W_QK refutes it whatever the width"
    exact = curve_over_units({decay: [42.0] * 64 for decay in falling.weight_decays})
    assert pseudo_rank_falls(falling, exact, 48).verdict == YES, "nothing is flatter"
    few = curve_over_units({decay: [42.0] * 4 for decay in falling.weight_decays})
    assert pseudo_rank_falls(falling, few, 48).verdict == OPEN, "four heads without spread may be chance"
    fewer = [0.0, 0.1, 0.5]
    assert pseudo_rank_falls(falling.only(fewer), level.only(fewer), 48).verdict == OPEN


def test_a7_the_gap_falls() -> None:
    assert gap_falls(noisy({0.0: 0.05, 0.1: 0.04, 0.5: 0.03, 1.0: 0.02, 3.0: 0.01})).verdict == YES
    assert gap_falls(noisy({0.0: 0.01, 0.1: 0.02, 0.5: 0.03, 1.0: 0.04, 3.0: 0.05})).verdict == NO
    assert gap_falls(noisy({0.0: 0.05, 0.1: 0.04, 0.5: 0.03, 1.0: 0.02, 3.0: 0.01}, 0.1)).verdict == OPEN
    assert gap_falls(noisy({0.0: 0.05, 0.1: 0.04, 0.5: 0.03, 1.0: 0.02})).verdict == OPEN, "four λ"
    assert gap_falls(None).verdict == OPEN


FLAT = {0.0: 2.66, 0.001: 2.661, 0.1: 2.659, 0.5: 2.60, 3.0: 2.7, 10.0: 3.4}
FLAT_SCORES = {0.0: 0.40, 0.001: 0.402, 0.1: 0.399, 0.5: 0.44, 3.0: 0.45, 10.0: 0.1}


def strength(losses: Mapping[float, float] | None, scores: Mapping[float, float] | None, noise: float = 0.001) -> Assertion:
    return flat_below_and_collapse_above(
        noisy(losses, noise) if losses else None, noisy(scores, noise) if scores else None, setting([*(losses or scores or {})])
    )


def test_a8_flat_below_a_tenth_and_collapsed_at_ten() -> None:
    assert strength(FLAT, FLAT_SCORES).verdict == YES
    without_scores = strength(FLAT, None)
    assert without_scores.verdict == OPEN
    assert "the score is not known at λ = 0, 0.001, 0.1; the score is not known at λ = 10." in without_scores.evidence
    without_losses = strength(None, FLAT_SCORES)
    assert without_losses.verdict == OPEN
    assert "the loss is not known at λ = 0, 0.001, 0.1; the loss is not known at λ = 10." in without_losses.evidence
    one_part = strength(FLAT, {decay: score for decay, score in FLAT_SCORES.items() if decay < 10})
    assert one_part.verdict == OPEN
    assert "Missing: the score is not known at λ = 10." in one_part.evidence
    assert strength({**FLAT, 0.0: 2.9}, None).verdict == NO, "one part is enough to refute it"
    assert strength({**FLAT, 0.0: 2.9}, FLAT_SCORES).verdict == NO, "not flat"
    assert strength(FLAT, {**FLAT_SCORES, 10.0: 0.43}).verdict == NO, "no collapse"
    assert strength({**FLAT, 10.0: 2.7}, FLAT_SCORES).verdict == NO
    assert strength(FLAT, FLAT_SCORES, 0.05).verdict == OPEN
    without_ten = {decay: value for decay, value in FLAT.items() if decay < 10}
    found = strength(without_ten, None)
    assert found.verdict == OPEN
    assert "as large as the paper's 10" in found.evidence
    assert strength({0.1: 2.6, 0.5: 2.7, 10.0: 3.5}, None).verdict == OPEN, "flat takes two λ"
    assert flat_below_and_collapse_above(noisy(FLAT), None, setting(list(FLAT), 2.3)).verdict == OPEN
    assert flat_below_and_collapse_above(None, None, setting([])).verdict == OPEN


def test_a8_chance_is_no_score() -> None:
    """Half of 0.45 is never reached where guessing gives 0.25, so that what is compared is what lies above chance."""
    at_chance = {**FLAT_SCORES, 10.0: 0.27}
    arguments = noisy(FLAT), noisy(at_chance), setting(list(at_chance))
    assert flat_below_and_collapse_above(*arguments).verdict == NO
    assert flat_below_and_collapse_above(*arguments, chance=0.25).verdict == YES


def ways(*slopes: float, noise: float = 0.005) -> dict[str, Curve]:
    decays = (0.1, 0.3, 0.6, 1.0)
    return {
        f"learning_rate = {n}": noisy({d: 0.3 + slope * k for k, d in enumerate(decays)}, noise, n)
        for n, slope in enumerate(slopes)
    }


def test_a9_the_order_survives_finetuning() -> None:
    assert order_survives_finetuning(ways(0.05, 0.04, 0.06), SWEPT).verdict == YES
    reversed_once = order_survives_finetuning(ways(0.05, 0.04, -0.06), SWEPT)
    assert reversed_once.verdict == NO
    assert "learning_rate = 2" in reversed_once.evidence
    assert order_survives_finetuning(ways(0.05, 0.04, 0.06, noise=0.3), SWEPT).verdict == OPEN
    assert order_survives_finetuning(ways(0.05, 0.04, -0.001, noise=0.01), SWEPT).verdict == OPEN, "opposite, within noise"
    assert order_survives_finetuning(ways(0.05), ()).verdict == OPEN


def test_a9_an_order_takes_half_of_the_pairs() -> None:
    """One λ that is far below three equal ones is told apart in half of the pairs; below four of them in 4 of 10."""
    one_far = {0.1: 0.1, 0.3: 0.4, 0.6: 0.4, 1.0: 0.4}
    half = order_survives_pretraining_rate({name: noisy(one_far, 0.005, n) for n, name in enumerate("ab")})
    assert half.verdict == YES
    less = order_survives_pretraining_rate({name: noisy({**one_far, 3.0: 0.4}, 0.005, n) for n, name in enumerate("ab")})
    assert less.verdict == OPEN
    assert "only 4 of 10 pairs" in less.evidence


def test_a9_settings_that_were_not_varied_are_named() -> None:
    found = order_survives_finetuning(ways(0.05, 0.04), SWEPT[:1])
    assert found.verdict == OPEN
    assert "`batch.global_batch_size`" in found.evidence
    assert "`optimizer.weight_decay`" in found.evidence
    assert "`optimizer.learning_rate`" not in found.evidence
    assert order_survives_finetuning(ways(0.05, -0.04), SWEPT[:1]).verdict == NO


def test_a9_the_order_survives_pretraining_rates() -> None:
    assert order_survives_pretraining_rate(ways(0.05, 0.04, 0.06)).verdict == YES
    assert order_survives_pretraining_rate(ways(0.05, -0.04)).verdict == NO
    assert order_survives_pretraining_rate(ways(0.05)).verdict == OPEN
    other = {"a": noisy({0.1: 0.3, 1: 0.4}), "b": noisy({0.2: 0.3, 2: 0.4})}
    assert order_survives_pretraining_rate(other).verdict == OPEN, "no shared λ"


def test_a10_the_correlation_is_unstable() -> None:
    losses = {0.01: 2.60, 0.1: 2.61, 0.3: 2.62, 1.0: 2.63, 3.0: 3.0}
    one_decides = {0.01: 0.30, 0.1: 0.34, 0.3: 0.37, 1.0: 0.40, 3.0: 0.1}
    assert correlation_is_unstable(noisy(losses), noisy(one_decides)).verdict == YES
    straight, bowl = {k / 10: 2.6 + k / 100 for k in range(30)}, {k / 10: 0.3 + (k - 14.5) ** 2 / 100 for k in range(30)}
    balanced = correlation_is_unstable(noisy(straight), noisy(bowl, 1e-4))
    assert balanced.verdict == YES, "the sign changes, by less than 0.5"
    line = {decay: 3.5 - loss for decay, loss in U.items()}
    assert correlation_is_unstable(noisy(U), noisy(line)).verdict == NO
    assert correlation_is_unstable(noisy(U), noisy(line, 0.06)).verdict == OPEN
    assert correlation_is_unstable(noisy(U).only([0.01, 0.1, 0.5, 1.0]), noisy(line)).verdict == OPEN, "four λ"
    assert correlation_is_unstable(noisy(U), noisy(dict.fromkeys(U, 0.4))).verdict == OPEN, "no correlation"
    assert correlation_is_unstable(None, noisy(line)).verdict == OPEN
    assert correlation_is_unstable(noisy(U), None).verdict == OPEN


def shuffled(values: Mapping[float, float], seed: int) -> dict[float, float]:
    return dict(random.Random(seed).sample(list(values.items()), len(values)))


def plain(values: Mapping[float, float]) -> Curve:
    return curve(list(values), list(values.values()))


ORDERS: dict[str, Callable[[int], Assertion]] = {
    "A1": lambda seed: u_shaped(shuffled(U, seed)),
    "A2": lambda seed: long_and_short(shuffled({0.01: 2.55, 0.1: 2.50, 0.3: 2.51, 1.0: 2.6}, seed), shuffled(U, seed)),
    "A3": lambda seed: optima(shuffled(SCORES_LATER, seed), losses=shuffled(U, seed + 1)),
    "A4": lambda seed: worse_loss_better_score(noisy(shuffled(U, seed)), noisy(shuffled(SCORES_LATER, seed + 1), 0.005)),
    "A5": lambda seed: probes_rise({"topic": {0: plain(shuffled({k / 2: 0.1 * k for k in range(6)}, seed))}}),
    "A6": lambda seed: pseudo_rank_falls(
        noisy(shuffled({0.0: 40, 0.1: 38, 0.5: 30, 1: 25, 3: 20}, seed)), noisy(shuffled({0: 42, 1: 42.1, 3: 42}, seed)), 48
    ),
    "A7": lambda seed: gap_falls(noisy(shuffled({0.0: 0.05, 0.1: 0.04, 0.5: 0.03, 1.0: 0.02, 3.0: 0.01}, seed))),
    "A8": lambda seed: strength(shuffled(FLAT, seed), shuffled(FLAT_SCORES, seed + 1)),
    "A9a": lambda seed: order_survives_finetuning(
        {name: noisy(shuffled({0.1: 0.3, 0.3: 0.35, 1.0: 0.4}, seed), 0.005, place) for place, name in enumerate("abc")}, SWEPT
    ),
    "A9b": lambda seed: order_survives_pretraining_rate(
        {name: noisy(shuffled({0.1: 0.3, 0.3: 0.35, 1.0: 0.4}, seed), 0.005, place) for place, name in enumerate("ab")}
    ),
    "A10": lambda seed: correlation_is_unstable(noisy(shuffled(U, seed)), noisy(shuffled(SCORES_LATER, seed + 1))),
}


@pytest.mark.parametrize("key", STATEMENTS)
def test_the_order_of_weight_decays_does_not_matter(key: str) -> None:
    first = ORDERS[key](0)
    assert first.key == key
    assert first.verdict != OPEN, "a verdict that is open whatever comes in would pass"
    assert all(ORDERS[key](seed) == first for seed in range(1, 6))


def test_the_paper_is_met_by_its_own_best_weight_decays() -> None:
    """λ of a run with a recipe's learning rate and steps is itself; that of others is a range."""
    own = setting([0.1, 0.5])
    assert str(own.in_the_paper(0.5)) == "0.5"
    assert own.that_are([0.1, 0.5], "above", 0.1) == [0.5]
    assert own.that_are([0.1, 0.5], "at_most", 0.1) == [0.1]


def test_a_weight_decay_of_a_short_run_is_translated_by_its_timescale() -> None:
    """At 2,000 steps and a learning rate of 1e-3, λ = 0.1 remembers five runs: less decay than any recipe's 0.1."""
    short = setting([0.0, 0.1, 0.3, 1.0], rate_times_steps=1.0)
    found = short.in_the_paper(1.0)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((1 / 5.72205, 1 / 2.38425))
    assert short.that_are([0.0, 0.1, 0.3, 1.0], "above", 0.1) == [1.0]
    assert short.that_are([0.0, 0.1, 0.3, 1.0], "at_most", 0.1) == [0.0, 0.1], "0.3 is 0.05 by one recipe, 0.13 by another"


def test_imported_models_of_the_paper_keep_their_weight_decay() -> None:
    unknown = {0.0: None, 0.1: None, 1.0: None}
    public = Setting(unknown, 1_484_916_736, 141)
    assert public.recipe is not None
    assert str(public.in_the_paper(1.0)) == "1"
    other = Setting(unknown, 7e9, 20)
    assert other.in_the_paper(1.0) is None
    assert str(other.in_the_paper(0.0)) == "0"
    assert other.that_are([0.0, 0.1, 1.0], "at_most", 0.1) == [0.0]


def spearman(values: Sequence[float]) -> tuple[float, float]:
    """SciPy's correlation with the order of the values, and its one-sided p-value."""
    found: Any = stats.spearmanr(range(len(values)), values, alternative="greater")
    return float(found.statistic), float(found.pvalue)


def test_the_trend_is_the_permutation_test_of_spearman() -> None:
    values = [0.3, 0.1, 0.5, 0.5, 0.9]
    found = trend(curve([0, 0.1, 0.5, 1, 3], values))
    assert found is not None
    assert found.correlation == pytest.approx(spearman(values)[0])
    every = [spearman(order)[0] for order in permutations(values)]
    assert found.p_rise == pytest.approx(np.mean([value >= found.correlation - 1e-9 for value in every]))
    assert found.p_fall == pytest.approx(np.mean([value <= found.correlation + 1e-9 for value in every]))


def test_drawn_orders_agree_with_the_t_distribution() -> None:
    strong = trend(curve(list(range(10)), [1, 0, 3, 2, 4, 6, 5, 8, 9, 7]))
    assert strong is not None
    assert 0 < strong.p_rise < 0.001
    values = [1, 5, 3, 9, 4, 0, 6, 8, 2, 7]
    weak = trend(curve(list(range(10)), values))
    assert weak is not None
    assert weak.p_rise == pytest.approx(spearman(values)[1], abs=0.02)


def test_a_trend_in_noise_is_rare() -> None:
    generator = np.random.default_rng(0)
    found = [trend(curve(list(range(5)), generator.normal(size=5))) for _ in range(800)]
    directions = [item.direction() for item in found if item is not None]
    assert np.mean([direction != 0 for direction in directions]) < 0.05


@pytest.mark.parametrize("count", [4, 12])
def test_noise_alone_seldom_gives_a_verdict(count: int) -> None:
    """λ without any effect on losses of sequences and on answers to questions, which differ in difficulty and are shared."""
    generator = np.random.default_rng(0)
    # λ on both sides of what A1 and A2 ask about, and one that is about 0.1.
    decays = (0.01, *np.geomspace(0.1, 5, count - 1).tolist())
    short, long = setting(decays), setting(decays, 140, 40.0544)

    def measured(units: np.ndarray) -> Curve:
        return curve_over_units(
            {decay: units[:, k].tolist() for k, decay in enumerate(decays)}, 200, int(generator.integers(1000))
        )

    def losses() -> Curve:
        # Noisy enough that the margin for seeds hides nothing.
        return measured(generator.normal(2.6, 0.4, (100, 1)) + generator.normal(0, 0.5, (100, count)))

    def scores() -> Curve:
        return measured((generator.random((100, count)) < generator.random((100, 1))).astype(float))

    told: Counter[str] = Counter()
    for _ in range(40):
        loss, score = losses(), scores()
        twice = {"one": score, "other": scores()}
        found = (
            loss_is_u_shaped(loss, short),
            optimum_drops_in_longer_runs([LossGroup("", losses(), long), LossGroup("", loss, short)]),
            downstream_optimum_is_larger(loss, score, short),
            downstream_optimum_is_larger(loss, score, Setting(short.timescales, 500_921_856, 20)),
            worse_loss_better_score(loss, score),
            order_survives_finetuning(twice, SWEPT),
            order_survives_pretraining_rate(twice),
            gap_falls(losses()),
        )
        told.update(item.key for item in found if item.verdict != OPEN)
    assert all(number <= 4 for number in told.values()), told
    assert sum(told.values()) <= 0.05 * 8 * 40


@pytest.mark.parametrize("shape", ["steep", "bowl"])
def test_a_best_weight_decay_is_seldom_made_of_noise(shape: str) -> None:
    """Losses that are surely lowest at a small λ, or equal but at both ends of the grid; scores that are equal everywhere.

    Of many equal λ one leads by chance, and most are larger than the best by loss.
    """
    generator = np.random.default_rng(1)
    decays = np.geomspace(0.002, 20, 12).tolist()
    shift = 5.0 * np.arange(-1, 11) ** 2 if shape == "steep" else np.array([5.0] + [0.0] * 10 + [5.0])
    short, long = setting(decays), setting(decays, 140, 40.0544)

    def measured(units: np.ndarray) -> Curve:
        return curve_over_units(
            {decay: units[:, k].tolist() for k, decay in enumerate(decays)}, 200, int(generator.integers(1000))
        )

    told: Counter[str] = Counter()
    for _ in range(40):
        loss, later = (measured(generator.normal(2.6, 0.5, (100, 12)) + shift) for _ in range(2))
        score = measured((generator.random((100, 12)) < generator.random((100, 1))).astype(float))
        found = [downstream_optimum_is_larger(loss, score, short)]
        if shape == "bowl":
            found += [
                loss_is_u_shaped(loss, short),
                optimum_drops_in_longer_runs([LossGroup("", later, long), LossGroup("", loss, short)]),
            ]
        told.update(item.key for item in found if item.verdict != OPEN)
    assert all(number <= 4 for number in told.values()), told


def test_noise_that_is_not_known_settles_nothing() -> None:
    known = curve([0.1, 1.0], [0.0, 100.0])
    assert difference(known, 0.1, 1.0).sign == 0
    assert flatness(known, [0.1, 1.0], 1e9) is None
    without_spread = curve([0.1, 1.0], [0.0, 100.0], np.tile([0.0, 100.0], (50, 1)))
    assert difference(without_spread, 0.1, 1.0).sign == 0


def test_flat_is_more_than_not_different() -> None:
    assert flatness(noisy({0.1: 0.0, 1.0: 0.0}, 0.001), [0.1, 1.0], 0.02) is True
    assert flatness(noisy({0.1: 0.0, 1.0: 0.0}, 0.1), [0.1, 1.0], 0.02) is None
    assert flatness(noisy({0.1: 0.0, 1.0: 0.1}, 0.001), [0.1, 1.0], 0.02) is False
    assert flatness(noisy({0.1: 0.0}), [0.1], 0.02) is None


def test_a_shape_is_told_in_words() -> None:
    assert u_shape(noisy(U))[0] is True
    hump, words = u_shape(noisy({0.1: 2.6, 0.5: 2.8, 1.0: 2.6}))
    assert hump is False
    assert "hump" in words


def test_verdicts_of_several_places_have_to_agree() -> None:
    yes, no, open_ = (u_shaped(U), u_shaped({0.01: 2.70, 0.1: 2.60, 0.5: 2.66, 1.0: 2.72}), u_shaped(U, noise=1))
    assert combined([yes, yes]).verdict == YES
    assert combined([yes, open_]) == open_
    assert combined([open_, yes, no]) == no


def test_statements_are_shown_in_order() -> None:
    found = [ORDERS[key](0) for key in ("A10", "A2", "A9b", "A1", "A9a")]
    assert [item.key for item in in_order(found)] == ["A1", "A2", "A9a", "A9b", "A10"]
    assert all(item.certainty for item in found)
