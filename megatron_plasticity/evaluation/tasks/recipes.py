"""A task file put to work: rows in, examples out, with a count of everything on the way."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from megatron_plasticity.config.task_files import FileRows, Lookup, Rows, TaskFile
from megatron_plasticity.config.tasks import AnswerKind
from megatron_plasticity.errors import ConfigError, UserError
from megatron_plasticity.evaluation.tasks.origins import Origin, file_origin, find_origin
from megatron_plasticity.evaluation.tasks.task import Example, Reference
from megatron_plasticity.evaluation.tasks.templates import Template

ANSWER_KINDS: tuple[str, ...] = get_args(AnswerKind)
ROW = "row"
"""In expressions: the whole row as it was read, for columns whose names are no words."""
NUMBER = "row_number"
"""In expressions: the number of the row, 0 for the first."""

Tick = Callable[[], None]


@dataclass(frozen=True)
class Made:
    """An example, and the text in which overlap is looked for."""

    example: Example
    compared: str


@dataclass
class Counts:
    """What became of the rows."""

    read: int = 0
    on_the_other_side: int = 0
    """Rows of the other side of a cut."""
    left_out: Counter[str] = field(default_factory=Counter)
    """By the name of the condition that did not hold."""

    def as_json(self) -> dict[str, Any]:
        cut = {"on_the_other_side": self.on_the_other_side} if self.on_the_other_side else {}
        return {"rows_read": self.read, **cut, **({"left_out": dict(self.left_out)} if self.left_out else {})}


@dataclass(frozen=True)
class _LookupRecipe:
    """How one lookup becomes a mapping."""

    files: FileRows
    columns: dict[str, Template]
    key: Template
    value: Template

    def mapping(self, folder: Path) -> dict[Any, Any]:
        """Read the table below `folder`."""
        found = {}
        for number, row in enumerate(file_origin(self.files, folder).read(None)):
            place = f"row {number} of {', '.join(self.files.paths)}"
            columns = _with_columns(row | {ROW: row, NUMBER: number}, self.columns, place)
            found[self.key(columns, place)] = self.value(columns, place)
        return found


class _Compiler:
    """Compiles what stands at one place of a task file, and gathers what is wrong with it."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.problems: list[str] = []

    def template(self, key: str, source: str, is_expression: bool = False) -> Template:
        try:
            return Template(source, f"{self._where}.{key}", is_expression)
        except UserError as error:
            self.problems.append(str(error))
            return Template("", self._where, is_expression=False)  # never used: problems end in an error

    def expression(self, key: str, source: str) -> Template:
        return self.template(key, source, is_expression=True)

    def expressions(self, key: str, sources: dict[str, str]) -> dict[str, Template]:
        return {name: self.expression(f"{key}.{name}", source) for name, source in sources.items()}

    def lookup(self, name: str, lookup: Lookup) -> _LookupRecipe:
        key = f"lookups.{name}"
        return _LookupRecipe(
            lookup.files,
            self.expressions(f"{key}.files.columns", lookup.files.columns),
            self.expression(f"{key}.key", lookup.key),
            self.expression(f"{key}.value", lookup.value),
        )


class Recipe:
    """The expressions and templates of one `Rows`, compiled."""

    def __init__(self, rows: Rows, where: str) -> None:
        """Raises ConfigError with all that is wrong with them; `where` is the place in the task file, such as `train.all`."""
        self._rows, self._where = rows, where
        compiler = _Compiler(where)
        self._columns: dict[type, dict[str, Template]] = {
            type(layout): compiler.expressions(f"{key}.columns", layout.columns)
            for key, layout in (("hub", rows.hub), ("files", rows.files))
            if layout is not None
        }
        self._lookups = {name: compiler.lookup(name, lookup) for name, lookup in rows.lookups.items()}
        self._keep = compiler.expressions("keep", rows.keep)
        self._part_key = compiler.expression("part.key", rows.part.key) if rows.part else None
        fixed_kind = rows.answer_kind in ANSWER_KINDS
        self._kind = None if fixed_kind else compiler.expression("answer_kind", rows.answer_kind)
        self._choices = compiler.expression("choices", rows.choices) if rows.choices else None
        sources = {key: getattr(rows, key) for key in ("prompt", "response", "answer", "group", "program", "id", "compared")}
        self._texts = {key: compiler.template(key, source) for key, source in sources.items() if source}
        if compiler.problems:
            raise ConfigError("\n".join(compiler.problems))

    def origin(self, folder: Path | None) -> Origin:
        """Where the rows are; raises UserError when they, or what they look up, are nowhere."""
        for lookup in self._lookups.values():
            file_origin(lookup.files, folder or Path())
        return find_origin(self._rows, self._where, folder)

    def examples(self, origin: Origin, folder: Path | None, name: str, counts: Counts, tick: Tick) -> Iterator[Made]:
        """The examples of all rows that are kept, in the rows' order; `name` begins their ids.

        Raises UserError when a row lacks a column, has an empty prompt or answer, or an expression fails.
        """
        lookups = {table: lookup.mapping(folder or Path()) for table, lookup in self._lookups.items()}
        first = self._first_keys(origin, lookups)
        for number, columns in self._columns_of(origin, lookups, tick):
            counts.read += 1
            place = f"row {number}"
            if first is not None and (self._key(columns, place) in first) != self._takes_first:
                counts.on_the_other_side += 1
                continue
            broken = next((key for key, condition in self._keep.items() if not condition(columns, place)), None)
            if broken is not None:
                counts.left_out[broken] += 1
                continue
            yield self._made(columns, place, number, name)

    # --- columns ---

    def _columns_of(
        self, origin: Origin, lookups: dict[str, dict[Any, Any]], tick: Tick = lambda: None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        derived = self._columns[type(origin.layout)]
        for number, row in enumerate(origin.read(self._names(derived.values()))):
            tick()
            yield number, _with_columns(lookups | row | {ROW: row, NUMBER: number}, derived, f"row {number}")

    def _names(self, derived: Iterable[Template]) -> frozenset[str] | None:
        """Columns that are used at all; None for "all of them"."""
        single = (template for template in (self._part_key, self._kind, self._choices) if template is not None)
        names = {name for used in (derived, self._keep.values(), self._texts.values(), single) for t in used for name in t.names}
        return None if ROW in names else frozenset(names)

    # --- the cut ---

    @property
    def _takes_first(self) -> bool:
        return self._rows.part is not None and self._rows.part.side == "first"

    def _key(self, columns: dict[str, Any], place: str) -> str:
        assert self._part_key is not None
        return str(self._part_key(columns, place))

    def _first_keys(self, origin: Origin, lookups: dict[str, dict[Any, Any]]) -> frozenset[str] | None:
        part = self._rows.part
        if part is None:
            return None
        keys = {self._key(columns, f"row {number}") for number, columns in self._columns_of(origin, lookups)}
        size = part.count if part.count is not None else round(cast(float, part.share) * len(keys))
        if not 0 < size < len(keys):
            raise UserError(f"{self._where}.part: {size} of {len(keys)} keys come first, which leaves one side empty")
        return frozenset(sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())[:size])

    # --- the example ---

    def _made(self, columns: dict[str, Any], place: str, number: int, name: str) -> Made:
        texts = {key: str(template(columns, place)).strip() for key, template in self._texts.items()}
        # A training example without a reference can still be learned from; the check of the responses counts it.
        for key in ("prompt", "response" if self._where.startswith("train.") else "answer"):
            if not texts[key]:
                raise UserError(f"{self._where}.{key}: empty at {place}; leave such rows out by a condition in `keep`")
        kind = self._kind(columns, place) if self._kind is not None else self._rows.answer_kind
        if kind not in ANSWER_KINDS:
            raise UserError(f"{self._where}.answer_kind: {kind!r} at {place}; expected one of {', '.join(ANSWER_KINDS)}")
        if kind == "program_input" and not texts.get("program"):
            raise UserError(f"{self._where}.program: needed at {place}, whose answer is of the kind program_input")
        choices = tuple(str(choice) for choice in self._choices(columns, place) or ()) if self._choices is not None else ()
        example = Example(
            id=f"{name}/{texts.get('id', number)}",
            prompt=texts["prompt"],
            response=texts.get("response", ""),
            reference=Reference(cast(AnswerKind, kind), texts["answer"], texts.get("program", "")),
            choices=choices,
            group=texts.get("group", ""),
        )
        return Made(example, texts.get("compared", texts["prompt"]))


def recipes(task: TaskFile, origin: str) -> dict[str, Recipe]:
    """A recipe for each `Rows` of the task, by its place in the file. Raises ConfigError that lists what is wrong in `origin`."""
    made: dict[str, Recipe] = {}
    problems: list[str] = []
    for where, rows in task.rows.items():
        try:
            made[where] = Recipe(rows, where)
        except ConfigError as error:
            problems += str(error).splitlines()
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{origin}: {count} in the templates\n" + "\n".join(f"  {problem}" for problem in problems))
    return made


def _with_columns(columns: dict[str, Any], derived: dict[str, Template], place: str) -> dict[str, Any]:
    for name, expression in derived.items():
        columns[name] = expression(columns, place)
    return columns
