"""Every task that ships: its file is right, and makes the examples it should of rows of both layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.evaluation.tasks.catalogue import load_task_file, shipped_tasks, suites
from megatron_plasticity.evaluation.tasks.prepare import prepare_task
from megatron_plasticity.evaluation.tasks.recipes import recipes
from megatron_plasticity.evaluation.tasks.registry import get_task
from megatron_plasticity.evaluation.tasks.task import Example
from tests.evaluation.tasks.rows import write_files, write_hub

Prepared = Callable[[str, str], tuple[list[Example], dict[str, list[Example]], dict[str, Any]]]
"""Name of a task and layout of its rows → training examples and test sets in the order of their ids, and the manifest."""

TASKS = shipped_tasks()
FROM_FILES = [name for name, path in TASKS.items() if all(rows.files for rows in load_task_file(path).rows.values())]
FROM_HUB = [name for name, path in TASKS.items() if all(rows.hub for rows in load_task_file(path).rows.values())]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layout → a folder with the rows of all tasks in it."""
    files, hub = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("hub")
    write_files(files)
    write_hub(hub)
    return {"files": files, "hub": hub}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is left in the cache of the person who runs the tests, and nothing read from it."""
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def prepared(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Prepares a shipped task from a layout, once."""
    output = tmp_path_factory.mktemp("tasks")

    @cache
    def call(name: str, layout: str) -> tuple[list[Example], dict[str, list[Example]], dict[str, Any]]:
        _, manifest = prepare_task(load_task_file(TASKS[name]), folders[layout], output / layout, name)
        task = get_task(TaskConfig(name=name, folder=output / layout))
        tests = {set_name: sorted(examples, key=by_id) for set_name, examples in task.test_sets(None, 0).items()}
        return sorted(task.train(None, 0), key=by_id), tests, manifest

    return call


def by_id(example: Example) -> str:
    return example.id


def test_both_suites_ship_whole() -> None:
    assert suites() == {
        "paper": ["metamathqa", "simplescaling", "medmcqa-cot", "pubmedqa", "mmlu-pro-cot", "race"],
        "reachable": ["gsm8k", "math", "cruxeval", "boardgameqa", "tabmwp", "strategyqa"],
    }
    assert {name for names in suites().values() for name in names} <= set(TASKS)
    assert set(suites()["paper"]) <= set(FROM_HUB)
    assert set(suites()["reachable"]) <= set(FROM_FILES)
    assert set(TASKS) == set(FROM_FILES) | set(FROM_HUB)


@pytest.mark.parametrize("name", TASKS)
def test_is_a_task_file_with_templates_that_compile(name: str) -> None:
    task = load_task_file(TASKS[name])
    assert task.name == name
    assert recipes(task, name).keys() == task.rows.keys()
    for where, rows in task.rows.items():
        for layout in (rows.hub, rows.files):
            assert layout is None or layout.expected_rows, f"{where} does not say how many rows there should be"


@pytest.mark.parametrize(("name", "layout"), [(n, "files") for n in FROM_FILES] + [(n, "hub") for n in FROM_HUB])
def test_every_response_ends_with_the_answer_it_is_graded_by(name: str, layout: str, prepared: Prepared) -> None:
    train, tests, manifest = prepared(name, layout)
    assert train
    assert all(tests.values())
    for part in (*manifest["train"]["parts"].values(), *manifest["test_sets"].values()):
        assert (part["own_answers"]["unreadable"], part["own_answers"]["wrong"]) == (0, 0)
    # The numbers of hand-made rows are not those of the data sets, and the manifest says so.
    assert any("the task file expects" in warning for warning in manifest["warnings"])


@pytest.mark.parametrize("name", sorted(set(FROM_FILES) & set(FROM_HUB) - {"math"}))
def test_both_layouts_give_the_same_examples(name: str, prepared: Prepared) -> None:
    """But for MATH, whose training rows are other ones on the hub."""
    from_files, from_hub = (prepared(name, layout) for layout in ("files", "hub"))
    assert from_files[:2] == from_hub[:2]


def test_gsm8k(prepared: Prepared) -> None:
    train, tests, _ = prepared("gsm8k", "files")
    assert (train[0].prompt, train[0].response) == ("Two and 3?", "It is 2+3=5.\nThe answer is 5.")
    assert (tests["gsm8k_platinum"][0].reference.kind, tests["gsm8k_platinum"][0].reference.answer) == ("number", "9")


def test_math_trains_on_what_is_not_in_math_500(prepared: Prepared) -> None:
    train, tests, manifest = prepared("math", "files")
    assert [example.group for example in train] == ["level 1"]
    assert [(example.group, example.reference.answer) for example in tests["math_500"]] == [("level 2", "3.5")]
    exact = manifest["overlap"]["math_500"]["exact"]
    assert (exact["test_questions"], exact["train_rows"], exact["removed"]) == (1, 1, True)  # though one has \dfrac


def test_cruxeval_cuts_by_function(prepared: Prepared) -> None:
    train, tests, _ = prepared("cruxeval", "files")
    assert (len(train), [len(examples) for examples in tests.values()]) == (2 * 3, [200, 200])

    def functions(examples: list[Example]) -> set[str]:
        return {example.id.split("/")[-1] for example in examples}

    assert functions(tests["cruxeval_output"]) == functions(tests["cruxeval_input"])
    assert not functions(train) & functions(tests["cruxeval_output"])
    asked = tests["cruxeval_input"][0]
    assert asked.reference.kind == "program_input"
    assert asked.reference.program.startswith("def f(a)")
    assert asked.reference.answer in asked.prompt


def test_boardgameqa_speaks_of_yes_no_and_unknown(prepared: Prepared) -> None:
    train, tests, _ = prepared("boardgameqa", "files")
    assert [example.reference.answer for example in train] == ["yes", "unknown"]  # the dog's is in the test set
    assert train[1].response == "It is open. So the answer is unknown."
    assert (tests["boardgameqa_500"][0].prompt, tests["boardgameqa_500"][0].reference.answer) == (
        "Does the dog win? Answer yes, no or unknown.",
        "no",
    )


def test_tabmwp_has_numbers_and_words(prepared: Prepared) -> None:
    train, tests, _ = prepared("tabmwp", "files")
    assert train[0].prompt == "Prices\nhat | $1\ncap | $2\n\nWhich costs more?\n\nChoose from: hat, cap"
    assert (train[0].reference.kind, train[0].choices) == ("text", ("hat", "cap"))
    asked = tests["tabmwp_test1k"][0]
    assert asked.prompt == "hat | $1\ncap | $2.10\n\nHow much are both? (Unit: $)"
    assert (asked.reference.kind, asked.reference.answer, asked.choices) == ("number", "3.10", ())


def test_strategyqa_takes_facts_where_there_is_no_rationale(prepared: Prepared) -> None:
    train, _, _ = prepared("strategyqa", "files")
    assert [example.response for example in train] == [
        'Ice is frozen "water". So the answer is yes.',
        "Fire burns. It is hot. So the answer is no.",
    ]


@pytest.mark.parametrize(("name", "layout"), [("pubmedqa", "hub"), ("pubmedqa-labelled", "files")])
def test_pubmedqa_target(name: str, layout: str, prepared: Prepared) -> None:
    train, tests, _ = prepared(name, layout)
    assert train[0].response.startswith("The conclusion of the abstract is: It ")
    assert train[0].response.endswith(f" Therefore, the answer is {train[0].reference.answer}.")
    assert "Question: Does drug" in train[0].prompt
    assert "Abstract: It was tried. " in train[0].prompt
    assert [len(examples) for examples in tests.values()] == ([2] if layout == "hub" else [1])


def test_mmlu_pro_keeps_what_is_right_and_says_so(prepared: Prepared) -> None:
    train, tests, manifest = prepared("mmlu-pro", "files")
    assert manifest["test_sets"]["mmlu_pro_right"]["on_the_other_side"] == 36
    assert len(train) + len(tests["mmlu_pro_right"]) == 38  # one is wrong, one does not say
    assert train[0].response == "It is the first. The answer is A."
    assert train[0].prompt.endswith("\nA. 0\nB. 1\nC. 2")


def test_mmlu_pro_cot_is_flagged(prepared: Prepared) -> None:
    _, tests, manifest = prepared("mmlu-pro-cot", "hub")
    assert len(tests["mmlu_pro_cot_validation"]) == 3, "all rows stay, as in the paper"
    assert manifest["test_sets"]["mmlu_pro_cot_validation"]["flag"] == "1 distinct questions in 3 rows"


def test_race_target(prepared: Prepared) -> None:
    train, tests, _ = prepared("race", "hub")
    assert [example.response for example in train] == ["Ann. Therefore, the answer is B.", "Cy. Therefore, the answer is C."]
    assert tests["race_test"][0].choices == ("Bo", "Ann", "Cy.", "Di")


def test_medmcqa_target(prepared: Prepared) -> None:
    train, tests, _ = prepared("medmcqa-cot", "hub")
    assert [example.response for example in train] == ["It is b.\n\nThe answer is B.", "So c.\n\nThe answer is C."]
    assert (tests["medmcqa_validation"][0].prompt, tests["medmcqa_validation"][0].reference.answer) == (
        "Where?\nOptions:\nA. a\nB. b\nC. c\nD. d",
        "D",
    )


def test_simplescaling_keeps_attempts_with_a_box(prepared: Prepared) -> None:
    train, tests, manifest = prepared("simplescaling", "hub")
    assert [example.reference.answer for example in train] == ["3"]
    assert manifest["train"]["parts"]["train"]["left_out"] == {"the attempt has a box": 1}
    assert {name: examples[0].reference.kind for name, examples in tests.items()} == {
        "gsm8k_platinum": "maths",
        "math_test": "maths",
    }
    assert manifest["test_sets"]["math_test"]["groups"] == {"level 1": 7, "level 2": 7}


def test_metamathqa(prepared: Prepared) -> None:
    train, _, _ = prepared("metamathqa", "hub")
    assert [example.reference.answer for example in train] == ["5", "\\frac{1}{2}"]


def test_tasks_that_share_a_test_set_ask_the_same_questions(folders: dict[str, Path], tmp_path: Path) -> None:
    asked = []
    for name in ("metamathqa", "simplescaling"):
        prepare_task(load_task_file(TASKS[name]), folders["hub"], tmp_path, name)
        asked.append(get_task(TaskConfig(name=name, folder=tmp_path)).test_sets(1, seed=3))
    assert asked[0] == asked[1]
    assert len(asked[0]["math_test"]) == 1
