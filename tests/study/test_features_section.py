"""Features in a study: their runs, and the report's section, with formulas and sources, whole without a training log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_plasticity.config.hashing import canonical
from megatron_plasticity.study.plan import plan_study
from megatron_plasticity.study.report import write_report
from megatron_plasticity.study.results import collect
from tests.study.fabricate import Fabrication, fabricate
from tests.study.small import small_study
from tests.study.test_report import page_of

FEATURES = Fabrication(tasks=(), analyses=("features",))


def change_results(study: Path, changes: dict[str, Any]) -> None:
    for path in study.glob("features-*/results.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_section_has_figures_formulas_and_the_table(tmp_path: Path) -> None:
    study = fabricate(tmp_path / "study", FEATURES)
    assert all(model.features for model in collect(study).groups[0].models)
    html, page = page_of(study)
    assert "features" in page.ids
    for text in (
        "Dormant units of the MLP",
        "exp(−Σ p·ln p), p = σ/Σσ, of 64 features (Roy and Vetterli, 2007)",
        "2010.14498",
        "√(2ηλ·(1 − β₁)/(1 + β₁))",
        "attention: ‖ΔW‖/‖W‖ over equilibrium",
        "infinite",
    ):
        assert text in page.words
    assert html.count("Relative update: MLP") == 1
    assert 'aria-label="Relative update of MLP over the steps"' in html


def test_without_a_training_log_the_layers_are_shown_alone(tmp_path: Path) -> None:
    study = fabricate(tmp_path / "study", FEATURES)
    change_results(study, {"training": None})
    _, page = page_of(study)
    assert "Dormant units of the MLP" in page.words
    assert "over equilibrium" not in page.words


def test_models_with_other_thresholds_share_those_that_all_have(tmp_path: Path) -> None:
    study = fabricate(tmp_path / "study", FEATURES)
    first = next(study.glob("features-*/results.json"))
    results = json.loads(first.read_text())
    for layer in results["layers"]:
        del layer["dormant_units"]["0.1"]
    first.write_text(json.dumps(results))
    _, page = page_of(study)
    assert "τ = 0.025" in page.words
    assert "τ = 0.1" not in page.words


def test_without_the_analysis_there_is_no_section(tmp_path: Path) -> None:
    study = fabricate(tmp_path / "study", Fabrication(tasks=(), analyses=("overfitting",)))
    assert 'id="features"' not in write_report(study).read_text(encoding="utf-8")


def test_a_text_enters_the_name_of_the_run_by_its_content(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"

    def folder() -> Path:
        plan = plan_study(small_study(tmp_path, {"analyses": {"features": {"text": str(text)}}}), "corpus-hash")
        return next(cell.folder for cell in plan.cells if cell.id == "features-wd1")

    text.write_text("one")
    first = folder()
    text.write_text("other")
    assert folder() != first


def test_studies_from_before_there_were_features_keep_their_hash(tmp_path: Path) -> None:
    assert "features" not in canonical(small_study(tmp_path, {"analyses": {"features": None}}).analyses)
    assert "features" in canonical(small_study(tmp_path).analyses)


@pytest.mark.parametrize("log", [[0.1, 0.2], [None, 0.2]])
def test_a_gap_in_the_log_is_a_gap_in_the_line(tmp_path: Path, log: list[float | None]) -> None:
    study = fabricate(tmp_path / "study", FEATURES)
    for path in study.glob("features-*/results.json"):
        results = json.loads(path.read_text())
        results["training"]["steps"] = [1, 2]
        for found in results["training"]["classes"].values():
            found.update({key: log for key, values in found.items() if values is not None})
        path.write_text(json.dumps(results))
    assert "Relative update: attention" in write_report(study).read_text(encoding="utf-8")
