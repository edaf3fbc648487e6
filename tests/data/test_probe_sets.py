from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from megatron_plasticity.config.analysis import ProbesRecipe
from megatron_plasticity.config.load import check_config
from megatron_plasticity.config.probe_sets import PUBLISHED, ProbeSet
from megatron_plasticity.data.labelled_text import labelled_texts
from megatron_plasticity.data.probe_sets import LabelledSet, labelled_sets, probe_inputs
from megatron_plasticity.errors import ConfigError, UserError


def described(folder: Path, **changes: Any) -> ProbeSet:
    """A set in the form of GLUE: tab-separated, with a line of names. Twelve training texts, one of them twice; four to ask."""
    folder.mkdir(exist_ok=True)
    train, test = folder / "train.tsv", folder / "dev.tsv"
    if not train.exists():
        rows = [f'text "{number} \t{number % 3 % 2}' for number in range(12)]
        train.write_text("\n".join(["sentence\tlabel", *rows, rows[0]]) + "\n", encoding="utf-8")
        test.write_text("sentence\tlabel\n" + "".join(f"asked {number}\t{number % 2}\n" for number in range(4)), encoding="utf-8")
    fields: dict[str, Any] = {
        "name": "mine", "train_files": (train,), "test_files": (test,), "text": "sentence", "labels": ("0", "1"),
    }  # fmt: skip
    return ProbeSet(**(fields | changes))


def texts_of(dataset: ProbeSet) -> LabelledSet:
    return labelled_sets(ProbesRecipe(datasets=(dataset.name,), own_datasets=(dataset,)))[dataset.name]


def test_files_in_the_form_of_glue(tmp_path: Path) -> None:
    mine = texts_of(described(tmp_path, classes=("negative", "positive")))
    assert mine.classes == ("negative", "positive")
    train = mine.texts("train", 100, seed=0)
    assert [item.text for item in train] == [f'text "{number} ' for number in range(12)]  # as they are, each once
    assert Counter(item.label for item in train) == {0: 8, 1: 4}
    assert len(mine.texts("test", 3, seed=0)) == 3


def test_a_draw_depends_on_the_seed_alone_and_has_no_text_twice(tmp_path: Path) -> None:
    mine = texts_of(described(tmp_path))
    drawn = mine.texts("train", 8, seed=0)
    assert drawn == texts_of(described(tmp_path)).texts("train", 8, seed=0)
    assert drawn != mine.texts("train", 8, seed=1)
    assert len({item.text for item in drawn}) == 8


def test_what_is_asked_is_not_fitted(tmp_path: Path) -> None:
    dataset = described(tmp_path)
    with (tmp_path / "dev.tsv").open("a") as file:
        file.write('text "3 \t0\n')
    mine = texts_of(dataset)
    assert 'text "3 ' not in {item.text for item in mine.texts("train", 100, seed=0)}
    assert len(mine.texts("test", 100, seed=0)) == 5


def test_files_without_a_line_of_names_and_with_named_labels(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("A wins\tSports\nB rises\tBusiness\n")
    (tmp_path / "dev.tsv").write_text("C falls\tBusiness\n")
    named: dict[str, Any] = {"text": "text", "label": "class", "labels": ("World", "Sports", "Business")}
    found = texts_of(described(tmp_path, header=("text", "class"), **named))
    assert found.classes == ("World", "Sports", "Business")
    assert [(item.text, item.label) for item in found.texts("train", 10, seed=0)] == [("A wins", 1), ("B rises", 2)]
    with pytest.raises(UserError, match=r"dev.tsv, row 1 holds 'Business' in column 'class'; expected one of `labels`: 'World'"):
        texts_of(described(tmp_path, header=("text", "class"), **named | {"labels": ("World", "Sports")})).texts(
            "test", 1, seed=0
        )


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_other_forms_of_files(tmp_path: Path, form: str) -> None:
    file = tmp_path / f"train.{form}"
    if form == "csv":
        file.write_text('text,label\n"one, two",0\nthree,1\n')
    elif form == "jsonl":
        file.write_text('{"text": "one, two", "label": 0}\n{"text": "three", "label": 1}\n')
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one, two", "three"], "label": [0, 1]}), file)
    found = texts_of(described(tmp_path, train_files=(file,), text="text", test_files=(tmp_path / "asked.jsonl",)))
    (tmp_path / "asked.jsonl").write_text('{"text": "asked", "label": 1}\n')
    assert [(item.text, item.label) for item in found.texts("train", 10, seed=0)] == [("one, two", 0), ("three", 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text": "review"},
            r"train.tsv, row 1 has no column 'review'; it has 'sentence', 'label'. Name the right one by `text`",
        ),
        ({"label": "class"}, r"has no column 'class'; .* by `label`, or the columns of a file .* by `header`"),
        ({"labels": ("no", "yes")}, r"row 1 holds '0' in column 'label'; expected one of `labels`: 'no', 'yes'"),
        ({"train_files": (Path("gone.tsv"),)}, r"data set 'mine': train_files: gone.tsv not found"),
        ({"header": ("sentence", "label", "id")}, r"expected 3 columns \(sentence, label, id\), found 2"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    dataset = described(tmp_path, test_files=(tmp_path / "asked.csv",), **changes)
    columns = dataset.header or (dataset.text, dataset.label)
    row = ["asked" if name == dataset.text else dataset.labels[0] if name == dataset.label else "" for name in columns]
    (tmp_path / "asked.csv").write_text("\n".join([*([] if dataset.header else [",".join(columns)]), ",".join(row)]) + "\n")
    with pytest.raises(UserError, match=message):
        texts_of(dataset).texts("train", 10, seed=0)


def test_an_empty_text_is_named(tmp_path: Path) -> None:
    dataset = described(tmp_path)
    with (tmp_path / "dev.tsv").open("a") as file:
        file.write(" \t0\n")
    with pytest.raises(UserError, match=r"dev.tsv, row 5 holds ' ' in column 'sentence'; expected a text to read"):
        texts_of(dataset).texts("test", 10, seed=0)


def test_the_content_of_files_enters_the_hash_and_their_place_does_not(tmp_path: Path) -> None:
    def inputs(dataset: ProbeSet) -> dict[str, str]:
        return probe_inputs(ProbesRecipe(datasets=("topic", "mine"), own_datasets=(dataset,)))

    first, elsewhere = described(tmp_path / "a"), described(tmp_path / "b")
    assert list(inputs(first)) == ["dataset mine"]
    assert inputs(first) == inputs(elsewhere)
    swapped = first.model_copy(update={"train_files": first.test_files, "test_files": first.train_files})
    assert inputs(swapped) != inputs(first)
    with (tmp_path / "b" / "dev.tsv").open("a") as file:
        file.write("more\t0\n")
    assert inputs(first) != inputs(elsewhere)
    assert probe_inputs(ProbesRecipe()) == {}


def test_procedural_sets_are_those_of_labelled_text() -> None:
    sets = labelled_sets(ProbesRecipe())
    assert sets["polarity"].classes == ("negative", "positive")
    assert sets["polarity"].texts("train", 20, seed=3) == labelled_texts("polarity", "train", 20, seed=3)


def test_published_sets_are_at_a_commit_that_needs_no_network() -> None:
    recipe = ProbesRecipe(datasets=("sst2", "ag_news"))
    assert probe_inputs(recipe) == {f"dataset {name}": dataset.revision for name, dataset in PUBLISHED.items()}
    assert [len(texts.classes) for texts in labelled_sets(recipe).values()] == [2, 4]


def test_files_take_the_place_of_a_published_set(tmp_path: Path) -> None:
    mine = described(tmp_path, name="sst2")
    recipe = ProbesRecipe(datasets=("sst2",), own_datasets=(mine,))
    assert len(labelled_sets(recipe)["sst2"].texts("train", 100, seed=0)) == 12
    assert probe_inputs(recipe)["dataset sst2"] != PUBLISHED["sst2"].revision


def on_the_hub(tmp_path: Path, **changes: Any) -> ProbeSet:
    """A set in the hub's form, in a local folder: what `datasets` reads is its own reader's work either way."""
    folder = tmp_path / "repository"
    folder.mkdir(exist_ok=True)
    for split, count in (("train", 6), ("validation", 3)):
        table = pyarrow.table(
            {"idx": range(count), "sentence": [f"{split} {i}" for i in range(count)], "label": [i % 2 for i in range(count)]}
        )
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    fields: dict[str, Any] = {
        "name": "mine", "hub": str(folder), "test_split": "validation", "text": "sentence", "labels": ("0", "1"),
    }  # fmt: skip
    return ProbeSet(**(fields | changes))


def test_rows_in_the_form_of_the_hub(tmp_path: Path) -> None:
    found = texts_of(on_the_hub(tmp_path))
    assert [(item.text, item.label) for item in found.texts("test", 10, seed=0)] == [
        ("validation 0", 0), ("validation 1", 1), ("validation 2", 0),
    ]  # fmt: skip
    assert len(found.texts("train", 10, seed=0)) == 6
    before = found.identity()
    (tmp_path / "repository" / "README.md").write_text("more")
    assert found.identity() != before


def test_a_split_or_column_that_the_hub_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data set 'mine': cannot read split 'dev' of .*repository: .*\. Check the name and the network"
    ):
        texts_of(on_the_hub(tmp_path, test_split="dev")).texts("test", 10, seed=0)
    with pytest.raises(UserError, match=r"split validation, row 1 has no column 'text'; it has 'label'"):
        texts_of(on_the_hub(tmp_path, text="text")).texts("test", 10, seed=0)


def test_a_branch_is_looked_up_once_and_read_at_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def dataset_info(self: object, name: str, revision: str | None) -> Any:
        asked.append((name, revision))
        return type("Info", (), {"sha": "c" * 40})

    def load_dataset(name: str, config: str | None, split: str, revision: str) -> datasets.Dataset:
        assert (name, config, revision) == ("owner/set", None, "c" * 40)
        return datasets.Dataset.from_dict({"text": [f"{split} text"], "label": [1]})

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = texts_of(ProbeSet(name="mine", hub="owner/set", labels=("0", "1")))
    assert found.identity() == "c" * 40
    assert [item.text for item in found.texts("train", 5, seed=0)] == ["train text"]
    assert asked == [("owner/set", None)]


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def dataset_info(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    with pytest.raises(
        UserError, match=r"'mine': cannot read revision 'main' of owner/set: ConnectionError: no route.* `own_datasets`"
    ):
        texts_of(ProbeSet(name="mine", hub="owner/set", labels=("0", "1"))).identity()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"datasets": ["sst_2"]}, "datasets: no data set 'sst_2'; did you mean 'sst2'?"),
        ({"datasets": ["imdb"]}, "datasets: no data set 'imdb'; there are topic, polarity, sst2, ag_news; describe others"),
        ({"datasets": ["topic", "topic"]}, "datasets: names a value twice"),
        ({"seeds": []}, "seeds: expected at least one value"),
        ({"regularisation": [0.0, 1.0]}, "regularisation: C is an inverse strength and has to be greater than zero"),
        ({"own_datasets": [{"name": "a", "hub": "x/y", "labels": [0, 1]}]}, "'a' is not used; name it in `datasets` as well"),
        ({"own_datasets": [{"name": "topic", "hub": "x/y", "labels": [0, 1]}]}, "'topic' is the name of a procedural set"),
        ({"own_datasets": [{"name": "a", "hub": "x/y", "labels": [0, 1], "lable": "b"}]}, "unknown key; did you mean 'label'?"),
        ({"own_datasets": [{"name": "a", "labels": [0, 1]}]}, "'a' takes either `hub`, or `train_files` and `test_files`"),
        ({"own_datasets": [{"name": "a", "labels": [0, 1], "train_files": ["b"]}]}, "needs both `train_files` and `test_files`"),
        (
            {"own_datasets": [{"name": "a", "labels": [0, 0], "hub": "x/y", "classes": ["z"], "header": ["text"]}]},
            "`header` belongs to files|`header` has no column 'label'|`labels` names a value twice|2 `labels` and 1 `classes`",
        ),
        (
            {"own_datasets": [{"name": "a", "labels": [0, 1], "train_files": ["b"], "test_files": ["c"], "revision": "main"}]},
            "`revision` belongs to a data set on the hub",
        ),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_used(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(ProbesRecipe, changes, "probes.yaml")
    for part in message.split("|"):
        assert part in str(caught.value)


def test_numbers_in_labels_are_read_as_text() -> None:
    assert ProbeSet(name="a", hub="x/y", labels=(0, 1)).labels == ("0", "1")  # type: ignore[arg-type]
