"""Rows of table files, whatever their form: each row as a mapping from column to value."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from megatron_plasticity.errors import UserError

_COMPRESSIONS = (".gz", ".zst", ".zstd")
KEY = "key"
"""Column with the key of a row, where a file is an object whose values are the rows."""
VALUE = "value"
"""Column of a row that is no object itself."""


def table_rows(path: Path, header: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of one file, in their order. `header` names the columns of a .csv or .tsv that does not do it itself.

    Raises UserError when the file is missing, damaged or of an unknown form.
    """
    import pyarrow.parquet  # 50 MB to install, which a machine that only trains does without

    name = _inner_name(path)
    suffix = Path(name).suffix.lower()
    try:
        if suffix == ".parquet":
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
                yield from batch.to_pylist()
            return
        with _opened(path) as file:
            match suffix:
                case ".jsonl" | ".ndjson":
                    yield from _json_lines(file, path)
                case ".json":
                    yield from _json_rows(file, path)
                case ".csv" | ".tsv":
                    yield from _separated(file, path, suffix, header)
                case _:
                    raise UserError(f"{path}: cannot tell the form by the ending; expected .jsonl, .json, .csv, .tsv or .parquet")
    except (OSError, EOFError, UnicodeDecodeError, zipfile.BadZipFile, pyarrow.ArrowException, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _inner_name(path: Path) -> str:
    """Name of the file without what compresses it."""
    if path.suffix.lower() in _COMPRESSIONS:
        return path.stem
    if path.suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                members = [name for name in archive.namelist() if not name.endswith("/")]
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        if len(members) != 1:
            raise UserError(f"{path}: expected one file in the archive, found {len(members)}; unpack it and name the files")
        return members[0]
    return path.name


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive, archive.open(_inner_name(path)) as file:
            yield file
        return
    import pyarrow

    with pyarrow.input_stream(str(path), compression="detect") as stream:  # .gz and .zst by their endings
        yield cast(IO[bytes], io.BufferedReader(cast(Any, stream), 1 << 20))


def _json_lines(file: IO[bytes], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not one JSON object a line: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected an object, found a {type(row).__name__}")
        yield row


def _json_rows(file: IO[bytes], path: Path) -> Iterator[dict[str, Any]]:
    """Of a list, of an object whose values are the rows, or of one object a line."""
    content = file.read()
    try:
        whole = json.loads(content)
    except ValueError:
        yield from _json_lines(io.BytesIO(content), path)
        return
    pairs = whole.items() if isinstance(whole, dict) else enumerate(whole) if isinstance(whole, list) else None
    if pairs is None:
        raise UserError(f"{path}: expected a list of rows or an object of rows, found a {type(whole).__name__}")
    for key, value in pairs:
        row = value if isinstance(value, dict) else {VALUE: value}
        yield {KEY: key, **row} if isinstance(whole, dict) else row


def _separated(file: IO[bytes], path: Path, suffix: str, header: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    # In .tsv files as data sets have them a quotation mark is a letter like any other.
    csv.field_size_limit(1 << 27)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    lines = csv.reader(text) if suffix == ".csv" else csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    names = list(header) if header is not None else next(lines, [])
    for row in lines:
        if not row:
            continue
        if len(row) != len(names):
            raise UserError(
                f"{path}, line {lines.line_num}: expected {len(names)} columns ({', '.join(names)}), found {len(row)}; `header` "
                "names the columns of a file that does not do it itself"
            )
        yield dict(zip(names, row, strict=True))
