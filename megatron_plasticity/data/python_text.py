"""Real English and source code that every Python installation carries: nothing is downloaded, and no package is imported.

English is the docstrings of the standard library and the installed packages, their documentation files, the long descriptions in
their metadata, and the language reference behind `help()`. Code is their source with the docstrings cut out, so that no text
counts as both. What comes out depends on the installation and the seed, and on nothing else.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from megatron_plasticity.config.data import PythonTextConfig
from megatron_plasticity.data.documents import Document, document_digest
from megatron_plasticity.data.python_files import METADATA_FILES, TextFile, find_text_files, installation_roots

ENGLISH = "python_english"
CODE = "python_code"

# A document is made of neighbouring units of one file until it has this many characters; a longer unit is cut at blank lines.
_DOCUMENT_CHARACTERS = 1_000
_SHORTEST_UNIT = 40
_LARGEST_FILE = 2_000_000
# No file gives more than this to either kind of text: changelogs and generated code are long and all alike.
_MOST_CHARACTERS_PER_FILE = 40_000
_TOPICS_FILE = "pydoc_data/topics.py"  # the language reference is the exception: long, and the best prose there is

_FUNCTION_WORDS = frozenset(
    {"the", "a", "an", "of", "to", "in", "is", "for", "and", "or", "that", "this", "it", "be", "as", "with", "are", "by"}
)
_WORD = re.compile(r"[A-Za-z]+")
_SURROGATE = re.compile("[\ud800-\udfff]")  # a docstring can hold half a character, by escape


class Progress(Protocol):
    """What a long function tells about its advance."""

    def update(self, done: float, total: float, unit: str, **info: float | str) -> None: ...


@dataclass
class PythonText:
    """Documents of the installation, and where they came from."""

    documents: list[Document] = field(default_factory=list)
    bytes_by_package: dict[str, Counter[str]] = field(default_factory=lambda: {ENGLISH: Counter(), CODE: Counter()})
    """Source kind → package (`python` for the standard library) → bytes of UTF-8."""
    unreadable_files: int = 0

    def bytes_of(self, source: str) -> int:
        return self.bytes_by_package[source].total()


def python_text(
    config: PythonTextConfig,
    seed: int,
    roots: Iterable[tuple[Path, bool]] | None = None,
    progress: Progress | None = None,
) -> PythonText:
    """Take `config.megabytes` of text, or all there is when the installation has less.

    Files that cannot be read, or parsed as Python of this version, are counted and passed over.
    """
    wanted = {
        ENGLISH: config.megabytes * 1e6 * (1 - config.code_fraction),
        CODE: config.megabytes * 1e6 * config.code_fraction,
    }
    result = PythonText()
    seen: set[bytes] = set()
    for file in find_text_files(installation_roots() if roots is None else roots, seed):
        open_sources = [source for source in wanted if result.bytes_of(source) < wanted[source]]
        if not open_sources:
            break
        try:
            units = _read_units(file)
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
            # Not UTF-8, not Python of this version, nested too deeply for the parser, unreadable: other files have text enough.
            result.unreadable_files += 1
            continue
        package = "python" if file.group.startswith("python/") else file.group
        for source in open_sources:
            for text in _documents(_fresh(units[source], seen)):
                if result.bytes_of(source) >= wanted[source]:
                    break
                result.documents.append(Document(text, source))
                result.bytes_by_package[source][package] += len(text.encode("utf-8"))
        if progress is not None:
            taken = sum(min(result.bytes_of(source), wanted[source]) for source in wanted)
            progress.update(taken / 1e6, config.megabytes, "MB", stage="collecting Python text")
    return result


def _read_units(file: TextFile) -> dict[str, list[str]]:
    if file.path.is_symlink() or file.path.stat().st_size > _LARGEST_FILE:
        return {ENGLISH: [], CODE: []}
    text = file.path.read_text(encoding="utf-8-sig")
    if file.name == _TOPICS_FILE:
        return {ENGLISH: [unit for topic in _topics(text) for unit in _pieces(topic)], CODE: []}
    if file.path.suffix == ".py":
        english, code = split_module(text)
    else:
        body = text.partition("\n\n")[2] if file.path.name in METADATA_FILES else text
        english, code = [body], []
    return {
        ENGLISH: _first_units(unit for text in english for unit in _pieces(text) if _is_english(unit)),
        CODE: _first_units(unit for text in code for unit in _pieces(text) if _is_readable(unit)),
    }


def _first_units(units: Iterable[str]) -> list[str]:
    taken: list[str] = []
    length = 0
    for unit in units:
        if length >= _MOST_CHARACTERS_PER_FILE:
            break
        taken.append(unit)
        length += len(unit)
    return taken


def _topics(module: str) -> list[str]:
    """The texts of `help("topics")`: a module that is one dictionary of strings."""
    for node in ast.parse(module).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return [text for text in ast.literal_eval(node.value).values() if isinstance(text, str)]
    return []


def split_module(text: str) -> tuple[list[str], list[str]]:
    """Docstrings of a module, and its source without them, one text per top-level definition. Raises SyntaxError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        tree = ast.parse(text)
    docstrings: list[str] = []
    lines = text.split("\n")
    for node in (tree, *_definitions(tree)):
        if docstring := ast.get_docstring(node):
            docstrings.append(docstring)
            _cut_docstring(node, lines)
    starts = [_first_line(node, lines) for node in tree.body if isinstance(node, _Definition)]
    bounds = [_end_of_licence(lines), *starts, len(lines)]
    code = []
    for start, stop in pairwise(bounds):
        code.append("\n".join(line for line in lines[start:stop] if line != _CUT).strip("\n"))
    return docstrings, code


_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(node: ast.AST) -> Iterator[_Definition]:
    """Classes and functions below `node`, in source order. Only statements are visited: most of a tree is expressions."""
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, block, ()):
            if isinstance(child, _Definition):
                yield child
            yield from _definitions(child)


_CUT = "\0"  # cannot be a line of a Python source, which holds no null bytes


def _cut_docstring(node: ast.Module | _Definition, lines: list[str]) -> None:
    statement = node.body[0]
    first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
    indent = lines[first].encode()[: statement.col_offset].decode()
    lines[first : last + 1] = [_CUT] * (last + 1 - first)
    if indent.strip():  # `def f(): "docstring"`: rare, and without a line of its own the whole of it goes
        return
    if len(node.body) == 1 and not isinstance(node, ast.Module):
        lines[first] = f"{indent}pass"


def _first_line(node: _Definition, lines: list[str]) -> int:
    """Index of a definition's first line, its decorators and the comment above it included."""
    line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    while line > 0 and lines[line - 1].startswith("#"):
        line -= 1
    return line


def _end_of_licence(lines: list[str]) -> int:
    """Index of the first line after the comments that a file begins with: they repeat from file to file."""
    return next((number for number, line in enumerate(lines) if line.strip("\0 ") and not line.startswith("#")), len(lines))


def _pieces(text: str) -> Iterator[str]:
    """A text cut at blank lines into pieces of about the length of a document."""
    return _documents(re.split(r"\n[ \t]*\n", text.rstrip()))


def _is_readable(text: str) -> bool:
    """Not a table of numbers, not data in letters, not mostly another script, and writable as UTF-8."""
    if len(text) < _SHORTEST_UNIT or _SURROGATE.search(text):
        return False
    letters = sum(map(len, _WORD.findall(text)))
    spaces = text.count(" ") + text.count("\n")
    return letters + spaces >= 0.6 * len(text) and max(map(len, text.split()), default=0) <= 200


def _is_english(text: str) -> bool:
    words = _WORD.findall(text)
    function_words = sum(word.lower() in _FUNCTION_WORDS for word in words)
    return _is_readable(text) and function_words >= 0.08 * len(words)


def _fresh(units: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    """Units that were not met before; copies are common in docstrings and in code that packages share."""
    for unit in units:
        digest = document_digest(unit)
        if digest not in seen:
            seen.add(digest)
            yield unit


def _documents(units: Iterable[str]) -> Iterator[str]:
    """Neighbours joined by blank lines until they have the length of a document."""
    parts: list[str] = []
    length = 0
    for unit in units:
        parts.append(unit)
        length += len(unit)
        if length >= _DOCUMENT_CHARACTERS:
            yield "\n\n".join(parts)
            parts, length = [], 0
    if parts:
        yield "\n\n".join(parts)
