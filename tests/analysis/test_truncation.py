"""Truncated heads: the best approximation of each product, a fair control, and a checkpoint like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from megatron_plasticity.analysis.truncation import (
    Directions,
    Heads,
    directions,
    own_parameter,
    ranks_to_try,
    run_truncation,
    truncated_tensors,
)
from megatron_plasticity.analysis.truncation_figure import write_truncation_figure
from megatron_plasticity.config.analysis import AttentionProduct, TruncationConfig
from megatron_plasticity.config.model import Family
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.token_store import TokenStore, TokenStoreWriter
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.tracking.trained_model import TrainedModel
from megatron_plasticity.training.pretrain import pretrain
from tests.commands import Run
from tests.interchange.folders import write_model

Make = Callable[..., Transformer]
FAMILIES = pytest.mark.parametrize("family", ["llama2", "olmo2"])
TARGETS = pytest.mark.parametrize("target", ["qk", "vp"])


def weights_of(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def with_gains(model: Transformer) -> Transformer:
    """Gains of the QK-norm that differ, where there is one."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "attn.q_norm" in name or "attn.k_norm" in name:
            parameter.data.uniform_(0.5, 2.0, generator=generator)
    return model


def products(weights: dict[str, Tensor], model: Transformer, layer: int, target: AttentionProduct) -> list[Tensor]:
    """W_QK or W_VP of each head, d×d, written out."""
    config, prefix = model.config, f"layers.{layer}.attn"
    own, shared = ("q_proj", "k_proj") if target == "qk" else ("out_proj", "v_proj")
    own_weight, shared_weight = (weights[f"{prefix}.{name}.weight"].double() for name in (own, shared))
    if target == "qk" and config.family == "olmo2":
        own_weight = weights[f"{prefix}.q_norm.weight"].double()[:, None] * own_weight
        shared_weight = weights[f"{prefix}.k_norm.weight"].double()[:, None] * shared_weight
    found = []
    for head in range(config.query_heads):
        group = head // (config.query_heads // config.kv_heads)
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        group_rows = slice(group * config.head_dim, (group + 1) * config.head_dim)
        if target == "qk":
            found.append(shared_weight[group_rows].T @ own_weight[rows])
        else:
            found.append(own_weight[:, rows] @ shared_weight[group_rows])
    return found


@FAMILIES
@TARGETS
@pytest.mark.parametrize("rank", [0, 1, 5, 12])
def test_each_product_becomes_its_best_approximation(
    make_model: Make, family: Family, target: AttentionProduct, rank: int
) -> None:
    """With keys and values shared by two heads each: those of the dense product (Eckart and Young)."""
    model = with_gains(make_model(family))
    weights = weights_of(model)
    after = dict(truncated_tensors(weights, model.config, target, rank))
    assert list(after) == list(weights)
    changed = {name for name in weights if not torch.equal(weights[name], after[name])}
    assert changed <= {own_parameter(layer, target) for layer in range(3)}
    for layer in range(3):
        for dense, found in zip(products(weights, model, layer, target), products(after, model, layer, target), strict=True):
            left, values, right = torch.linalg.svd(dense)
            best = (left[:, :rank] * values[:rank]) @ right[:rank]
            torch.testing.assert_close(found, best, rtol=0, atol=1e-6 * float(values[0]))


def test_a_head_reads_rank_directions_at_every_distance(make_model: Make) -> None:
    """So rotary embedding, which turns between W_K and W_Q, adds none."""
    model = make_model()
    after = dict(truncated_tensors(weights_of(model), model.config, "qk", 3))
    for head in after["layers.1.attn.q_proj.weight"].split(12):
        assert torch.linalg.matrix_rank(head, rtol=1e-5) == 3


@TARGETS
def test_the_control_keeps_random_directions_of_the_same_subspace(make_model: Make, target: AttentionProduct) -> None:
    model = make_model()
    found = directions(weights_of(model), model.config, 0, target)
    turned = found.turned(torch.Generator().manual_seed(0))
    identity = torch.eye(12, dtype=torch.float64).expand(4, 12, 12)
    torch.testing.assert_close(turned.vectors.mT @ turned.vectors, identity)
    torch.testing.assert_close(turned.vectors @ turned.vectors.mT, found.vectors @ found.vectors.mT)
    dense = torch.stack(products(weights_of(model), model, 0, target))
    dense = dense.mT if target == "qk" else dense
    for those in (found, turned):
        torch.testing.assert_close(those.strengths, (those.vectors.mT @ dense).norm(dim=2), rtol=1e-5, atol=1e-9)
        kept = those.vectors[..., :5]
        lost = (dense - kept @ (kept.mT @ dense)).norm(dim=(1, 2)) / dense.norm(dim=(1, 2))
        assert those.lost(5) == pytest.approx(float(lost.mean()), rel=1e-5)
    assert found.lost(5) < turned.lost(5)


def test_a_product_that_is_zero_has_nothing_to_lose() -> None:
    assert Directions(torch.eye(4).expand(1, 4, 4), torch.zeros(1, 4)).lost(2) == 0


@FAMILIES
def test_the_model_is_truncated_as_it_is_written_and_restored(make_model: Make, family: Family) -> None:
    model = with_gains(make_model(family))
    before = weights_of(model)
    written = dict(truncated_tensors(before, model.config, "vp", 4))
    with Heads(model, before, "vp", NoProgress()) as heads:
        lost = heads.truncate(4)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), written[name], rtol=0, atol=1e-6)
        wider, narrower = heads.truncate(8, control_seed=1), heads.truncate(4, control_seed=1)
        assert lost < narrower
        assert wider < narrower, "the control's directions of rank 4 are a part of those of rank 8"
        assert heads.truncate(4, control_seed=2) != narrower
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


# --- the measurement ---


@pytest.fixture
def reader(tmp_path: Path) -> BlockReader:
    with TokenStoreWriter(tmp_path / "store", 64) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 64, 33 * 5))
    return BlockReader(TokenStore(tmp_path / "store"), 32)


def config_with(**settings: Any) -> TruncationConfig:
    return TruncationConfig(name="t", run=Path("runs/x"), **settings)


def measured(make_model: Make, reader: BlockReader, **settings: Any) -> dict[str, Any]:
    model = make_model()
    for parameter in model.parameters():  # far from initialisation, so that attention matters
        parameter.data.mul_(3)
    return run_truncation(model, weights_of(model), reader, config_with(**settings), NoProgress())


def test_results_have_the_agreed_shape_and_full_rank_costs_nothing(make_model: Make, reader: BlockReader, tmp_path: Path) -> None:
    results = measured(make_model, reader, ranks=(12, 0, 3), control_seeds=(0, 1), bootstrap_resamples=50)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert (results["sequences"], results["head_dim"]) == (5, 12)
    assert list(results["targets"]) == ["qk", "vp"]
    for ranks in results["targets"].values():
        assert list(ranks) == ["0", "3", "12"]
        for name in ("truncated", "control"):
            assert ranks["12"][name]["increase"]["value"] == pytest.approx(0, abs=1e-5)
            assert ranks["12"][name]["product_error"] == pytest.approx(0, abs=1e-3)
            assert ranks["0"][name]["product_error"] == pytest.approx(1)
            outcome = ranks["3"][name]
            assert outcome["loss"] == pytest.approx(results["loss"] + outcome["increase"]["value"])
            assert outcome["increase"]["low"] < outcome["increase"]["value"] < outcome["increase"]["high"]
            assert abs(outcome["increase"]["value"]) > 1e-4
        assert ranks["0"]["control_excess"] == {"value": 0, "low": 0, "high": 0}, "with nothing kept both are the same"
        excess = ranks["3"]["control"]["loss"] - ranks["3"]["truncated"]["loss"]
        assert ranks["3"]["control_excess"]["value"] == pytest.approx(excess)
    write_truncation_figure(results, tmp_path / "truncation.svg")
    assert "random directions" in (tmp_path / "truncation.svg").read_text()


def test_without_controls_and_with_one_sequence(make_model: Make, reader: BlockReader, tmp_path: Path) -> None:
    results = measured(make_model, reader, targets=("vp",), ranks=(2,), control_seeds=(), sequences=1)
    assert list(results["targets"]) == ["vp"]
    (entry,) = results["targets"]["vp"].values()
    assert list(entry) == ["truncated"]
    assert list(entry["truncated"]["increase"]) == ["value"]
    write_truncation_figure(results, tmp_path / "truncation.svg")
    assert "random directions" not in (tmp_path / "truncation.svg").read_text()


def test_a_comparison_does_not_depend_on_what_else_is_measured(make_model: Make, reader: BlockReader) -> None:
    alone = measured(make_model, reader, targets=("vp",), ranks=(2,), control_seeds=())
    among = measured(make_model, reader, ranks=(1, 2))
    assert alone["targets"]["vp"]["2"]["truncated"] == among["targets"]["vp"]["2"]["truncated"]


def test_ranks_by_default_and_those_that_no_head_can_have() -> None:
    assert ranks_to_try(config_with(), 12) == (0, 1, 2, 4, 8)
    assert ranks_to_try(config_with(), 16) == (0, 1, 2, 4, 8)
    assert ranks_to_try(config_with(ranks=(4, 2, 4)), 16) == (2, 4)
    with pytest.raises(UserError, match=r"ranks: \[17\] exceed the head dimension of this model, 16"):
        ranks_to_try(config_with(ranks=(16, 17)), 16)


def test_a_model_that_is_kept_has_one_target_and_one_rank() -> None:
    for settings in ({"ranks": (1, 2), "targets": ("qk",)}, {"ranks": (1,)}, {"targets": ("vp",)}):
        with pytest.raises(ValidationError, match="one target and one rank"):
            config_with(write=True, **settings)


# --- the command ---


@pytest.fixture
def base(pretrain_config: Callable[..., PretrainConfig]) -> RunFolder:
    changes = {"name": "base", "model": {"context_length": 160}, "steps": 2, "checkpoint": {"every_steps": 2}}
    return pretrain(pretrain_config({**changes, "batch": {"global_batch_size": 2, "micro_batch_size": 2}}), NoProgress())


def test_from_a_run_to_the_evaluation_of_its_truncated_model(run: Run, base: RunFolder, tmp_path: Path, repository: Path) -> None:
    config, output = repository / "configs/analyze/truncation.yaml", f"output={tmp_path / 'runs'}"
    code, out, err = run("analyze", "truncation", config, f"run={base.path}", output, "sequences=2")
    assert code == 0, err
    assert "W_QK of rank" in out
    survey = RunFolder.open(Path(out.splitlines()[-1]))
    assert list(survey.results["targets"]["vp"]) == ["0", "1", "2", "4"]
    assert (survey.path / "truncation.svg").is_file()
    assert not (survey.path / "checkpoints").exists()

    one = ("targets=[qk]", "ranks=[2]", "write=true", "sequences=2")
    code, out, err = run("analyze", "truncation", config, f"run={base.path}", output, *one)
    assert code == 0, err
    kept = Path(out.splitlines()[-1])
    trained = TrainedModel.open(kept)
    assert trained.identity == trained.run.hash == RunFolder.open(kept).hash
    assert trained.checkpoint.trainer["truncated_from"] == base.hash
    assert trained.pretraining_run().path == base.path

    code, out, err = run("analyze", "attention", repository / "configs/analyze/attention.yaml", f"run={kept}", output)
    assert code == 0, err
    spectra = RunFolder.open(Path(out.splitlines()[-1]))
    assert max(max(layer["qk"]["pseudo_rank"]["0.99"]) for layer in spectra.results["layers"]) <= 2
    assert max(max(layer["vp"]["pseudo_rank"]["0.99"]) for layer in spectra.results["layers"]) > 2
    assert (spectra.path / "attention.svg").is_file()

    asked = ("tasks=[{name: arithmetic, test_examples: 2}]", "max_new_tokens=4")
    code, out, err = run("evaluate", repository / "configs/evaluate/debug.yaml", f"run={kept}", output, *asked)
    assert code == 0, err
    code, out, err = run("evaluate", repository / "configs/evaluate/debug.yaml", f"run={survey.path}", output, *asked)
    assert code == 2
    assert "this truncation run has made no model" in err


def test_a_model_from_elsewhere_needs_a_text(run: Run, tmp_path: Path, repository: Path) -> None:
    write_model(tmp_path / "source")
    output = f"output={tmp_path / 'runs'}"
    imported = run("import-hf", tmp_path / "source", output)[1].splitlines()[-1]
    command = ("analyze", "truncation", repository / "configs/analyze/truncation.yaml", f"run={imported}", output, "ranks=[1]")
    code, _, err = run(*command)
    assert code == 2
    assert "name one by `text`" in err

    text = tmp_path / "text.txt"
    code, _, err = run(*command, f"text={text}")
    assert code == 2
    assert f"{text}: expected a text file" in err
    text.write_text("too short")
    code, _, err = run(*command, f"text={text}")
    assert code == 2
    assert "give a longer text" in err
    text.write_text("the quick brown fox " * 400)
    code, out, err = run(*command, f"text={text}")
    assert code == 0, err
    first = out.splitlines()[-1]
    text.write_text("jumps over the lazy dog " * 400)
    code, out, err = run(*command, f"text={text}")
    assert code == 0, err
    assert out.splitlines()[-1] != first, "another text is another run"
