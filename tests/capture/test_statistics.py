from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_plasticity.capture.recipe import check_memory
from megatron_plasticity.capture.recorder import Recorder
from megatron_plasticity.capture.statistics import PointStatistics, StreamingStatistics, from_tensors, kept_states
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.transformer import Transformer


def states(count: int, *shape: int, seed: int = 0, offset: float = 0.0) -> Tensor:
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + offset


def of(batches: list[Tensor], covariance: bool = True) -> PointStatistics:
    streaming = StreamingStatistics(covariance)
    for batch in batches:
        streaming.add(batch)
    return from_tensors(streaming.tensors())


@pytest.mark.parametrize("cuts", [[50], [1, 49], [20, 0, 29, 1], [1] * 50])
def test_batches_of_any_size_give_what_numpy_gives_for_all_at_once(cuts: list[int]) -> None:
    # An offset of 1e6 takes six digits from whoever sums squares.
    x = states(50, 5, offset=1e6)
    found = of(list(x.split(cuts)))
    covariance = np.cov(x.numpy(), rowvar=False)
    assert found.count == 50
    np.testing.assert_allclose(found.mean, x.numpy().mean(axis=0), rtol=1e-14)
    assert found.covariance is not None
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.variance, covariance.diagonal(), rtol=1e-7)
    norms = np.linalg.norm(x.numpy(), axis=1)
    assert float(found.norm_mean) == pytest.approx(norms.mean())
    assert float(found.norm_deviation) == pytest.approx(norms.std(ddof=1), rel=1e-6)
    assert float(found.norm_max) == norms.max()


def test_each_head_has_its_own() -> None:
    x = states(40, 3, 4)
    found = of(list(x.split(7)))
    for head in range(3):
        alone = of([x[:, head]])
        assert found.covariance is not None
        assert alone.covariance is not None
        torch.testing.assert_close(found.covariance[head], alone.covariance)
        torch.testing.assert_close(found.mean[head], alone.mean)
        assert float(found.norm_deviation[head]) == pytest.approx(float(alone.norm_deviation))


def test_without_covariance_the_variances_are_the_same_and_nothing_square_is_kept() -> None:
    batches = list(states(30, 6).split(4))
    streaming = StreamingStatistics(covariance=False)
    for batch in batches:
        streaming.add(batch)
    assert max(tensor.numel() for tensor in streaming.tensors().values()) == 6
    assert streaming.result.covariance is None
    torch.testing.assert_close(streaming.result.variance, of(batches).variance)


def test_one_state_has_no_variance_and_none_is_an_error() -> None:
    assert of([states(1, 2)]).variance.isnan().all()
    with pytest.raises(ValueError, match="no states"):
        StreamingStatistics().tensors()


def test_only_positions_that_are_kept_count(model: Transformer, tokens: Tensor) -> None:
    kept = torch.tensor([[0, 4], [9, -1], [-1, -1]])
    recorded = Recorder(model, ["*"]).record(tokens, kept=kept)
    whole = Recorder(model, ["*"]).record(tokens)
    for point in ("layers.1.resid_post", "layers.0.attn.q"):
        every = whole[point] if whole[point].dim() == 3 else whole[point].transpose(1, 2)
        expected = torch.stack([every[0, 0], every[0, 4], every[1, 9]])
        torch.testing.assert_close(kept_states(point, recorded[point], kept), expected)
    last = Recorder(model, ["*"], positions="last").record(tokens, kept=kept[:, :1])
    torch.testing.assert_close(kept_states("layers.0.attn.q", last["layers.0.attn.q"], kept[:, :1]), expected[[0, 2]])


def test_covariances_that_do_not_fit_are_refused_with_what_to_do(model: Transformer) -> None:
    # d² · 8 bytes: 32² at embed, 2 heads of 8² at k, 50² at head.
    size = 8 * (32**2 + 2 * 8**2 + 50**2)
    check_memory(["embed", "layers.0.attn.k", "head", "logits"], model.config, size)
    with pytest.raises(UserError, match=r"3 hook points .*the largest is that of 'head'.* set covariance: false"):
        check_memory(["embed", "layers.0.attn.k", "head", "logits"], model.config, size - 1)
