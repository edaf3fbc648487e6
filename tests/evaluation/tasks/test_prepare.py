"""Preparing a task of one's own: what is checked, what is written, and what a failure leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_plasticity.config.files import sha256_file
from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.errors import ConfigError, UserError
from megatron_plasticity.evaluation.tasks import prepare as module
from megatron_plasticity.evaluation.tasks.prepared import PreparedTask, overlap_warning
from tests.evaluation.tasks.conftest import TEST, TRAIN, Prepare, own_task
from tests.evaluation.tasks.rows import write_json_lines


def changed(side: str, **changes: Any) -> dict[str, Any]:
    """`own_task` with other keys in its training rows or its test set."""
    tree = own_task()
    ((_, rows),) = tree[side].items()
    rows |= changes
    return tree


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def test_a_prepared_task(prepare: Prepare, data: Path) -> None:
    folder, manifest = prepare()
    assert folder.name == f"sums-{manifest['sha256'][:10]}"
    assert (folder.parent / "sums").resolve() == folder.resolve()
    assert files_below(folder) == ["manifest.json", "test-some.parquet", "train.parquet"]
    assert manifest["train"]["parts"]["all"]["files"] == {"train.jsonl": sha256_file(data / "train.jsonl")}
    assert manifest["train"]["parts"]["all"]["licence"] == "CC0"
    assert manifest["warnings"] == ["test_sets.some: only 5 questions"]
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == sha256_file(folder / name)
    task = PreparedTask(folder)
    assert (task.name, task.description, task.identity) == ("sums", "sums", manifest["sha256"])
    example = task.test_sets(1, 0)["some"][0]
    assert example.prompt in [row["question"] for row in TEST]
    assert example.response == f"Adding up. The answer is {example.reference.answer}."


def test_the_same_rows_make_the_same_task_and_others_another(prepare: Prepare, data: Path) -> None:
    folder, manifest = prepare()
    assert prepare()[0] == folder
    write_json_lines(data / "test.jsonl", [*TEST[:-1], TEST[-1] | {"answer": "6"}])
    other, changed_manifest = prepare()
    assert other != folder
    assert changed_manifest["sha256"] != manifest["sha256"]
    assert (folder.parent / "sums").resolve() == other.resolve(), "the name leads to the newest"
    assert PreparedTask(folder).identity == manifest["sha256"], "what was prepared before stays"


def test_conditions_leave_rows_out_and_are_counted(prepare: Prepare) -> None:
    _, manifest = prepare(changed("train", keep={"small": "answer | int < 20", "even": "(answer | int) % 4 == 0"}))
    assert manifest["train"]["parts"]["all"]["left_out"] == {"small": 10, "even": 5}
    assert manifest["train"]["examples"] == 5


@pytest.mark.parametrize(("size", "first"), [({"count": 4}, 4), ({"share": 0.25}, 5)])
def test_both_sides_of_a_cut_are_all_there_is(prepare: Prepare, size: dict[str, Any], first: int) -> None:
    tree = changed("train", part={"key": "question", "side": "rest"} | size)
    tree["test_sets"]["some"] = tree["train"]["all"] | {"part": {"key": "question", "side": "first"} | size}
    folder, manifest = prepare(tree)
    task = PreparedTask(folder)
    train = {example.prompt for example in task.train(None, 0)}
    test = {example.prompt for example in task.test_sets(None, 0)["some"]}
    assert (len(train), len(test)) == (20 - first, first)
    assert train | test == {row["question"] for row in TRAIN}
    assert manifest["train"]["parts"]["all"]["on_the_other_side"] == first


def test_a_cut_has_two_sides(prepare: Prepare) -> None:
    with pytest.raises(UserError, match="20 of 20 keys come first, which leaves one side empty"):
        prepare(changed("train", part={"key": "question", "side": "rest", "count": 20}))


def test_lookups_columns_and_the_row_itself(prepare: Prepare, data: Path) -> None:
    (data / "names.tsv").write_text("What is 1 plus 1?\tone\n", encoding="utf-8")
    lookup = {"files": {"paths": ["names.tsv"], "header": ["asked", "name"]}, "key": "asked", "value": "name | upper"}
    tree = changed(
        "train",
        lookups={"names": lookup},
        keep={"has a name": "question in names"},
        prompt="{{ names[question] }} {{ row['answer'] }} {{ row_number }} {{ twice }}",
        files={"paths": ["train.jsonl"], "columns": {"once": "answer | int", "twice": "2 * once"}},
    )
    folder, _ = prepare(tree)
    assert [example.prompt for example in PreparedTask(folder).train(None, 0)] == ["ONE 2 1 4"]


def test_responses_without_their_answer_are_counted_and_strictness_refuses_them(prepare: Prepare, tmp_path: Path) -> None:
    response = "{{ 'No idea.' if row_number == 3 else 'The answer is 4.' }}"
    _, manifest = prepare(changed("train", response=response))
    own = manifest["train"]["parts"]["all"]["own_answers"]
    assert (own["responses"], own["unreadable"], own["wrong"]) == (20, 1, 18)
    assert own["first_unreadable"] == ["train/all/3"]
    assert "train.all: of 20 responses 1 state no answer that can be read and 18 another one" in manifest["warnings"][0]
    before = files_below(tmp_path / "tasks")
    with pytest.raises(UserError, match="--strict makes errors of warnings") as raised:
        prepare(changed("train", response=response), strict=True)
    assert "state no answer" in str(raised.value)
    assert files_below(tmp_path / "tasks") == before


def test_other_numbers_of_rows_than_expected_are_warned_of(prepare: Prepare) -> None:
    tree = changed("train", files={"paths": ["train.jsonl"], "expected_rows": 21, "expected_examples": 20})
    assert prepare(tree)[1]["warnings"][0] == "train.all: 20 rows, the task file expects 21"


def test_repeated_questions_are_flagged_in_tests_and_dropped_from_training_on_request(prepare: Prepare, data: Path) -> None:
    write_json_lines(data / "test.jsonl", TEST * 30)
    write_json_lines(data / "train.jsonl", TRAIN * 2)
    _, manifest = prepare()
    assert manifest["train"]["examples"] == 40
    assert manifest["test_sets"]["some"]["flag"] == "5 distinct questions in 150 rows"
    _, manifest = prepare(own_task(drop_duplicates=True))
    assert (manifest["train"]["examples"], manifest["train"]["duplicates_dropped"]) == (20, 20)
    assert manifest["test_sets"]["some"]["examples"] == 150


# --- overlap ---


def test_overlap_is_reported_and_warned_of(prepare: Prepare, data: Path) -> None:
    long = "A man with a red hat walks nine miles to the blue town and then back home again, how far?"
    write_json_lines(
        data / "train.jsonl",
        [*TRAIN, {"question": "what is 0 PLUS one?", "answer": "1"}, {"question": f"Once more: {long}", "answer": "18"}],
    )
    write_json_lines(data / "test.jsonl", [*TEST, {"question": long, "answer": "18"}])
    folder, manifest = prepare()
    exact, ngram = manifest["overlap"]["some"]["exact"], manifest["overlap"]["some"]["ngram"]
    assert (exact["test_questions"], exact["train_rows"], exact["removed"]) == (1, 1, False)
    assert exact["first"] == [["some/0", "train/all/20"]]
    assert exact["share"] == pytest.approx(1 / 6)
    assert ngram["first"] == [["some/5", "train/all/21"]]
    warning = overlap_warning(PreparedTask(folder))
    assert warning is not None
    assert "1 of 6 questions of some (16.7%) are also asked in training; 1 of 6 questions of some (16.7%) have most" in warning

    folder, manifest = prepare(own_task(decontamination={"exact": "remove", "ngram": "remove"}))
    assert (manifest["train"]["removed_by_decontamination"], manifest["train"]["examples"]) == (2, 20)
    assert manifest["train"]["parts"]["all"]["examples"] == 20
    assert overlap_warning(PreparedTask(folder)) is None


def test_rows_removed_as_exact_do_not_hide_others(prepare: Prepare, data: Path) -> None:
    long = "A man with a red hat walks nine miles to the blue town and then back home again, how far?"
    write_json_lines(data / "train.jsonl", [{"question": long, "answer": "18"}, {"question": f"Again: {long}", "answer": "18"}])
    write_json_lines(data / "test.jsonl", [{"question": long, "answer": "18"}])
    assert prepare()[1]["overlap"]["some"]["ngram"]["test_questions"] == 0, "the question is counted as exact"
    overlap = prepare(own_task(decontamination={"exact": "remove"}))[1]["overlap"]["some"]
    assert overlap["ngram"]["first"] == [["some/0", "train/all/1"]]


def test_procedural_tasks_have_no_overlap() -> None:
    from megatron_plasticity.evaluation.tasks.registry import get_task

    assert overlap_warning(get_task(TaskConfig(name="arithmetic"))) is None


# --- what is wrong is said, and leaves nothing ---


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            changed("train", prompt="{{ qestion }}"),
            "train.all.prompt: UndefinedError: 'qestion' is undefined .* question, answer",
        ),
        (changed("train", prompt="{{ '' }}"), "train.all.prompt: empty at row 0"),
        (changed("test_sets", answer=" "), "test_sets.some.answer: empty at row 0"),
        (changed("train", answer_kind="'numbr'"), "'numbr' at row 0; expected one of number, maths"),
        (changed("train", answer_kind="program_input"), "train.all.program: needed"),
        (changed("train", keep={"any": "1 / 0 > answer"}), "train.all.keep.any: ZeroDivisionError"),
        (changed("train", keep={"none": "false"}), "no row is left of 20"),
        (changed("train", id="same"), "'train/all/same' names two rows"),
        (changed("train", prompt="{{ ''.__class__.__mro__ }}"), "SecurityError|is unsafe"),
        (changed("train", files={"paths": ["nowhere.jsonl"], "upstream": "here"}), "nowhere.jsonl. They can be had at here"),
        (
            changed("train", files=None, hub={"name": "some/where"}),
            "has no some/where/, .*hf download --repo-type dataset some/where",
        ),
        (changed("train", lookups={"x": {"files": {"paths": ["gone.tsv"]}, "key": "a"}}), "gone.tsv: not found"),
    ],
)
def test_a_failing_preparation_leaves_nothing(prepare: Prepare, tmp_path: Path, tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(tree)
    assert files_below(tmp_path / "tasks") == []


def test_a_preparation_that_dies_while_writing_leaves_nothing(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = prepare()
    before = files_below(tmp_path / "tasks")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "write_json_atomic", full)
    with pytest.raises(UserError, match="cannot write the task: No space left"):
        prepare(changed("train", prompt="Again: {{ question }}"))
    assert files_below(tmp_path / "tasks") == before
    assert (tmp_path / "tasks/sums").resolve() == folder.resolve()


def test_all_that_is_wrong_with_the_templates_is_told_at_once(prepare: Prepare) -> None:
    tree = changed("train", prompt="{{ question", keep={"odd": "answer |"}, choices="answer | nofilter")
    tree["test_sets"]["some"]["answer"] = "{% if %}"
    with pytest.raises(ConfigError, match=r"sums\.yaml: 4 problems in the templates") as raised:
        prepare(tree)
    for where in ("train.all.prompt", "train.all.keep.odd", "train.all.choices", "test_sets.some.answer"):
        assert f"  {where}: " in str(raised.value)


@pytest.mark.parametrize(
    ("tree", "messages"),
    [
        (changed("train", respose="x"), ["train.all.respose: unknown key; did you mean 'response'"]),
        (changed("train", response=""), ["train.all.response: needed for training"]),
        (changed("train", files=None), ["needs `hub`, `files` or both"]),
        (own_task(name="a/b", descriptio="x"), ["name: string should match", "descriptio: unknown key"]),
        (changed("train", part={"key": "a", "side": "rest"}), ["takes exactly one of `count` and `share`"]),
        (own_task(test_sets={"train": own_task()["test_sets"]["some"]}), ["test_sets.train: `train` stands for"]),
        (own_task(test_sets={"a b": own_task()["test_sets"]["some"]}), ["test_sets.a b: a name has letters"]),
    ],
)
def test_a_task_file_that_is_wrong(prepare: Prepare, tree: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        prepare(tree)
    for message in messages:
        assert message in str(raised.value)


def test_the_manifest_is_plain_json(prepare: Prepare) -> None:
    folder, manifest = prepare()
    assert json.loads((folder / "manifest.json").read_text(encoding="utf-8")) == manifest
    assert manifest["task_file"]["train"]["all"]["licence"] == "CC0"
