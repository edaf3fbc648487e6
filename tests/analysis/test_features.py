"""Dormant units, ranks and norms: against whole matrices in numpy, and on models built to have what is looked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from megatron_plasticity.analysis import features
from megatron_plasticity.analysis.features import dormant_shares, feature_measures, feature_ranks, run_features
from megatron_plasticity.analysis.features_figure import write_features_figure
from megatron_plasticity.analysis.weight_norms import spectral_norm, weight_norms
from megatron_plasticity.capture.recorder import Recorder
from megatron_plasticity.capture.statistics import StreamingStatistics
from megatron_plasticity.config.analysis import FeaturesRecipe
from megatron_plasticity.config.model import Family, ModelConfig
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.token_store import TokenStore, TokenStoreWriter
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.tracking.metrics import read_metrics
from megatron_plasticity.tracking.mlflow_content import flat_numbers
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.training.finetune import finetune
from megatron_plasticity.training.pretrain import pretrain
from tests.commands import Run
from tests.interchange.folders import write_model

Make = Callable[..., Transformer]
FAMILIES = pytest.mark.parametrize("family", ["llama2", "olmo2"])


@pytest.fixture
def reader(tmp_path: Path) -> BlockReader:
    with TokenStoreWriter(tmp_path / "store", 64) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 64, 33 * 7))
    return BlockReader(TokenStore(tmp_path / "store"), 32)


def measured(model: Transformer, reader: BlockReader, **settings: Any) -> dict[str, Any]:
    return run_features(model.eval(), reader, FeaturesRecipe(**settings), NoProgress())


def dense_ranks(matrix: np.ndarray, delta: float = 0.01) -> dict[str, float]:
    """The three ranks, from the singular values of the whole matrix, term by term."""
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values / values.sum()
    srank = next(k for k in range(1, len(values) + 1) if values[:k].sum() >= (1 - delta) * values.sum())
    return {
        "entropy_rank": float(np.exp(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())),
        "srank": srank,
        "stable_rank": float(np.linalg.norm(matrix) ** 2 / values[0] ** 2),
    }


# --- the measures ---


@FAMILIES
def test_numbers_are_those_of_the_whole_matrices(make_model: Make, reader: BlockReader, family: Family) -> None:
    """In three uneven batches, against everything at once."""
    model = make_model(family)
    for parameter in model.parameters():  # far from initialisation, so that layers do something
        parameter.data.mul_(2)
    results = measured(model, reader, sequences=7, batch_size=3, dormant_thresholds=(0.5, 0.9))
    assert (results["sequences"], results["positions"], results["hidden_size"]) == (7, 7 * 32, 48)

    tokens = torch.from_numpy(reader.tokens(np.arange(7))[:, :-1].copy())
    states = {
        name: state.double().numpy()
        for name, state in Recorder(model, ["*.resid_post", "*.mlp.post", "*.attn.z", "final_norm"]).record(tokens).items()
    }

    def check(found: dict[str, Any], matrix: np.ndarray) -> None:
        for kind, dense in (("uncentred", matrix), ("centred", matrix - matrix.mean(axis=0))):
            assert found[kind] == pytest.approx(dense_ranks(dense), rel=1e-5)
        norms = np.linalg.norm(matrix, axis=1)
        assert found["norm"] == pytest.approx({"mean": norms.mean(), "deviation": norms.std(ddof=1)}, rel=1e-6)

    for index, layer in enumerate(results["layers"]):
        check(layer, states[f"layers.{index}.resid_post"].reshape(-1, 48))
        hidden = np.abs(states[f"layers.{index}.mlp.post"]).reshape(-1, 64).mean(axis=0)
        heads = np.linalg.norm(states[f"layers.{index}.attn.z"].reshape(-1, 4, 12), axis=2).mean(axis=0)
        for threshold in (0.5, 0.9):
            assert layer["dormant_units"][str(threshold)] == (hidden / hidden.mean() <= threshold).mean()
            assert layer["dormant_heads"][str(threshold)] == (heads / heads.mean() <= threshold).mean()
        assert 0 < layer["dormant_units"]["0.9"] < 1
    check(results["final_norm"], states["final_norm"].reshape(-1, 48))

    layers = results["layers"]
    assert results["summary"]["uncentred"]["srank"] == pytest.approx(np.mean([layer["uncentred"]["srank"] for layer in layers]))
    shares = [layer["dormant_units"]["0.9"] for layer in layers]
    assert results["summary"]["dormant_units"]["0.9"] == pytest.approx(np.mean(shares))


def test_units_and_heads_that_were_put_to_sleep_are_found(make_model: Make, reader: BlockReader) -> None:
    model = make_model()
    mlp, attention = model.layers[1].mlp, model.layers[2].attn  # type: ignore[union-attr]
    mlp.gate_proj.weight.data[:16] = 0  # type: ignore[union-attr]  # silu(0) = 0: silent on every token
    mlp.up_proj.weight.data[16:24] *= 1e-3  # type: ignore[union-attr]  # hardly anything
    attention.v_proj.weight.data[:12] = 0  # type: ignore[union-attr]  # one of two key/value heads, so two of four heads
    layers = measured(model, reader)["layers"]
    assert [layer["dormant_units"]["0"] for layer in layers] == [0, 16 / 64, 0]
    assert [layer["dormant_units"]["0.025"] for layer in layers] == [0, 24 / 64, 0]
    assert [layer["dormant_heads"]["0"] for layer in layers] == [0, 0, 0.5]


def test_a_layer_that_is_silent_altogether_is_dormant() -> None:
    assert dormant_shares(torch.zeros(5), (0.0, 0.1)) == {"0": 1, "0.1": 1}
    assert dormant_shares(torch.tensor([0.0, 0.1, 1.9, 2.0]), (0.0, 0.1, 1.0)) == {"0": 0.25, "0.1": 0.5, "1": 0.5}


def test_ranks_of_known_spectra() -> None:
    assert feature_ranks(torch.ones(200).double(), 0.01) == pytest.approx({"entropy_rank": 200, "srank": 198, "stable_rank": 200})
    one = torch.tensor([3.0, 0, 0, 0]).double()
    assert feature_ranks(one, 0.01) == pytest.approx({"entropy_rank": 1, "srank": 1, "stable_rank": 1})
    assert feature_ranks(one * 0, 0.01) == {"entropy_rank": 0, "srank": 0, "stable_rank": 0}
    halves = torch.tensor([0.5, 0.25, 0.25]).double()
    assert feature_ranks(halves, 0.25)["srank"] == 2
    assert feature_ranks(halves, 0.2)["srank"] == 3
    assert feature_ranks(halves, 0.2)["entropy_rank"] == pytest.approx(2**1.5)


def test_a_mean_is_a_direction_until_it_is_taken_away() -> None:
    """Constant rows but for two directions: rank 3, and 2 when centred, whatever the size of the mean."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(10, 3, generator=generator, dtype=torch.float64)).Q
    varying = torch.randn(500, 2, generator=generator, dtype=torch.float64)
    stream = StreamingStatistics()
    for rows in (1e4 * basis[:, 0] + varying @ basis[:, 1:].T).split(77):
        stream.add(rows)
    found = feature_measures(stream, 1e-6)
    assert (found["uncentred"]["srank"], found["centred"]["srank"]) == (3, 2)
    assert found["uncentred"]["stable_rank"] == pytest.approx(1, abs=1e-6)
    assert found["centred"]["entropy_rank"] == pytest.approx(2, abs=0.01)
    assert found["norm"]["mean"] == pytest.approx(1e4, rel=1e-4)


def test_passes_within_memory_give_the_same_numbers(
    make_model: Make, reader: BlockReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = measured(make_model(), reader)
    points = [*(f"layers.{layer}.resid_post" for layer in range(3)), "final_norm"]
    monkeypatch.setattr(features, "_passes", lambda config, memory: [points[:1], points[1:3], points[3:]])
    assert measured(make_model(), reader) == at_once


def test_matrices_are_cut_into_what_fits() -> None:
    config = ModelConfig(
        family="llama2", layers=5, hidden_size=256, mlp_hidden_size=512, query_heads=4, kv_heads=4, head_dim=64, vocab_size=64,
        context_length=32,
    )  # type: ignore[call-arg]  # fmt: skip
    assert [len(points) for points in features._passes(config, 2)] == [2, 2, 2]  # half a MiB each, and two for merging
    assert [len(points) for points in features._passes(config, 100)] == [6]
    with pytest.raises(UserError, match=r"memory_mib=1: the second moments of 256 features need 2 MiB"):
        features._passes(config, 1)


def test_the_model_is_left_as_it_was(make_model: Make, reader: BlockReader) -> None:
    model = make_model()
    measured(model, reader)
    assert not any(module._forward_hooks for module in model.modules())


def test_too_few_positions_for_a_rank(make_model: Make, reader: BlockReader) -> None:
    with pytest.raises(UserError, match=r"1 sequences have 32 positions, fewer than the 48 features .* raise `sequences` \(7"):
        measured(make_model(), reader, sequences=1)


def test_a_diverged_model_has_no_rank(make_model: Make, reader: BlockReader) -> None:
    model = make_model()
    model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"layers\.1\.resid_post is not finite on some tokens"):
        measured(model, reader)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight is not finite"):
        weight_norms(dict(model.named_parameters()), model.config, NoProgress())


def test_thresholds_are_named_once_and_not_negative() -> None:
    for thresholds in ((0.1, 0.1), (-0.1,), ()):
        with pytest.raises(ValidationError, match="dormant_thresholds"):
            FeaturesRecipe(dormant_thresholds=thresholds)


# --- weights ---


def test_norms_of_weights_are_those_of_numpy(make_model: Make) -> None:
    model = make_model("olmo2")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = weight_norms(weights, model.config, NoProgress())
    query = weights["layers.1.attn.q_proj.weight"].double().numpy()
    assert found["layers"][1]["attn.q_proj"] == pytest.approx(
        {"frobenius": np.linalg.norm(query), "spectral": np.linalg.norm(query, 2)}
    )
    assert list(found["layers"][0]["attn.q_norm"]) == ["frobenius"]
    assert set(found["others"]) == {"embed", "final_norm", "head"}
    of_mlp = np.concatenate([weight.double().numpy().ravel() for name, weight in weights.items() if ".mlp." in name])
    assert found["classes"]["mlp"] == pytest.approx(
        {"frobenius": np.linalg.norm(of_mlp), "root_mean_square": np.sqrt(np.mean(of_mlp**2))}
    )


def test_the_spectral_norm_of_a_large_matrix_is_found_without_decomposing_it() -> None:
    matrix = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))
    for given in (matrix, matrix.T):
        assert spectral_norm(given) == pytest.approx(np.linalg.norm(matrix.double().numpy(), 2), rel=1e-5)
    assert spectral_norm(torch.zeros(300, 300)) == 0


# --- the command ---


@pytest.fixture
def base(pretrain_config: Callable[..., PretrainConfig]) -> RunFolder:
    return pretrain(pretrain_config({"name": "base", "model": {"context_length": 160}}), NoProgress())


def test_from_a_run_to_its_figures(run: Run, base: RunFolder, tmp_path: Path, repository: Path) -> None:
    config, output = repository / "configs/analyze/features.yaml", f"output={tmp_path / 'runs'}"
    code, out, err = run("analyze", "features", config, f"run={base.path}", output, "sequences=5")
    assert code == 0, err
    assert "entropy rank, centred" in out
    assert "AdamW timescale 167 of the run" in out
    folder = RunFolder.open(Path(out.splitlines()[-1]))
    results = folder.results
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert "rotational equilibrium" in (folder.path / "features.svg").read_text(encoding="utf-8")
    numbers = flat_numbers(results)  # what MLflow is given
    assert numbers["results/summary/uncentred/entropy_rank"] == results["summary"]["uncentred"]["entropy_rank"]
    assert "results/training/summary/mlp/over_equilibrium" in numbers

    rows = {(row["step"], name): value for row in read_metrics(base.metrics_path) for name, value in row.items()}
    training = results["training"]
    assert training["steps"] == [6, 12]
    for place, step in enumerate(training["steps"]):
        rate, norm = rows[step, "train/learning_rate"], rows[step, "weight_norm/mlp"]
        assert training["learning_rate"][place] == pytest.approx(rate)
        of_mlp = {key: values[place] for key, values in training["classes"]["mlp"].items()}
        assert of_mlp["effective_learning_rate"] == pytest.approx(rate / norm)
        assert of_mlp["effective_learning_rate"] == pytest.approx(rows[step, "effective_learning_rate/mlp"])
        assert of_mlp["relative_update"] == pytest.approx(rows[step, "update_norm/mlp"] / norm)
        assert of_mlp["equilibrium"] == pytest.approx((2 * rate * 0.1 * 0.1 / 1.9) ** 0.5)
    assert results["weights"]["classes"]["mlp"]["frobenius"] == pytest.approx(rows[12, "weight_norm/mlp"], rel=1e-5)

    # An earlier checkpoint has the log up to it.
    code, out, err = run("analyze", "features", config, f"run={base.path}/checkpoints/step-10", output, "sequences=5")
    assert code == 0, err
    assert RunFolder.open(Path(out.splitlines()[-1])).results["training"]["steps"] == [6]


def test_a_fine_tuned_model_has_the_log_of_its_own_run(
    run: Run, base: RunFolder, finetune_config: Callable[..., FinetuneConfig], tmp_path: Path, repository: Path
) -> None:
    tuned = finetune(finetune_config(base.path, {"max_length": 160, "logging": {"norms_every_steps": 1}}), NoProgress())
    config, output = repository / "configs/analyze/features.yaml", f"output={tmp_path / 'runs'}"
    code, out, err = run("analyze", "features", config, f"run={tuned.path}", output, "sequences=5")
    assert code == 0, err
    training = RunFolder.open(Path(out.splitlines()[-1])).results["training"]
    assert training["steps"] == list(range(1, tuned.results["steps"] + 1))
    logged = [row["train/learning_rate"] for row in read_metrics(tuned.metrics_path) if "train/learning_rate" in row]
    assert training["learning_rate"][-1] == pytest.approx(logged[-1])


def test_a_model_from_elsewhere_needs_a_text_and_has_no_log(run: Run, tmp_path: Path, repository: Path) -> None:
    write_model(tmp_path / "source")
    output = f"output={tmp_path / 'runs'}"
    imported = run("import-hf", tmp_path / "source", output)[1].splitlines()[-1]
    command = ("analyze", "features", repository / "configs/analyze/features.yaml", f"run={imported}", output)
    code, _, err = run(*command)
    assert code == 2
    assert "name one by `text`" in err

    text = tmp_path / "text.txt"
    code, _, err = run(*command, f"text={text}")
    assert code == 2
    assert f"{text}: expected a text file" in err
    text.write_text("the quick brown fox " * 400)
    code, out, err = run(*command, f"text={text}")
    assert code == 0, err
    assert "AdamW timescale" not in out
    folder = RunFolder.open(Path(out.splitlines()[-1]))
    assert folder.results["training"] is None
    assert (folder.path / "features.svg").is_file()
    text.write_text("jumps over the lazy dog " * 400)
    code, out, err = run(*command, f"text={text}")
    assert code == 0, err
    assert out.splitlines()[-1] != str(folder.path), "another text is another run"


def test_figures_say_what_they_show(make_model: Make, reader: BlockReader, tmp_path: Path) -> None:
    results = {**measured(make_model(), reader), "training": None}
    write_features_figure(results, tmp_path / "features.svg")
    drawn = (tmp_path / "features.svg").read_text(encoding="utf-8")
    for text in ("units, τ = 0.025", "entropy rank, centred", "Ranks of the 48 features"):
        assert text in drawn
    assert "rotational" not in drawn
