"""The section of the report on the paper's statements: gathered from a study's folders, shown, escaped, and printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from megatron_plasticity.analysis.assertions.verdict import STATEMENTS
from megatron_plasticity.cli import main
from megatron_plasticity.study.report import write_report
from megatron_plasticity.study.report.assertion_table import terminal_lines
from megatron_plasticity.study.report.assertions import StudyAssertions, assess
from megatron_plasticity.study.report.findings import find
from megatron_plasticity.study.results import collect
from tests.study.fabricate import Fabrication, fabricate

TASKS = ("arithmetic", "trials")
ACROSS = {"A2", "A9b"}


def assessed(study: Path) -> StudyAssertions:
    results = collect(study)
    return assess(results, [find(group, results.outcomes, results.config) for group in results.groups])


def verdicts(study: Path, group: int = 0) -> dict[str, str]:
    found = assessed(study)
    return {item.key: item.verdict for item in (*found.groups[group], *found.across)}


def change_cells(study: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = study / "study.json"
    tree = json.loads(path.read_text())
    for cell in tree["cells"]:
        change(cell)
    path.write_text(json.dumps(tree))


def change_pretraining(study: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """`change(cell, results)` on every pretraining run."""
    for cell in json.loads((study / "study.json").read_text())["cells"]:
        if cell["kind"] == "pretrain":
            path = study / cell["folder"] / "results.json"
            results = json.loads(path.read_text())
            change(cell, results)
            path.write_text(json.dumps(results))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = fabricate(tmp_path_factory.mktemp("whole") / "study")
    write_report(study)
    return study


def test_the_page_has_every_statement_with_its_verdict(whole: Path) -> None:
    html = (whole / "report" / "index.html").read_text(encoding="utf-8")
    section = unescape(html.split('<section id="statements">')[1].split("</section>")[0])
    assert 'href="#statements"' in html
    for key, statement in STATEMENTS.items():
        assert f">{key}</td>" in section
        assert statement.text in section
        assert statement.certainty in section
    assert section.count("<tr>") == 1 + len(STATEMENTS), "one table for a study with one group"


def test_the_report_in_json_has_the_evidence(whole: Path) -> None:
    report = json.loads((whole / "report" / "report.json").read_text())
    found = [*report["groups"][0]["assertions"], *report["assertions"]]
    assert {item["key"] for item in found} == set(STATEMENTS)
    assert {item["key"] for item in report["assertions"]} == ACROSS
    assert all(item["evidence"] and item["certainty"] for item in found)
    assert {item["verdict"] for item in found} <= {"holds", "does not hold", "cannot be said"}


def test_what_was_invented_is_found(whole: Path) -> None:
    """Scores that peak at a larger λ than the loss, probes that rise; at 2 tokens per parameter nothing is said of 20."""
    found = verdicts(whole)
    assert (found["A3"], found["A4"], found["A5"]) == ("holds", "holds", "holds")
    assert found["A1"] == found["A2"] == found["A8"] == found["A9a"] == "cannot be said"


def test_a_study_of_the_papers_length_is_tested_on_its_weight_decays(tmp_path: Path) -> None:
    study = fabricate(tmp_path / "study", Fabrication(weight_decays=(0.0, 0.1, 0.5, 1.5, 20.0), tasks=TASKS))
    rate_times_steps = 2.38425

    def as_in_the_paper(cell: dict[str, Any]) -> None:
        decay = cell["weight_decay"]
        cell["adamw_timescale"] = 1 / (decay * rate_times_steps) if decay else None

    change_cells(study, as_in_the_paper)
    change_pretraining(study, lambda cell, results: results.update(tokens=20 * results["parameters"]["total"]))
    found = {item.key: item for item in assessed(study).groups[0]}
    assert found["A1"].verdict == "holds"
    assert "in the paper's runs" not in found["A1"].evidence, "λ is that of the paper"
    assert found["A8"].verdict == "does not hold"
    assert found["A5"].verdict == "cannot be said", "λ = 20 has collapsed, and four are left"


def test_groups_of_other_lengths_are_compared(tmp_path: Path) -> None:
    study = fabricate(tmp_path / "study", Fabrication(weight_decays=(0.01, 0.1, 0.5, 2.0), seeds=(1, 2), tasks=()))

    def lengths(cell: dict[str, Any]) -> None:
        steps = 100_136 if cell["point"].pop("seed") == 2 else 14_305
        cell["point"]["steps"] = steps
        cell["adamw_timescale"] = 1 / (4e-4 * cell["weight_decay"] * steps)

    change_pretraining(
        study,
        lambda cell, results: results.update(tokens={1: 20, 2: 140}[cell["point"]["seed"]] * results["parameters"]["total"]),
    )
    change_cells(study, lengths)
    across = {item.key: item for item in assessed(study).across}
    assert across["A2"].verdict == "does not hold", "both are lowest at 0.5"
    assert "0.5 at 140" in across["A2"].evidence


def test_groups_of_other_learning_rates_are_compared(tmp_path: Path) -> None:
    study = fabricate(
        tmp_path / "study", Fabrication(weight_decays=(0.0, 0.1, 0.5), seeds=(1, 2), tasks=TASKS, analyses=(), questions=1000)
    )

    def rates(cell: dict[str, Any]) -> None:
        cell["point"]["optimizer.learning_rate"] = 1e-3 * cell["point"].pop("seed")

    assert verdicts(study)["A9b"] == "cannot be said", "seeds are no learning rates"
    change_cells(study, rates)
    found = {item.key: item for item in assessed(study).across}["A9b"]
    assert found.verdict == "holds"
    assert "2 ways of pretraining" in found.evidence


def test_ways_of_finetuning_are_compared_and_escaped(tmp_path: Path) -> None:
    """A label of a way of fine-tuning comes from the config, and stands in the evidence."""
    hostile = "<script>alert(1)</script>"
    axes = {"optimizer.learning_rate": (1e-5, 3e-5), "batching": ("plain", hostile)}
    study = fabricate(tmp_path / "study", Fabrication(tasks=("arithmetic",), analyses=(), finetune_axes=axes))
    orders = json.loads((study / "study.json").read_text())["cells"]
    for cell in orders:
        # After this way of fine-tuning the strongest decay knows everything, and the others nothing.
        if cell["kind"] == "evaluate" and cell["task"] and cell["variant"]["batching"] == hostile:
            path = study / cell["folder"] / "results.json"
            results = json.loads(path.read_text())
            asked = len(results["tasks"]["arithmetic"]["greedy_correct"])
            right = [int(index % 10 < 9) if cell["weight_decay"] == 0 else int(index % 10 == 0) for index in range(asked)]
            results["tasks"]["arithmetic"]["greedy_correct"] = right
            path.write_text(json.dumps(results))
    html = write_report(study).read_text(encoding="utf-8")
    section = html.split('<section id="statements">')[1].split("</section>")[0]
    found = {item.key: item for item in assessed(study).groups[0]}["A9a"]
    assert found.verdict == "does not hold"
    assert hostile in found.evidence
    assert "<script>" not in section
    assert "&lt;script&gt;" in section


def test_imported_models_are_tested_on_what_is_known_of_them(tmp_path: Path) -> None:
    """The paper's public checkpoints: λ and tokens are labels, and there is neither a loss nor a timescale."""
    study = fabricate(
        tmp_path / "study", Fabrication(tasks=TASKS, analyses=("probes", "attention"), weight_decays=(0, 0.1, 0.3, 0.6, 1))
    )

    def imported(cell: dict[str, Any]) -> None:
        cell["adamw_timescale"] = None
        cell["kind"] = {"pretrain": "import"}.get(cell["kind"], cell["kind"])

    def labelled(cell: dict[str, Any], results: dict[str, Any]) -> None:
        del results["held_out_loss"], results["seen_loss"]
        results.update(tokens=30_000_000_000, parameters={"total": 1_484_916_736})

    change_pretraining(study, labelled)
    change_cells(study, imported)
    found = {item.key: item for item in assessed(study).groups[0]}
    assert all(found[key].verdict == "cannot be said" for key in ("A1", "A3", "A4", "A7", "A10"))
    assert "Pretrain the models in the study" in found["A3"].evidence
    assert "8 pairs of data set and layer" in found["A5"].evidence
    assert "over λ = 0, 0.1." in found["A8"].evidence, "λ of the paper's own models needs no timescale"


def change_results(study: Path, kind: str, change: Callable[[dict[str, Any]], None]) -> None:
    """`change(results)` on every run of a kind."""
    for cell in json.loads((study / "study.json").read_text())["cells"]:
        if cell["kind"] == kind:
            path = study / cell["folder"] / "results.json"
            results = json.loads(path.read_text())
            change(results)
            path.write_text(json.dumps(results))


def test_a_collapsed_weight_decay_alone_makes_no_order(tmp_path: Path) -> None:
    """λ = 400 is more than 10 in the paper's runs, and is what all the others are told apart from."""
    study = fabricate(tmp_path / "study", Fabrication(weight_decays=(0.4, 0.5, 400.0), seeds=(1, 2), tasks=TASKS, analyses=()))

    def rates(cell: dict[str, Any]) -> None:
        cell["point"]["optimizer.learning_rate"] = 1e-3 * cell["point"].pop("seed")

    change_cells(study, rates)
    found = {item.key: item for item in assessed(study).across}["A9b"]
    assert found.verdict == "cannot be said"
    assert "0 of 1 pairs" in found.evidence, "the pair of the useful λ is all that counts"


def test_models_of_unequal_length_are_of_no_length(tmp_path: Path) -> None:
    """Twenty tokens per parameter for all but one λ: the statements about twenty are not tested on the group."""
    study = fabricate(tmp_path / "study", Fabrication(tasks=(), analyses=("overfitting",)))
    change_pretraining(study, lambda cell, results: results.update(tokens=20 * results["parameters"]["total"]))
    same = {item.key: item for item in assessed(study).groups[0]}["A1"]
    assert "tokens per parameter" not in same.evidence
    change_pretraining(
        study,
        lambda cell, results: results.update(tokens=(40 if cell["weight_decay"] == 0.5 else 20) * results["parameters"]["total"]),
    )
    other = {item.key: item for item in assessed(study).groups[0]}["A1"]
    assert other.verdict == "cannot be said"
    assert "or not the same for all" in other.evidence


def test_the_evidence_names_what_is_lacking_and_nothing_else(tmp_path: Path) -> None:
    study = fabricate(tmp_path / "study", Fabrication(tasks=()))

    def raw_only(results: dict[str, Any]) -> None:
        for entry in results["datasets"].values():
            del entry["variants"]["standardised"]

    def no_width(results: dict[str, Any]) -> None:
        del results["head_dim"]

    def no_share(results: dict[str, Any]) -> None:
        for layer in results["layers"]:
            del layer["qk"]["pseudo_rank"]["0.95"], layer["vp"]["pseudo_rank"]["0.95"]

    def evidence(key: str) -> str:
        item = next(item for item in assessed(study).groups[0] if item.key == key)
        assert item.verdict == "cannot be said"
        return item.evidence

    change_results(study, "probes", raw_only)
    assert "put `true` among `standardise`" in evidence("A5")
    change_results(study, "attention", no_width)
    assert "the width of a head is not in the results" in evidence("A6")
    change_results(study, "attention", no_share)
    assert "at a share of 0.95: put it among the `thresholds`" in evidence("A6")

    one = fabricate(tmp_path / "one", Fabrication(weight_decays=(0.1,), tasks=()))
    found = {item.key: item.evidence for item in assessed(one).groups[0]}
    for key in ("A1", "A3", "A4", "A7"):
        assert found[key] == "Losses are known at one λ only: it takes several, so add values of λ."
    assert "results of 1 λ of the useful range" in found["A5"]
    assert "results of 1 λ of the useful range" in found["A6"]
    none = fabricate(tmp_path / "none", Fabrication(tasks=(), analyses=()))
    found = {item.key: item.evidence for item in assessed(none).groups[0]}
    assert "No probes were fitted" in found["A5"]
    assert "were not analysed" in found["A6"]
    assert "`overfitting: {}`" in found["A1"]


@pytest.mark.parametrize(
    "what",
    [
        Fabrication(weight_decays=()),
        Fabrication(weight_decays=(0.1,), tasks=("arithmetic",)),
        Fabrication(weight_decays=(0.0, 0.5), tasks=(), analyses=()),
        Fabrication(weight_decays=(0.0, 0.5), tasks=TASKS, older=True),
        Fabrication(weight_decays=(0.0, 0.5), tasks=TASKS, statuses={"pretrain-wd0": "failed", "probes-wd0.5": "missing"}),
    ],
    ids=["no runs", "one λ", "no children", "older results", "failed runs"],
)
def test_a_study_with_little_says_little(tmp_path: Path, what: Fabrication) -> None:
    study = fabricate(tmp_path / "study", what)
    found = assessed(study)
    assert all(item.verdict == "cannot be said" for group in (*found.groups, found.across) for item in group if item.key != "A4")
    assert write_report(study).is_file()


def test_the_terminal_shows_the_verdicts(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["study", "report", str(whole)])
    assert not exit_.value.code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("report: ")
    assert lines[1] == "the paper's statements on this study:"
    assert "  A4   holds          Some pair of λ has worse validation loss and a better score after fine-tuning." in lines
    assert lines[-1].startswith("  cannot be said (the report says why): A1, A2, ")


def test_the_terminal_names_groups(tmp_path: Path) -> None:
    study = fabricate(tmp_path / "study", Fabrication(seeds=(1, 2), tasks=TASKS))
    report = json.loads((write_report(study).parent / "report.json").read_text())
    lines = terminal_lines(report)
    assert "seed = 1:" in lines
    assert lines[-2:] == ["across the groups:", "  cannot be said (the report says why): A2, A9b"]
    assert terminal_lines({"groups": [], "assertions": report["assertions"]}) == []
