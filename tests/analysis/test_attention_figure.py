"""The picture of an `attention` run: a heat map for each statistic, on the scale of what a head can have."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_plasticity.analysis.attention import spectra
from megatron_plasticity.analysis.attention_figure import attention_figure, panels, write_attention_figure
from megatron_plasticity.analysis.attention_maps import attention_maps, with_maps
from megatron_plasticity.analysis.drawing import drawing
from megatron_plasticity.config.analysis import AttentionRecipe
from megatron_plasticity.models.transformer import Transformer


@pytest.fixture
def results(make_model: Callable[..., Transformer]) -> dict[str, Any]:
    model = make_model("olmo2")
    found = spectra(dict(model.named_parameters()), model.config, AttentionRecipe(fold_qk_norm="both"))
    tokens = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
    return with_maps(found, attention_maps(model, tokens))


def test_every_statistic_has_its_panel_and_its_scale(results: dict[str, Any]) -> None:
    qk, folded, vp, entropy, sink, previous = panels(results)
    assert (qk.title, folded.title) == ("W_QK: pseudo-rank (0.95)", "W_QK with gains: pseudo-rank (0.95)")
    assert vp.values.tolist() == [layer["vp"]["pseudo_rank"]["0.95"] for layer in results["layers"]]
    assert qk.highest == folded.highest == vp.highest == 12
    assert previous.values.tolist() == [layer["maps"]["previous_token"] for layer in results["layers"]]
    assert sink.highest == previous.highest == 1
    uniform = sum(math.log(seen) for seen in range(1, 9)) / 8
    assert entropy.highest == pytest.approx(uniform)
    assert entropy.values.shape == (3, 4)
    assert entropy.values.max() <= entropy.highest


def test_without_maps_and_with_another_threshold(results: dict[str, Any]) -> None:
    for layer in results["layers"]:
        del layer["maps"]
        for product in ("qk", "qk_folded", "vp"):
            del layer[product]["pseudo_rank"]["0.95"], layer[product]["pseudo_rank"]["0.99"]
    assert [panel.title for panel in panels(results)] == [
        f"{name}: pseudo-rank (0.90)" for name in ("W_QK", "W_QK with gains", "W_VP")
    ]
    with drawing():
        assert len(attention_figure(results).axes) == 6, "three panels, each with its colour bar"


def test_the_file_is_an_svg_with_text_and_the_same_each_time(results: dict[str, Any], tmp_path: Path) -> None:
    for name in ("once.svg", "twice.svg"):
        write_attention_figure(results, tmp_path / name)
    text = (tmp_path / "once.svg").read_text(encoding="utf-8")
    assert text.startswith("<?xml")
    assert "Mass on the previous token" in text
    assert text == (tmp_path / "twice.svg").read_text(encoding="utf-8")
