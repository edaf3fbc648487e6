"""What counts as a spike of the loss."""

from __future__ import annotations

import numpy as np

from megatron_plasticity.tracking.loss_spikes import LEAST, WINDOW, LossSpikes


def spikes(losses: list[float], deviations: float = 6.0) -> dict[int, float]:
    alarm = LossSpikes(deviations)
    found = {index: alarm.excess(loss) for index, loss in enumerate(losses)}
    return {index: excess for index, excess in found.items() if excess is not None}


def noisy_descent(count: int) -> list[float]:
    noise = np.random.default_rng(0).normal(0, 0.03, count)
    return [float(2.0 + 3.0 * 0.98**step + error) for step, error in enumerate(noise)]


def test_a_descending_noisy_loss_has_none() -> None:
    assert spikes(noisy_descent(500)) == {}


def test_a_jump_is_one_with_its_height() -> None:
    losses = noisy_descent(300)
    losses[250] += 1.5
    found = spikes(losses)
    assert list(found) == [250]
    assert abs(found[250] - 1.5) < 0.2


def test_before_enough_is_known_nothing_is() -> None:
    assert spikes([2.0] * (LEAST - 1) + [9.0]) == {}
    assert list(spikes([2.0] * LEAST + [9.0])) == [LEAST]


def test_however_quiet_the_losses_a_tenth_of_a_nat_is_needed() -> None:
    assert spikes([2.0] * 40 + [2.09]) == {}
    assert list(spikes([2.0] * 40 + [2.11])) == [40]


def test_a_loss_that_stays_high_becomes_the_rule() -> None:
    found = spikes([2.0] * 100 + [3.0] * 100)
    assert min(found) == 100
    assert max(found) < 100 + WINDOW


def test_infinity_is_a_spike_and_zero_deviations_turn_it_off() -> None:
    assert list(spikes([2.0] * 20 + [float("inf")])) == [20]
    assert spikes([2.0] * 20 + [9.0], deviations=0.0) == {}
