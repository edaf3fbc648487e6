"""Reading a study folder: whole, partial and damaged."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_plasticity.errors import UserError
from megatron_plasticity.study.results import Series, UnequalSeeds, collect
from tests.study.fabricate import TASKS, Fabrication, fabricate

SMALL = Fabrication(weight_decays=(0.0, 0.5), tasks=("arithmetic", "trials"), analyses=("overfitting",), questions=20)


def folder_of(study: Path, cell: str) -> Path:
    entries = json.loads((study / "study.json").read_text())["cells"]
    return study / next(entry["folder"] for entry in entries if entry["id"] == cell)


def test_a_whole_study_is_read(tmp_path: Path) -> None:
    results = collect(fabricate(tmp_path / "study", Fabrication()))
    assert results.weight_decays == (0.0, 0.1, 0.5, 1.5, 5.0)
    assert results.tasks == tuple(TASKS)
    assert {cell.status for cell in results.cells} == {"done"}
    (group,) = results.groups
    assert group.label == ""
    model = group.models[2]
    assert model.held_out_loss == json.loads((model.pretrain.folder / "results.json").read_text())["held_out_loss"]
    assert set(model.base_scores) == set(model.finetuned_scores) == set(TASKS)
    scores = model.finetuned_scores["algebra"]
    assert scores.metrics["greedy"].value == pytest.approx(sum(scores.greedy_correct) / scores.questions)
    assert model.probes
    assert model.attention
    assert model.overfitting
    assert model.pretrain.metrics["train/loss"].steps[:3] == (0, 10, 20)
    assert model.pretrain.seconds == 130.0


def test_zero_weight_decay_has_no_timescale(tmp_path: Path) -> None:
    zero, half = collect(fabricate(tmp_path / "study", SMALL)).groups[0].models
    assert zero.pretrain.adamw_timescale is None
    assert half.pretrain.adamw_timescale == pytest.approx(1 / (1e-3 * 0.5 * 400))


def test_other_axes_make_groups(tmp_path: Path) -> None:
    results = collect(fabricate(tmp_path / "study", Fabrication(seeds=(1, 2), weight_decays=(1.0, 0.1), tasks=(), analyses=())))
    assert [group.label for group in results.groups] == ["seed = 1", "seed = 2"]
    assert [model.weight_decay for model in results.groups[0].models] == [0.1, 1.0]


def test_ways_of_fine_tuning_make_outcomes(tmp_path: Path) -> None:
    axes = {"optimizer.weight_decay": (0.0, 0.1), "schedule.decay_fraction": (0.1,), "engine.decay_fraction": (1e-5,)}
    results = collect(fabricate(tmp_path / "study", replace(SMALL, finetune_axes=axes)))
    first, second = results.variants
    assert second == "weight_decay = 0.1, schedule.decay_fraction = 0.1, engine.decay_fraction = 1e-05"
    assert results.variants[first] == {path: values[0] for path, values in axes.items()}
    assert [(o.name, o.task, o.variant) for o in results.outcomes][1] == (f"arithmetic, {second}", "arithmetic", second)
    model = results.groups[0].models[0]
    assert set(model.finetuned_scores) == {outcome.name for outcome in results.outcomes}
    assert set(model.base_scores) == set(SMALL.tasks)


def test_one_way_of_fine_tuning_has_no_name(tmp_path: Path) -> None:
    results = collect(fabricate(tmp_path / "study", replace(SMALL, finetune_axes={"optimizer.weight_decay": (0.5,)})))
    assert results.variants == {}
    assert [outcome.name for outcome in results.outcomes] == list(SMALL.tasks)


def test_seeds_are_averaged_question_by_question(tmp_path: Path) -> None:
    what = replace(SMALL, finetune_axes={"seed": (1, 2, 3)}, test_sets={"short": 5, "long": 15})
    study = fabricate(tmp_path / "study", what)
    results = collect(study)
    assert (results.variants, results.finetune_seeds) == ({}, ("1", "2", "3"))
    model = results.groups[0].models[1]
    single = [
        json.loads((folder_of(study, f"evaluate-wd0.5-trials-seed{seed}") / "results.json").read_text())["tasks"]["trials"]
        for seed in (1, 2, 3)
    ]
    scores = model.finetuned_scores["trials"]
    assert scores.greedy_correct == pytest.approx(np.mean([each["greedy_correct"] for each in single], axis=0))
    means = [np.mean([part["metrics"]["greedy"]["value"] for part in each["test_sets"].values()]) for each in single]
    greedy = scores.metrics["greedy"]
    assert greedy.value == pytest.approx(np.mean(means)), "a task's score is the plain mean of its test sets'"
    assert greedy.low is not None
    assert greedy.high is not None
    assert greedy.low < greedy.value < greedy.high
    assert list(scores.by_seed.values()) == pytest.approx(means)
    assert scores.metrics["pass"].low is None, "an interval of one seed is not that of the mean"
    assert [(part.name, part.questions) for part in scores.test_sets] == [("short", 5), ("long", 15)]
    levels = [each["test_sets"]["long"]["groups"]["level 1"]["greedy"] for each in single]
    assert scores.test_sets[1].groups["level 1"] == pytest.approx(np.mean(levels))


def test_a_seed_that_one_weight_decay_lacks_counts_at_none(tmp_path: Path) -> None:
    """Else one λ's score would be a mean over other seeds than that of the λ with which it is compared."""
    what = replace(SMALL, finetune_axes={"seed": (1, 2, 3)}, statuses={"evaluate-wd0.5-trials-seed1": "failed"})
    whole = collect(fabricate(tmp_path / "whole", replace(what, statuses={}))).groups[0]
    group = collect(fabricate(tmp_path / "study", what)).groups[0]
    for model, complete in zip(group.models, whole.models, strict=True):
        assert list(model.finetuned_scores["trials"].by_seed) == ["2", "3"]
        assert model.finetuned_scores["arithmetic"].by_seed.keys() == complete.finetuned_scores["arithmetic"].by_seed.keys()
    assert group.unequal_seeds == (UnequalSeeds("trials", None, ("2", "3"), {0.5: ("1",)}),)
    assert whole.unequal_seeds == ()


def test_one_seed_that_all_have_is_named(tmp_path: Path) -> None:
    what = replace(SMALL, finetune_axes={"seed": (1, 2)}, statuses={"evaluate-wd0.5-trials-seed1": "failed"})
    for model in collect(fabricate(tmp_path / "study", what)).groups[0].models:
        scores = model.finetuned_scores["trials"]
        assert scores.by_seed == {"2": pytest.approx(scores.metrics["greedy"].value)}
        assert set(scores.greedy_correct) <= {0, 1}
        assert scores.metrics["greedy"].low is not None


def test_without_a_common_seed_nothing_is_compared(tmp_path: Path) -> None:
    lost = {"evaluate-wd0.5-trials-seed1": "failed", "evaluate-wd0-trials-seed2": "failed"}
    group = collect(fabricate(tmp_path / "study", replace(SMALL, finetune_axes={"seed": (1, 2)}, statuses=lost))).groups[0]
    assert all("trials" not in model.finetuned_scores for model in group.models)
    assert group.unequal_seeds == (UnequalSeeds("trials", None, (), {0.0: ("2",), 0.5: ("1",)}),)


def test_a_weight_decay_without_any_seed_takes_none_from_the_others(tmp_path: Path) -> None:
    lost = {f"evaluate-wd0.5-trials-seed{seed}": "failed" for seed in (1, 2)}
    what = replace(SMALL, finetune_axes={"seed": (1, 2)}, statuses=lost)
    zero, half = collect(fabricate(tmp_path / "study", what)).groups[0].models
    assert list(zero.finetuned_scores["trials"].by_seed) == ["1", "2"]
    assert "trials" not in half.finetuned_scores


def test_earlier_checkpoints_are_apart_from_the_last(tmp_path: Path) -> None:
    results = collect(fabricate(tmp_path / "study", replace(SMALL, finetune_steps=(100, 200))))
    assert results.earlier_steps == (100, 200)
    model = results.groups[0].models[1]
    assert list(model.earlier) == [100, 200]
    early = model.earlier[100]
    assert set(early.finetuned_scores) == set(early.base_scores) == set(SMALL.tasks)
    assert early.finetuned_scores["trials"].greedy_correct != model.finetuned_scores["trials"].greedy_correct


@pytest.mark.parametrize(
    ("status", "reason"),
    [("failed", "out of memory"), ("running", "200 of 400 steps"), ("pending", "waiting"), ("missing", "not started")],
)
def test_a_cell_without_results_keeps_its_state_and_reason(tmp_path: Path, status: str, reason: str) -> None:
    cell = "finetune-wd0.5-trials"
    what = Fabrication(
        weight_decays=(0.5,), tasks=("trials",), questions=10, statuses={cell: status, f"evaluate-{cell[9:]}": "missing"}
    )
    results = collect(fabricate(tmp_path / "study", what))
    found = next(c for c in results.cells if c.id == cell)
    assert found.status == status
    assert found.reason is not None
    assert reason in found.reason
    assert results.groups[0].models[0].finetuned_scores == {}
    assert results.groups[0].models[0].base_scores["trials"].questions == 10


@pytest.mark.parametrize("file", ["results.json", "state.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", None])
def test_a_damaged_cell_is_kept_and_named(tmp_path: Path, file: str, content: str | None) -> None:
    study = fabricate(tmp_path / "study", SMALL)
    path = folder_of(study, "pretrain-wd0.5") / file
    path.unlink() if content is None else path.write_text(content)
    cell = next(c for c in collect(study).cells if c.id == "pretrain-wd0.5")
    assert cell.status == "damaged"
    assert cell.reason is not None
    assert file in cell.reason
    assert cell.results == {}


def test_a_diverged_run_has_no_loss(tmp_path: Path) -> None:
    study = fabricate(tmp_path / "study", SMALL)
    path = folder_of(study, "pretrain-wd0.5") / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "held_out_loss": {"float": "nan"}}))
    model = collect(study).groups[0].models[1]
    assert model.pretrain.status == "done"
    assert model.held_out_loss is None


def test_torn_and_non_finite_metric_rows(tmp_path: Path) -> None:
    study = fabricate(tmp_path / "study", SMALL)
    path = folder_of(study, "pretrain-wd0.5") / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "time": 0, "train/loss": 2.5}\n{"step": 2, "time": 0, "train/loss": "nan"}\n{"step": 3, "train/lo'
    )
    series = collect(study).groups[0].models[1].pretrain.metrics["train/loss"]
    assert series.steps == (1, 2)
    assert series.values[0] == 2.5
    assert math.isnan(series.values[1])
    assert isinstance(series, Series)


def test_a_folder_that_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"study\.json"):
        collect(tmp_path)
    (tmp_path / "study.json").write_text('{"name": "x"}')
    with pytest.raises(UserError, match="cannot be read as a study"):
        collect(tmp_path)
