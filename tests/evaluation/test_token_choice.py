from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.sampling import SamplingParameters
from megatron_plasticity.evaluation.token_choice import choose, draw, filtered, penalised

FILTERS = [(0.7, None, 1.0, 1.0), (1.0, 5, 1.0, 1.0), (1.3, None, 0.8, 1.0), (1.0, 40, 0.9, 1.0), (0.6, 20, 0.95, 1.3)]
"""temperature, top_k, top_p, repetition penalty"""


def _logits(rows: int, vocabulary: int) -> torch.Tensor:
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))


def _transformers(logits: torch.Tensor, ids: torch.Tensor, temperature: float, top_k: int | None, top_p: float, penalty: float):
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    processors.append(TopPLogitsWarper(top_p))
    return processors(ids, logits)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "penalty"), FILTERS)
@pytest.mark.parametrize("vocabulary", [60, 3000])  # 3000: more than are sorted at first, and nuclei of either size
def test_filters_are_those_of_transformers(vocabulary: int, temperature, top_k, top_p, penalty) -> None:
    logits = _logits(20, vocabulary)
    logits[:5] /= 20  # nearly uniform
    ids = torch.randint(vocabulary, (20, 30), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(20, vocabulary, dtype=torch.bool).scatter_(1, ids, True)
    ours = filtered(penalised(logits, seen, penalty) / temperature, top_k, top_p)
    theirs = _transformers(logits, ids, temperature, top_k, top_p, penalty)
    torch.testing.assert_close(ours, theirs)
    assert (top_k is None and top_p == 1) or ours.isneginf().any()


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "penalty"), FILTERS)
def test_draws_follow_the_filtered_distribution(temperature, top_k, top_p, penalty) -> None:
    """Equidistant numbers instead of random ones: each token comes as often as transformers' processors say, to one draw."""
    logits, ids, draws = _logits(1, 60), torch.tensor([[3, 8, 20, 41, 41]]), 40_000
    seen = torch.zeros(1, 60, dtype=torch.bool).scatter_(1, ids, True)
    numbers = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    parameters = SamplingParameters(1, temperature, top_p, top_k, penalty)
    tokens = choose(logits.expand(draws, -1), parameters, numbers, seen.expand(draws, -1))
    expected = _transformers(logits, ids, temperature, top_k, top_p, penalty).double().softmax(-1)[0].numpy() * draws
    counts = np.bincount(tokens.numpy(), minlength=60)
    assert np.abs(counts - expected).max() < 1.01
    assert counts[expected == 0].sum() == 0  # what is impossible is never drawn


def test_a_draw_is_the_first_token_beyond_its_number() -> None:
    scores = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]]).log().expand(6, -1)
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-52], dtype=torch.float64)
    assert draw(scores, numbers).tolist() == [0, 0, 2, 2, 3, 3]


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    logits, seen = torch.tensor([[2.0, 1.9, -1.0]]), torch.tensor([[True, False, False]])
    numbers = torch.zeros(1, dtype=torch.float64)
    assert choose(logits, SamplingParameters(1), numbers).tolist() == [0]
    assert choose(logits, SamplingParameters(1, repetition_penalty=1.1), numbers, seen).tolist() == [1]


def test_a_nucleus_has_a_token_however_small_it_is() -> None:
    assert filtered(_logits(7, 50), None, 1e-9).isfinite().sum(dim=1).tolist() == [1] * 7


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (1.0, 0.5)])
def test_a_diverged_model_is_a_user_error(damage: float, temperature: float, top_p: float) -> None:
    with pytest.raises(UserError, match="not finite"):
        choose(torch.tensor([[0.0, damage]]), SamplingParameters(1, temperature, top_p), torch.zeros(1, dtype=torch.float64))
