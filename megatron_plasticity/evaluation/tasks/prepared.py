"""A prepared task: a folder with its examples and a manifest, which pins down every file.

train.parquet              training examples
test-<name>.parquet        one for each test set
manifest.json              sources, licences, counts, overlap, flags, SHA-256 of each file
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from megatron_plasticity.config.files import sha256_file
from megatron_plasticity.config.tasks import AnswerKind
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.tasks.task import Example, Reference, Task

if TYPE_CHECKING:
    import pyarrow

MANIFEST_FILE = "manifest.json"
TRAIN_FILE = "train.parquet"
FORMAT = 1


def test_set_file(name: str) -> str:
    """Name of the file of a test set."""
    return f"test-{name}.parquet"


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples in their order."""
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([_as_row(example) for example in examples], _schema())
    pyarrow.parquet.write_table(table, path, compression="zstd")


def _schema() -> pyarrow.Schema:
    import pyarrow  # 50 MB to install, which training on procedural problems does without

    text = pyarrow.string()
    columns = ("id", "prompt", "response", "answer_kind", "answer", "program")
    return pyarrow.schema([*((name, text) for name in columns), ("choices", pyarrow.list_(text)), ("group", text)])


def content_sha256(examples: Sequence[Example]) -> str:
    """SHA-256 of the examples themselves, whatever wrote the file they are in."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(_as_row(example), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def identity_of(files: dict[str, Any]) -> str:
    """One hash for all that a run can see of a task: names and contents of the files that the manifest lists."""
    lines = [f"{entry['content_sha256']}  {name}\n" for name, entry in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared task, after checking that every file is there with the size recorded. Raises UserError."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise UserError(f"{folder}: not a prepared task (it has no {MANIFEST_FILE}). {_ADVICE}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{path}: format {manifest['format']}; this version reads format {FORMAT}. {_ADVICE}")
        files = manifest["files"]
        intact = manifest["sha256"] == identity_of(files) and all(
            (folder / name).is_file() and (folder / name).stat().st_size == entry["bytes"] for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged: {type(error).__name__}: {error}. {_ADVICE}") from error
    if not intact:
        raise UserError(f"{folder}: damaged: its files are not those that the manifest lists. {_ADVICE}")
    return manifest


_ADVICE = "Delete the folder and run `megatron-plasticity tasks prepare` again."


@dataclass(frozen=True)
class PreparedTask:
    """The task in a prepared folder."""

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Raises UserError when the folder is incomplete."""
        return read_manifest(self.folder)

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def description(self) -> str:
        return self.manifest["description"]

    @property
    def identity(self) -> str:
        return self.manifest["sha256"]

    @property
    def answer_kinds(self) -> frozenset[AnswerKind]:
        import pyarrow.parquet

        kinds: set[AnswerKind] = set()
        for name in self.manifest["files"]:
            kinds.update(
                pyarrow.parquet.read_table(self.folder / name, columns=["answer_kind"])["answer_kind"].unique().to_pylist()
            )
        return frozenset(kinds)

    def train(self, count: int | None, seed: int) -> list[Example]:
        """`count` training examples; a smaller count is the beginning of a larger one. Raises UserError if there are fewer."""
        return _drawn(self._examples(TRAIN_FILE), count, f"{seed}/train", f"task {self.name!r}", "train_examples")

    def test_sets(self, count: int | None, seed: int) -> dict[str, list[Example]]:
        """`count` questions of each test set; a smaller count is the beginning of a larger one. A test set that tasks share gives
        each of them the same questions."""
        return {
            name: _drawn(
                self._examples(test_set_file(name)),
                count,
                f"{seed}/{name}",
                f"test set {name!r} of task {self.name!r}",
                "test_examples",
            )
            for name in self.manifest["test_sets"]
        }

    def _examples(self, name: str) -> list[Example]:
        import pyarrow.parquet

        path = self.folder / name
        if sha256_file(path) != self.manifest["files"][name]["sha256"]:
            raise UserError(f"{path}: damaged: its sha256 is not the manifest's. {_ADVICE}")
        return [_from_row(row) for row in pyarrow.parquet.read_table(path).to_pylist()]


def overlap_warning(task: Task) -> str | None:
    """What to know before training on a task: how many of its test questions are in its training rows. None if none are."""
    if not isinstance(task, PreparedTask):
        return None  # procedural tasks share no problem between their sides
    found = []
    for name, by_kind in task.manifest["overlap"].items():
        size = task.manifest["test_sets"][name]["examples"]
        for kind, said in (
            ("exact", "are also asked in training"),
            ("ngram", "have most of their words in common with a training row"),
        ):
            number = 0 if by_kind[kind]["removed"] else by_kind[kind]["test_questions"]
            if number:
                found.append(f"{number:,} of {size:,} questions of {name} ({number / size:.1%}) {said}")
    return f"task {task.name!r}: {'; '.join(found)}; see {task.folder / MANIFEST_FILE}" if found else None


def _drawn(examples: list[Example], count: int | None, seed: str, whose: str, key: str) -> list[Example]:
    if count is not None and count > len(examples):
        raise UserError(
            f"{whose} has {len(examples):,} examples: lower {key} to at most {len(examples)}, or set it to null for all"
        )
    Random(seed).shuffle(examples)
    return examples[:count]


def _as_row(example: Example) -> dict[str, Any]:
    return {
        "id": example.id,
        "prompt": example.prompt,
        "response": example.response,
        "answer_kind": example.reference.kind,
        "answer": example.reference.answer,
        "program": example.reference.program,
        "choices": list(example.choices),
        "group": example.group,
    }


def _from_row(row: dict[str, Any]) -> Example:
    reference = Reference(row["answer_kind"], row["answer"], row["program"])
    return Example(row["id"], row["prompt"], row["response"], reference, tuple(row["choices"]), row["group"])
