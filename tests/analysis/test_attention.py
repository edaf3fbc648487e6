from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_plasticity.analysis.attention import (
    attention_maps,
    layer_singular_values,
    map_statistics,
    product_singular_values,
    pseudo_rank,
    run_attention,
    spectra,
    spectrum_measures,
)
from megatron_plasticity.capture.recorder import Recorder
from megatron_plasticity.config.analysis import AttentionRecipe
from megatron_plasticity.config.model import Family
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.transformer import Transformer

Make = Callable[..., Transformer]


class Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + index % 26) for index in ids)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_values_are_those_of_the_dense_products_of_each_head_and_its_group(make_model: Make, kv_heads: int) -> None:
    model = make_model(kv_heads=kv_heads)
    qk, vp = layer_singular_values(dict(model.named_parameters()), model.config, layer=1)
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


def test_product_of_wide_factors_has_at_most_d_values() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(product_singular_values(left, right), torch.linalg.svdvals(left @ right.T))


def test_gains_of_the_qk_norm_are_folded_in_when_asked(make_model: Make) -> None:
    model = make_model("olmo2", kv_heads=4)
    attn = model.layers[0].attn
    torch.nn.init.uniform_(attn.q_norm.weight, 0.5, 2.0)  # type: ignore[union-attr,arg-type]
    torch.nn.init.uniform_(attn.k_norm.weight, 0.5, 2.0)  # type: ignore[union-attr,arg-type]
    state = dict(model.named_parameters())
    plain, _ = layer_singular_values(state, model.config, 0)
    folded, _ = layer_singular_values(state, model.config, 0, fold_qk_norm=True)
    query = torch.diag(attn.q_norm.weight.double()) @ attn.q_proj.weight.double()  # type: ignore[union-attr]
    key = torch.diag(attn.k_norm.weight.double()) @ attn.k_proj.weight.double()  # type: ignore[union-attr]
    exact = torch.linalg.svdvals(key[12:24].T @ query[12:24])[:12]
    torch.testing.assert_close(folded[1], exact, rtol=1e-5, atol=1e-12)
    assert not torch.allclose(plain[1], folded[1], rtol=0.01)


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


@pytest.mark.parametrize("family", ["llama2", "olmo2"])
@torch.no_grad()
def test_maps_are_those_of_the_forward_pass(make_model: Make, family: Family) -> None:
    """The recomputed weights times the recorded v must be the recorded z, and equal softmax attention written out."""
    model = make_model(family)
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    recorded = Recorder(model, ["layers.2.attn.*"]).record(tokens)
    query, key, value, z = (recorded[f"layers.2.attn.{name}"] for name in ("q", "k", "v", "z"))
    weights = torch.zeros(2, 4, 9, 9)
    for row in range(2):
        for head in range(4):
            for i in range(9):
                scores = key[row, head // 2, : i + 1] @ query[row, head, i] / math.sqrt(12)
                weights[row, head, i, : i + 1] = torch.softmax(scores, 0)
    mixed = (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, z, rtol=1e-5, atol=1e-5)

    maps = attention_maps(model, tokens, Letters())
    expected = map_statistics(weights)
    assert maps["layers"][2] == {name: pytest.approx(values, abs=1e-5) for name, values in expected.items()}
    example = next(map for map in maps["example_maps"] if (map["layer"], map["head"]) == (2, 2))
    torch.testing.assert_close(torch.tensor(example["weights"]), weights[0, 2], rtol=0, atol=6e-5)
    assert example["tokens"] == [Letters().decode([token]) for token in tokens[0].tolist()]


def statistics(rows: list[list[float]]) -> dict[str, float]:
    return {name: values[0] for name, values in map_statistics(torch.tensor(rows)[None, None]).items()}


def test_statistics_of_known_maps() -> None:
    uniform = statistics([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])
    assert uniform["entropy"] == pytest.approx((math.log(2) + math.log(3)) / 3, abs=1e-6)
    assert uniform["sink"] == pytest.approx((1 / 2 + 1 / 3) / 2)  # query 0 is left out
    assert uniform["previous_token"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert statistics([[1, 0, 0], [1, 0, 0], [1, 0, 0]]) == {"entropy": 0, "sink": 1, "previous_token": 0.5}
    assert statistics([[1, 0, 0], [1, 0, 0], [0, 1, 0]]) == {"entropy": 0, "sink": 0.5, "previous_token": 1}


def test_statistics_are_means_over_sequences() -> None:
    sink, local = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0]]), torch.eye(3)
    both = map_statistics(torch.stack([sink, local])[:, None])
    assert both["sink"] == [0.5]


def run(model: Transformer, **recipe: object) -> tuple[dict, Tensor]:
    tokens = torch.randint(64, (3, 32), generator=torch.Generator().manual_seed(2))
    return run_attention(model, AttentionRecipe(**recipe), tokens, Letters()), tokens  # type: ignore[arg-type]


def test_results_have_the_agreed_shape_and_are_json(make_model: Make) -> None:
    results, tokens = run(make_model(), map_sequences=2, map_length=16)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert len(results["layers"]) == 3
    assert set(results["layers"][0]) == {"qk", "vp", "maps"}
    assert set(results["layers"][0]["qk"]["pseudo_rank"]) == {"0.90", "0.95", "0.99"}
    assert results["head_dim"] == len(results["mean_spectrum"]["qk"][0]) == 12
    for kind in ("qk", "vp"):
        assert all(
            spectrum[0] == pytest.approx(1) and spectrum == sorted(spectrum)[::-1] for spectrum in results["mean_spectrum"][kind]
        )
        ranks = [layer[kind]["pseudo_rank"]["0.95"] for layer in results["layers"]]
        assert results["summary"][f"{kind}_pseudo_rank"] == pytest.approx(sum(map(sum, ranks)) / 12)
    assert results["map_tokens"] == 16
    assert [(map["layer"], map["head"]) for map in results["example_maps"]] == [
        (layer, head) for layer in range(3) for head in (0, 2)
    ]
    assert len(results["example_maps"][0]["tokens"]) == 16
    assert results["layers"][1]["maps"] == attention_maps(make_model(), tokens[:2, :16])["layers"][1]


def test_maps_can_be_left_out(make_model: Make) -> None:
    results, _ = run(make_model(), map_sequences=0)
    assert "example_maps" not in results
    assert set(results["layers"][0]) == {"qk", "vp"}


def test_weights_decayed_to_zero_have_rank_zero_and_no_nan(make_model: Make) -> None:
    model = make_model()
    with torch.no_grad():
        for block in model.layers:
            block.attn.q_proj.weight.zero_()  # type: ignore[union-attr]
    results, _ = run(model, map_sequences=0)
    json.dumps(results, allow_nan=False)
    assert results["summary"]["qk_pseudo_rank"] == 0
    assert results["mean_spectrum"]["qk"][0] == [0.0] * 12
    assert results["summary"]["vp_pseudo_rank"] > 0


def test_diverged_or_missing_weights_and_too_short_maps_are_named(make_model: Make) -> None:
    model = make_model()
    state = dict(model.named_parameters())
    with pytest.raises(UserError, match=r"no weight layers.1.attn.k_proj.weight"):
        spectra(
            {name: weight for name, weight in state.items() if name != "layers.1.attn.k_proj.weight"},
            model.config,
            AttentionRecipe(),
        )
    with pytest.raises(UserError, match="2 tokens or more"):
        run(model, map_length=1)
    with torch.no_grad():
        model.layers[1].attn.v_proj.weight[0, 0] = math.nan  # type: ignore[union-attr,index]
    with pytest.raises(UserError, match=r"layers.1.attn.v_proj.weight is not finite"):
        run(model)
    with pytest.raises(UserError, match="diverged"):
        model.layers[1].attn.k_proj.weight.data[0, 0] = math.nan  # type: ignore[union-attr,index]
        attention_maps(model, torch.zeros(1, 4, dtype=torch.int64))
