"""The comparison of studies: its numbers, what it refuses to compare, and its page."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_plasticity.errors import UserError
from megatron_plasticity.study.report.comparison import write_comparison
from megatron_plasticity.study.report.comparison.findings import Choice
from megatron_plasticity.study.report.comparison.movement import _movement
from megatron_plasticity.study.report.comparison.page import Comparison, compare
from megatron_plasticity.study.report.figures.comparison import GroupPalette, Scales
from megatron_plasticity.study.report.figures.timescale_axis import TimescaleAxis, round_values
from tests.commands import Run
from tests.study.fabricate import Fabrication
from tests.study.fabricate_comparison import GRID, Setting, fabricate_setting, four_settings
from tests.study.test_report import Page

WHAT = Fabrication(weight_decays=(0.0, 0.1, 1.0), tasks=("arithmetic", "trials"), analyses=("overfitting",), questions=60)
TASKS = ("arithmetic", "algebra", "trials")


def setting(name: str, what: Fabrication = WHAT, **changes: Any) -> Setting:
    return Setting(replace(what, name=name), **changes)


def long(name: str, what: Fabrication = WHAT, **changes: Any) -> Setting:
    return setting(name, what, tokens_per_parameter=140.0, **changes)


def written(folder: Path, *settings: Setting) -> list[Path]:
    return [fabricate_setting(folder / each.what.name, each) for each in settings]


def reasons(found: Comparison) -> str:
    return "\n".join(f"{item.what} | {item.where} | {item.why}" for item in found.left_out)


# Numbers


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two lengths, three tasks, seeds of fine-tuning of which both have two."""
    what = Fabrication(weight_decays=(0.1, 0.3, 1.0, 3.0), tasks=TASKS, analyses=("overfitting",), questions=90, seed=7)
    return written(
        tmp_path_factory.mktemp("seeded"),
        setting("short", replace(what, finetune_axes={"seed": (1, 2, 3)}), family="olmo2", valley=1.0, peak=1.4),
        long("long", replace(what, finetune_axes={"seed": (2, 3)}), family="olmo2", valley=0.1, peak=0.3),
    )


def raw_answers(study: Path, seeds: tuple[str, ...]) -> dict[float, dict[str, np.ndarray]]:
    """λ → task → correctness per question, mean over seeds, straight from the files."""
    found: dict[float, dict[str, list[np.ndarray]]] = {}
    for cell in json.loads((study / "study.json").read_text())["cells"]:
        if cell["kind"] == "evaluate" and cell["task"] and str(cell["variant"]["seed"]) in seeds:
            results = json.loads((study / cell["folder"] / "results.json").read_text())
            answers = np.array(results["tasks"][cell["task"]]["greedy_correct"])
            found.setdefault(cell["weight_decay"], {}).setdefault(cell["task"], []).append(answers)
    return {decay: {task: np.mean(repeats, axis=0) for task, repeats in tasks.items()} for decay, tasks in found.items()}


def raw_losses(study: Path) -> dict[float, np.ndarray]:
    """λ → loss of each held-out sequence."""
    cells = json.loads((study / "study.json").read_text())["cells"]
    return {
        cell["weight_decay"]: np.array(json.loads((study / cell["folder"] / "results.json").read_text())["held_out_losses"])
        for cell in cells
        if cell["kind"] == "overfitting"
    }


def difference_by_hand(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> tuple[float, float]:
    """Mean over tasks of `other` minus `one`, and its standard error over questions by the textbook: no bootstrap."""
    apart = [other[task] - one[task] for task in one]
    value = float(np.mean([each.mean() for each in apart]))
    return value, math.sqrt(sum(each.var() / len(each) for each in apart)) / len(apart)


def candidates_by_hand(values: dict[float, dict[str, np.ndarray]], lowest: bool) -> list[float]:
    decays = sorted(values)
    pairs = [(one, other) for one in decays for other in decays if one < other]
    reach = stats.norm.ppf(1 - 0.025 / len(pairs))
    beaten = set()
    for one, other in pairs:
        value, error = difference_by_hand(values[one], values[other])
        assert not 0.93 < abs(value) / (reach * error) < 1.07, "too near the threshold for two computations to agree"
        if abs(value) > reach * error:
            beaten.add(other if (value > 0) == lowest else one)
    return [decay for decay in decays if decay not in beaten]


def test_the_table_of_groups_against_an_independent_computation(seeded: list[Path], tmp_path: Path) -> None:
    write_comparison(seeded, tmp_path / "out")
    with (tmp_path / "out" / "groups.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["studies"] for row in rows] == ["short", "long"]
    for study, row in zip(seeded, rows, strict=True):
        answers = raw_answers(study, ("2", "3"))
        means = {decay: float(np.mean([each.mean() for each in tasks.values()])) for decay, tasks in answers.items()}
        losses = raw_losses(study)
        by_loss, by_score = min(losses, key=lambda d: losses[d].mean()), max(means, key=means.__getitem__)
        assert (float(row["best_by_loss"]), float(row["best_by_score"])) == (by_loss, by_score)
        assert float(row["lowest_loss"]) == pytest.approx(losses[by_loss].mean())
        assert float(row["score_at_best"]) == pytest.approx(means[by_score])
        value, error = difference_by_hand(answers[by_loss], answers[by_score])
        assert float(row["gap"]) == pytest.approx(value)
        for end, sign in (("gap_low", -1), ("gap_high", 1)):
            assert float(row[end]) == pytest.approx(value + sign * 1.96 * error, abs=0.25 * error + 1e-9)
        expected = candidates_by_hand(answers, lowest=False)
        assert [float(each) for each in row["best_by_score_candidates"].split("; ")] == expected
        of_losses = candidates_by_hand({decay: {"": each} for decay, each in losses.items()}, lowest=True)
        assert [float(each) for each in row["best_by_loss_candidates"].split("; ")] == of_losses
        tokens = float(row["tokens"])
        assert float(row["tokens_per_parameter"]) == pytest.approx(tokens / 1_400_000)
        assert float(row["best_by_score_timescale"]) == pytest.approx(1 / (1e-3 * by_score * tokens / (32 * 256)))
        assert (row["tasks"], row["seeds"]) == ("; ".join(TASKS), "2; 3")


def test_gains_are_over_the_base_model_on_the_same_questions(seeded: list[Path]) -> None:
    found = compare(seeded)
    for study, each in zip(seeded, found.found, strict=True):
        base = {}
        for cell in json.loads((study / "study.json").read_text())["cells"]:
            if cell["kind"] == "evaluate" and not cell["task"]:
                tasks = json.loads((study / cell["folder"] / "results.json").read_text())["tasks"]
                base[cell["weight_decay"]] = {task: np.array(tasks[task]["greedy_correct"]) for task in TASKS}
        for decay, tuned in raw_answers(study, ("2", "3")).items():
            value, _ = difference_by_hand(base[decay], tuned)
            assert each.gains[decay].value == pytest.approx(value)


# Whether the best λ moves


def choice(grid: tuple[float, ...], *candidates: float) -> Choice:
    return Choice(grid, candidates[0], (), candidates)


@pytest.mark.parametrize(
    ("one", "other", "movement"),
    [
        (choice(GRID, 0.1), choice(GRID, 1.0), "larger"),
        (choice(GRID, 3.0), choice(GRID, 0.1, 0.3), "smaller"),
        (choice(GRID, 0.3), choice(GRID, 1.0), "larger by a grid step"),
        (choice(GRID, 1.0, 3.0), choice(GRID, 0.3), "smaller by a grid step"),
        (choice(GRID, 0.3, 1.0), choice(GRID, 1.0, 3.0), "not told apart"),
        (choice(GRID, 0.3), choice(GRID, 0.3), "the same"),
        (choice(GRID, 0.3), choice((0.1, 0.5, 3.0), 0.5), "not told apart"),  # nobody tried the other's λ
        (choice((0.1, 0.2, 0.4), 0.1), choice((0.2, 0.4, 0.8), 0.8), "larger"),
        (Choice(GRID, 0.1), choice(GRID, 1.0), "not known"),
        (choice((0.1,), 0.1), choice(GRID, 1.0), "not known"),
    ],
)
def test_a_best_weight_decay_has_moved_only_beyond_the_grid(one: Choice, other: Choice, movement: str) -> None:
    assert _movement(one, other) == movement


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    settings = four_settings().values()
    what = {"tasks": ("arithmetic",), "analyses": ("overfitting",), "questions": 300}
    return compare(written(tmp_path_factory.mktemp("four"), *(replace(s, what=replace(s.what, **what)) for s in settings)))


def test_each_question_has_its_pair(four: Comparison) -> None:
    pairs = {pair.question: pair for pair in four.pairs if pair.question != "other"}
    names = {question: (p.first.group.studies[0], p.second.group.studies[0]) for question, p in pairs.items()}
    assert names == {
        "tokens": ("olmo-20x", "olmo-140x"),
        "family": ("llama-20x", "olmo-20x"),
        "size": ("llama-20x", "llama-large"),
    }
    assert [pair.question for pair in four.pairs].count("other") == 3
    assert pairs["tokens"].also == ()
    unlike = next(
        pair for pair in four.pairs if {"llama-large", "olmo-140x"} == {*pair.first.group.studies, *pair.second.group.studies}
    )
    assert {"family Llama-2 against OLMo-2", "parameters 5.6M against 1.4M", "tokens per parameter 20 against 140"} <= set(
        unlike.also
    )
    assert "corpus fineweb-edu against olmo-mix" in pairs["family"].also
    assert "tokenizer" in pairs["family"].also


def test_the_best_weight_decay_falls_with_length_and_its_timescale_need_not(four: Comparison) -> None:
    """As in the paper's runs: 1 at 20 tokens per parameter and 0.1 at 140 are almost the same timescale."""
    pair = next(pair for pair in four.pairs if pair.question == "tokens")
    assert (pair.first.by_loss, pair.second.by_loss) != (None, None)
    assert pair.movement("loss", "weight decay") == "smaller"
    assert pair.movement("loss", "timescale") == "not told apart"
    assert pair.movement("score", "weight decay") == "smaller by a grid step"
    family = next(pair for pair in four.pairs if pair.question == "family")
    assert family.movement("loss", "weight decay") == "the same"


def test_seeds_of_pretraining_are_a_question_of_their_own(tmp_path: Path) -> None:
    what = replace(WHAT, seeds=(1, 2), tasks=("trials",))
    found = compare(written(tmp_path, setting("seeds", what), long("long", what)))
    assert sorted(pair.question for pair in found.pairs) == ["seed", "seed", "tokens", "tokens", "tokens", "tokens"]
    assert {pair.also for pair in found.pairs if pair.question == "tokens"} == {
        (),
        ("seed 1 against 2",),
        ("seed 2 against 1",),
    }
    assert len({each.group.label for each in found.found}) == 4


def test_one_study_with_several_groups_can_be_compared(tmp_path: Path) -> None:
    found = compare(written(tmp_path, setting("seeds", replace(WHAT, seeds=(1, 2), tasks=("trials",)))))
    assert [each.group.name for each in found.found] == ["seed = 1", "seed = 2"]
    assert len(found.common.outcomes) == 1


# What may be compared


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"questions": "others"}, "test questions"),
        ({"evaluate": {"template": "Q: {prompt} A:"}}, "evaluation: template"),
        ({"evaluate": {"paper_compat": True}}, "evaluation: paper_compat"),
        ({"evaluate": {"max_new_tokens": 32}}, "evaluation: max_new_tokens 32 against 256"),
        ({"finetune": {"optimizer": {"learning_rate": 3e-3}}}, "fine-tuning: optimizer.learning_rate 0.003 against 0.001"),
        ({"finetune": {"task": {"train_examples": 50}}}, "fine-tuning: train_examples 50 against 1000"),
        ({"finetune": {"lora": {"rank": 4}}}, "fine-tuning: lora.rank 4 against default"),
    ],
)
def test_unlike_terms_are_not_compared(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    found = compare(written(tmp_path, setting("one"), long("two", **changes)))
    assert found.common.groups == ()
    assert all(each.by_score is None for each in found.found)
    assert reason in reasons(found)
    assert all(each.by_loss is not None for each in found.found), "loss does not depend on it"


def test_neutral_settings_and_the_seed_do_not_matter(tmp_path: Path) -> None:
    other = long("two", finetune={"seed": 7, "engine": {"zero_stage": 1}, "device": "cpu", "batch": {"micro_batch_size": 4}})
    found = compare(written(tmp_path, setting("one"), other))
    assert [outcome.name for outcome in found.common.outcomes] == list(WHAT.tasks)
    assert found.common.outcomes[0].shared_seeds == ()
    assert found.common.outcomes[0].seeds == {0: ("42",), 1: ("7",)}


def test_unlike_samples_leave_greedy_scores_alone(tmp_path: Path) -> None:
    found = compare(written(tmp_path, setting("one"), long("two", evaluate={"samples": 4})))
    assert len(found.common.outcomes) == 2
    assert "samples 8 against 4" in reasons(found) or "samples 4 against 8" in reasons(found)
    assert write_comparison([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    quantities = {row["quantity"] for row in json.loads((tmp_path / "out" / "comparison.json").read_text())["curves"]}
    assert "score" in quantities
    assert "majority" not in quantities


def test_the_mean_is_over_the_tasks_of_all_groups(tmp_path: Path) -> None:
    more = replace(WHAT, tasks=("arithmetic", "trials", "steps"))
    found = compare(
        written(tmp_path, setting("one"), long("two", more), long("three", replace(more, tasks=("trials", "steps", "passage"))))
    )
    assert len(found.common.groups) == 3
    assert [outcome.name for outcome in found.common.outcomes] == ["trials"]
    assert sorted(outcome.name for outcome in found.common.partial) == ["arithmetic", "steps"]
    assert "passage | " in reasons(found)
    assert "no other group has this task" in reasons(found)
    assert "not of all groups" in reasons(found)


def test_a_group_with_nothing_in_common_keeps_its_loss(tmp_path: Path) -> None:
    alone = long("alone", replace(WHAT, tasks=("passage",)), parameters=5_600_000)
    found = compare(written(tmp_path, setting("one"), long("two"), alone))
    assert [found.found[index].group.studies for index in found.common.groups] == [("one",), ("two",)]
    left = next(each for each in found.found if each.group.studies == ("alone",))
    assert left.by_score is None
    assert left.by_loss is not None


def test_a_way_of_a_sweep_is_matched_by_what_it_is(tmp_path: Path) -> None:
    sweep = replace(WHAT, tasks=("trials",), finetune_axes={"optimizer.learning_rate": (1e-3, 3e-3)})
    found = compare(written(tmp_path, setting("one"), long("sweep", sweep)))
    (outcome,) = found.common.outcomes
    assert outcome.evaluated.finetuned["fine-tuning: optimizer.learning_rate"] == "0.001"
    assert "optimizer.learning_rate 0.003 against 0.001" in reasons(found)


def test_unlike_fine_tuning_is_compared_when_asked_for_and_named(tmp_path: Path) -> None:
    """As with the paper's 4B models, which are fine-tuned at a smaller learning rate than the others."""
    other = long("two", finetune={"optimizer": {"learning_rate": 7.5e-4}})
    folders = written(tmp_path, setting("one"), other)
    found = compare(folders, any_finetuning=True)
    assert [outcome.name for outcome in found.common.outcomes] == list(WHAT.tasks)
    assert "fine-tuning: optimizer.learning_rate 0.001 against 0.00075" in found.pairs[0].also
    assert all(each.by_score is not None for each in found.found)
    words = Page(write_comparison(folders, tmp_path / "out", any_finetuning=True).read_text(encoding="utf-8")).words
    assert "after whatever fine-tuning, as was asked for" in words
    assert "--any-finetuning" in words


def test_unlike_fine_tuning_takes_one_way_each(tmp_path: Path) -> None:
    sweep = replace(WHAT, tasks=("trials",), finetune_axes={"optimizer.learning_rate": (1e-3, 3e-3)})
    with pytest.raises(UserError, match="trials in 2 ways"):
        compare(written(tmp_path, setting("one"), long("sweep", sweep)), any_finetuning=True)


def test_answers_of_one_weight_decay_that_were_judged_otherwise_are_left_out(tmp_path: Path) -> None:
    odd = replace(WHAT, tasks=("trials",), graders={"evaluate-wd1-trials": "another"})
    found = compare(written(tmp_path, setting("one", odd), long("two")))
    assert found.found[0].scores.keys() == {0.0, 0.1}
    assert "grader another against words" in reasons(found)


def test_evaluations_that_kept_too_little_are_named(tmp_path: Path) -> None:
    one, two = written(tmp_path, setting("one"), long("two"))
    cell = next(c for c in json.loads((two / "study.json").read_text())["cells"] if c["id"] == "finetune-wd1-trials")
    (two / cell["folder"] / "config.yaml").write_text("name: x\n")
    found = compare([one, two])
    assert "trials | Llama-2 1.4M 140×, λ = 1 | the config of the evaluation" in reasons(found)
    assert found.found[1].scores.keys() == {0.0, 0.1}


# Runs that are not there, and runs that are there twice


def test_failed_and_diverged_runs_are_left_out_and_named(tmp_path: Path) -> None:
    failed = replace(
        WHAT, statuses={"finetune-wd0-trials": "failed", "evaluate-wd0-trials": "missing", "overfitting-wd1": "failed"}
    )
    one, two = written(tmp_path, setting("one", failed), long("two", replace(WHAT, analyses=())))
    cell = next(c for c in json.loads((two / "study.json").read_text())["cells"] if c["id"] == "pretrain-wd1")
    path = two / cell["folder"] / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "held_out_loss": {"float": "nan"}}))
    found = compare([one, two])
    first, second = found.found
    assert first.scores.keys() == {0.1, 1.0}
    assert first.losses_of == "pretraining", "the overfitting runs do not know every λ"
    assert second.losses.keys() == {0.0, 0.1}
    assert second.by_loss is not None
    assert second.by_loss.candidates is None, "the noise is not known"
    assert "evaluate-wd0-trials | one | missing" in reasons(found)
    assert "pretrain-wd1 | two | no finite held-out loss" in reasons(found)
    page = write_comparison([one, two], tmp_path / "out").read_text()
    words = Page(page).words
    assert "one: 3 of 21 runs have no results" in words
    assert "no mean score at λ = 0" in words


def test_studies_that_share_base_runs_are_one_group(tmp_path: Path) -> None:
    """One study holds the other's base runs, one λ more, and another task."""
    further = replace(WHAT, weight_decays=(0.1, 1.0, 3.0), tasks=("trials", "steps"))
    folders = written(tmp_path, setting("one", identity="same"), setting("again", further, identity="same"), long("long"))
    found = compare(folders)
    assert [each.group.studies for each in found.found] == [("one", "again"), ("long",)]
    merged = found.found[0]
    assert [member.weight_decay for member in merged.group.members] == [0.0, 0.1, 1.0, 3.0]
    assert merged.losses.keys() == {0.0, 0.1, 1.0, 3.0}
    assert "they share 2 base runs (equal hashes)" in reasons(found)
    trials = next(outcome for outcome in found.common.outcomes if outcome.name == "trials")
    assert {decay: len(seeds) for decay, seeds in trials.runs[0].items()} == {0.0: 1, 0.1: 1, 1.0: 1, 3.0: 1}
    assert [pair.question for pair in found.pairs] == ["tokens"]


def test_nothing_is_left_to_compare_once_shared_runs_count_once(tmp_path: Path) -> None:
    folders = written(tmp_path, setting("one", identity="same"), setting("two", identity="same", finetune={"epochs": 1}))
    with pytest.raises(
        UserError, match="there is one group of base models once the base runs that the studies share are counted once"
    ):
        compare(folders)


def test_what_is_no_study_or_there_twice_is_refused_at_once(tmp_path: Path) -> None:
    (one,) = written(tmp_path, setting("one"))
    shutil.copytree(one, tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        compare([one, tmp_path / "empty", tmp_path / "copy", tmp_path / "." / "one", tmp_path / "nowhere"])
    message = str(caught.value)
    assert f"{tmp_path / 'empty'} is not a study folder" in message
    assert f"{tmp_path / 'nowhere'} is not a study folder" in message
    assert "once more" in message
    assert "copy: holds the same runs as" in message


def test_nothing_in_common_is_an_error_with_reasons(tmp_path: Path) -> None:
    undone = {f"pretrain-wd{decay:g}": "failed" for decay in WHAT.weight_decays}
    one = setting("one", replace(WHAT, analyses=(), statuses=undone))
    two = long("two", replace(WHAT, analyses=(), statuses=undone, tasks=("steps",)))
    with pytest.raises(UserError, match="nothing in common") as caught:
        compare(written(tmp_path, one, two))
    assert "one: 3 of" in str(caught.value)
    assert "no other group has this task" in str(caught.value)


def as_imported(study: Path) -> Path:
    """The same study with base models that were pretrained elsewhere: without configs, losses and timescales, of a size of the
    paper's."""
    tree = json.loads((study / "study.json").read_text())
    for cell in tree["cells"]:
        cell["adamw_timescale"] = None
        if cell["kind"] == "pretrain":
            folder = study / cell["folder"]
            cell["kind"], cell["folder"] = "import", cell["folder"].replace("pretrain-", "import-")
            folder = folder.rename(study / cell["folder"])
            (folder / "config.yaml").write_text(f"name: x\nsource: somewhere\nweight_decay: {cell['weight_decay']}\n")
            size = {"total": 1_484_916_736, "non_embedding": 1_073_874_944}
            results = {"checkpoint": "checkpoints/step-0", "parameters": size, "tokens": 29_998_000_000}
            (folder / "results.json").write_text(json.dumps(results))
            (folder / "checkpoints/step-0").mkdir(parents=True)
            (folder / "checkpoints/step-0/model.json").write_text('{"family": "olmo2"}')
    (study / "study.json").write_text(json.dumps(tree))
    return study


def test_imported_models_of_the_paper_have_the_timescales_of_its_recipe(tmp_path: Path) -> None:
    one, two = written(tmp_path, setting("one", replace(WHAT, analyses=())), long("two"))
    found = compare([as_imported(one), two])
    group = next(each for each in found.found if each.group.studies == ("one",))
    assert group.group.label == "OLMo-2 1.5B 20×"
    assert group.group.timescales == {
        0.0: None,
        0.1: pytest.approx(1 / (4e-4 * 14_305 * 0.1)),
        1.0: pytest.approx(0.17476, rel=1e-3),
    }
    assert (group.losses, group.by_loss, group.gap) == ({}, None, None)
    assert group.by_score is not None
    assert "settings of pretraining not known" in found.pairs[0].also
    words = Page(write_comparison([one, two], tmp_path / "out").read_text(encoding="utf-8")).words
    assert "their timescales are those of the paper's recipe" in words


# The page


@pytest.fixture(scope="module")
def page_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    what = replace(WHAT, tasks=("trials",), analyses=("probes", "attention", "overfitting"))
    studies = written(folder, setting("one", what), long("two", what, family="olmo2"), long("three", what))
    return write_comparison(studies).parent


def test_the_page_is_whole_and_self_contained(page_folder: Path) -> None:
    assert page_folder.name == "comparison-one-two-three"
    html = (page_folder / "index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert {"answer", "groups", "scores", "gains", "loss", "inside", "compared", "limits", "reproduce"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "iframe", "object", "embed", "img"} & set(page.tags)
    files = {link for link in page.links if not link.startswith("#")}
    assert files == {"groups.csv", "curves.csv", "pairs.csv", "left_out.csv", "comparison.json"}
    assert all((page_folder / file).is_file() for file in files)
    inside = {link[1:] for link in page.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", html))
    assert inside <= set(page.ids)
    for text in ("Llama-2 1.4M 20×", "W_QK: pseudo-rank", "Probes: topic", "Train–validation gap", "AdamW timescale"):
        assert text in page.words


def test_the_figures_follow_the_colour_scheme(page_folder: Path) -> None:
    html = (page_folder / "index.html").read_text(encoding="utf-8")
    for figure in re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL):
        ElementTree.fromstring(figure)
        assert not re.search(r"(?:fill|stroke): #(?!ffffff)", figure), "a colour that the dark scheme cannot change"
    defined = set(re.findall(r"(--[a-z0-9-]+):", html))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", html)) <= defined


def test_csv_and_json_say_the_same(page_folder: Path) -> None:
    record = json.loads((page_folder / "comparison.json").read_text())
    with (page_folder / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(record["curves"]) > 50
    assert float(rows[-1]["value"]) == record["curves"][-1]["value"]
    assert {row["quantity"] for row in rows} >= {"score", "gain", "held-out loss", "majority", "pass"}
    assert len(record["pairs"]) == 3


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><b onclick="x">{{ 7 * 7 }} & $\\frac{1}{2}$ \x00\x1b'])
def test_names_and_errors_are_escaped(tmp_path: Path, hostile: str) -> None:
    what = replace(
        WHAT, tasks=("trials",), analyses=(), description=hostile, error=hostile, statuses={"finetune-wd0-trials": "failed"}
    )
    one, two = setting("one", replace(what, statuses={"evaluate-wd0-trials": "failed"})), long("two", what)
    folders = written(tmp_path, one, two)
    for folder in folders:
        tree = json.loads((folder / "study.json").read_text())
        (folder / "study.json").write_text(json.dumps({**tree, "name": tree["name"] + hostile}))
    html = write_comparison(folders, tmp_path / "out").read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "b"} & set(page.tags)
    assert "\x00" not in html
    assert hostile.split("\x00")[0].strip() in page.words


def test_colours_are_readable_on_both_schemes() -> None:
    """Contrast of at least 4.5 with the page; WCAG 2.2 asks 3 of graphics (1.4.11)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    palette = GroupPalette(8)
    assert all(1.05 / (luminance(colour) + 0.05) >= 4.5 for colour in palette.light)
    assert all((luminance(colour) + 0.05) / (luminance("#15171b") + 0.05) >= 4.5 for colour in palette.dark)
    marks = [(palette[group], GroupPalette(20).marker(group)) for group in range(20)]
    assert len(set(marks)) == 20


def test_timescales_run_the_other_way_round() -> None:
    axis = TimescaleAxis([0.1, 1.0, math.inf])
    assert axis(math.inf) < axis(1.0) < axis(0.1)
    assert axis(1.0) - axis(0.1) == pytest.approx(-1)
    assert round_values(0.1, 1.0) == pytest.approx([0.1, 0.2, 0.5, 1.0])
    assert len(round_values(1e-4, 100.0)) <= 7
    assert Scales([{0.5: None, 0.0: None}]).known == ("weight decay",)


# The command


def test_the_command_says_what_it_found(run: Run, page_folder: Path, tmp_path: Path) -> None:
    studies = [page_folder.parent / name for name in ("one", "three")]
    code, out, err = run("study", "compare", *studies, "--output", tmp_path / "here")
    assert code == 0, err
    assert str(tmp_path / "here" / "index.html") in out
    assert "Llama-2 1.4M 20×: best λ by loss" in out
    assert "With more tokens per parameter" in out


def test_another_page_is_not_overwritten(run: Run, page_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine")
    studies = [page_folder.parent / name for name in ("one", "three")]
    code, _, err = run("study", "compare", *studies, "--output", tmp_path)
    assert code == 2
    assert "holds another page" in err
    assert (tmp_path / "index.html").read_text() == "mine"
    (tmp_path / "file").touch()
    code, _, err = run("study", "compare", *studies, "--output", tmp_path / "file")
    assert code == 2
    assert "Traceback" not in err


def test_the_command_refuses_what_is_no_study(run: Run, tmp_path: Path) -> None:
    code, _, err = run("study", "compare", tmp_path, tmp_path / "x")
    assert code == 2
    assert "study.json" in err
    assert "Traceback" not in err
