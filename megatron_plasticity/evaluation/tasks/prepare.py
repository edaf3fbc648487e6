"""Prepare a task: rows in, a folder of examples with a manifest out, all or nothing.

The folder is `<output>/<name>-<hash>` with the hash of the examples, so that other rows make another folder; `<output>/<name>`
leads to the one that was prepared last.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_plasticity.config.files import atomic_folder, point_link_at, sha256_file, write_json_atomic
from megatron_plasticity.config.hashing import HASH_DIGITS
from megatron_plasticity.config.task_files import Decontamination, TaskFile
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.grading import Grader
from megatron_plasticity.evaluation.tasks.checks import check_responses, distinct_questions, question_flag
from megatron_plasticity.evaluation.tasks.origins import Origin
from megatron_plasticity.evaluation.tasks.overlap import Overlap, find_overlap, normalised
from megatron_plasticity.evaluation.tasks.prepared import (
    FORMAT,
    MANIFEST_FILE,
    TRAIN_FILE,
    content_sha256,
    identity_of,
    read_manifest,
    test_set_file,
    write_examples,
)
from megatron_plasticity.evaluation.tasks.recipes import Counts, Made, Recipe, recipes

_log = logging.getLogger(__name__)
_TICKS = 256
_SHOWN = 5


class Progress(Protocol):
    """What a preparation tells about its advance."""

    def update(self, done: float, total: float, unit: str, **info: float | str) -> None: ...


@dataclass
class _Set:
    """The examples of one place in the task file."""

    where: str
    origin: Origin
    licence: str
    counts: Counts
    made: list[Made]
    warnings: list[str] = field(default_factory=list)


def find_origins(task: TaskFile, folder: Path | None, file: str) -> dict[str, tuple[Recipe, Origin]]:
    """Where all rows of a task are, by their place in its file, which messages call `file`.

    Raises UserError when some are nowhere or the file is wrong, before any is read.
    """
    return {where: (recipe, recipe.origin(folder)) for where, recipe in recipes(task, file).items()}


def prepare_task(
    task: TaskFile, folder: Path | None, output: Path, file: str, strict: bool = False, progress: Progress | None = None
) -> tuple[Path, dict[str, Any]]:
    """Prepare `task` from what is below `folder`, or from the hub without one; returns the task's folder and its manifest.

    With `strict`, whatever the manifest would warn of is an error. Raises UserError when rows are missing or do not fit the file;
    nothing is left half-written.
    """
    origins = find_origins(task, folder, file)
    sets = {where: _read(task, where, *origins[where], folder, progress) for where in origins}
    parts = {name: sets[f"train.{name}"] for name in task.train}
    test_sets = {name: sets[f"test_sets.{name}"] for name in task.test_sets}
    train, counts, overlap = _training_rows(task, parts, test_sets, progress)
    if not train:
        raise UserError(f"{file}: no training row is left: {counts}")
    with Grader() as grader:
        described = {where: _set_described(made, grader) for where, made in sets.items()}
    tests_described = {name: described[f"test_sets.{name}"] | _questions(test_sets[name]) for name in test_sets}
    warnings = [warning for made in sets.values() for warning in made.warnings]
    if strict and warnings:
        raise UserError(f"{file}: not prepared, since --strict makes errors of warnings\n  " + "\n  ".join(warnings))
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": task.name,
        "description": task.description,
        "train": {"examples": len(train), **counts, "parts": {name: described[f"train.{name}"] for name in parts}},
        "test_sets": tests_described,
        "overlap": overlap,
        "warnings": warnings,
        "task_file": task.model_dump(mode="json"),
    }
    examples = {TRAIN_FILE: [made.example for made in train]}
    examples |= {test_set_file(name): [made.example for made in test_set.made] for name, test_set in test_sets.items()}
    try:
        return _write(task.name, output, examples, manifest)
    except OSError as error:
        raise UserError(f"{output}: cannot write the task: {error}; nothing was left half-written") from error


def _training_rows(
    task: TaskFile, parts: dict[str, _Set], test_sets: dict[str, _Set], progress: Progress | None
) -> tuple[list[Made], dict[str, int], dict[str, Any]]:
    """The training rows that stay, counts of those that do not, and the overlap by test set. `parts` lose what does not stay."""
    train = [made for part in parts.values() for made in part.made]
    read = len(train)
    if task.drop_duplicates:
        first = {normalised(made.example.prompt): made for made in reversed(train)}
        train = [made for made in train if first[normalised(made.example.prompt)] is made]
    distinct = len(train)
    overlaps = _overlaps(train, test_sets, progress)
    gone = _training_rows_to_remove(overlaps, task.decontamination)
    described = {name: _described(found, train, test_sets[name], task.decontamination) for name, found in overlaps.items()}
    train = [made for number, made in enumerate(train) if number not in gone]
    kept_ids = {made.example.id for made in train}
    for part in parts.values():
        part.made = [made for made in part.made if made.example.id in kept_ids]
    return train, {"duplicates_dropped": read - distinct, "removed_by_decontamination": len(gone)}, described


# --- reading ---


def _read(task: TaskFile, where: str, recipe: Recipe, origin: Origin, folder: Path | None, progress: Progress | None) -> _Set:
    counts = Counts()
    total = origin.total or origin.layout.expected_rows
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None and done % _TICKS == 0:
            progress.update(done, max(done, total or done), "rows", reading=where)

    # Without the name of the task: a test set that tasks share has the same questions in each.
    name = where.removeprefix("test_sets.").replace("train.", "train/")
    made = list(recipe.examples(origin, folder, name, counts, tick))
    if not made:
        raise UserError(f"{where}: no row is left of {counts.read:,}: {counts.as_json()}")
    _check_ids(where, made)
    return _Set(where, origin, task.rows[where].licence, counts, made)


def _check_ids(where: str, rows: Sequence[Made]) -> None:
    seen: set[str] = set()
    for made in rows:
        if made.example.id in seen:
            raise UserError(f"{where}.id: {made.example.id!r} names two rows; ids are unique, or left out")
        seen.add(made.example.id)


# --- overlap ---


def _overlaps(train: Sequence[Made], test_sets: dict[str, _Set], progress: Progress | None) -> dict[str, Overlap]:
    texts = [made.compared for made in train]
    done = 0

    def tick(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress.update(done, len(texts) * len(test_sets), "rows compared")

    return {name: find_overlap(texts, [made.compared for made in of.made], tick) for name, of in test_sets.items()}


def _training_rows_to_remove(overlaps: dict[str, Overlap], rule: Decontamination) -> set[int]:
    gone: set[int] = set()
    for found in overlaps.values():
        gone |= {train for _, train in found.exact} if rule.exact == "remove" else set()
        gone |= {train for _, train in found.ngram} if rule.ngram == "remove" else set()
    return gone


def _described(found: Overlap, train: Sequence[Made], test: _Set, rule: Decontamination) -> dict[str, Any]:
    """The overlap with one test set. Of training rows that stay, one that asks a question exactly makes all others needless to
    count for it; those that are removed as exact do not count for other questions either."""
    if rule.exact == "remove":
        gone = {row for _, row in found.exact}
        further = [pair for pair in found.ngram if pair[1] not in gone]
    else:
        asked = {question for question, _ in found.exact}
        further = [pair for pair in found.ngram if pair[0] not in asked]
    described = {}
    for kind, pairs, removed in (("exact", found.exact, rule.exact), ("ngram", further, rule.ngram)):
        questions = {question for question, _ in pairs}
        described[kind] = {
            "test_questions": len(questions),
            "share": len(questions) / len(test.made),
            "train_rows": len({row for _, row in pairs}),
            "removed": removed == "remove",
            "first": [[test.made[question].example.id, train[row].example.id] for question, row in pairs[:_SHOWN]],
        }
    return described


# --- the manifest ---


def _set_described(made: _Set, grader: Grader) -> dict[str, Any]:
    """What the manifest says of one set; its warnings are gathered in passing."""
    examples = [each.example for each in made.made]
    check = check_responses(examples, grader)
    if (complaint := check.complaint(made.where)) is not None:
        made.warnings.append(complaint)
    for what, wanted, found in (
        ("rows", made.origin.layout.expected_rows, made.counts.read),
        ("examples", made.origin.layout.expected_examples, len(examples)),
    ):
        if wanted is not None and wanted != found:
            made.warnings.append(f"{made.where}: {found:,} {what}, the task file expects {wanted:,}")
    return {
        "examples": len(examples),
        **made.origin.described,
        "licence": made.licence,
        **made.counts.as_json(),
        "own_answers": check.as_json(),
    }


def _questions(test: _Set) -> dict[str, Any]:
    examples = [made.example for made in test.made]
    distinct = distinct_questions(examples)
    flag = question_flag(len(examples), distinct)
    if flag is not None:
        test.warnings.append(f"{test.where}: {flag}")
    groups = sorted({example.group for example in examples} - {""})
    by_group = {"groups": {group: sum(example.group == group for example in examples) for group in groups}} if groups else {}
    return {"distinct_questions": distinct, **by_group, **({"flag": flag} if flag else {})}


# --- writing ---


def _write(name: str, output: Path, examples: dict[str, list[Any]], manifest: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    contents = {file: {"examples": len(rows), "content_sha256": content_sha256(rows)} for file, rows in examples.items()}
    manifest["sha256"] = identity_of(contents)
    folder = output / f"{name}-{manifest['sha256'][:HASH_DIGITS]}"
    with atomic_folder(folder) as building:
        for file, rows in examples.items():
            write_examples(building / file, rows)
            path = building / file
            contents[file] |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        manifest["files"] = contents
        write_json_atomic(building / MANIFEST_FILE, manifest)
    if not point_link_at(folder, name):
        _log.warning("%s is in the way of a link to %s; ask for the task by its full folder", output / name, folder.name)
    return folder, read_manifest(folder)
