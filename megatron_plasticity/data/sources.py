"""Where the text of a corpus comes from: the files of a source, and the documents inside a file.

The `datasets` library says which files a data set on the hub consists of, and at which commit. The files themselves, remote ones
and those of this machine alike, are opened through `fsspec` and read by `pyarrow` and `json`, because only the text column is
wanted: the readers of `datasets` either fail where the metadata of two files differ, or read and cast all of it.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Literal, cast

import fsspec

from megatron_plasticity.config.data import SourceConfig
from megatron_plasticity.errors import UserError

if TYPE_CHECKING:
    import pyarrow

Format = Literal["parquet", "json", "text"]

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".txt": "text",
}
_HUB_COMMIT = re.compile(r"^hf://datasets/[^@]+@([^/]+)/")
_ROWS_PER_READ = 256


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: str
    """Local path, or address that fsspec opens, such as `hf://datasets/owner/name@commit/path`."""
    bytes: int
    """Size on disk, compressed if it is."""
    changed: str
    """When a local file was last changed, as a number; the commit of a file on the hub."""


def source_files(source: SourceConfig, seed: int) -> list[SourceFile]:
    """All files of a source, in an order that depends on the seed and the paths below the folder that they share alone: any
    number of the first ones is a fair sample, and the same one wherever the folder lies.

    Raises UserError when there is no such data set or file, or a file's format is not known.
    """
    paths = _local_paths(source) if source.files else _hub_paths(source)
    for path in paths:
        file_format(path, source)
    files = [_describe(source, path) for path in paths]

    # By characters will do, and takes addresses as well as paths.
    shared = os.path.commonprefix([path.rpartition("/")[0] + "/" for path in paths])  # noqa: RUF071

    def key(file: SourceFile) -> bytes:
        return hashlib.sha256(f"{seed}/{file.path.removeprefix(shared)}".encode()).digest()

    return sorted(files, key=key)


def hub_commit(files: list[SourceFile]) -> str | None:
    """The commit at which files lie on the hub; None for files of this machine."""
    match = _HUB_COMMIT.match(files[0].path)
    return match[1] if match else None


def file_format(path: str, source: SourceConfig) -> Format:
    """Format of a file, by the source's `format` or else the file's ending. Raises UserError for an unknown one."""
    if source.format is not None:
        return source.format
    suffixes = PurePosixPath(path).suffixes
    suffix = next((s.lower() for s in reversed(suffixes) if s.lower() not in _COMPRESSIONS), "")
    if suffix not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise UserError(
            f"{path} (source {source.name!r}): cannot tell the format by the ending; expected one of {known}, or state `format`"
        )
    return _FORMATS[suffix]


def documents(path: str, source: SourceConfig) -> Iterator[str]:
    """Texts of the documents of one file, in their order; a null text is "". Memory is that of the largest document and of some
    hundred others.

    Raises UserError when the file is damaged, or has no such column.
    """
    import pyarrow  # 50 MB to install, which training on a prepared corpus does without

    try:
        with fsspec.open(path, "rb") as opened:
            file = cast(IO[bytes], opened)
            match file_format(path, source):
                case "parquet":
                    yield from _parquet_texts(file, path, source)
                case "json":
                    yield from _json_texts(_decompressed(file, path), path, source)
                case "text":
                    yield from _plain_texts(_decompressed(file, path), source)
    except (OSError, EOFError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} (source {source.name!r}): cannot be read: {error}") from error


# --- which files ---


def _local_paths(source: SourceConfig) -> list[str]:
    paths: set[str] = set()
    for pattern in source.files:
        # Not Path.glob, which takes no absolute patterns.
        found = [path for path in glob.glob(pattern, recursive=True) if not PurePosixPath(path).name.startswith(".")]  # noqa: PTH207
        found = [path for path in found if fsspec.filesystem("file").isfile(path)]
        if not found:
            raise UserError(f"sources: no file matches {pattern!r} (source {source.name!r})")
        paths.update(found)
    return sorted(paths)


def _hub_paths(source: SourceConfig) -> list[str]:
    import datasets  # takes seconds to import, and only data sets on the hub need it

    assert source.hub is not None
    try:
        builder = datasets.load_dataset_builder(source.hub, source.config, revision=source.revision)
    except Exception as error:  # of the library, of the hub client, of the network
        raise UserError(
            f"sources: cannot find {_spelled(source)} (source {source.name!r}): {type(error).__name__}: {error}. Check the name "
            "and the network; a gated data set needs `hf auth login`; `files` reads what was downloaded before"
        ) from error
    splits = dict(builder.config.data_files or {})
    if source.split not in splits:
        known = ", ".join(str(name) for name in splits) or "none"
        raise UserError(f"sources: {_spelled(source)} has no split {source.split!r} (source {source.name!r}); it has: {known}")
    return sorted(str(path) for path in splits[source.split])


def _spelled(source: SourceConfig) -> str:
    parts = [f"the data set {source.hub!r}"]
    parts += [f"config {source.config!r}"] if source.config else []
    parts += [f"revision {source.revision!r}"] if source.revision else []
    return ", ".join(parts)


def _describe(source: SourceConfig, path: str) -> SourceFile:
    try:
        system, location = fsspec.core.url_to_fs(path)
        info = system.info(location)
    except OSError as error:
        raise UserError(f"{path} (source {source.name!r}): cannot be found: {error}") from error
    commit = _HUB_COMMIT.match(path)
    return SourceFile(path, int(info["size"]), commit[1] if commit else repr(info.get("mtime")))


# --- what is in a file ---


def _decompressed(file: IO[bytes], path: str) -> IO[bytes]:
    codec = _COMPRESSIONS.get(PurePosixPath(path).suffix.lower())
    if codec is None:
        return file
    import pyarrow

    # pyarrow reads both kinds, also of several parts end to end, with no further package.
    stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), codec)
    return io.BufferedReader(stream, 1 << 20)


def _parquet_texts(file: IO[bytes], path: str, source: SourceConfig) -> Iterator[str]:
    import pyarrow.parquet

    # Read as it is used: without these the column of a whole row group is in memory at once.
    table = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    if source.text not in table.schema_arrow.names:
        raise _no_column(path, source, table.schema_arrow.names)
    if not _is_text(table.schema_arrow.field(source.text).type):
        found = table.schema_arrow.field(source.text).type
        raise UserError(f"{path} (source {source.name!r}): column {source.text!r} holds {found}, not text")
    for batch in table.iter_batches(batch_size=_ROWS_PER_READ, columns=[source.text]):
        for text in batch.column(0).to_pylist():
            yield text or ""


def _is_text(kind: pyarrow.DataType) -> bool:
    import pyarrow

    inner = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return pyarrow.types.is_string(inner) or pyarrow.types.is_large_string(inner) or pyarrow.types.is_string_view(inner)


def _json_texts(file: IO[bytes], path: str, source: SourceConfig) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path}, line {number} (source {source.name!r}): not one JSON object a line, which is what `json` means: {error}"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} (source {source.name!r}): expected an object, found a {type(row).__name__}")
        if source.text not in row:
            raise _no_column(f"{path}, line {number}", source, row)
        text = row[source.text]
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"{path}, line {number} (source {source.name!r}): {source.text!r} holds a {type(text).__name__}, not text"
            )
        yield text or ""


def _plain_texts(file: IO[bytes], source: SourceConfig) -> Iterator[str]:
    # Line ends stay as they are: what is tokenized is what is in the file.
    text = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
    match source.text_documents:
        case "file":
            yield text.read()
        case "line":
            for line in text:
                yield line.rstrip("\r\n")
        case "paragraph":
            lines: list[str] = []
            for line in text:
                if line.strip():
                    lines.append(line)
                elif lines:
                    yield "".join(lines).rstrip("\r\n")
                    lines = []
            yield "".join(lines).rstrip("\r\n")


def _no_column(where: str, source: SourceConfig, found: Any) -> UserError:
    return UserError(
        f"{where} (source {source.name!r}): has no column {source.text!r}; it has: {', '.join(found)}. Name the right one by "
        "`text`"
    )
