"""The learning rate over a run."""

from __future__ import annotations

import math

import pytest

from megatron_plasticity.config.training import OptimizerConfig, ScheduleConfig, adamw_timescale
from megatron_plasticity.optim.schedule import learning_rate_at


def rates(total: int, **schedule: object) -> list[float]:
    config = ScheduleConfig.model_validate(schedule)
    return [learning_rate_at(step, total, 2.0, config) for step in range(total)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    assert rates(100, warmup_fraction=0.1)[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_last_step_runs_at_the_final_rate(kind: str) -> None:
    assert rates(50, kind=kind, final_fraction=0.1)[-1] == pytest.approx(0.2)
    assert rates(50, kind=kind, final_fraction=0.0)[-1] == pytest.approx(0.0, abs=1e-12)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    values = rates(100, warmup_fraction=0.0, final_fraction=0.0)
    assert values[49] == pytest.approx(1.0)
    assert values[24] == pytest.approx(1 + math.cos(math.pi / 4))


def test_wsd_is_flat_until_its_decay() -> None:
    values = rates(100, kind="wsd", warmup_fraction=0.1, decay_fraction=0.2, final_fraction=0.0)
    assert set(values[10:80]) == {2.0}
    assert values[80:] == pytest.approx([2.0 * (1 - (i + 1) / 20) for i in range(20)])


def test_constant_stays_at_the_peak() -> None:
    assert rates(10, kind="constant", warmup_fraction=0.0) == [2.0] * 10


def test_a_run_of_one_step_has_a_rate() -> None:
    for kind in ("cosine", "linear", "wsd", "constant"):
        (rate,) = rates(1, kind=kind)
        assert 0.2 <= rate <= 2.0


def test_phases_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must not exceed 1"):
        ScheduleConfig(kind="wsd", warmup_fraction=0.6, decay_fraction=0.6)


def test_timescale_is_the_inverse_of_its_definition() -> None:
    assert adamw_timescale(1e-3 * 0.5, 1000) == pytest.approx(2.0)
    assert adamw_timescale(0.0, 1000) is None
    config = OptimizerConfig(learning_rate=1e-3, adamw_timescale=2.0)
    assert config.resolved_weight_decay(1000) == pytest.approx(0.5)
    assert OptimizerConfig(learning_rate=1e-3, adamw_timescale=math.inf).resolved_weight_decay(1000) == 0.0


def test_the_papers_timescales() -> None:
    """Our arithmetic on the paper's best validation λ: 0.84 for 0.5B, 0.52 for 1B."""
    assert adamw_timescale(2.5e-4 * 0.5, 9537) == pytest.approx(0.84, abs=0.005)
    assert adamw_timescale(2.0e-4 * 0.5, 19073) == pytest.approx(0.52, abs=0.005)
