"""Against scikit-learn's solvers, on the objective written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_plasticity.analysis import logistic
from megatron_plasticity.analysis.logistic import SharedFeatures, accuracy, fit_logistic

STRENGTHS = (1e-3, 1e-2, 0.1, 1.0, 10.0)


def draw(
    classes: int, rows: int = 300, width: int = 10, scales: float = 1.0, noise: float = 2.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Features whose sizes spread by `scales` (in factors of e), with means, and labels that `noise` makes uncertain."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(rows, width))
    labels = (features @ generator.normal(size=(width, classes)) + noise * generator.normal(size=(rows, classes))).argmax(axis=1)
    labels[:classes] = np.arange(classes)
    features = (features + generator.normal(size=width)) * np.exp(scales * generator.normal(size=width))
    return torch.from_numpy(features), torch.from_numpy(labels)


def objective(weights: np.ndarray, bias: np.ndarray, features: np.ndarray, labels: Tensor, c: float) -> float:
    """C·Σ CE + ½‖W‖², divided by C·N; one row of weights is the log-odds of class 1."""
    scores = torch.from_numpy(features @ weights.T + bias)
    if len(weights) == 1:
        scores = torch.cat([torch.zeros_like(scores), scores], dim=1)
    return cross_entropy(scores, labels).item() + float(np.square(weights).sum()) / (2 * c * len(labels))


def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    strengths: tuple[float, ...] = STRENGTHS,
    tolerance: float = logistic.TOLERANCE,
) -> tuple[SharedFeatures, Tensor]:
    """Both variants of one layer."""
    shared = SharedFeatures.of(features[None], (True, False))
    c = torch.tensor(strengths, dtype=torch.float64).expand(1, 2, -1)
    return shared, fit_logistic(shared, labels, classes, c, tolerance=tolerance)


def assert_optimal(features: Tensor, labels: Tensor, classes: int, exact: float = 1e-8) -> None:
    """Both variants at each C: never more than 2e-6 above scikit-learn's Newton or L-BFGS, whichever gets lower."""
    shared, found = fit(features, labels, classes)
    for variant, scale in enumerate(shared.scales[0, :, :-1].numpy()):
        inputs = shared.rows[0, :, :-1].numpy() / scale
        for index, c in enumerate(STRENGTHS):
            coefficients = found[0, variant, index].numpy()
            own = objective(coefficients[:, :-1] * scale, coefficients[:, -1], inputs, labels, c)
            solvers = [
                LogisticRegression(C=c, solver=solver, tol=exact, max_iter=2000).fit(inputs, labels.numpy())
                for solver in ("newton-cholesky", "lbfgs")
            ]
            assert own < min(objective(s.coef_, s.intercept_, inputs, labels, c) for s in solvers) + 2e-6, (variant, c)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning", "ignore::scipy.linalg.LinAlgWarning")
class TestOptimum:
    @pytest.mark.parametrize("classes", [2, 4, 20])
    def test_more_rows_than_features(self, classes: int) -> None:
        assert_optimal(*draw(classes, rows=500, width=20), classes)

    @pytest.mark.parametrize("classes", [2, 4])
    def test_more_features_than_rows(self, classes: int) -> None:
        assert_optimal(*draw(classes, rows=60, width=90), classes)

    @pytest.mark.parametrize("classes", [2, 4])
    def test_separable(self, classes: int) -> None:
        assert_optimal(*draw(classes, rows=400, width=12, noise=0.0), classes)

    @pytest.mark.parametrize("classes", [2, 4])
    def test_features_of_hugely_different_scales(self, classes: int) -> None:
        assert_optimal(*draw(classes, width=15, scales=4.0), classes)

    def test_constant_and_repeated_features(self) -> None:
        features, labels = draw(4)
        features[:, 0] = 0.1
        features[:, 1] = 0.0
        features[:, 3] = features[:, 2]
        assert_optimal(features, labels, 4)

    def test_rare_class(self) -> None:
        features, _ = draw(2)
        assert_optimal(features, (torch.arange(300) % 100 == 0).long(), 2)


@pytest.mark.parametrize("classes", [2, 4])
def test_coefficients_and_accuracy_are_those_of_scikit_learn(classes: int) -> None:
    features, labels = draw(classes)
    asked, answers = draw(classes, rows=200, seed=0)
    shared, found = fit(features, labels, classes, tolerance=1e-14)
    assert found.shape == (1, 2, 5, 1 if classes == 2 else classes, 11)
    reached = accuracy(found, shared.like(asked[None]), answers)
    for index, c in enumerate(STRENGTHS):
        reference = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-10).fit(features.numpy(), labels.numpy())
        np.testing.assert_allclose(found[0, 1, index, :, :-1].numpy(), reference.coef_, atol=1e-5)
        assert reached[0, 1, index].item() == pytest.approx(reference.score(asked.numpy(), answers.numpy()))


def test_tightening_the_tolerance_reaches_the_optimum_itself() -> None:
    features, labels = draw(3)
    shared = SharedFeatures.of(features[None], (False,))
    c = torch.tensor([[[1.0]]], dtype=torch.float64)
    found = fit_logistic(shared, labels, 3, c, tolerance=1e-16)[0, 0, 0]
    reference = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-13).fit(features.numpy(), labels.numpy())
    np.testing.assert_allclose(found[:, :-1].numpy(), reference.coef_, atol=1e-7)


def test_a_smaller_c_shrinks_the_weights_and_never_the_bias() -> None:
    features, labels = draw(2)
    labels[:240] = 1
    _, found = fit(features, labels, 2, (10.0, 1e-7), tolerance=1e-12)
    weak, strong = found[0, 1, :, 0]
    assert strong[:-1].abs().max() < 1e-3 * weak[:-1].abs().max()
    share = labels.double().mean()
    assert strong[-1].item() == pytest.approx(torch.log(share / (1 - share)).item(), abs=1e-3)


def test_accuracy_counts_the_highest_score() -> None:
    two = torch.tensor([[[1.0, 0.0, -0.5]]])
    rows = torch.tensor([[[1.0, 0, 1], [0.0, 0, 1], [0.6, 9, 1]]])
    assert accuracy(two, rows, torch.tensor([1, 0, 1])).item() == 1.0
    assert accuracy(two, rows, torch.tensor([0, 0, 1])).item() == pytest.approx(2 / 3)
    assert accuracy(torch.eye(3)[None], torch.eye(3)[None], torch.tensor([0, 2, 2])).item() == pytest.approx(2 / 3)


def test_rows_before_the_first_one_are_not_fitted() -> None:
    features, labels = draw(3)
    c = torch.tensor(STRENGTHS, dtype=torch.float64).expand(1, 1, -1)
    shared = SharedFeatures.of(features[None], (False,))
    later = fit_logistic(shared, labels, 3, c, first_row=30, tolerance=1e-14)
    alone = SharedFeatures.of(features[None, 30:], (False,))
    expected = fit_logistic(alone, labels[30:], 3, c, tolerance=1e-14)
    torch.testing.assert_close(later[..., :-1], expected[..., :-1], atol=1e-5, rtol=0)


def test_a_start_changes_the_way_and_not_the_end() -> None:
    features, labels = draw(4)
    shared, found = fit(features, labels, 4)
    c = torch.tensor(STRENGTHS, dtype=torch.float64).expand(1, 2, -1)
    torch.testing.assert_close(fit_logistic(shared, labels, 4, c, start=found), found, atol=0, rtol=1e-12)  # nothing left to do
    other = fit_logistic(shared, labels, 4, c, start=torch.randn(found.shape, dtype=torch.float64), tolerance=1e-13)
    torch.testing.assert_close(other[..., :-1], found[..., :-1], atol=2e-2, rtol=1e-2)


def test_variants_share_rows_and_layers_share_a_batch() -> None:
    layers = torch.stack([draw(3, seed=seed, scales=2.0)[0] for seed in range(3)])
    labels = draw(3)[1]
    c = torch.tensor(STRENGTHS, dtype=torch.float64)
    shared = SharedFeatures.of(layers, (False, True))
    together = fit_logistic(shared, labels, 3, c.expand(3, 2, -1), tolerance=1e-14)
    for layer in range(3):
        alone = SharedFeatures.of(layers[layer, None], (True,))
        found = fit_logistic(alone, labels, 3, c.expand(1, 1, -1), tolerance=1e-14)
        scale = alone.scales[0, 0, :-1]
        torch.testing.assert_close(together[layer, 1, ..., :-1] * scale, found[0, 0, ..., :-1] * scale, atol=1e-5, rtol=1e-5)


def test_standardising_uses_the_training_rows_and_passes_over_constant_features() -> None:
    train, test = draw(2, rows=50, width=3)[0], draw(2, rows=20, width=3, seed=1)[0]
    train[:, 2] = test[:, 2] = 0.1  # constant, and not a binary fraction
    shared = SharedFeatures.of(train[None], (True, False))
    torch.testing.assert_close(shared.scales[0, 0], torch.cat([train[:, :2].std(dim=0, correction=0), torch.ones(2).double()]))
    assert (shared.scales[0, 1] == 1).all()
    expected = torch.cat([test - train.mean(dim=0), torch.ones(20, 1).double()], dim=1)
    torch.testing.assert_close(shared.like(test[None])[0], expected)


def test_rounding_of_a_constant_feature_is_not_blown_up() -> None:
    generator = torch.Generator().manual_seed(0)
    constant = 1000 * (1 + 1e-7 * torch.randn(50, generator=generator))
    shared = SharedFeatures.of(torch.stack([constant, 1000 + torch.randn(50, generator=generator)], dim=1)[None], (True,))
    assert (shared.rows / shared.scales[:, 0, None])[0, :, 0].abs().max() < 0.01
    assert shared.scales[0, 0, 1].item() == pytest.approx(1, abs=0.3)


def test_a_fit_that_does_not_arrive_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "_ITERATIONS", 1)
    with pytest.warns(UserWarning, match="not at its optimum after 1 steps"):
        fit(*draw(4), 4)
