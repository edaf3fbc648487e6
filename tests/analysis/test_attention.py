from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from megatron_plasticity.analysis.attention import (
    core_singular_values,
    layer_singular_values,
    pseudo_rank,
    spectra,
    spectrum_measures,
    triangle,
)
from megatron_plasticity.config.analysis import AttentionRecipe
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.transformer import Transformer

Make = Callable[..., Transformer]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_values_are_those_of_the_dense_products_of_each_head_and_its_group(make_model: Make, kv_heads: int) -> None:
    model = make_model(kv_heads=kv_heads)
    found = layer_singular_values(dict(model.named_parameters()), model.config, layer=1)
    assert list(found) == ["qk", "vp"]
    qk, vp = found["qk"], found["vp"]
    attn = model.layers[1].attn
    assert qk.shape == vp.shape == (4, 12)
    for head in range(4):
        rows, group = slice(12 * head, 12 * head + 12), head // (4 // kv_heads)
        group_rows = slice(12 * group, 12 * group + 12)
        query, key = attn.q_proj.weight.double()[rows], attn.k_proj.weight.double()[group_rows]  # type: ignore[union-attr]
        value, output = attn.v_proj.weight.double()[group_rows], attn.out_proj.weight.double()[:, rows]  # type: ignore[union-attr]
        for values, dense in ((qk, key.T @ query), (vp, output @ value)):
            assert dense.shape == (48, 48)
            exact = torch.linalg.svdvals(dense)
            torch.testing.assert_close(values[head], exact[:12], rtol=1e-5, atol=1e-12)
            assert exact[12:].max() < 1e-12


def test_heads_of_weights_that_have_lost_rank_keep_small_values_apart_from_zero() -> None:
    """Singular values over eleven decades, as strong decay leaves them: an eigenvalue of Aᵀ·A would lose those below 1e-8."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.logspace(0, -11, 12, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(1, 48, 12, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    found = core_singular_values(triangle(left * exact.sqrt()), triangle(right * exact.sqrt()))
    torch.testing.assert_close(found[0], exact, rtol=1e-3, atol=1e-15)


def test_gains_of_the_qk_norm_are_folded_in_when_asked(make_model: Make) -> None:
    model = make_model("olmo2", kv_heads=4)
    attn = model.layers[0].attn
    torch.nn.init.uniform_(attn.q_norm.weight, 0.5, 2.0)  # type: ignore[union-attr,arg-type]
    torch.nn.init.uniform_(attn.k_norm.weight, 0.5, 2.0)  # type: ignore[union-attr,arg-type]
    state = dict(model.named_parameters())
    plain, folded = (layer_singular_values(state, model.config, 0, fold)["qk"] for fold in (False, True))
    query = torch.diag(attn.q_norm.weight.double()) @ attn.q_proj.weight.double()  # type: ignore[union-attr]
    key = torch.diag(attn.k_norm.weight.double()) @ attn.k_proj.weight.double()  # type: ignore[union-attr]
    exact = torch.linalg.svdvals(key[12:24].T @ query[12:24])[:12]
    torch.testing.assert_close(folded[1], exact, rtol=1e-5, atol=1e-12)
    assert not torch.allclose(plain[1], folded[1], rtol=0.01)

    both = spectra(state, model.config, AttentionRecipe(fold_qk_norm="both"))
    assert list(both["layers"][0]) == ["qk", "qk_folded", "vp"]
    for fold, name in ((False, "qk"), (True, "qk_folded")):
        alone = spectra(state, model.config, AttentionRecipe(fold_qk_norm=fold))
        assert both["layers"][0][name] == alone["layers"][0]["qk"]
        assert both["summary"][f"{name}_pseudo_rank"] == alone["summary"]["qk_pseudo_rank"]
        assert both["mean_spectrum"][name] == alone["mean_spectrum"]["qk"]


def test_a_family_without_qk_norm_has_nothing_to_fold(make_model: Make) -> None:
    model = make_model("llama2")
    with pytest.raises(UserError, match="llama2 has no QK-norm"):
        spectra(dict(model.named_parameters()), model.config, AttentionRecipe(fold_qk_norm=True))


def test_pseudo_rank_of_known_spectra() -> None:
    values = torch.tensor([[1.0] * 20, [1.0] + [0.0] * 19, [0.0] * 20, [8.0, 1.0, 1.0] + [0.0] * 17], dtype=torch.float64)
    assert pseudo_rank(values, 0.95).tolist() == [19, 1, 0, 3]
    assert pseudo_rank(values, 0.8).tolist() == [16, 1, 0, 1]
    assert pseudo_rank(values, 1.0).tolist() == [20, 1, 0, 3]
    assert pseudo_rank(values.square(), 0.95).tolist() == [19, 1, 0, 1]
    thirds = torch.full((30,), 1 / 3, dtype=torch.float64)  # cumulative sums that round
    assert pseudo_rank(thirds, 0.9).item() == 27


def test_measures_of_known_spectra() -> None:
    values = torch.tensor([[2.0, 2.0, 2.0, 2.0], [4.0, 3.0, 0.0, 0.0], [0.0] * 4], dtype=torch.float64)
    measures = spectrum_measures(values, (0.9, 0.999))
    assert measures["pseudo_rank"] == {"0.90": [4, 2, 0], "0.999": [4, 2, 0]}
    assert measures["pseudo_rank_squared"]["0.90"] == [4, 2, 0]
    assert measures["nuclear"] == pytest.approx([8, 7, 0])
    assert measures["frobenius"] == pytest.approx([4, 5, 0])
    assert measures["stable_rank"] == pytest.approx([4, 25 / 16, 0])
    entropy = -(4 / 7 * math.log(4 / 7) + 3 / 7 * math.log(3 / 7))
    assert measures["entropy_rank"] == pytest.approx([4, math.exp(entropy), 0])


class Lookups(Mapping[str, Tensor]):
    """Weights that note what is looked up."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.seen: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.seen.append(name)
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def spectra_of(model: Transformer, **recipe: Any) -> dict[str, Any]:
    return spectra(dict(model.named_parameters()), model.config, AttentionRecipe(**recipe))


def test_spectra_look_at_four_tensors_of_a_layer_once(make_model: Make) -> None:
    weights = Lookups(dict(make_model().named_parameters()))
    spectra(weights, make_model().config, AttentionRecipe())
    names = ("q_proj", "k_proj", "out_proj", "v_proj")
    assert sorted(weights.seen) == sorted(f"layers.{layer}.attn.{name}.weight" for layer in range(3) for name in names)


def test_threads_change_nothing_and_are_as_they_were(make_model: Make) -> None:
    before = torch.get_num_threads()
    alone = spectra_of(make_model())
    torch.set_num_threads(2)
    try:
        assert spectra_of(make_model()) == alone
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_results_have_the_agreed_shape_and_are_json(make_model: Make) -> None:
    results = spectra_of(make_model())
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert len(results["layers"]) == 3
    assert set(results["layers"][0]) == {"qk", "vp"}
    assert set(results["layers"][0]["qk"]["pseudo_rank"]) == {"0.90", "0.95", "0.99"}
    assert results["head_dim"] == len(results["mean_spectrum"]["qk"][0]) == 12
    for kind in ("qk", "vp"):
        assert all(
            spectrum[0] == pytest.approx(1) and spectrum == sorted(spectrum)[::-1] for spectrum in results["mean_spectrum"][kind]
        )
        ranks = [layer[kind]["pseudo_rank"]["0.95"] for layer in results["layers"]]
        assert results["summary"][f"{kind}_pseudo_rank"] == pytest.approx(sum(map(sum, ranks)) / 12)


def test_weights_decayed_to_zero_have_rank_zero_and_no_nan(make_model: Make) -> None:
    model = make_model()
    with torch.no_grad():
        for block in model.layers:
            block.attn.q_proj.weight.zero_()  # type: ignore[union-attr]
    results = spectra_of(model)
    json.dumps(results, allow_nan=False)
    assert results["summary"]["qk_pseudo_rank"] == 0
    assert results["mean_spectrum"]["qk"][0] == [0.0] * 12
    assert results["summary"]["vp_pseudo_rank"] > 0


def test_diverged_or_missing_weights_are_named(make_model: Make) -> None:
    model = make_model()
    state = dict(model.named_parameters())
    with pytest.raises(UserError, match=r"no weight layers.1.attn.k_proj.weight"):
        spectra(
            {name: weight for name, weight in state.items() if name != "layers.1.attn.k_proj.weight"},
            model.config,
            AttentionRecipe(),
        )
    with torch.no_grad():
        model.layers[1].attn.v_proj.weight[0, 0] = math.nan  # type: ignore[union-attr,index]
    with pytest.raises(UserError, match=r"layers.1.attn.v_proj.weight is not finite"):
        spectra_of(model)


@pytest.mark.parametrize(
    ("key", "value"), [("thresholds", ()), ("thresholds", (1.5,)), ("map_length", 1), ("fold_qk_norm", "once")]
)
def test_what_cannot_be_measured_is_refused_by_the_config(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        AttentionRecipe(**{key: value})  # type: ignore[arg-type]
