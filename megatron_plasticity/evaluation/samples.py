"""The table of every response of an evaluation, `samples.parquet`: written, read, and shown."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_plasticity.errors import UserError

SAMPLES_FILE = "samples.parquet"

SCHEMA = pyarrow.schema(
    [
        ("task", pyarrow.string()),
        ("test_set", pyarrow.string()),
        ("group", pyarrow.string()),
        ("question", pyarrow.string()),
        ("pass", pyarrow.string()),  # greedy or sampled
        ("sample", pyarrow.int32()),
        ("prompt", pyarrow.string()),
        ("text", pyarrow.string()),
        ("tokens", pyarrow.int32()),
        ("finish", pyarrow.string()),  # end_of_text, length, stop or prompt_too_long
        ("extracted", pyarrow.string()),
        ("answer", pyarrow.string()),
        ("correct", pyarrow.bool_()),
        ("correct_by_other_rules", pyarrow.bool_()),
        ("reward", pyarrow.float64()),
    ]
)


def write_samples(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows, all or nothing."""
    put_table(path, pyarrow.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA))


def put_table(path: Path, table: pyarrow.Table) -> None:
    """Write a Parquet file, all or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_samples(folder: Path, number: int | None = None) -> list[dict[str, Any]]:
    """Rows of an evaluation's folder, in their order. With `number`, of so many questions of each test set, spread evenly over
    it. Raises UserError if the table is missing or damaged."""
    path = folder / SAMPLES_FILE
    try:
        rows = pyarrow.parquet.read_table(path, schema=SCHEMA).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot read the table of samples: {error}") from error
    if number is None:
        return rows
    questions: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        of_set = questions.setdefault((row["task"], row["test_set"]), [])
        if not of_set or of_set[-1] != row["question"]:
            of_set.append(row["question"])
    chosen = {(*test_set, name) for test_set, names in questions.items() for name in evenly(names, number)}
    return [row for row in rows if (row["task"], row["test_set"], row["question"]) in chosen]


def evenly(names: Sequence[str], number: int) -> list[str]:
    """`number` of the names, or all if there are not as many, spread over them."""
    count = min(number, len(names))
    return [names[place * len(names) // count] for place in range(count)]


def page(rows: Sequence[Mapping[str, Any]], width: int = 100) -> Iterator[str]:
    """Lines that show samples to a person: each question once, then its answers with their verdicts."""
    question = None
    for row in rows:
        here = (row["task"], row["test_set"], row["question"])
        if here != question:
            question = here
            group = f", {row['group']}" if row["group"] else ""
            yield f"━━ {row['task']} · {row['test_set']}{group} · {row['question']}"
            yield from _wrapped(row["prompt"], width, "   ")
            yield f"   expected: {row['answer']}"
        verdict = "✓" if row["correct"] else "✗"
        other = "" if row["correct_by_other_rules"] in (None, row["correct"]) else " (the other rules disagree)"
        reward = "" if row["reward"] is None else f", reward {row['reward']:.3g}"
        which = "greedy" if row["pass"] == "greedy" else f"sample {row['sample'] + 1}"
        answer = "no answer found" if row["extracted"] is None else f"answer {row['extracted']!r}"
        yield f" {verdict} {which}: {answer}{other}; {row['tokens']} tokens, {_ENDS[row['finish']]}{reward}"
        yield from _wrapped(row["text"].strip(), width, "     │ ")


_ENDS = {
    "end_of_text": "ended by itself",
    "length": "cut at its longest",
    "stop": "ended at a stop text",
    "prompt_too_long": "not asked, its prompt is too long",
}


def _wrapped(text: str, width: int, margin: str) -> Iterator[str]:
    printable = "".join(c if c.isprintable() or c == "\n" else "�" for c in text)  # a model may write terminal codes
    for line in printable.splitlines():
        yield from textwrap.wrap(line, width, initial_indent=margin, subsequent_indent=margin) or [margin.rstrip()]
