from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megatron_plasticity.models import loss
from megatron_plasticity.models.loss import IGNORE, token_loss


def composed(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same two losses from torch's own operations."""
    cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE)
    return cross_entropy.view(targets.shape), logits.float().logsumexp(-1)


def total(cross_entropy: torch.Tensor, log_partition: torch.Tensor) -> torch.Tensor:
    """A training loss with z-loss, whose weights differ from position to position."""
    weights = torch.linspace(0.5, 2.0, cross_entropy.numel()).view(cross_entropy.shape)
    return (weights * cross_entropy).sum() + 0.1 * log_partition.square().mean()


@pytest.mark.parametrize("scale", [1.0, 60.0])
@pytest.mark.parametrize("rows_at_once", [1, 4, 1000])
def test_values_and_gradients_equal_the_composed_operations(monkeypatch, scale: float, rows_at_once: int) -> None:
    monkeypatch.setattr(loss, "_rows_at_once", lambda logits: rows_at_once)
    targets = torch.randint(50, (3, 7))
    targets[0, :3] = targets[2, 6] = IGNORE
    logits = (scale * torch.randn(3, 7, 50)).requires_grad_()
    expected = composed(logits, targets)
    (expected_gradient,) = torch.autograd.grad(total(*expected), logits)
    ours = token_loss(logits, targets)
    (gradient,) = torch.autograd.grad(total(*ours), logits)
    torch.testing.assert_close(ours.cross_entropy, expected[0], rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(ours.log_partition, expected[1])
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    assert ours.cross_entropy[targets == IGNORE].eq(0).all()


def test_ignored_positions_feel_the_z_loss_only() -> None:
    logits = torch.randn(1, 2, 11, requires_grad=True)
    targets = torch.tensor([[IGNORE, 4]])
    (gradient,) = torch.autograd.grad(token_loss(logits, targets).cross_entropy.sum(), logits)
    assert gradient[0, 0].eq(0).all()
    assert gradient[0, 1].ne(0).all()
    (gradient,) = torch.autograd.grad(token_loss(logits, targets).log_partition.sum(), logits)
    torch.testing.assert_close(gradient, logits.detach().softmax(-1))


def test_bfloat16_logits_are_computed_in_float32() -> None:
    logits = (3 * torch.randn(2, 5, 300)).bfloat16()
    logits[0, 0, 7] = 30.0  # almost certain: in bf16 softmax - 1 would cancel to 0
    targets = torch.randint(300, (2, 5))
    targets[0, 0] = 7
    logits.requires_grad_()
    wide = logits.detach().float().requires_grad_()
    ours = token_loss(logits, targets)
    expected = token_loss(wide, targets)
    assert ours.cross_entropy.dtype == ours.log_partition.dtype == torch.float32
    assert torch.equal(ours.cross_entropy, expected.cross_entropy)
    (gradient,) = torch.autograd.grad(ours.cross_entropy.sum(), logits)
    (expected_gradient,) = torch.autograd.grad(expected.cross_entropy.sum(), wide)
    assert torch.equal(gradient, expected_gradient.bfloat16())


def test_a_model_that_knows_nothing_loses_log_of_the_vocabulary() -> None:
    ours = token_loss(torch.zeros(1, 1, 64), torch.tensor([[5]]))
    torch.testing.assert_close(ours.cross_entropy, torch.tensor([[64.0]]).log())
