"""A task file: where a task's rows come from, and how a row becomes a prompt, a response and a reference.

Expressions and templates are Jinja's. An *expression* (`level == 3`) gives a value, a *template* (`Level {{ level }}`) text. Both
see the columns of a row; docs/tasks.md says what else they see.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from megatron_plasticity.config.base import Section

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Layout(Section):
    """What rows of one origin look like."""

    columns: dict[str, str] = {}
    """Further columns, by expressions over those that there are and the ones before, so that all origins give the same names."""
    expected_rows: PositiveInt | None = None
    """Number of rows read; another one is a warning."""
    expected_examples: PositiveInt | None = None
    """Number of examples in the end; another one is a warning."""


class HubRows(Layout):
    """Rows of a data set on the Hugging Face hub, or of a local folder laid out like its repository."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?$")
    """Name on the hub, such as `openai/gsm8k`."""
    configs: tuple[str, ...] = ()
    """Configurations of the data set, read one after the other. Default: its default one."""
    split: str = "train"
    """Split, or several as `train+validation`."""
    revision: str | None = None
    """Commit, tag or branch. The commit that it stands for is written into the manifest."""


class FileRows(Layout):
    """Rows of files below the folder that `tasks prepare --from` names, else below the working directory."""

    paths: tuple[str, ...] = Field(min_length=1)
    """Files, read one after the other: .jsonl, .json (a list, or an object whose values are the rows), .csv, .tsv, .parquet, also
    compressed as .gz or .zst, or alone in a .zip."""
    header: tuple[str, ...] | None = None
    """Names of the columns of .csv and .tsv files that do not name them in their first line."""
    upstream: str = ""
    """Where the files can be had."""


class Lookup(Section):
    """A second table, which expressions see as a mapping: `word in NAME`, `NAME[word]`."""

    files: FileRows
    """The table's rows."""
    key: str
    """Expression for the key of a row. The last of rows with the same key counts."""
    value: str = "true"
    """Expression for the value of a row."""


class HashedPart(Section):
    """One side of a cut by the hash of a key: all rows of a key are on the same side, whatever else is filtered.

    The distinct keys of all rows read are put in the order of the SHA-256 of their text; the side `first` has the first of them.
    """

    key: str
    """Expression for the key."""
    side: Literal["first", "rest"]
    """Whether to take the rows of the first keys or of all others."""
    count: PositiveInt | None = None
    """How many keys are the first."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """How many keys are the first, as a share of all, rounded to a whole key."""

    @model_validator(mode="after")
    def _has_one_size(self) -> HashedPart:
        if (self.count is None) == (self.share is None):
            raise ValueError("takes exactly one of `count` and `share`")
        return self


class Rows(Section):
    """Rows of one origin, and what becomes of each. Needs `hub`, `files` or both; files are taken where they are there."""

    hub: HubRows | None = None
    """The rows on the hub."""
    files: FileRows | None = None
    """The rows in local files."""
    licence: str
    """Licence of the rows."""
    lookups: dict[str, Lookup] = {}
    """Further tables that expressions can look things up in."""
    part: HashedPart | None = None
    """Take one side of a cut. Default: all rows."""
    keep: dict[str, str] = {}
    """Name of a condition → expression; rows for which one is false are left out, and counted by its name."""
    answer_kind: str
    """One of number, maths, choice, yes_no_maybe, text, literal, program_input, or an expression that gives one."""
    prompt: str
    """Template of the question."""
    response: str = ""
    """Template of the answer to learn: a chain of thought that ends with the answer. Needed for training."""
    answer: str
    """Template of the reference that answers are graded against."""
    choices: str | None = None
    """Expression for the list of the options' texts."""
    group: str = ""
    """Template of the part of a test set that gets scores of its own, such as a level."""
    program: str = ""
    """Template of the Python source that defines `f`, for answers of the kind `program_input`."""
    id: str | None = None
    """Template of a name of the row, unique within its rows. Default: the number of the row."""
    compared: str | None = None
    """Template of the text in which overlap is looked for. Default: the prompt; name the question alone if prompts have long
    instructions in common."""

    @model_validator(mode="after")
    def _has_an_origin(self) -> Rows:
        if self.hub is None and self.files is None:
            raise ValueError("needs `hub`, `files` or both")
        return self


class Decontamination(Section):
    """What happens to training rows whose question is also in a test set. Both kinds of overlap are counted in any case."""

    exact: Literal["report", "remove"] = "report"
    """Questions that are the same but for white space and case."""
    ngram: Literal["report", "remove"] = "report"
    """Questions that have thirteen words in a row in common (docs/tasks.md has the whole rule)."""


class TaskFile(Section):
    """A task of fine-tuning and evaluation."""

    name: str = Field(pattern=NAME)
    """Name of the task, by which configs ask for it."""
    description: str
    """One line on what is asked."""
    train: dict[str, Rows] = Field(min_length=1)
    """Training rows, by the name of their part."""
    test_sets: dict[str, Rows] = Field(min_length=1)
    """Test sets by their names."""
    drop_duplicates: bool = False
    """Keep only the first of training rows that ask the same question."""
    decontamination: Decontamination = Decontamination()
    """Overlap between training and test rows."""

    @model_validator(mode="after")
    def _fits_together(self) -> TaskFile:
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        for part, rows in self.train.items():
            if not rows.response:
                yield f"train.{part}.response: needed for training"
        if "train" in self.test_sets:
            yield "test_sets.train: `train` stands for the training examples; give the test set another name"
        for where, names in (("train", self.train), ("test_sets", self.test_sets)):
            for name in names:
                if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                    yield f"{where}.{name}: a name has letters, digits, '.', '_' and '-' only"

    @property
    def rows(self) -> dict[str, Rows]:
        """All rows of the task by where they stand in the file."""
        return {f"train.{name}": rows for name, rows in self.train.items()} | {
            f"test_sets.{name}": rows for name, rows in self.test_sets.items()
        }
