"""Tasks as a person reads them: the list of all, what a preparation found, and examples as a model sees them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_plasticity.config.task_files import Rows, TaskFile
from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.tasks.catalogue import load_task_file, shipped_tasks, suites
from megatron_plasticity.evaluation.tasks.prepared import PreparedTask, overlap_warning
from megatron_plasticity.evaluation.tasks.procedural import PROCEDURAL_TASKS
from megatron_plasticity.evaluation.tasks.registry import get_task
from megatron_plasticity.evaluation.tasks.task import Example

_INDENT = "    "


def list_page(folder: Path) -> Iterator[str]:
    """Lines about all tasks: the procedural, the shipped by suite, and those of the user that are prepared in `folder`."""
    files = shipped_tasks()
    in_suites = {name for names in suites().values() for name in names}
    further = {"further tasks": [name for name in files if name not in in_suites]}
    for suite, names in ({f"suite {suite}": names for suite, names in suites().items()} | further).items():
        yield suite
        for name in names:
            yield from _task_lines(load_task_file(files[name]), folder)
    own = [path for path in sorted(folder.glob("*/")) if path.is_symlink() and path.name not in files]
    if own:
        yield "your own"
        for path in own:
            yield f"  {path.name}{_description(PreparedTask(path))}"
            yield from _prepared_lines(PreparedTask(path))
    yield "procedural, always there"
    for name, task in PROCEDURAL_TASKS.items():
        yield f"  {name}: {task.description}"


def _task_lines(task: TaskFile, folder: Path) -> Iterator[str]:
    yield f"  {task.name}: {task.description}"
    for side, parts in (("train", task.train), ("test", task.test_sets)):
        seen: dict[str, None] = {}
        for name, rows in parts.items():
            seen[f"{name + ': ' if side == 'test' else ''}{_source(rows)} ({rows.licence})"] = None
        yield from (f"{_INDENT}{side:5} {line}" for line in seen)
    prepared = folder / task.name
    if prepared.is_dir():
        yield from _prepared_lines(PreparedTask(prepared))
    else:
        yield f"{_INDENT}not prepared"


def _source(rows: Rows) -> str:
    if rows.hub is not None:
        return " ".join([rows.hub.name, *(["/".join(rows.hub.configs)] if len(rows.hub.configs) == 1 else []), rows.hub.split])
    assert rows.files is not None
    return ", ".join(rows.files.paths)


def _description(task: PreparedTask) -> str:
    try:
        return f": {task.description}"
    except UserError:  # its lines say why
        return ""


def _prepared_lines(task: PreparedTask) -> Iterator[str]:
    try:
        manifest = task.manifest
    except UserError as error:
        yield f"{_INDENT}! {error}"
        return
    tests = "; ".join(f"{name} {part['examples']:,}" for name, part in manifest["test_sets"].items())
    yield f"{_INDENT}prepared: {manifest['train']['examples']:,} training examples; {tests}"
    yield from (f"{_INDENT}! {name}: {part['flag']}" for name, part in manifest["test_sets"].items() if "flag" in part)


def preparation_page(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """What was prepared, what was left out on the way, and what overlaps."""
    train = manifest["train"]
    yield f"{manifest['name']}: {train['examples']:,} training examples"
    for name, part in train["parts"].items():
        yield f"  {name}: {part['examples']:,} of {part['rows_read']:,} rows{_left_out(part)}"
    for key, said in (
        ("duplicates_dropped", "repeated questions dropped"),
        ("removed_by_decontamination", "removed for overlap"),
    ):
        if train[key]:
            yield f"  {train[key]:,} {said}"
    for name, part in manifest["test_sets"].items():
        flag = f", {part['flag']}" if "flag" in part else ""
        yield f"test set {name}: {part['examples']:,} of {part['rows_read']:,} rows{_left_out(part)}{flag}"
        for kind, said in (("exact", "asked in training, word for word"), ("ngram", "asked in training, for the most part")):
            found = manifest["overlap"][name][kind]
            removed = "; they were removed" if found["removed"] and found["train_rows"] else ""
            yield (
                f"  {said}: {found['test_questions']:,} ({found['share']:.1%}), by {found['train_rows']:,} training rows{removed}"
            )
    yield from (f"warning: {warning}" for warning in manifest["warnings"])
    yield str(folder)


def _left_out(part: dict[str, Any]) -> str:
    parts = [f"{part['on_the_other_side']:,} on the other side"] if "on_the_other_side" in part else []
    parts += [f"{number:,} left out by “{name}”" for name, number in part.get("left_out", {}).items()]
    return f" ({', '.join(parts)})" if parts else ""


def examples_page(config: TaskConfig, side: str, number: int, template: str) -> Iterator[str]:
    """The first `number` examples of a draw from one side of a task, in the template in which a model sees them.

    Raises UserError if the task is unknown or not prepared.
    """
    if number < 1:
        raise UserError(f"--number {number}: expected at least 1")
    task = get_task(config)
    yield f"{task.name}: {task.description}"
    if isinstance(task, PreparedTask):
        yield from _prepared_lines(task)
        if (warning := overlap_warning(task)) is not None:
            yield f"warning: {warning}"
    sets = {"train": task.train(None, config.seed)} if side == "train" else task.test_sets(None, config.seed)
    for name, examples in sets.items():
        yield f"\n{name}: {min(number, len(examples))} of {len(examples):,} examples"
        for example in examples[:number]:
            yield from _example_lines(example, template)


def _example_lines(example: Example, template: str) -> Iterator[str]:
    group = f", {example.group}" if example.group else ""
    yield f"\n── {example.id}{group}"
    shown = template.replace("{prompt}", example.prompt) + example.response
    yield textwrap.indent(shown, "  ", lambda _: True)
    wanted = f"f of the answer gives {example.reference.answer}" if example.reference.program else example.reference.answer
    yield f"── graded as {example.reference.kind}: {wanted}"
