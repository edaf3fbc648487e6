"""Where the rows of a task come from this time: files, a folder laid out like a repository of the hub, or the hub itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megatron_plasticity.config.files import sha256_file
from megatron_plasticity.config.task_files import FileRows, HubRows, Layout, Rows
from megatron_plasticity.data.tables import table_rows
from megatron_plasticity.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Origin:
    """Rows that are ready to be read."""

    layout: Layout
    """Which of the two layouts of the task file they have."""
    described: dict[str, Any]
    """For the manifest: what was read, with the commit or the files' hashes."""
    read: Callable[[frozenset[str] | None], Iterator[dict[str, Any]]]
    """The rows; of a data set only the named columns if there are any names."""
    total: int | None
    """Number of rows, if it is known beforehand."""


def find_origin(rows: Rows, where: str, folder: Path | None) -> Origin:
    """Where `rows` can be read: files below `folder` (the working directory, if there is neither folder nor hub), else a folder
    `folder/<owner>/<name>`, else, without `folder`, the hub.

    Raises UserError that names `where` in the task file when nothing is there, before anything is read.
    """
    if rows.files is not None and (folder is not None or rows.hub is None):
        base = folder if folder is not None else Path()
        paths = [base / path for path in rows.files.paths]
        missing = [str(path) for path in paths if not path.is_file()]
        if not missing:
            return file_origin(rows.files, base)
        if rows.hub is None:
            raise UserError(f"{where}.files: not found: {', '.join(missing)}. {_how_to_get(rows.files, folder)}")
    assert rows.hub is not None
    if folder is None:
        return _hub_origin(rows.hub, where)
    repository = folder / rows.hub.name
    if repository.is_dir():
        return _dataset_origin(rows.hub, where, str(repository), None)
    files = f"neither {', '.join(rows.files.paths)} nor" if rows.files is not None else "no"
    raise UserError(
        f"{where}: {folder} has {files} {rows.hub.name}/, a folder with the files of that data set on the hub. Fetch it with "
        f"`hf download --repo-type dataset {rows.hub.name} --local-dir {repository}`, or leave --from out to read the hub"
    )


def file_origin(files: FileRows, base: Path) -> Origin:
    """The rows of files below `base`. Raises UserError when one is missing."""
    paths = [base / path for path in files.paths]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: not found. {_how_to_get(files, base)}")

    def read(_: frozenset[str] | None) -> Iterator[dict[str, Any]]:
        for path in paths:
            yield from table_rows(path, files.header)

    described: dict[str, Any] = {
        "files": {name: sha256_file(path) for name, path in zip(files.paths, paths, strict=True)},
        "upstream": files.upstream,
    }
    return Origin(files, described, read, None)


def _how_to_get(files: FileRows, folder: Path | None) -> str:
    upstream = f"They can be had at {files.upstream}. " if files.upstream else ""
    return upstream + ("Put them below that folder" if folder is not None else "Name the folder they are in with --from")


def _hub_origin(hub: HubRows, where: str) -> Origin:
    from huggingface_hub import HfApi

    commit = hub.revision
    if commit is None or not _COMMIT.fullmatch(commit):
        try:
            commit = HfApi().dataset_info(hub.name, revision=hub.revision).sha
        except Exception as error:  # of the hub client, of the network
            raise UserError(
                f"{where}.hub: cannot find {hub.name}: {type(error).__name__}: {error}. Check the network; a gated data set "
                "needs `hf auth login`; `--from FOLDER` reads what was downloaded before, laid out as FOLDER/<owner>/<name>/"
            ) from error
    return _dataset_origin(hub, where, hub.name, commit)


def _dataset_origin(hub: HubRows, where: str, address: str, commit: str | None) -> Origin:
    import datasets  # takes seconds to import, and only data sets need it

    datasets.disable_progress_bars()
    builders: list[DatasetBuilder] = []
    for config in hub.configs or (None,):
        with _readable(hub, where, address, config):
            builders.append(datasets.load_dataset_builder(address, config, revision=commit))

    def read(names: frozenset[str] | None) -> Iterator[dict[str, Any]]:
        for builder in builders:
            with _readable(hub, where, address, builder.config.name):
                builder.download_and_prepare()
                part = cast("Dataset", builder.as_dataset(split=hub.split))
            # Long columns that nobody asks for stay on the disk.
            wanted = part.column_names if names is None else [name for name in part.column_names if name in names]
            yield from cast("Iterator[dict[str, Any]]", part.select_columns(wanted or part.column_names))

    described = {"hub": hub.name, "configs": list(hub.configs), "split": hub.split, "commit": commit or "a local folder"}
    return Origin(hub, described, read, sum(map(_size(hub.split), builders)) or None)


@contextmanager
def _readable(hub: HubRows, where: str, address: str, config: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the library, of the hub client, of the network
        raise UserError(
            f"{where}.hub: cannot read {address}, config {config or 'default'!r}, split {hub.split!r}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _size(split: str) -> Callable[[DatasetBuilder], int]:
    """Number of rows as far as the data set's card tells it."""

    def size(builder: DatasetBuilder) -> int:
        known = builder.info.splits or {}
        return sum(known[name].num_examples or 0 for name in split.split("+") if name in known)

    return size
