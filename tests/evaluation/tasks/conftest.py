"""Small folders of hand-made rows, laid out as the shipped tasks expect them, and a task of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_plasticity.config.load import check_config
from megatron_plasticity.config.task_files import TaskFile
from megatron_plasticity.evaluation.tasks.prepare import prepare_task
from tests.evaluation.tasks.rows import write_json_lines

Prepare = Callable[..., tuple[Path, dict[str, Any]]]

TRAIN = [{"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(20)]
TEST = [{"question": f"What is {n} plus one?", "answer": str(n + 1)} for n in range(5)]


def own_task(**changes: Any) -> dict[str, Any]:
    """The tree of a task file of one's own, which reads `train.jsonl` and `test.jsonl`."""
    rows = {
        "licence": "CC0",
        "answer_kind": "number",
        "prompt": "{{ question }}",
        "response": "Adding up. The answer is {{ answer }}.",
        "answer": "{{ answer }}",
    }
    tree = {
        "name": "sums",
        "description": "sums",
        "train": {"all": rows | {"files": {"paths": ["train.jsonl"]}}},
        "test_sets": {"some": rows | {"files": {"paths": ["test.jsonl"]}}},
    }
    return tree | changes


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the rows of `own_task`."""
    folder = tmp_path / "rows"
    write_json_lines(folder / "train.jsonl", TRAIN)
    write_json_lines(folder / "test.jsonl", TEST)
    return folder


@pytest.fixture
def prepare(data: Path, tmp_path: Path) -> Prepare:
    """Prepares a tree of a task file from `data` into `tasks`; further arguments are `prepare_task`'s."""

    def call(tree: dict[str, Any] | None = None, **arguments: Any) -> tuple[Path, dict[str, Any]]:
        task = check_config(TaskFile, own_task() if tree is None else tree, "sums.yaml")
        return prepare_task(task, arguments.pop("folder", data), tmp_path / "tasks", "sums.yaml", **arguments)

    return call


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    """`own_task` as a file."""
    path = tmp_path / "sums.yaml"
    path.write_text(yaml.safe_dump(own_task()), encoding="utf-8")
    return path
