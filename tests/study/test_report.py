"""The report page: complete, self-contained, escaped, and honest about what is missing."""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from megatron_plasticity.data.ledger import Ledger, write_ledger
from megatron_plasticity.errors import UserError
from megatron_plasticity.study.report import write_report
from megatron_plasticity.study.report.assertions import assess
from megatron_plasticity.study.report.comparability import base_format_rates, readability
from megatron_plasticity.study.report.drawings import across_layers
from megatron_plasticity.study.report.figures.outcomes import average_ranks
from megatron_plasticity.study.report.findings import find
from megatron_plasticity.study.report.limits import limits
from megatron_plasticity.study.report.loss_tables import model_table
from megatron_plasticity.study.report.page import render_page
from megatron_plasticity.study.report.tables import score_table
from megatron_plasticity.study.results import Outcome, collect
from tests.study.fabricate import TASKS, Fabrication, fabricate

VOID = {"meta", "br", "img", "input", "hr", "link"}
SMALL = Fabrication(weight_decays=(0.0, 0.5, 1.5), tasks=("arithmetic", "trials"), analyses=(), questions=30)


class Page(HTMLParser):
    """Tags, attributes and text of a page; checks that tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.links.append(value or "")
            assert not name.startswith("on"), f"an event handler: {name}"
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not (self._open and self._open[-1] == "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(study: Path) -> tuple[str, Page]:
    html = write_report(study).read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = fabricate(tmp_path_factory.mktemp("whole") / "study")
    write_report(study)
    return study


def test_the_whole_report_has_every_section(whole: Path) -> None:
    page = Page((whole / "report" / "index.html").read_text(encoding="utf-8"))
    for section in (
        "answer",
        "loss",
        "tasks",
        "plasticity",
        "samples",
        "probes",
        "attention",
        "gap",
        "features",
        "training",
        "cells",
        "limits",
        "reproduce",
    ):
        assert section in page.ids
    assert all(task in page.words for task in TASKS)
    assert "Heads cut to a lower rank" in page.words
    # The ends, the least loss, and one between.
    assert [f"W_QK: pseudo-rank, λ = {decay:g}" in page.words for decay in (0, 0.1, 0.5, 1.5, 5)] == [
        True,
        True,
        True,
        False,
        True,
    ]
    assert page.tags.count("svg") == page.tags.count("figure") > 40


def test_the_page_is_self_contained(whole: Path) -> None:
    html = (whole / "report" / "index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    files = {link for link in page.links if not link.startswith(("#", "data:image/png;base64,"))}
    assert files == {"cells.csv", "scores.csv", "report.json"}
    assert all((whole / "report" / file).is_file() for file in files)
    assert "@import" not in html
    assert not re.search(r"url\((?!#|['\"]?#)", html)


def test_ids_are_unique_and_references_resolve(whole: Path) -> None:
    html = (whole / "report" / "index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    inside = {link[1:] for link in page.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", html))
    assert inside
    assert inside <= set(page.ids)


def test_figures_follow_the_colour_scheme(whole: Path) -> None:
    html = (whole / "report" / "index.html").read_text(encoding="utf-8")
    figures = re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL)
    for figure in figures:
        ElementTree.fromstring(figure)
        assert not re.search(r"(?:fill|stroke): #(?!ffffff)", figure), "a colour that the dark scheme cannot change"
    defined = set(re.findall(r"(--[a-z0-9-]+):", html))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", html)) <= defined


def test_rendering_is_repeatable_and_small(whole: Path) -> None:
    before = (whole / "report" / "index.html").read_bytes()
    write_report(whole)
    assert (whole / "report" / "index.html").read_bytes() == before
    assert len(before) < 2_500_000


def test_csv_and_json_hold_the_numbers_of_the_results(whole: Path) -> None:
    results = collect(whole)
    with (whole / "report" / "cells.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert [row["id"] for row in cells] == [cell.id for cell in results.cells]
    with (whole / "report" / "scores.csv").open(newline="") as file:
        scores = list(csv.DictReader(file))
    row = next(
        r for r in scores if (r["weight_decay"], r["task"], r["model"], r["metric"]) == ("0.5", "algebra", "fine-tuned", "greedy")
    )
    expected = results.groups[0].models[2].finetuned_scores["algebra"].metrics["greedy"]
    assert (float(row["value"]), float(row["low"]), float(row["high"])) == (expected.value, expected.low, expected.high)
    report = json.loads((whole / "report" / "report.json").read_text())
    assert report["name"] == "invented"
    assert len(report["scores"]) == len(scores)


def test_the_answer_names_the_two_best_weight_decays(whole: Path) -> None:
    results = collect(whole)
    losses = {m.weight_decay: m.held_out_loss for m in results.groups[0].models}
    means = {
        m.weight_decay: sum(s.metrics["greedy"].value for s in m.finetuned_scores.values()) / len(TASKS)
        for m in results.groups[0].models
    }
    report = json.loads((whole / "report" / "report.json").read_text())["groups"][0]
    assert report["best_by_loss"] == min(losses, key=lambda d: losses[d] or 9)
    assert report["best_by_score"] == max(means, key=means.__getitem__)
    assert report["best_by_loss"] != report["best_by_score"]
    words = Page((whole / "report" / "index.html").read_text(encoding="utf-8")).words
    assert "inside the grid" in words


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "</svg><img src=x onerror=alert(1)>",
        '"><b onclick="x">',
        "{{ 7 * 7 }} & $\\frac{1}{2}$ ]]> \x00\x1b",
    ],
)
def test_text_from_models_errors_and_names_is_escaped(tmp_path: Path, hostile: str) -> None:
    what = Fabrication(
        name=f"study {hostile}",
        description=f"asks {hostile}",
        weight_decays=(0.0, 0.5),
        tasks=("arithmetic",),
        questions=10,
        analyses=("attention",),
        error=f"error {hostile}",
        response=f"response {hostile}",
        token=hostile[:9],
        statuses={"finetune-wd0.5-arithmetic": "failed", "evaluate-wd0.5-arithmetic": "missing"},
    )
    html, page = page_of(fabricate(tmp_path / "study", what))
    assert not {"script", "img", "b"} & set(page.tags)
    seen = " ".join(hostile.split()).replace("\x00", "").replace("\x1b", "")
    for place in ("study", "asks", "error", "response"):
        assert f"{place} {seen[:9]}" in page.words.replace("�", "")
    assert "49" not in re.findall(r"asks (\d+)", page.words)
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f]", html)


def test_failed_running_and_missing_cells_are_shown_with_their_reason(tmp_path: Path) -> None:
    statuses = {
        "finetune-wd0.5-trials": "failed",
        "evaluate-wd0.5-trials": "missing",
        "pretrain-wd1.5": "running",
        **{f"{kind}-wd1.5-{task}": "missing" for kind in ("finetune", "evaluate") for task in SMALL.tasks},
        "evaluate-wd1.5": "pending",
    }
    what = Fabrication(**{**SMALL.__dict__, "statuses": statuses})
    _, page = page_of(fabricate(tmp_path / "study", what))
    for text in ("8 of", "out of memory", "still running", "not started", "waiting to be started"):
        assert text in page.words
    assert "λ = 0.5 and λ = 1.5" in page.words, "which λ cannot be compared"


@pytest.mark.parametrize(
    "what",
    [
        Fabrication(weight_decays=(0.5,), tasks=("arithmetic",), questions=10),
        Fabrication(weight_decays=(0.0,), tasks=(), analyses=()),
        Fabrication(tasks=()),
        Fabrication(tasks=("passage",), analyses=(), questions=10),
        Fabrication(weight_decays=(0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1, 1.5, 3, 10), tasks=(), analyses=()),
        Fabrication(weight_decays=(0.1, 1.0), seeds=(1, 2), tasks=("steps",), analyses=(), questions=10),
        Fabrication(weight_decays=(0.5,), tasks=(), analyses=(), statuses={"pretrain-wd0.5": "failed"}),
    ],
    ids=["one λ", "only λ=0", "no tasks", "no analyses", "paper's grid", "two seeds", "nothing done"],
)
def test_partial_studies_have_a_report(tmp_path: Path, what: Fabrication) -> None:
    _html, page = page_of(fabricate(tmp_path / "study", what))
    assert ("tasks" in page.ids) == bool(what.tasks)
    assert ("probes" in page.ids) == bool(what.analyses)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"\b(?:nan|None|inf)\b", page.words)
    if len(what.weight_decays) == 1:
        assert "one λ" in page.words or "No base model" in page.words
    assert all(f"seed = {seed}" in page.words for seed in what.seeds if len(what.seeds) > 1)


def test_a_minimum_at_the_edge_is_said(tmp_path: Path) -> None:
    _, page = page_of(fabricate(tmp_path / "study", Fabrication(weight_decays=(0.5, 1.5, 5.0), tasks=(), analyses=())))
    assert "no minimum inside" in page.words


def test_repeated_text_is_said(whole: Path) -> None:
    page = (whole / "report" / "index.html").read_text()
    assert re.search(r"400,000 training tokens, so the base models read it [\d.]+ times over", page)


def test_choices_by_loss_have_shares_and_neighbours_paired_differences(whole: Path) -> None:
    words = Page((whole / "report" / "index.html").read_text(encoding="utf-8")).words
    assert re.search(r"Lowest in \d+\xa0?\s?% of the bootstrap resamples of 20 held-out sequences", words)
    assert "on the same 20 seen and 20 held-out sequences" in words
    paired = json.loads((whole / "report" / "report.json").read_text())["groups"][0]["plasticity"]["paired_losses"]
    assert [pair["weight_decays"] for pair in paired["neighbours"]] == [[0.0, 0.1], [0.1, 0.5], [0.5, 1.5], [1.5, 5.0]]


def test_results_without_single_losses_still_have_a_report(tmp_path: Path) -> None:
    html, page = page_of(fabricate(tmp_path / "study", Fabrication(questions=20, older=True)))
    assert "No interval: it would take several seeds" in page.words
    assert "Differences between neighbouring" not in page.words
    assert "tenth of the run in which" in html
    assert "tenth of the first pass" not in html


def test_tenths_are_of_the_first_pass_when_text_was_read_again(whole: Path) -> None:
    html = (whole / "report" / "index.html").read_text(encoding="utf-8")
    assert "tenth of the first pass" in html
    assert "each sequence was seen about 8 times" in html


def test_passes_of_an_older_study_come_from_the_ledger(tmp_path: Path) -> None:
    study = fabricate(tmp_path / "study", Fabrication(tasks=(), analyses=("overfitting",), older=True))
    for model in collect(study).groups[0].models:
        write_ledger(model.pretrain.folder, Ledger(1, 256, 10, "ab", 45))
    assert [model.passes for model in collect(study).groups[0].models] == [4.5] * 5


def test_losses_of_one_row_are_of_one_measurement(whole: Path) -> None:
    model = collect(whole).groups[0].models[1]
    assert model.overfitting
    row = [field.text for field in model_table([model]).rows[0]]
    loss, seen = (model.overfitting.results[key] for key in ("held_out_loss", "seen_loss"))
    assert row[2:5] == [f"{loss:.4f}", f"{seen:.4f}", f"{loss - seen:.4f}"]
    assert row[5] == "overfitting"
    alone = [field.text for field in model_table([replace(model, overfitting=None)]).rows[0]]
    assert alone[2] == f"{model.held_out_loss:.4f}"
    assert alone[4:6] == ["–", "pretraining"]


def test_unreadable_base_answers_are_said(whole: Path) -> None:
    results = collect(whole)
    rates = base_format_rates(results.groups[0].models, results.tasks)
    share = sum(rates["algebra"]) / len(rates["algebra"])
    assert readability("algebra", rates).startswith(f"Base models give a readable answer in {100 * share:.0f}\xa0% of samples")
    assert readability("algebra", {"algebra": (0.9, 0.8)}) == ""
    assert readability("algebra", {}) == ""
    words = Page((whole / "report" / "index.html").read_text(encoding="utf-8")).words
    assert words.count("so the gain also measures learning the form") == len(TASKS)
    assert "base has an answer %" in words


def test_the_shortest_answer_is_not_called_a_reward_model(whole: Path) -> None:
    models, algebra = collect(whole).groups[0].models, [Outcome("algebra", "algebra")]
    assert "best by reward (shortest answer; a stand-in, not a reward model) %" in score_table(models, algebra).headings
    model = models[0]
    judged = replace(model, base_scores={}, finetuned_scores={
        "algebra": replace(model.finetuned_scores["algebra"], reward="sequence_classifier")
    })  # fmt: skip
    assert "best by reward %" in score_table([judged], algebra).headings


def test_unlike_graders_are_flagged(tmp_path: Path, whole: Path) -> None:
    what = replace(SMALL, graders={"evaluate-wd0.5-trials": "math-verify"})
    _, page = page_of(fabricate(tmp_path / "study", what))
    assert (
        "The answers of trials were judged by different graders (words at λ = 0, 0.5, 1.5; math-verify at λ = 0.5)" in page.words
    )
    assert "different graders" not in (whole / "report" / "index.html").read_text(encoding="utf-8")


def test_a_score_has_the_interval_of_its_evaluation_everywhere(whole: Path) -> None:
    results = collect(whole)
    found = find(results.groups[0], results.outcomes, results.config)
    for model in results.groups[0].models:
        own = model.finetuned_scores["steps"].metrics["greedy"]
        row = next(r for r in found.curves["steps"]["scores"] if r["weight_decay"] == model.weight_decay)
        assert (row["score"]["low"], row["score"]["high"]) == (own.low, own.high)


def test_resamples_and_seed_are_those_of_the_evaluations(whole: Path) -> None:
    results = collect(whole)

    def area(**evaluate: int) -> dict[str, float]:
        return find(results.groups[0], results.outcomes, {"evaluate": evaluate}).curves["steps"]["area"]["score"]

    assert area(bootstrap_resamples=50, seed=1) == area(bootstrap_resamples=50, seed=1)
    assert area(bootstrap_resamples=50, seed=1) != area(bootstrap_resamples=50, seed=2)
    assert area(bootstrap_resamples=50, seed=1) != area(bootstrap_resamples=60, seed=1)


def test_attention_maps_span_the_layers() -> None:
    heads = [(layer, head) for layer in range(7) for head in range(2)]
    assert across_layers(heads) == [(0, 0), (3, 0), (6, 0)]
    assert across_layers([(0, 0), (0, 1), (1, 0), (1, 1)]) == [(0, 0), (0, 1), (1, 0)]
    assert across_layers([]) == []


def test_equal_values_share_a_rank() -> None:
    assert average_ranks({0.0: 2.0, 0.1: 1.0, 0.5: 2.0 + 1e-14}) == {0.0: 2.5, 0.1: 1.0, 0.5: 2.5}


def test_limits_name_runs_with_skipped_steps_and_spikes(tmp_path: Path) -> None:
    results = collect(fabricate(tmp_path / "study"))
    assert not any(text.startswith("Unsteady") for text in limits(results))
    first, *others = results.cells
    unsteady = replace(first, results={**first.results, "skipped_steps": [3, 9], "loss_spikes": [10]})
    (said,) = [text for text in limits(replace(results, cells=(unsteady, *others))) if text.startswith("Unsteady")]
    assert f"{first.id} (2 skipped, 1 with a spike of the loss)" in said


def test_limits_name_the_sources_and_what_was_not_probed(tmp_path: Path) -> None:
    study = fabricate(tmp_path / "study", Fabrication(tasks=()))
    config = {"corpus": {"python_text": {"megabytes": 1}}, "analyses": {"probes": {"datasets": ["topic"]}}}
    said = " ".join(limits(replace(collect(study), config=config)))
    assert "topic probe and the held-out documents come from the same sources as the training text" in said
    assert "Probes and spectra were taken of the base models" in said
    own = " ".join(limits(replace(collect(study), config={"corpus": {"python_text": None}})))
    assert "The held-out documents come from the same sources" in own
    found = collect(study)
    small, *others, untold = [cell for cell in found.cells if cell.kind == "pretrain"]
    changed = {
        small.id: replace(small, results={**small.results, "parameters": {"total": 700_000}}),
        untold.id: replace(untold, results={**untold.results, "tokens": None}),
    }
    mixed = replace(found, cells=tuple(changed.get(cell.id, cell) for cell in found.cells))
    scale = next(text for text in limits(mixed) if text.startswith("Scale"))
    which = f"The {len(others) + 1} of {len(others) + 2} base models whose tokens are known"
    assert f"{which} have 700 thousand to 1.4 million parameters" in scale
    assert "saw 3.28 million tokens, 2.3 to 4.7 tokens per parameter" in scale
    findings = [find(g, mixed.outcomes, mixed.config) for g in mixed.groups]
    assert "0.7 to 1.4 million parameters" in render_page(mixed, findings, assess(mixed, findings))
    bare = fabricate(tmp_path / "bare", Fabrication(tasks=(), analyses=()))
    assert "Base models only" not in " ".join(limits(collect(bare)))


def test_a_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"study\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- several ways of fine-tuning, seeds, checkpoints and test sets ---

VARIED = replace(
    SMALL,
    finetune_axes={"optimizer.learning_rate": (1e-5, 3e-5), "optimizer.weight_decay": (0.0, 0.1), "seed": (1, 2)},
    finetune_steps=(100, 200),
    test_sets={"short": 10, "long": 20},
)


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = fabricate(tmp_path_factory.mktemp("varied") / "study", VARIED)
    write_report(study)
    return study


def varied_group(study: Path) -> dict[str, Any]:
    return json.loads((study / "report" / "report.json").read_text())["groups"][0]


def test_a_varied_study_has_a_whole_page(varied: Path) -> None:
    page = Page((varied / "report" / "index.html").read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert "steps" in page.ids
    assert "4 ways of fine-tuning · 2 seeds of fine-tuning · 3 pretraining steps" in page.words
    for text in (
        "mean of 2 tasks in 4 ways of fine-tuning",
        "Best λ after each of 4 ways of fine-tuning",
        "Thin lines are the 4 ways of fine-tuning",
        "Spread over seeds of fine-tuning",
        "Greedy scores of trials by test set",
        "long, level 1 %",
        "Mean score after fine-tuning from each step",
        "4 ways of fine-tuning and 3 values of λ",
        "fine-tuned with 2 seeds",
    ):
        assert text in page.words
    assert not re.search(r"\b(?:nan|None|inf)\b", page.words)


def test_a_plain_study_has_none_of_it(whole: Path) -> None:
    page = Page((whole / "report" / "index.html").read_text(encoding="utf-8"))
    assert "steps" not in page.ids
    for text in ("ways of fine-tuning", "Spread over seeds", "by test set", "Rank correlation"):
        assert text not in page.words
    report = json.loads((whole / "report" / "report.json").read_text())
    assert not {"variants", "over_pretraining"} & {*report, *report["groups"][0]}
    assert (whole / "report" / "scores.csv").read_text().splitlines()[0].endswith(",chance,cell")


def test_the_headline_is_the_mean_over_tasks_and_variants(varied: Path) -> None:
    model = collect(varied).groups[0].models[1]
    expected = sum(s.metrics["greedy"].value for s in model.finetuned_scores.values()) / len(model.finetuned_scores)
    group = varied_group(varied)["plasticity"]
    row = next(row for row in group["mean"]["scores"] if row["weight_decay"] == model.weight_decay)
    assert row["score"]["value"] == pytest.approx(expected)
    by_task = [
        row["score"]["value"] for mean in group["task_means"].values() for row in mean["scores"] if row["weight_decay"] == 0.5
    ]
    assert sum(by_task) / 2 == pytest.approx(expected)


def test_each_variant_has_its_best_weight_decay_and_a_rank_correlation(varied: Path) -> None:
    results = collect(varied)
    variants = varied_group(varied)["plasticity"]["variants"]
    assert list(variants) == list(results.variants)
    first, *others = variants.values()
    assert "rank_correlation" not in first
    assert all(-1 <= other["rank_correlation"] <= 1 for other in others)
    name = list(variants)[2]
    means = {
        m.weight_decay: sum(m.finetuned_scores[f"{task}, {name}"].metrics["greedy"].value for task in SMALL.tasks)
        for m in results.groups[0].models
    }
    assert variants[name]["best"]["weight_decay"] == max(means, key=means.__getitem__)


def test_plasticity_over_pretraining_ends_with_the_last_checkpoint(varied: Path) -> None:
    group = varied_group(varied)
    assert list(group["over_pretraining"]) == ["100", "200", "400"]
    last = group["over_pretraining"]["400"]["mean"]["scores"]
    assert [row["score"] for row in last] == [row["score"] for row in group["plasticity"]["mean"]["scores"]]
    assert all("gain" in row for row in last)


def test_csv_tells_variants_steps_and_test_sets_apart(varied: Path) -> None:
    with (varied / "report" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    key = ("weight_decay", "task", "model", "metric", "variant", "step", "test_set", "seed")
    assert len({tuple(row[name] for name in key) for row in rows}) == len(rows)
    assert {row["step"] for row in rows} == {"", "100", "200"}
    assert {row["test_set"] for row in rows} == {"", "short", "long"}
    with (varied / "report" / "cells.csv").open(newline="") as file:
        cell = next(row for row in csv.DictReader(file) if row["id"].startswith("finetune-wd0.5-step100-trials"))
    assert (cell["variant"], cell["step"]) == ("optimizer.learning_rate=1e-05; optimizer.weight_decay=0.0; seed=1", "100")


def test_scores_of_single_seeds_are_in_the_files(varied: Path) -> None:
    with (varied / "report" / "scores.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "greedy" and row["test_set"] == ""]
    place = ("weight_decay", "task", "variant", "step")
    by_seed: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row["model"] != "base":
            by_seed.setdefault(tuple(row[name] for name in place), {})[row["seed"]] = float(row["value"])
    means = {where: scores.pop("") for where, scores in by_seed.items()}
    single = by_seed
    assert {where: sum(scores.values()) / 2 for where, scores in single.items()} == pytest.approx(means)
    first = varied_group(varied)["finetune_seeds"][0]
    scores = single[(str(first["weight_decay"]), *first["outcome"].split(", ", 1), "")]
    assert first["scores"] == pytest.approx(scores)
    assert first["standard_deviation"] == pytest.approx(stdev(scores.values()))
    assert varied_group(varied)["finetune_seeds"][-1]["outcome"] == "mean of tasks"


def test_a_study_says_which_weight_decay_lacks_which_seed(tmp_path: Path) -> None:
    what = replace(SMALL, finetune_axes={"seed": (1, 2, 3)}, statuses={"evaluate-wd0.5-trials-seed1": "failed"}, questions=30)
    _, page = page_of(fabricate(tmp_path / "study", what))
    assert "trials: λ = 0.5 lacks seed 1, compared over seeds 2, 3. Run the study again" in page.words
    _, page = page_of(fabricate(tmp_path / "whole", replace(what, statuses={})))
    assert "Missing seeds" not in page.words


def test_the_sweep_of_the_paper_stays_readable(tmp_path: Path) -> None:
    axes = {
        "optimizer.learning_rate": (1e-5, 3e-5, 6e-4),
        "batch.global_batch_size": (32, 64, 128),
        "optimizer.weight_decay": (0.0, 0.1, 1.0),
    }
    what = replace(SMALL, weight_decays=(0.1, 0.3, 0.6, 1.0), finetune_axes=axes, questions=10)
    html, page = page_of(fabricate(tmp_path / "study", what))
    tasks = html[html.index('<section id="tasks">') : html.index('<section id="samples">')]
    assert tasks.count("<svg") == len(SMALL.tasks)
    open_tables = re.sub(r"<details>.*?</details>", "", tasks, flags=re.DOTALL)
    assert open_tables.count("<tr>") < 45
    assert "of the 27 ways of fine-tuning" in page.words.lower()


@pytest.mark.parametrize(
    "statuses",
    [
        {f"evaluate-wd0.5-trials-learning_rate3e-05-wd0.1-seed{seed}": "missing" for seed in (1, 2)},
        {f"evaluate-wd{decay}-step100": "failed" for decay in ("0", "0.5", "1.5")},
        {"pretrain-wd0.5": "running"},
    ],
    ids=["one outcome", "base of a step", "a base run"],
)
def test_unfinished_varied_studies_have_a_report(tmp_path: Path, statuses: dict[str, str]) -> None:
    _, page = page_of(fabricate(tmp_path / "study", replace(VARIED, statuses=statuses, questions=30)))
    assert not re.search(r"\b(?:nan|None|inf)\b", page.words)
