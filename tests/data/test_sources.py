"""Sources: which files they have, and what is read from each format."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_plasticity.config.data import SourceConfig
from megatron_plasticity.data.sources import documents, hub_commit, source_files
from megatron_plasticity.errors import UserError

ROWS = [{"text": f"document {number} – naïve", "id": number} for number in range(5)]
TEXTS = [row["text"] for row in ROWS]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(raw: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


def source(*patterns: Path | str, **changes: Any) -> SourceConfig:
    return SourceConfig(name="s", files=tuple(str(pattern) for pattern in patterns), **changes)


def read(path: Path, **changes: Any) -> list[str]:
    return list(documents(str(path), source(path, **changes)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.json", lines(ROWS)),
        ("a.json.gz", gzip.compress(lines(ROWS))),
        ("a.jsonl.gz", gzip.compress(lines(ROWS[:2])) + gzip.compress(lines(ROWS[2:]))),  # several members end to end
        ("a.json.zst", zstd(lines(ROWS))),
        ("a.jsonl.zst", zstd(lines(ROWS[:2])) + zstd(lines(ROWS[2:]))),
        ("a.b.jsonl", b"\n" + lines(ROWS) + b"\n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_json_lines_of_every_compression(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_parquet(tmp_path: Path, kind: pyarrow.DataType) -> None:
    column = pyarrow.array([*TEXTS, None]).cast(kind) if kind != pyarrow.string() else pyarrow.array([*TEXTS, None])
    pyarrow.parquet.write_table(pyarrow.table({"body": column, "n": range(6)}), tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet", text="body") == [*TEXTS, ""]


def test_text_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"first line\r\nsecond\n\n\n  third\n")
    assert read(path) == ["first line\r\nsecond\n\n\n  third\n"]
    assert read(path, text_documents="line") == ["first line", "second", "", "", "  third"]
    assert read(path, text_documents="paragraph") == ["first line\r\nsecond", "  third"]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"caf\xe9"))
    assert read(tmp_path / "a.txt.gz") == ["caf\ufffd"], "what is not UTF-8 is replaced"
    (tmp_path / "a.py").write_text("x = 1\n")
    assert read(tmp_path / "a.py", format="text") == ["x = 1\n"]


def test_other_columns_may_differ_within_and_between_files(tmp_path: Path) -> None:
    """In OLMo-mix they do, and a reader that takes all columns fails on one type of metadata after another."""
    rows = [
        {"text": "a", "metadata": {"url": "x"}},
        {"text": "b", "metadata": "x"},
        {"metadata": [1], "text": "c"},
        {"text": None},
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    assert read(tmp_path / "a.jsonl") == ["a", "b", "c", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lines([{"text": "a"}, {"body": "b", "n": 1}]),
            r"a\.jsonl, line 2 .*no column 'text'; it has: body, n\. Name the right one",
        ),
        (lines([{"text": "a"}]) + b'{"text": "b', r"a\.jsonl, line 2 .*not one JSON object a line"),
        (b'[{"text": "a"}]\n', "line 1 .*expected an object, found a list"),
        (lines([{"text": ["a"]}]), "holds a list, not text"),
    ],
)
def test_damaged_json(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.jsonl")


def test_damaged_files(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'text'; it has: body, n"):
        read(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column 'n' holds int64, not text"):
        read(tmp_path / "a.parquet", text="n")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"b\.parquet .*cannot be read"):
        read(tmp_path / "b.parquet")
    for name, whole in (("a.jsonl.gz", gzip.compress(lines(ROWS * 100))), ("a.jsonl.zst", zstd(lines(ROWS * 100)))):
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=f"{name} .*(cannot be read|not one JSON object)"):
            read(tmp_path / name)


def test_patterns_and_order(tmp_path: Path) -> None:
    for name in ("x/1.jsonl", "x/y/2.jsonl.gz", "x/.hidden.jsonl", "z.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    found = source_files(source(tmp_path / "**/*.jsonl*", tmp_path / "x/1.jsonl"), seed=1)
    assert {file.path for file in found} == {str(tmp_path / "x/1.jsonl"), str(tmp_path / "x/y/2.jsonl.gz")}
    assert {file.bytes for file in found} == {5}
    assert hub_commit(found) is None
    many = source(*(tmp_path / f"m{number}.txt" for number in range(9)))
    for pattern in many.files:
        Path(pattern).write_text("a")
    orders = [[file.path for file in source_files(many, seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_the_order_of_files_does_not_depend_on_where_their_folder_lies(tmp_path: Path) -> None:
    names = [f"{group}/{number}.jsonl" for group in ("a", "b") for number in range(10)]
    orders = []
    for home in (tmp_path / "here", tmp_path / "far" / "away"):
        for name in names:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text("{}\n")
        orders.append([Path(file.path).relative_to(home) for file in source_files(source(home / "*/*.jsonl"), 1)])
    assert orders[0] == orders[1] != sorted(orders[0])


def test_files_that_are_not_there_or_of_no_known_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file matches '.*\*\.jsonl' \(source 's'\)"):
        source_files(source(tmp_path / "*.jsonl"), 1)
    (tmp_path / "a.csv.gz").write_text("a")
    with pytest.raises(UserError, match=r"a\.csv\.gz .*cannot tell the format.*state `format`"):
        source_files(source(tmp_path / "*"), 1)


@pytest.fixture
def hub_layout(tmp_path: Path) -> Path:
    """A folder laid out like a data set on the hub, with two configurations."""
    folder = tmp_path / "owner-name"
    for part in ("web", "code"):
        (folder / "data" / part).mkdir(parents=True)
        for number in range(2):
            (folder / "data" / part / f"{number}.jsonl").write_bytes(lines([{"text": f"{part} {number}", part: number}]))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  default: true\n  data_files:\n  - split: train\n    path: data/*/*.jsonl\n"
        "- config_name: code\n  data_files:\n  - split: train\n    path: data/code/*.jsonl\n---\n"
    )
    return folder


def test_a_data_set_of_the_hub(hub_layout: Path) -> None:
    def texts(**changes: Any) -> set[str]:
        config = SourceConfig(name="s", hub=str(hub_layout), **changes)
        return {text for file in source_files(config, 1) for text in documents(file.path, config)}

    assert texts() == {"web 0", "web 1", "code 0", "code 1"}
    assert texts(config="code") == {"code 0", "code 1"}
    for changes, message in (
        ({"config": "prose"}, "config 'prose'.*cannot|cannot find the data set .*config 'prose'"),
        ({"split": "test"}, "no split 'test' .*it has: train"),
    ):
        with pytest.raises(UserError, match=message):
            texts(**changes)


def test_a_data_set_that_the_hub_does_not_have() -> None:
    """Offline, as in these tests: one message that says what to do."""
    with pytest.raises(UserError, match=r"cannot find the data set 'owner/nothing', config 'x', revision 'main'.*Check the name"):
        source_files(SourceConfig(name="s", hub="owner/nothing", config="x", revision="main"), 1)


def test_the_commit_is_in_the_address() -> None:
    from megatron_plasticity.data.sources import SourceFile

    assert hub_commit([SourceFile("hf://datasets/owner/name@0123abc/data/x.parquet", 1, "0123abc")]) == "0123abc"
