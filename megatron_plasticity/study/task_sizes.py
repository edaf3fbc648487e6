"""How many examples a task has, as far as that can be known: as many as are asked for, and no more than there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_plasticity.config.task_files import Rows
from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.tasks.catalogue import load_task_file, shipped_tasks
from megatron_plasticity.evaluation.tasks.prepared import TRAIN_FILE, read_manifest
from megatron_plasticity.evaluation.tasks.procedural import PROCEDURAL_TASKS


@dataclass(frozen=True)
class TaskSize:
    """Examples of a task that a study uses."""

    train: int | None
    """Training examples; None where it is not known."""
    questions: int | None
    """Questions of all test sets together."""


def task_size(task: TaskConfig, here: bool = True) -> TaskSize:
    """The size of a task as it is prepared on this machine; else, or if not `here`, as its file says that its origin has.

    The latter is an upper bound: examples without an answer are left out when a task is prepared.
    """
    if task.name in PROCEDURAL_TASKS:
        procedural = PROCEDURAL_TASKS[task.name]
        # Counting all that there are means drawing them all: only where all are wanted.
        return TaskSize(task.train_examples or procedural.size("train"), task.test_examples or procedural.size("test"))
    if here and (task.folder / task.name).is_dir():
        try:
            files = read_manifest(task.folder / task.name)["files"]
        except UserError:
            return TaskSize(task.train_examples, None)
        train = files.get(TRAIN_FILE, {}).get("examples")
        tests = [_at_most(task.test_examples, entry["examples"]) for name, entry in files.items() if name != TRAIN_FILE]
        return TaskSize(_at_most(task.train_examples, train), _sum(tests))
    if task.name not in shipped_tasks():
        return TaskSize(task.train_examples, None)
    file = load_task_file(shipped_tasks()[task.name])
    train = _sum([_declared(rows) for rows in file.train.values()])
    return TaskSize(_at_most(task.train_examples, train), _questions(file.test_sets, task.test_examples))


def _questions(test_sets: Mapping[str, Rows], asked: int | None) -> int | None:
    return _sum([_at_most(asked, _declared(rows)) for rows in test_sets.values()])


def _declared(rows: Rows) -> int | None:
    for layout in (rows.hub, rows.files):
        if layout is not None and (count := layout.expected_examples or layout.expected_rows) is not None:
            return count
    return None


def _at_most(asked: int | None, there: int | None) -> int | None:
    known = [count for count in (asked, there) if count is not None]
    return min(known, default=None)


def _sum(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None
