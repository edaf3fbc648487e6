"""Text of a Python installation: what is taken, what is left, and that it can be relied on."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from megatron_plasticity.config.data import PythonTextConfig
from megatron_plasticity.data.python_files import find_text_files, installation_roots
from megatron_plasticity.data.python_text import CODE, ENGLISH, python_text, split_module

MODULE = '''# Copyright of somebody
# All rights reserved.
"""Module docstring."""

import os


# About the function.
@decorator
def function(x):
    """Function docstring,
    in two lines."""
    return x  # kept


class Outer:
    """Outer docstring."""

    class Inner(Exception):
        """Inner docstring."""

    if os.name == "posix":

        async def method(self):
            "Method docstring."
            text = """not a docstring"""
            return text


def bare():
    """Only a docstring."""


def oneliner(): "On the line of the definition."
'''

SENTENCE = "This is one of the sentences in the documentation of a package, and it is number {}. "


def prose(start: int, sentences: int = 20) -> str:
    return "".join(SENTENCE.format(number) for number in range(start, start + sentences)).strip()


def function(name: str, docstring: str) -> str:
    return f'def {name}(value):\n    """{docstring}"""\n    result = value + value\n    return result.{name}\n'


@pytest.fixture
def installation(tmp_path: Path) -> list[tuple[Path, bool]]:
    """A standard library and two packages."""
    files = {
        "stdlib/pydoc_data/topics.py": f"topics = {{'assert': {prose(0)!r}, 'break': {prose(100)!r}, 'number': 3}}\n",
        "stdlib/json.py": function("loads", prose(200)),
        "stdlib/test/support.py": function("secret_test", prose(300)),
        "site/alpha/__init__.py": function("alpha", prose(400)),
        "site/alpha/copy.py": function("alpha", prose(400)),
        "site/alpha/guide.rst": prose(500),
        "site/alpha/LICENSE.md": prose(600),
        "site/alpha/numbers.txt": "3.14 2.71 1.41 " * 200,
        "site/alpha/names.txt": "\n".join(f"package.module.name{'x' * number}" for number in range(50)),
        "site/alpha-1.0.dist-info/METADATA": f"Name: alpha\nVersion: 1.0\n\n{prose(700)}",
        "site/alpha-1.0.dist-info/RECORD": prose(800),
        "site/megatron_plasticity/own.py": function("own", prose(900)),
        "site/megatron_plasticity-1.0.dist-info/METADATA": f"Name: own\n\n{prose(900)}",
        "site/beta.py": function("beta", prose(1000)),
        "site/.hidden/text.md": prose(1100),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return [(tmp_path / "stdlib", True), (tmp_path / "site", False)]


def test_docstrings_and_code_are_taken_apart() -> None:
    docstrings, code = split_module(MODULE)
    assert docstrings == [
        "Module docstring.",
        "Function docstring,\nin two lines.",
        "Outer docstring.",
        "Inner docstring.",
        "Method docstring.",
        "Only a docstring.",
        "On the line of the definition.",
    ]
    together = "\n\n\n".join(code)
    ast.parse(together)
    assert not any(line in together for docstring in docstrings for line in docstring.splitlines())
    assert "Copyright" not in together
    assert [unit.splitlines()[0] for unit in code if unit] == [
        "import os",
        "# About the function.",
        "class Outer:",
        "def bare():",
    ]
    for kept in ("return x  # kept", '"""not a docstring"""', "class Inner(Exception):\n        pass", "def bare():\n    pass"):
        assert kept in together


def test_what_is_text_and_what_is_not(installation: list[tuple[Path, bool]]) -> None:
    taken = python_text(PythonTextConfig(megabytes=1, code_fraction=0.5), 42, roots=installation)
    english = "\n".join(document.text for document in taken.documents if document.source == ENGLISH)
    code = "\n".join(document.text for document in taken.documents if document.source == CODE)
    present = {number for number in range(0, 1200, 100) if SENTENCE.format(number).strip() in english}
    assert present == {0, 100, 200, 400, 500, 700, 1000}
    for name in ("loads", "alpha", "beta"):
        assert code.count(f"def {name}(value):") == 1  # once, although alpha has a copy
    for left_out in ("sentences in the documentation", "secret_test", "def own", "topics ="):
        assert left_out not in code
    for left_out in ("3.14 2.71", "package.module"):
        assert left_out not in english
    assert english.count(SENTENCE.format(400).strip()) == 1


def test_all_there_is_when_there_is_less(installation: list[tuple[Path, bool]]) -> None:
    taken = python_text(PythonTextConfig(megabytes=100, code_fraction=0.4), 42, roots=installation)
    for source in (ENGLISH, CODE):
        size = sum(len(document.text.encode()) for document in taken.documents if document.source == source)
        assert taken.bytes_of(source) == size
        assert 0 < size < 20_000
    assert set(taken.bytes_by_package[CODE]) == {"python", "alpha", "beta"}
    assert python_text(PythonTextConfig(megabytes=1, code_fraction=0.4), 42, roots=[]).documents == []


def test_unreadable_files_are_counted_and_passed_over(installation: list[tuple[Path, bool]]) -> None:
    site = installation[1][0]
    before = python_text(PythonTextConfig(megabytes=1, code_fraction=0.4), 42, roots=installation)
    (site / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\n")
    (site / "old.py").write_text("print 'Python 2'\n")
    (site / "null.py").write_bytes(b"x = 1\0\n")
    (site / "deep.py").write_text("x = " + "(" * 5000 + ")" * 5000)
    (site / "gone.md").symlink_to(site / "nowhere.md")
    (site / "huge.md").write_text(prose(1200) * 1300)
    (site / "half.py").write_text(f'"""Half a character, \\ud800. {prose(1300)}"""\n')
    after = python_text(PythonTextConfig(megabytes=1, code_fraction=0.4), 42, roots=installation)
    assert after.unreadable_files == 4
    assert {document.text for document in after.documents} == {document.text for document in before.documents}


def test_the_selection_is_a_function_of_the_seed(installation: list[tuple[Path, bool]]) -> None:
    config = PythonTextConfig(megabytes=1, code_fraction=0.4)
    one, two = (python_text(config, 42, roots=installation).documents for _ in range(2))
    assert one == two
    assert [file.name for file in find_text_files(installation, 1)] != [file.name for file in find_text_files(installation, 2)]


def test_packages_take_turns(tmp_path: Path) -> None:
    for package, count in (("large", 50), ("small", 3)):
        (tmp_path / package).mkdir()
        for number in range(count):
            (tmp_path / package / f"module{number}.py").write_text("")
    groups = [file.group for file in find_text_files([(tmp_path, False)], 42)]
    assert sorted(groups[:6]) == ["large"] * 3 + ["small"] * 3


def test_one_file_cannot_fill_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "changes.md").write_text("\n\n".join(prose(20 * number) for number in range(200)))
    taken = python_text(PythonTextConfig(megabytes=10, code_fraction=0.4), 42, roots=[(tmp_path, False)])
    assert 40_000 <= taken.bytes_of(ENGLISH) < 45_000


def test_this_installation_has_text(tmp_path: Path) -> None:
    config = PythonTextConfig(megabytes=0.3, code_fraction=0.5)
    before = set(sys.modules)
    taken = python_text(config, 42)
    assert not {name.partition(".")[0] for name in set(sys.modules) - before}  # files are read, packages are not imported
    assert any(standard for _, standard in installation_roots())
    for source in (ENGLISH, CODE):
        assert 150_000 <= taken.bytes_of(source) < 160_000
        assert len({document.text for document in taken.documents}) == len(taken.documents)
