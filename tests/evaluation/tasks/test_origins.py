"""The hub, as far as it can be had without one: which commit is asked for, and what is read of a data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_plasticity.config.task_files import Rows
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.tasks.origins import find_origin
from tests.evaluation.tasks.rows import HUB, write_hub

NAME = "simplescaling/data_ablation_full59K"
COMMIT = "c0ffee" * 6 + "cafe"


def rows_of(name: str, **hub: Any) -> Rows:
    return Rows.model_validate({"hub": {"name": name} | hub, "licence": "x", "answer_kind": "text", "prompt": "x", "answer": "x"})


@pytest.fixture
def repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Local repositories, and a cache of their own."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_hub(tmp_path, [NAME, "ehovy/race"])
    return tmp_path


@pytest.fixture
def hub(repositories: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Lets names on the hub lead to the local repositories; returns what is asked for, with the revision."""
    import datasets
    import huggingface_hub

    asked: list[tuple[str, str | None]] = []
    real: Callable[..., Any] = datasets.load_dataset_builder

    def dataset_info(_: object, name: str, revision: str | None = None) -> SimpleNamespace:
        asked.append((name, revision))
        return SimpleNamespace(sha=COMMIT)

    def load_dataset_builder(name: str, config: str | None, revision: str | None = None) -> Any:
        asked.append((name, revision))
        return real(str(repositories / name), config)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    return asked


def test_the_hub_is_read_at_one_commit(hub: list[tuple[str, str | None]]) -> None:
    origin = find_origin(rows_of(NAME, revision="main"), "train.all", None)
    assert origin.described["commit"] == COMMIT
    assert hub == [(NAME, "main"), (NAME, COMMIT)]
    assert [row["question"] for row in origin.read(None)] == [row["question"] for row in HUB[NAME]["default/train"]]


def test_a_commit_needs_no_asking(hub: list[tuple[str, str | None]]) -> None:
    find_origin(rows_of(NAME, revision=COMMIT), "train.all", None)
    assert hub == [(NAME, COMMIT)]


def test_only_columns_that_are_used_are_read(repositories: Path) -> None:
    origin = find_origin(rows_of(NAME), "train.all", repositories)
    assert list(next(iter(origin.read(frozenset({"question", "no column"}))))) == ["question"]
    assert "thinking_trajectories" in next(iter(origin.read(None)))
    assert origin.described["commit"] == "a local folder"


def test_several_splits_are_read_one_after_the_other(repositories: Path) -> None:
    origin = find_origin(rows_of("ehovy/race", configs=["all"], split="train+validation"), "train.all", repositories)
    assert [row["answer"] for row in origin.read(None)] == ["B", "C"]


@pytest.mark.parametrize(
    ("hub_rows", "message"),
    [
        ({"configs": ["none"]}, "train.all.hub: cannot read .*config 'none'"),
        ({"split": "tset"}, "train.all.hub: cannot read .*'tset'"),
    ],
)
def test_a_configuration_or_split_that_is_not_there(repositories: Path, hub_rows: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(find_origin(rows_of("ehovy/race", **hub_rows), "train.all", repositories).read(None))
