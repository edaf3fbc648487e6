from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_plasticity.models import loss
from megatron_plasticity.models.loss import IGNORE, linear_cross_entropy, token_loss
from megatron_plasticity.training.objective import scored_positions
from tests.reference_loss import reference_loss


@pytest.mark.parametrize("scale", [1.0, 60.0])
@pytest.mark.parametrize("elements_at_once", [1, 200, 10**6])
def test_losses_of_logits_equal_those_of_torchs_operations(monkeypatch, scale: float, elements_at_once: int) -> None:
    monkeypatch.setitem(loss._ELEMENTS_AT_ONCE, "cpu", elements_at_once)
    targets = torch.randint(50, (3, 7))
    targets[0, :3] = targets[2, 6] = IGNORE
    logits = scale * torch.randn(3, 7, 50)
    expected = reference_loss(logits, targets)
    ours = token_loss(logits.requires_grad_(), targets)
    torch.testing.assert_close(ours.cross_entropy, expected.cross_entropy, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(ours.log_partition, expected.log_partition)
    assert ours.cross_entropy[targets == IGNORE].eq(0).all()
    assert not ours.cross_entropy.requires_grad


def test_logits_are_left_as_they_are() -> None:
    logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    before = logits.clone()
    token_loss(logits, targets)
    assert torch.equal(logits, before)


def test_bfloat16_logits_are_computed_in_float32() -> None:
    logits = (3 * torch.randn(2, 5, 300)).bfloat16()
    targets = torch.randint(300, (2, 5))
    ours, expected = token_loss(logits, targets), token_loss(logits.float(), targets)
    assert ours.cross_entropy.dtype == ours.log_partition.dtype == torch.float32
    assert torch.equal(ours.cross_entropy, expected.cross_entropy)


def test_a_model_that_knows_nothing_loses_log_of_the_vocabulary() -> None:
    ours = token_loss(torch.zeros(1, 1, 64), torch.tensor([[5]]))
    torch.testing.assert_close(ours.cross_entropy, torch.tensor([[64.0]]).log())


def with_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: float = 0.7, **settings: Any) -> tuple[Tensor, ...]:
    """Total, cross-entropy and both gradients, of a loss that something else is made of."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = linear_cross_entropy(hidden, weight, targets, **settings)
    return found.total.detach(), found.cross_entropy, *torch.autograd.grad(upstream * found.total, (hidden, weight))


def expected_with_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss_weight: float, scale: float, upstream: float = 0.7
) -> tuple[Tensor, ...]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = reference_loss(hidden @ weight.t(), targets)
    cross_entropy = losses.cross_entropy.sum()
    total = scale * (cross_entropy + z_loss_weight * losses.log_partition.square()[targets != IGNORE].sum())
    return total.detach(), cross_entropy.detach(), *torch.autograd.grad(upstream * total, (hidden, weight))


def example(vocabulary: int = 50, ignored: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 16, generator=generator)
    weight = torch.randn(vocabulary, 16, generator=generator)
    targets = torch.randint(vocabulary, (3, 7), generator=generator)
    if ignored:
        targets[0, :3] = targets[2, 6] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize(
    ("z_loss_weight", "rows_at_once", "compiled"),
    [
        *((weight, rows, False) for weight in (0.0, 0.01) for rows in (1, 4, 1000)),
        pytest.param(0.01, 4, True, marks=pytest.mark.slow),
    ],
)
def test_the_fused_loss_equals_torchs_operations_in_float64(
    monkeypatch, z_loss_weight: float, rows_at_once: int, compiled: bool
) -> None:
    monkeypatch.setitem(loss._ROWS_AT_ONCE, "cpu", rows_at_once)
    monkeypatch.setitem(loss._ELEMENTS_AT_ONCE, "cpu", 120)
    hidden, weight, targets = example()
    expected = expected_with_gradients(hidden.double(), weight.double(), targets, z_loss_weight, 0.25)
    for scored in (None, scored_positions(targets)):
        settings = {"scored": scored, "z_loss_weight": z_loss_weight, "scale": 0.25, "compiled": compiled}
        ours = with_gradients(hidden, weight, targets, **settings)
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=2e-6, atol=2e-6)
    assert ours[2][targets == IGNORE].eq(0).all()


def test_gradients_in_bfloat16_are_those_of_exact_logits_rounded_once() -> None:
    """In bf16 near certainty softmax − 1 would cancel to 0, and sums over pieces would lose what is small."""
    hidden, weight, targets = example(ignored=False)
    hidden[0, 0] = 8 * weight[targets[0, 0]] / weight[targets[0, 0]].norm()
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logits = (hidden @ weight.t()).float()  # what bf16 makes of them is the model's business
    softmax = logits.softmax(-1)
    exact = softmax - torch.nn.functional.one_hot(targets, 50)
    assert softmax[0, 0, targets[0, 0]].bfloat16() == 1, "a certain token is among them"
    total, _, of_hidden, of_weight = with_gradients(hidden, weight, targets, upstream=1.0)
    torch.testing.assert_close(total, reference_loss(logits, targets).cross_entropy.sum())
    assert of_hidden.dtype == of_weight.dtype == torch.bfloat16
    torch.testing.assert_close(of_hidden, exact.bfloat16() @ weight)
    assert of_hidden[0, 0].any()
    expected = exact.bfloat16().float().flatten(0, 1).t() @ hidden.float().flatten(0, 1)
    torch.testing.assert_close(of_weight.float(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.slow
def test_compiled_it_is_the_same_in_bfloat16_at_any_length(monkeypatch) -> None:
    monkeypatch.setitem(loss._ROWS_AT_ONCE, "cpu", 16)
    weight = example()[1].bfloat16()
    for length in (40, 17, 1):
        hidden, targets = torch.randn(1, length, 16).bfloat16(), torch.randint(50, (1, length))
        targets[0, ::3] = IGNORE
        settings = {"scored": scored_positions(targets), "z_loss_weight": 0.01}
        plain, compiled = (with_gradients(hidden, weight, targets, compiled=way, **settings) for way in (False, True))
        for mine, theirs in zip(compiled, plain, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_under_autocast_it_is_a_product_like_any_other() -> None:
    hidden, weight, targets = example()
    expected = with_gradients(hidden.bfloat16(), weight.bfloat16(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_gradients(hidden, weight, targets)
    assert ours[2].dtype == ours[3].dtype == torch.float32
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype))


def test_the_gradient_of_the_matrix_is_summed_over_pieces_in_float32(monkeypatch) -> None:
    """A thousand small summands onto a large one: in bf16 they would be lost one by one."""
    monkeypatch.setitem(loss._ROWS_AT_ONCE, "cpu", 1)
    hidden = torch.cat((torch.tensor([256.0]), torch.full((1000,), 0.5))).view(1, -1, 1).bfloat16()
    weight = torch.zeros(2, 1).bfloat16()
    *_, of_weight = with_gradients(hidden, weight, torch.zeros(1, 1001, dtype=torch.int64), upstream=1.0)
    torch.testing.assert_close(of_weight.float(), torch.tensor([[-378.0], [378.0]]), rtol=2**-8, atol=0)


@pytest.mark.parametrize(("hidden_learns", "weight_learns"), [(True, False), (False, True), (False, False)])
def test_what_learns_nothing_gets_no_gradient(hidden_learns: bool, weight_learns: bool) -> None:
    hidden, weight, targets = example()
    found = linear_cross_entropy(hidden.requires_grad_(hidden_learns), weight.requires_grad_(weight_learns), targets)
    assert found.total.requires_grad == (hidden_learns or weight_learns)
    assert not found.cross_entropy.requires_grad
    if hidden_learns or weight_learns:
        found.total.backward()
    assert (hidden.grad is not None, weight.grad is not None) == (hidden_learns, weight_learns)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets).total, found.total)


def test_rows_without_any_target_change_nothing() -> None:
    hidden, weight, targets = example()
    targets = torch.full_like(targets, IGNORE)
    for scored in (None, scored_positions(targets)):
        total, cross_entropy, *gradients = with_gradients(hidden, weight, targets, scored=scored)
        assert total == cross_entropy == 0
        assert not any(gradient.any() for gradient in gradients)


def test_no_tensor_of_all_logits_is_ever_made(monkeypatch) -> None:
    """Every allocation is smaller than the logits of half the rows."""
    rows, vocabulary, width = 256, 1000, 8
    monkeypatch.setitem(loss._ROWS_AT_ONCE, "cpu", 32)
    hidden = torch.randn(1, rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(vocabulary, (1, rows))
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, targets).total.backward()
    largest = max(event.cpu_memory_usage for event in profile.events() or [])
    assert 32 * vocabulary * 4 <= largest < rows * vocabulary * 4 / 2
