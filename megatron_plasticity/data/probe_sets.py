"""The labelled texts that probes are fitted on and asked about: which they are, and what of them enters a run's hash."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, Protocol

from megatron_plasticity.config.analysis import ProbesRecipe
from megatron_plasticity.config.files import sha256_files
from megatron_plasticity.config.probe_sets import PROCEDURAL, PUBLISHED, ProbeSet
from megatron_plasticity.data.labelled_text import LabelledText, Split, label_names, labelled_texts
from megatron_plasticity.data.tables import table_rows
from megatron_plasticity.errors import UserError

SPLITS: tuple[Split, ...] = ("train", "test")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class LabelledSet(Protocol):
    """Labelled texts of two splits that share no text."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        ...

    def identity(self) -> str | None:
        """What enters a run's hash: the content of files, or the commit on the hub. None for texts that the code makes."""
        ...

    def texts(self, split: Split, count: int, seed: int) -> list[LabelledText]:
        """Up to `count` distinct texts, drawn by `seed`; fewer when there are fewer."""
        ...


def labelled_sets(recipe: ProbesRecipe) -> dict[str, LabelledSet]:
    """The sets that a recipe names, in its order. One of its own comes before a published one of the same name."""
    own = {dataset.name: dataset for dataset in recipe.own_datasets}
    described = PUBLISHED | own
    return {name: _Procedural(name) if name in PROCEDURAL else _Rows(described[name]) for name in recipe.datasets}


def probe_inputs(recipe: ProbesRecipe) -> dict[str, str]:
    """Hashes of the texts that probes read, for the hash of their run; {} when all are procedural.

    Raises UserError for a file that is missing, or a data set that the hub does not have.
    """
    return {f"dataset {name}": identity for name, texts in labelled_sets(recipe).items() if (identity := texts.identity())}


@dataclass(frozen=True)
class _Procedural:
    """One of the sets of `labelled_text.py`: the classes are in equal numbers."""

    name: str

    def identity(self) -> None:
        return None

    @property
    def classes(self) -> tuple[str, ...]:
        return label_names(self.name)

    def texts(self, split: Split, count: int, seed: int) -> list[LabelledText]:
        return labelled_texts(self.name, split, count, seed)


@dataclass(frozen=True)
class _Rows:
    """Rows of files or of the hub: a uniform draw without replacement, so classes are as frequent as they are in the data."""

    described: ProbeSet

    @property
    def classes(self) -> tuple[str, ...]:
        return self.described.class_names

    def identity(self) -> str:
        if self.described.hub is None:
            files = [(split, path) for split in SPLITS for path in self._paths(split)]
        elif self._is_on_the_hub:
            return self._commit
        else:
            folder = Path(self.described.hub)
            files = [(path.relative_to(folder), path) for path in sorted(folder.rglob("*")) if path.is_file()]
        return sha256_files(files)

    def texts(self, split: Split, count: int, seed: int) -> list[LabelledText]:
        found = self._train if split == "train" else self._test
        return list(found) if count >= len(found) else Random(f"{seed}/{split}").sample(found, count)

    @cached_property
    def _test(self) -> list[LabelledText]:
        return list(self._labelled("test").values())

    @cached_property
    def _train(self) -> list[LabelledText]:
        asked = {item.text for item in self._test}  # what is asked about must not have been fitted on
        return [item for text, item in self._labelled("train").items() if text not in asked]

    def _labelled(self, split: Split) -> dict[str, LabelledText]:
        """The texts of a split in their order; of equal ones the first. Raises UserError for a row that cannot be used."""
        described = self.described
        label_of = {value: label for label, value in enumerate(described.labels)}
        texts: dict[str, LabelledText] = {}
        for where, row in self._rows(split):
            for key, column in (("text", described.text), ("label", described.label)):
                if column not in row:
                    raise self._refused(
                        f"{where} has no column {column!r}; it has {', '.join(map(repr, row))}. Name the right one by `{key}`, "
                        "or the columns of a file that does not do it in its first line by `header`"
                    )
            text, value = row[described.text], str(row[described.label])
            if not isinstance(text, str) or not text.strip():
                raise self._refused(f"{where} holds {text!r} in column {described.text!r}; expected a text to read")
            if value not in label_of:
                known = ", ".join(map(repr, described.labels))
                raise self._refused(f"{where} holds {value!r} in column {described.label!r}; expected one of `labels`: {known}")
            texts.setdefault(text, LabelledText(text, label_of[value]))
        return texts

    def _rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Where a row stands, and its columns."""
        if self.described.hub is None:
            for path in self._paths(split):
                for number, row in enumerate(table_rows(path, self.described.header), start=1):
                    yield f"{path}, row {number}", row
            return
        name = self.described.train_split if split == "train" else self.described.test_split
        for number, row in enumerate(self._hub_rows(name), start=1):
            yield f"split {name}, row {number}", row

    def _paths(self, split: Split) -> tuple[Path, ...]:
        paths = self.described.train_files if split == "train" else self.described.test_files
        for path in paths:
            if not path.is_file():
                raise self._refused(f"{split}_files: {path} not found")
        return paths

    @property
    def _is_on_the_hub(self) -> bool:
        return self.described.hub is not None and not Path(self.described.hub).is_dir()

    def _hub_rows(self, split: str) -> Any:
        import datasets  # takes seconds to import, and only data sets on the hub need it

        hub, config = self.described.hub, self.described.config
        assert hub is not None
        commit = self._commit if self._is_on_the_hub else None
        try:
            rows = datasets.load_dataset(hub, config, split=split, revision=commit)
        except Exception as error:  # of the library, of the hub client, of the network
            raise self._unreachable(f"split {split!r}", error) from error
        wanted = [name for name in (self.described.text, self.described.label) if name in rows.column_names]
        return rows.select_columns(wanted or rows.column_names)

    @cached_property
    def _commit(self) -> str:
        """The commit that the revision stands for; asks the hub unless it is one."""
        hub, revision = self.described.hub, self.described.revision
        assert hub is not None
        if revision is not None and _COMMIT.fullmatch(revision):
            return revision
        from huggingface_hub import HfApi

        try:
            return str(HfApi().dataset_info(hub, revision=revision).sha)
        except Exception as error:  # of the hub client, of the network
            raise self._unreachable(f"revision {revision or 'main'!r}", error) from error

    def _refused(self, why: str) -> UserError:
        return UserError(f"data set {self.described.name!r}: {why}")

    def _unreachable(self, what: str, error: Exception) -> UserError:
        return self._refused(
            f"cannot read {what} of {self.described.hub}: {type(error).__name__}: {error}. Check the name and the network; a "
            f"gated data set needs `hf auth login`. To read files of this machine, describe {self.described.name} in "
            "`own_datasets` (docs/probes.md)"
        )
