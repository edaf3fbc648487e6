from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from megatron_plasticity.analysis import probes
from megatron_plasticity.analysis.probes import Probe, choose_c, fit_probe, last_token_states, run_probes, standardised
from megatron_plasticity.capture.recorder import Recorder
from megatron_plasticity.config.analysis import ProbesRecipe
from megatron_plasticity.data.labelled_text import LabelledText
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.transformer import Transformer

Make = Callable[..., Transformer]


def draw(classes: int, rows: int = 300, width: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(rows, width)) * np.exp(generator.normal(size=width))
    labels = (features @ generator.normal(size=(width, classes)) + 2 * generator.normal(size=(rows, classes))).argmax(axis=1)
    return features, labels


def objective(weights: torch.Tensor, bias: torch.Tensor, features: np.ndarray, labels: np.ndarray, c: float) -> torch.Tensor:
    """C·Σ CE + ½‖W‖², divided by C·N, written out; one row of weights is the log-odds of class 1."""
    scores = torch.from_numpy(features) @ weights.T + bias
    if len(weights) == 1:
        scores = torch.cat([torch.zeros_like(scores), scores], dim=1)
    loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels), reduction="sum")
    return (c * loss + weights.square().sum() / 2) / (c * len(labels))


def torch_optimum(features: np.ndarray, labels: np.ndarray, rows: int, c: float) -> float:
    weights = torch.zeros(rows, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(rows, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = objective(weights, bias, features, labels, c)
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    return objective(weights, bias, features, labels, c).item()


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("c", [1e-3, 0.1, 10.0])
def test_fit_reaches_the_optimum_of_the_stated_objective(classes: int, c: float) -> None:
    """Against torch's L-BFGS on the objective written out, and against another of scikit-learn's solvers."""
    features, labels = draw(classes)
    probe = fit_probe(features, labels, classes, c)
    assert probe.weights.shape == (1 if classes == 2 else classes, 10)
    reached = objective(torch.from_numpy(probe.weights), torch.from_numpy(probe.bias), features, labels, c).item()
    assert reached == pytest.approx(torch_optimum(features, labels, len(probe.weights), c), abs=1e-5)
    reference = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-10).fit(features, labels)
    np.testing.assert_allclose(probe.weights, reference.coef_, atol=2e-3)
    assert probe.accuracy(features, labels) == pytest.approx(reference.score(features, labels), abs=1 / 300)


def test_a_smaller_c_shrinks_the_weights_and_never_the_bias() -> None:
    features, labels = draw(2)
    labels = np.where(np.arange(300) < 240, 1, labels)
    weak, strong = fit_probe(features, labels, 2, 10.0), fit_probe(features, labels, 2, 1e-7)
    assert np.abs(strong.weights).max() < 1e-3 * np.abs(weak.weights).max()
    share = labels.mean()
    assert strong.bias[0] == pytest.approx(np.log(share / (1 - share)), abs=1e-3)


def test_accuracy_counts_the_highest_score() -> None:
    two = Probe(np.array([[1.0, 0.0]]), np.array([-0.5]))
    rows = np.array([[1.0, 0], [0.0, 0], [0.6, 9]])
    assert two.accuracy(rows, np.array([1, 0, 1])) == 1.0
    assert two.accuracy(rows, np.array([0, 0, 1])) == pytest.approx(2 / 3)
    three = Probe(np.eye(3), np.zeros(3))
    assert three.accuracy(np.eye(3), np.array([0, 1, 0])) == pytest.approx(2 / 3)


def test_c_is_chosen_on_rows_that_were_not_fitted() -> None:
    """Pure noise with more features than rows: any fit is perfect on its own rows, so only held-out rows can prefer a C."""
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(200, 400)), np.r_[np.zeros(150), np.ones(50)].astype(int)
    assert choose_c(features, labels, 2, (1e-6, 10.0), seed=0) == 1e-6  # always the commonest class: 75 %
    signal = np.r_[-np.ones(150), np.ones(50)][:, None] * np.array([[1e-3]])
    assert choose_c(signal, labels, 2, (1e-6, 1e6), seed=0) == 1e6
    assert choose_c(signal, labels, 2, (0.5,), seed=0) == 0.5
    assert choose_c(np.abs(signal) * 0, labels, 2, (10.0, 0.1, 1.0), seed=0) == 0.1  # all equal: the strongest


def test_a_class_without_training_texts_is_named() -> None:
    with pytest.raises(UserError, match="only 2 of 3 classes are among the 4 training texts; raise `train_texts`"):
        fit_probe(np.eye(4), np.array([0, 1, 0, 1]), 3, 1.0)


def test_standardising_uses_the_training_rows_only() -> None:
    generator = np.random.default_rng(0)
    train, test = generator.normal(5, 3, (50, 3)), generator.normal(0, 1, (20, 3))
    train[:, 2] = test[:, 2] = 0.1  # constant, and not a binary fraction
    scaled_train, scaled_test = standardised(train, test)
    np.testing.assert_allclose(scaled_train[:, :2].mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(scaled_train[:, :2].std(axis=0), 1)
    np.testing.assert_allclose(scaled_test[:, 0], (test[:, 0] - train[:, 0].mean()) / train[:, 0].std())
    np.testing.assert_allclose(scaled_test[:, 2], 0, atol=1e-12)


@pytest.mark.parametrize("family", ["llama2", "olmo2"])
def test_states_are_those_of_each_text_alone_and_in_the_order_given(make_model: Make, family: str, monkeypatch) -> None:
    monkeypatch.setattr(probes, "_TOKENS_PER_BATCH", 40)
    model = make_model(family)
    generator = np.random.default_rng(0)
    sequences = [generator.integers(0, 64, length).tolist() for length in (7, 32, 1, 7, 20, 3, 12)]
    states = last_token_states(model, sequences)
    assert list(states) == ["embed", "layers.0.resid_post", "layers.1.resid_post", "layers.2.resid_post", "final_norm"]
    for row, sequence in enumerate(sequences):
        alone = Recorder(model, list(states)).record(torch.tensor([sequence]))
        for point, values in states.items():
            np.testing.assert_allclose(values[row], alone[point][0, -1].numpy(), rtol=1e-4, atol=1e-5, err_msg=point)


def test_batches_hold_similar_lengths_and_few_enough_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_TOKENS_PER_BATCH", 40)
    lengths = [7, 32, 1, 7, 20, 3, 12, 100]
    batches = probes._batches_by_length(lengths)
    assert sorted(row for batch in batches for row in batch) == list(range(8))
    assert all(len(batch) * max(lengths[row] for row in batch) <= 40 for batch in batches if len(batch) > 1)
    assert [lengths[row] for batch in batches for row in batch] == sorted(lengths)


def test_an_empty_text_has_no_state(make_model: Make) -> None:
    with pytest.raises(ValueError, match="without tokens"):
        last_token_states(make_model(), [[1], []])


class Bytes:
    """A tokenizer of one id per character."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[ord(letter) % 64 for letter in text] for text in texts]


def fake_texts(name: str, split: str, count: int, seed: int) -> list[LabelledText]:
    """The class is the last letter, so the embedding of the last token separates the classes perfectly."""
    classes = {"letters": 3, "pair": 2}[name]
    generator = np.random.default_rng([seed, split == "test"])
    return [
        LabelledText("".join(chr(97 + i) for i in generator.integers(0, 26, 4)) + "xyz"[row % classes], row % classes)
        for row in range(count)
    ]


@pytest.fixture
def fake_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "labelled_texts", fake_texts)
    monkeypatch.setattr(probes, "label_names", lambda name: {"letters": ("x", "y", "z"), "pair": ("x", "y")}[name])


@pytest.mark.usefixtures("fake_sets")
def test_results_have_the_agreed_shape_and_find_what_is_there(make_model: Make) -> None:
    recipe = ProbesRecipe(datasets=("letters", "pair"), train_texts=60, test_texts=31, max_tokens=16, seeds=(0, 1))
    results = run_probes(make_model(), Bytes(), recipe)  # type: ignore[arg-type]
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    letters = results["datasets"]["letters"]
    assert letters["classes"] == ["x", "y", "z"]
    assert letters["chance"] == pytest.approx(11 / 31)
    assert (letters["train_texts"], letters["test_texts"]) == ([60, 60], 31)
    assert set(letters["variants"]) == {"standardised", "raw"}
    for variant in letters["variants"].values():
        assert variant["points"] == ["embed", *(f"layers.{layer}.resid_post" for layer in range(3)), "final_norm"]
        assert np.shape(variant["accuracy"]) == np.shape(variant["chosen_c"]) == (5, 2)
        assert variant["accuracy"][0] == [1.0, 1.0]
    assert run_probes(make_model(), Bytes(), recipe) == results  # type: ignore[arg-type]


@pytest.mark.usefixtures("fake_sets")
def test_texts_are_cut_at_their_end_and_never_longer_than_the_context(make_model: Make) -> None:
    recipe = ProbesRecipe(datasets=("pair",), train_texts=60, test_texts=30, max_tokens=4, seeds=(0,), standardise=(False,))
    results = run_probes(make_model(), Bytes(), recipe)  # type: ignore[arg-type]
    assert list(results["datasets"]["pair"]["variants"]) == ["raw"]
    assert max(results["datasets"]["pair"]["variants"]["raw"]["accuracy"][0]) < 0.8  # the telling last letter is cut off
    longer = recipe.model_copy(update={"max_tokens": 1000})
    assert run_probes(make_model(), Bytes(), longer)["max_tokens"] == 32  # type: ignore[arg-type]


@pytest.mark.usefixtures("fake_sets")
def test_a_diverged_model_is_named(make_model: Make) -> None:
    model = make_model()
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")  # type: ignore[union-attr,index]
    with pytest.raises(UserError, match=r"layers.1.resid_post are not finite"):
        run_probes(model, Bytes(), ProbesRecipe(datasets=("pair",), train_texts=20, test_texts=10))  # type: ignore[arg-type]


def test_rounding_of_a_constant_feature_is_not_blown_up() -> None:
    rounding = np.random.default_rng(0).normal(0, 1e-7, 50)
    features = np.column_stack([1000 * (1 + rounding), np.random.default_rng(1).normal(1000, 1, 50)]).astype(np.float32)
    scaled, _ = standardised(features.astype(np.float64), features[:1].astype(np.float64))
    assert np.abs(scaled[:, 0]).max() < 0.01
    assert scaled[:, 1].std() == pytest.approx(1)
