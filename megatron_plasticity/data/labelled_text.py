"""Labelled texts for linear probes: `topic` (real documentation, four subjects) and `polarity` (procedural reviews).

`topic` is made of paragraphs of the standard library's docstrings and of the language reference behind `help()`. Files are
parsed, never imported. A source document (a module, or one article of the reference) is on one side of the train/test split with
all its paragraphs, and a paragraph that several documents share counts once. How much there is depends on the installation: a
caller that asks for more gets what there is.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Literal

from megatron_plasticity.data.problems.split import on_test_side
from megatron_plasticity.data.reviews import draw_review

Split = Literal["train", "test"]

# Subject → modules and packages of the standard library. One that this Python version lacks is passed over.
_SUBJECTS = {
    "internet": "http urllib email socket ssl smtplib smtpd ftplib imaplib poplib nntplib telnetlib xmlrpc wsgiref socketserver "
    "mailbox cgi ipaddress html asyncio asyncore asynchat webbrowser netrc mimetypes base64",
    "interfaces": "tkinter turtle turtledemo idlelib curses cmd argparse optparse getopt",
    "language": "ast dis inspect typing tokenize lib2to3 importlib types symtable code codeop traceback pydoc doctest "
    "dataclasses abc enum pkgutil warnings runpy modulefinder compileall unittest bdb pdb",
    "files": "os shutil pathlib tempfile zipfile tarfile glob gzip bz2 lzma subprocess multiprocessing threading posixpath "
    "ntpath fnmatch filecmp fileinput stat _pyio codecs shelve dbm sqlite3 logging concurrent queue csv configparser plistlib "
    "pickle json",
}
_REFERENCE, _REFERENCE_SUBJECT = Path("pydoc_data/topics.py"), "language"
_POLARITIES = ("negative", "positive")
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test"})
_SHORTEST, _LONGEST = 80, 600  # characters of a paragraph
_TEST_SHARE = 1 / 3
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class LabelledText:
    text: str
    label: int
    """Index into the names of the classes."""


@dataclass(frozen=True)
class SourceDocument:
    """A document and the paragraphs of it that are long enough to be told apart."""

    name: str
    paragraphs: tuple[str, ...]


def label_names(name: str) -> tuple[str, ...]:
    """Classes of one of the two sets, by label."""
    return {"topic": tuple(_SUBJECTS), "polarity": _POLARITIES}[name]


def labelled_texts(name: str, split: Split, count: int, seed: int) -> list[LabelledText]:
    """Up to `count` distinct texts in an order drawn from `seed`, the classes in equal numbers (up to one text).

    Fewer come back when the set has fewer: check the length.
    """
    classes = len(label_names(name))
    wanted = [count // classes + (label < count % classes) for label in range(classes)]
    rng = Random(f"{seed}/{name}/{split}")
    texts = _draw_topic(split, wanted, rng) if name == "topic" else _draw_polarity(split, wanted, rng)
    rng.shuffle(texts)
    return texts


def _draw_topic(split: Split, wanted: list[int], rng: Random) -> list[LabelledText]:
    pools = [
        [paragraph for document in documents for paragraph in document.paragraphs]
        for documents in (split_documents(split, subject) for subject in _SUBJECTS)
    ]
    least = min(map(len, pools))  # the classes stay balanced even when one is small
    return [
        LabelledText(text, label)
        for label, (pool, number) in enumerate(zip(pools, wanted, strict=True))
        for text in rng.sample(pool, min(number, least))
    ]


def _draw_polarity(split: Split, wanted: list[int], rng: Random) -> list[LabelledText]:
    texts: dict[str, int] = {}
    for label, number in enumerate(wanted):
        found = 0
        while found < number:
            review = draw_review(rng, positive=bool(label))
            if on_test_side(review.key) == (split == "test") and review.text not in texts:
                texts[review.text] = label
                found += 1
    return [LabelledText(text, label) for text, label in texts.items()]


def split_documents(split: Split, subject: str) -> list[SourceDocument]:
    """Source documents of a subject on one side; in the order of their hashes, each goes to the side that lags behind."""
    sides: dict[str, list[SourceDocument]] = {"train": [], "test": []}
    sizes = {"train": 0, "test": 0}
    for document in sorted(_documents()[subject], key=lambda d: hashlib.sha256(d.name.encode()).digest()):
        size = len(document.paragraphs)
        total = sizes["train"] + sizes["test"] + size
        side = "test" if sizes["test"] + size / 2 <= total * _TEST_SHARE else "train"
        sides[side].append(document)
        sizes[side] += size
    return sides[split]


@cache
def _documents() -> dict[str, list[SourceDocument]]:
    """All source documents by subject; a paragraph stays with the first document that has it."""
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    documents: dict[str, list[SourceDocument]] = {}
    for subject in _SUBJECTS:
        documents[subject] = []
        for name, text in _texts(library, subject):
            paragraphs = dict.fromkeys(paragraph for paragraph in _paragraphs(text) if paragraph not in seen)
            seen.update(paragraphs)
            if paragraphs:
                documents[subject].append(SourceDocument(name, tuple(paragraphs)))
    return documents


def _texts(library: Path, subject: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each source document of a subject."""
    for module in _SUBJECTS[subject].split():
        single = library / f"{module}.py"
        files = [single] if single.is_file() else sorted((library / module).rglob("*.py"))
        for file in files:
            relative = file.relative_to(library)
            if not _SKIPPED_FOLDERS.intersection(relative.parts):
                yield relative.as_posix(), "\n\n".join(_docstrings(_parse(file)))
    if subject == _REFERENCE_SUBJECT:
        for name, text in _reference(library / _REFERENCE).items():
            yield f"{_REFERENCE.as_posix()}#{name}", text


def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return ast.Module(body=[], type_ignores=[])  # templates and broken files hold no documentation


def _docstrings(module: ast.Module) -> Iterator[str]:
    # In the order of `ast.walk`, but without expressions, which are most of a tree.
    waiting: deque[ast.AST] = deque([module])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, block, ()))


def _reference(file: Path) -> dict[str, str]:
    """Articles of the language reference: the dictionary literal that the file assigns to `topics`."""
    for node in _parse(file).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return {str(name): str(text) for name, text in ast.literal_eval(node.value).items()}
    return {}


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of prose in one line each: no interpreter sessions, no tables, no headings."""
    for paragraph in _BLANK_LINES.split(text):
        line = " ".join(paragraph.split())
        letters = sum(character.isalpha() or character == " " for character in line)
        if _SHORTEST <= len(line) <= _LONGEST and ">>>" not in line and letters > 0.8 * len(line):
            yield line
