from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_plasticity.data.tables import table_rows
from megatron_plasticity.errors import UserError

ROWS = [{"a": 1, "b": "x\ty"}, {"a": 2, "b": "é"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path: Path) -> None:
    """`ROWS` in the form that the name asks for."""
    match path.name:
        case "list.json":
            path.write_text(json.dumps(ROWS), encoding="utf-8")
        case "lines.jsonl" | "lines.json":
            path.write_text("\n" + LINES, encoding="utf-8")
        case "lines.jsonl.gz":
            path.write_bytes(gzip.compress(LINES.encode()))
        case "lines.jsonl.zst":
            with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
                stream.write(LINES.encode())
        case "archive.zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("folder/rows.json", json.dumps(ROWS))
        case "rows.parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        case "rows.csv.gz":
            path.write_bytes(gzip.compress('a,b\n1,"x\ty"\n2,é\n'.encode()))


@pytest.mark.parametrize(
    "name",
    ["list.json", "lines.jsonl", "lines.json", "lines.jsonl.gz", "lines.jsonl.zst", "archive.zip", "rows.parquet", "rows.csv.gz"],
)
def test_rows_are_the_same_in_every_form(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    rows = list(table_rows(tmp_path / name))
    assert [{key: str(value) for key, value in row.items()} for row in rows] == [
        {key: str(value) for key, value in row.items()} for row in ROWS
    ]


def test_an_object_of_rows_gives_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"7": {"a": 1}, "8": "yes"}), encoding="utf-8")
    assert list(table_rows(path)) == [{"key": "7", "a": 1}, {"key": "8", "value": "yes"}]


def test_tab_separated_values_know_no_quotation_marks(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text('"Yes," he said\tno\n\n', encoding="utf-8")
    assert list(table_rows(path, ["said", "meant"])) == [{"said": '"Yes," he said', "meant": "no"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", b"a", "cannot tell the form by the ending"),
        ("rows.jsonl", b"{}\n[1]\n", "line 2: expected an object, found a list"),
        ("rows.jsonl", b"{\n", "line 1: not one JSON object a line"),
        ("rows.json", b"3", "expected a list of rows or an object of rows, found a int"),
        ("rows.tsv", b"a\tb\n1\n", "line 2: expected 2 columns"),
        ("rows.parquet", b"PAR", "cannot be read"),
        ("rows.zip", b"PK", "cannot be read"),
        ("rows.jsonl.gz", b"no", "cannot be read"),
        ("rows.csv", b"\xff\xfe\xfa\n", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        list(table_rows(tmp_path / name))
    assert str(tmp_path / name) in str(raised.value)


def test_an_archive_holds_one_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.json", "[]")
        archive.writestr("b.json", "[]")
    with pytest.raises(UserError, match="expected one file in the archive, found 2"):
        list(table_rows(tmp_path / "two.zip"))
