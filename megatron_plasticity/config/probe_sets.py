"""Labelled texts for linear probes: those that are known by name, and the section that describes others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from megatron_plasticity.config.base import Section, neutral

Label = Annotated[str, Field(coerce_numbers_to_str=True)]


class ProbeSet(Section):
    """Labelled texts of two splits: a data set on the Hugging Face hub, or files of this machine (docs/probes.md)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name, by which `datasets` asks for it. That of a published set takes its place."""
    hub: str | None = None
    """Data set on the hub, such as `stanfordnlp/sst2`, or a local folder that is laid out like one."""
    config: str | None = None
    """Configuration of the hub's data set. Default: its default one."""
    revision: str | None = None
    """Commit, tag or branch on the hub. The commit that it stands for enters the run's hash."""
    train_split: str = "train"
    """Split of the hub's data set that probes are fitted on."""
    test_split: str = "test"
    """Split of the hub's data set that they are asked about."""
    train_files: tuple[Path, ...] = neutral(())
    """Local files with training texts, instead of `hub`: .tsv, .csv, .jsonl, .json, .parquet, also compressed as .gz or .zst.
    Their content enters the run's hash."""
    test_files: tuple[Path, ...] = neutral(())
    """Local files with test texts."""
    header: tuple[str, ...] | None = None
    """Names of the columns of .tsv and .csv files that do not name them in their first line."""
    text: str = "text"
    """Column with the text."""
    label: str = "label"
    """Column with the label."""
    labels: tuple[Label, ...] = Field(min_length=2)
    """Values of that column, as text, in the order of the classes; a row with another value is an error."""
    classes: tuple[str, ...] | None = neutral(None)
    """Names of the classes. Default: the values themselves."""

    @model_validator(mode="after")
    def _fits_together(self) -> ProbeSet:
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        of_files = bool(self.train_files or self.test_files)
        if (self.hub is None) != of_files:
            yield f"data set {self.name!r} takes either `hub`, or `train_files` and `test_files`"
        elif of_files and not (self.train_files and self.test_files):
            yield f"data set {self.name!r} needs both `train_files` and `test_files`"
        for key in ("config", "revision"):
            if of_files and getattr(self, key) is not None:
                yield f"data set {self.name!r}: `{key}` belongs to a data set on the hub, not to files"
        if self.header is not None and self.hub is not None:
            yield f"data set {self.name!r}: `header` belongs to files, not to a data set on the hub"
        for key in ("text", "label"):
            if self.header is not None and getattr(self, key) not in self.header:
                yield f"data set {self.name!r}: `header` has no column {getattr(self, key)!r}, which is its `{key}`"
        if len(set(self.labels)) != len(self.labels):
            yield f"data set {self.name!r}: `labels` names a value twice"
        if self.classes is not None and len(self.classes) != len(self.labels):
            yield f"data set {self.name!r} has {len(self.labels)} `labels` and {len(self.classes)} `classes`"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.labels if self.classes is None else self.classes


PROCEDURAL = ("topic", "polarity")
"""Sets that are made on the spot (`data/labelled_text.py`)."""

# The two sets of the paper (docs/probes.md says how sure that is). Columns, classes and sizes are certain, from the data sets'
# cards on the hub: SST-2 has 67,349 training texts and 872 validation texts, which are the test set here because the 1,821 of its
# test split have no labels; AG News has 120,000 and 7,600. With the commit stated, a run's hash is known without asking the hub.
PUBLISHED = {
    "sst2": ProbeSet(
        name="sst2",
        hub="stanfordnlp/sst2",
        revision="8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb",
        test_split="validation",
        text="sentence",
        labels=("0", "1"),
        classes=("negative", "positive"),
    ),
    "ag_news": ProbeSet(
        name="ag_news",
        hub="fancyzhx/ag_news",
        revision="eb185aade064a813bc0b7f42de02595523103ca4",
        labels=("0", "1", "2", "3"),
        classes=("World", "Sports", "Business", "Sci/Tech"),
    ),
}
"""Sets on the hub that are known by name."""
