r"""The expressions and templates of task files: Jinja in a sandbox, with a few words of our own.

| filter | gives |
|---|---|
| `lettered` | the lines "A. first", "B. second", … of a list of options |
| `letter` | the letter of an option's number, 0 for A |
| `boxed` | `\boxed{…}` around a text |
| `last_box` | content of the last `\boxed{…}` of a text, "" if it has none |
| `stated_answer(kind)` | what the answer extraction reads in a text, "" if nothing |
| `substituted(pattern, by)` | the text with every match of a regular expression replaced |
| `captured(pattern)` | the first group of the last match of a regular expression, "" if there is none |

A column that is not there is an error, not an empty text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox

from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.extraction import extract_answer, last_box


def lettered(options: Sequence[Any]) -> str:
    """The options as lines, each with its letter."""
    return "\n".join(f"{letter(number)}. {option}" for number, option in enumerate(options))


def letter(number: int) -> str:
    """A for 0; raises ValueError beyond Z."""
    if not 0 <= int(number) < len(ascii_uppercase):
        raise ValueError(f"no letter for option {number}")
    return ascii_uppercase[int(number)]


def boxed(text: object) -> str:
    r"""`\boxed{text}`."""
    return rf"\boxed{{{text}}}"


def _captured(text: str, pattern: str) -> str:
    found = re.findall(pattern, text)
    return (found[-1] if isinstance(found[-1], str) else found[-1][0]) if found else ""


def environment() -> jinja2.Environment:
    """The sandbox with our filters in it."""
    made = jinja2.sandbox.SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {
        "lettered": lettered,
        "letter": letter,
        "boxed": boxed,
        "last_box": lambda text: last_box(text) or "",
        "stated_answer": lambda text, kind: extract_answer(text, kind) or "",
        "substituted": lambda text, pattern, by: re.sub(pattern, by, text),
        "captured": _captured,
    }
    return made


_ENVIRONMENT = environment()


class Template:
    """One expression or template of a task file, compiled."""

    def __init__(self, source: str, where: str, is_expression: bool) -> None:
        """`where` names the key in messages. Raises UserError for wrong syntax or an unknown filter."""
        self._where, self._source = where, source
        whole = "{{ (" + source + ") }}" if is_expression else source
        try:
            self.names: frozenset[str] = frozenset(jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(whole)))
            """The columns and lookups that it uses."""
            if is_expression:
                expression = _ENVIRONMENT.compile_expression(source, undefined_to_none=False)
                self._evaluate: Any = lambda columns: expression(**columns)
            else:
                template = _ENVIRONMENT.from_string(source)
                self._evaluate = lambda columns: template.render(**columns)
        except jinja2.TemplateError as error:
            raise UserError(f"{where}: {(error.message or str(error)).rstrip('.')} in {source!r}") from None

    def __call__(self, columns: Mapping[str, Any], row: str) -> Any:
        """Value for a row; `row` names it in messages. Raises UserError when a column is missing or a value does not fit."""
        try:
            value = self._evaluate(columns)
            if isinstance(value, jinja2.Undefined):
                str(value)  # raises, and says what is undefined
        except Exception as error:  # whatever an expression can do wrong
            known = ", ".join(columns)
            raise UserError(
                f"{self._where}: {type(error).__name__}: {error} in {self._source!r} at {row}; its columns are: {known}"
            ) from None
        return value
