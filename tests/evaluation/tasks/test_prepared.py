from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.tasks.prepared import PreparedTask
from megatron_plasticity.evaluation.tasks.registry import get_task
from tests.evaluation.tasks.conftest import Prepare


def test_draws(prepare: Prepare) -> None:
    task = PreparedTask(prepare()[0])
    everything = task.train(None, 1)
    assert len(everything) == 20
    assert len({example.id for example in everything}) == 20
    assert task.train(7, 1) == everything[:7], "a smaller count is the beginning of a larger one"
    assert task.train(7, 2) != everything[:7]
    assert task.test_sets(2, 1)["some"] == task.test_sets(None, 1)["some"][:2]


def test_too_many_are_refused(prepare: Prepare) -> None:
    task = PreparedTask(prepare()[0])
    with pytest.raises(UserError, match="task 'sums' has 20 examples: lower train_examples to at most 20, or set it to null"):
        task.train(21, 0)
    with pytest.raises(UserError, match="test set 'some' of task 'sums' has 5 examples: lower test_examples"):
        task.test_sets(6, 0)


def test_a_damaged_folder_is_refused(prepare: Prepare) -> None:
    folder, _ = prepare()
    train = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(train[:-1] + b"?")
    with pytest.raises(UserError, match=r"train\.parquet: damaged"):
        PreparedTask(folder).train(1, 0)
    (folder / "train.parquet").write_bytes(train + b"?")
    with pytest.raises(UserError, match="its files are not those"):
        _ = PreparedTask(folder).identity


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "damaged: JSONDecodeError"), ('{"format": 99}', "format 99; this version reads"), ("[]", "damaged: TypeError")],
)
def test_a_damaged_manifest_is_refused(prepare: Prepare, content: str, message: str) -> None:
    folder, _ = prepare()
    (folder / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        _ = PreparedTask(folder).name


def test_a_manifest_whose_hash_is_not_its_files(prepare: Prepare) -> None:
    folder, manifest = prepare()
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": "0" * 64}), encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        _ = PreparedTask(folder).identity


def test_get_task(prepare: Prepare, tmp_path: Path) -> None:
    folder, manifest = prepare()
    task = get_task(TaskConfig(name="sums", folder=tmp_path / "tasks"))
    assert (task.name, task.identity) == ("sums", manifest["sha256"])
    assert get_task(TaskConfig(name=folder.name, folder=tmp_path / "tasks")).identity == manifest["sha256"]
    assert get_task(TaskConfig(name="steps")).identity is None


def test_a_shipped_task_that_is_not_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"run `megatron-plasticity tasks prepare gsm8k`$"):
        get_task(TaskConfig(name="gsm8k"))
    with pytest.raises(UserError, match=r"run `megatron-plasticity tasks prepare gsm8k --output elsewhere`$"):
        get_task(TaskConfig(name="gsm8k", folder=Path("elsewhere")))


def test_an_unknown_task_names_the_nearest(prepare: Prepare, tmp_path: Path) -> None:
    prepare()
    for wrong, near in (("aritmetic", "'arithmetic'"), ("gms8k", "'gsm8k'"), ("sum", "'sums'")):
        with pytest.raises(UserError, match=f"did you mean {near}"):
            get_task(TaskConfig(name=wrong, folder=tmp_path / "tasks"))
    with pytest.raises(UserError, match="unknown task 'zzz': the tasks are arithmetic, algebra"):
        get_task(TaskConfig(name="zzz"))


def test_a_folder_that_is_no_task(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="not a prepared task"):
        get_task(TaskConfig(name="mine", folder=tmp_path))
