from __future__ import annotations

import numpy as np
import pytest

from megatron_plasticity.analysis import bootstrap
from megatron_plasticity.analysis.bootstrap import interval, resampled_means


def test_spread_of_resampled_means_is_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    means = resampled_means(values, 4000, np.random.default_rng(1))
    assert means.shape == (4000,)
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    assert means.std() == pytest.approx(values.std() / 20, rel=0.05)
    estimate = interval(values.mean(), means)
    assert estimate["low"] == pytest.approx(values.mean() - 1.96 * values.std() / 20, abs=0.02)
    assert estimate["high"] == pytest.approx(values.mean() + 1.96 * values.std() / 20, abs=0.02)


def test_columns_are_resampled_together() -> None:
    first = np.random.default_rng(0).normal(size=50)
    means = resampled_means(np.column_stack([first, first + 1, -first]), 200, np.random.default_rng(1))
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 1)
    np.testing.assert_allclose(means[:, 2], -means[:, 0])


def test_chunks_do_not_change_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=30)
    whole = resampled_means(values, 100, np.random.default_rng(1))
    monkeypatch.setattr(bootstrap, "_CHUNK", 70)
    np.testing.assert_allclose(resampled_means(values, 100, np.random.default_rng(1)), whole, rtol=1e-9)


def test_nothing_cannot_be_resampled() -> None:
    with pytest.raises(ValueError, match="nothing"):
        resampled_means(np.empty(0), 10, np.random.default_rng(0))
