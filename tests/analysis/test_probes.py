from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_plasticity.analysis import probes
from megatron_plasticity.analysis.probes import check_rows, last_token_states, probe_layers, run_probes
from megatron_plasticity.capture.recorder import Recorder
from megatron_plasticity.config.analysis import ProbesRecipe
from megatron_plasticity.data.labelled_text import LabelledText
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.transformer import Transformer

Make = Callable[..., Transformer]


def chosen(features: Tensor, labels: Tensor, grid: tuple[float, ...], classes: int = 2) -> float:
    recipe = ProbesRecipe(regularisation=grid, standardise=(False,))
    return probe_layers(features[None], labels, features[None], labels, classes, recipe, seed=0).strength.item()


def test_c_is_chosen_on_rows_that_were_not_fitted() -> None:
    """Pure noise with more features than rows: any fit is perfect on its own rows, so only held-out rows can prefer a C."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 400, generator=generator, dtype=torch.float64)
    labels = torch.cat([torch.zeros(150), torch.ones(50)]).long()
    assert chosen(noise, labels, (1e-6, 10.0)) == 1e-6  # always the commonest class: 75 %
    signal = (2.0 * labels - 1)[:, None] * 1e-3
    assert chosen(signal, labels, (1e-6, 1e6)) == 1e6
    assert chosen(signal, labels, (0.5,)) == 0.5
    assert chosen(signal * 0, labels, (10.0, 0.1, 1.0)) == 0.1  # all equal: the strongest


def test_layers_variants_and_their_order_do_not_change_what_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 120, 7, generator=generator) * torch.tensor([0.01, 1, 1, 1, 3, 10, 100])
    labels = (features[1, :, 1] + 0.5 * torch.randn(120, generator=generator) > 0).long()
    split = features[:, :80], labels[:80], features[:, 80:], labels[80:]
    together = probe_layers(*split, 2, ProbesRecipe(), seed=1)
    assert together.accuracy.shape == together.strength.shape == (3, 2)
    for layer in range(3):
        for variant, standardise in enumerate((True, False)):
            alone = probe_layers(
                split[0][layer, None],
                split[1],
                split[2][layer, None],
                split[3],
                2,
                ProbesRecipe(standardise=(standardise,)),
                seed=1,
            )
            assert alone.accuracy.item() == together.accuracy[layer, variant]
            assert alone.strength.item() == together.strength[layer, variant]


def test_too_few_rows_for_a_split_are_named_with_the_class() -> None:
    recipe = ProbesRecipe(regularisation=(0.1, 1.0))
    rows = torch.tensor([0, 1, 0, 1])
    check_rows("mine", rows, ("bad", "good"), recipe, seed=0)
    with pytest.raises(
        UserError, match=r"'mine', seed 3: not enough rows .* of 4 training texts 1 are held out .* class 'odd'; raise"
    ):
        check_rows("mine", rows, ("bad", "good", "odd"), recipe, seed=3)
    with pytest.raises(UserError, match="class 'bad', 'good'; raise `train_texts`"):
        check_rows("mine", rows[:0], ("bad", "good"), recipe, seed=0)
    lone = torch.tensor([1])
    with pytest.raises(UserError, match="of 1 training texts 1 are held out"):
        check_rows("mine", lone, ("bad", "good"), recipe, seed=0)


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
            torch.testing.assert_close(values[row], alone[point][0, -1], rtol=1e-4, atol=1e-5, msg=point)


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


@dataclass(frozen=True)
class LastLetter:
    """The class is the last letter, so the embedding of the last token separates the classes perfectly."""

    classes: tuple[str, ...]

    def identity(self) -> None:
        return None

    def texts(self, split: str, count: int, seed: int) -> list[LabelledText]:
        generator = np.random.default_rng([seed, split == "test"])
        return [
            LabelledText(
                "".join(chr(97 + i) for i in generator.integers(0, 26, 4)) + self.classes[row % len(self.classes)], label
            )
            for row in range(count)
            for label in [row % len(self.classes)]
        ]


LETTERS, PAIR = {"letters": LastLetter(("x", "y", "z"))}, {"pair": LastLetter(("x", "y"))}


def test_results_have_the_agreed_shape_and_find_what_is_there(make_model: Make) -> None:
    recipe = ProbesRecipe(train_texts=60, test_texts=31, max_tokens=16, seeds=(0, 1))
    results = run_probes(make_model(), Bytes(), recipe, LETTERS | PAIR)  # type: ignore[arg-type]
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
    assert run_probes(make_model(), Bytes(), recipe, LETTERS | PAIR) == results  # type: ignore[arg-type]


def test_texts_are_cut_at_their_end_and_never_longer_than_the_context(make_model: Make) -> None:
    recipe = ProbesRecipe(train_texts=60, test_texts=30, max_tokens=4, seeds=(0,), standardise=(False,))
    results = run_probes(make_model(), Bytes(), recipe, PAIR)  # type: ignore[arg-type]
    assert list(results["datasets"]["pair"]["variants"]) == ["raw"]
    assert max(results["datasets"]["pair"]["variants"]["raw"]["accuracy"][0]) < 0.8  # the telling last letter is cut off
    longer = recipe.model_copy(update={"max_tokens": 1000})
    assert run_probes(make_model(), Bytes(), longer, PAIR)["max_tokens"] == 32  # type: ignore[arg-type]


def test_a_diverged_model_is_named(make_model: Make) -> None:
    model = make_model()
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")  # type: ignore[union-attr,index]
    with pytest.raises(UserError, match=r"layers.1.resid_post are not finite"):
        run_probes(model, Bytes(), ProbesRecipe(train_texts=20, test_texts=10), PAIR)  # type: ignore[arg-type]


def test_too_few_texts_end_in_an_error_before_the_model_runs(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "last_token_states", lambda *_: pytest.fail("the model ran"))
    recipe = ProbesRecipe(train_texts=2, test_texts=10, regularisation=(1.0,))  # enough for the pair
    with pytest.raises(UserError, match=r"'letters', seed 0: not enough rows for a split"):
        run_probes(make_model(), Bytes(), recipe, PAIR | LETTERS)  # type: ignore[arg-type]


def test_few_layers_at_a_time_where_they_are_large() -> None:
    cpu = torch.device("cpu")
    assert probes._layers_together(1000, 64, 2, ProbesRecipe(), cpu) > 5
    assert probes._layers_together(10_000, 2048, 4, ProbesRecipe(), cpu) == 1
