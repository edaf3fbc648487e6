"""Attention maps: those of the forward pass and of transformers, and statistics of maps that are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_plasticity.analysis.attention import spectra
from megatron_plasticity.analysis.attention_maps import attention_maps, map_statistics, with_maps
from megatron_plasticity.capture.recorder import Recorder
from megatron_plasticity.config.analysis import AttentionRecipe
from megatron_plasticity.config.interchange import ImportConfig
from megatron_plasticity.config.model import Family
from megatron_plasticity.errors import UserError
from megatron_plasticity.interchange.exporting import export_model
from megatron_plasticity.interchange.importing import import_model
from megatron_plasticity.models.attention import attention_weights
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.tracking.trained_model import TrainedModel
from tests.interchange.folders import write_model

Make = Callable[..., Transformer]


class Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + index % 26) for index in ids)


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
    assert maps["map_tokens"] == 9
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


@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
def test_maps_are_those_of_transformers_eager_attention(tmp_path: Path, model_type: str) -> None:
    """Of an export whose gains are not 1 and whose attention is far from uniform, with grouped keys."""
    from transformers import AutoModelForCausalLM

    write_model(tmp_path / "source", model_type, num_key_value_heads=2)
    run = import_model(ImportConfig(name="model", source=str(tmp_path / "source"), output=tmp_path / "runs"), NoProgress())
    folder = export_model(run.path, tmp_path / "export", NoProgress())
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ours = TrainedModel.open(run.path).checkpoint.build_model(torch.device("cpu"))
    tokens = torch.randint(ours.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens, output_attentions=True).attentions
    recorded = Recorder(ours, ["layers.*.attn.q", "layers.*.attn.k"]).record(tokens)
    found = attention_maps(ours, tokens)
    assert len(expected) == ours.config.layers
    for layer, weights in enumerate(expected):
        recomputed = attention_weights(recorded[f"layers.{layer}.attn.q"], recorded[f"layers.{layer}.attn.k"])
        torch.testing.assert_close(recomputed, weights, rtol=0, atol=1e-5)
        assert weights.std() > 0.05, "near uniform maps would agree by themselves"
        for name, values in map_statistics(weights).items():
            assert found["layers"][layer][name] == pytest.approx(values, abs=1e-5)


def test_results_hold_spectra_and_maps_layer_by_layer(make_model: Make) -> None:
    model = make_model()
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(2))
    maps = attention_maps(model, tokens, Letters())
    results = with_maps(spectra(dict(model.named_parameters()), model.config, AttentionRecipe()), maps)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert set(results["layers"][0]) == {"qk", "vp", "maps"}
    assert results["layers"][1]["maps"] == maps["layers"][1]
    assert results["map_tokens"] == 16
    assert [(map["layer"], map["head"]) for map in results["example_maps"]] == [
        (layer, head) for layer in range(3) for head in (0, 2)
    ]
    assert len(results["example_maps"][0]["tokens"]) == 16


def test_maps_of_diverged_weights_are_refused(make_model: Make) -> None:
    model = make_model()
    model.layers[1].attn.k_proj.weight.data[0, 0] = math.nan  # type: ignore[union-attr,index]
    with pytest.raises(UserError, match="diverged"):
        attention_maps(model, torch.zeros(1, 4, dtype=torch.int64))
