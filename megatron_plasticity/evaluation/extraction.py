r"""Reading the answer out of a model's text.

Correctness, majority vote and format rate all read what `extract_answer` returns. Under both rules an answer is

1. the content of the last `\boxed{…}`; without a box,
2. what follows the last statement of an answer.

Otherwise there is no answer, which counts as wrong. An empty span is no answer either.

| | `own` | `paper`: as the public harness reads it |
|---|---|---|
| a last box that never closes (text cut at its limit) | is not a box: the one before it counts | no box counts |
| an empty last box | no answer | no box counts |
| `\{` and `\}` in a box | text | braces like any other |
| a statement of an answer | "answer is", "answer:", in any case; "####" and a number on a line of its own | "answer is" |
| where it ends | with its sentence, line, formula or code block, by kind | with the text |
| Markdown around it | left out: "**24.**" says "24" | a part of it |
| multiple choice: a last box without a letter | gives way to a statement with one | counts |
| a colon in it | stays, but for one right after the phrase | the answer is what follows the last one |

The harness reads the last box by its own words, so "\boxed {3}" gives "{3}".
"""

from __future__ import annotations

import re
from typing import Literal

from megatron_plasticity.config.tasks import AnswerKind
from megatron_plasticity.evaluation.answers import PUNCTUATION, choice_letter

Rules = Literal["own", "paper"]
"""How answers are read and compared: this project's rules, or those of the paper's public harness."""

_BOX = r"\boxed{"
_PAPER_BOX = r"\boxed"
_PAPER_PHRASE = "answer is"
_PHRASE = re.compile(
    r"\banswer(?:\s+is\b|\s*(?:\*\*)?\s*:(?:\*\*)?)|^####(?=[ \t]*[-+$\\(.]*\d[^\n]*$)", re.IGNORECASE | re.MULTILINE
)
_BLOCK = re.compile(r"```[A-Za-z]*\n(.*?)\n?```", re.DOTALL)
_DISPLAY = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]", re.DOTALL)
_LITERALS: tuple[AnswerKind, ...] = ("literal", "program_input")
_PAIRS = (("{", "}"), (r"\begin", r"\end"), (r"\[", r"\]"), (r"\(", r"\)"))
_MARKER = r"(?:\*\*|__|\*|_)"
_CLOSING_MARKER = re.compile(rf"{_MARKER}[:\s]+")
_EMPHASISED = re.compile(rf"({_MARKER})(?=[^\s*_])(.+?)(?<=\S)\1(?![\w*])(.*)", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<!\b[A-Za-z])(?<!\b[DMS][rst])(?<!\bMrs)\.(?=\s|\*\*|$)|\n\s*\n")
"""The end of a sentence; after a single letter a full stop belongs to an initial (4:30 P.M.) or an option, after Mr to a name."""


def extract_answer(text: str, kind: AnswerKind = "text", rules: Rules = "own") -> str | None:
    """The answer span of a response, stripped of white space, or None if it states none."""
    span = _span_of_paper(text) if rules == "paper" else _span(text, kind)
    return span.strip() or None


def _span(text: str, kind: AnswerKind) -> str:
    box = last_box(text)
    if box is not None and not (kind == "choice" and choice_letter(box) is None):
        return box
    phrase = _last_phrase(text, kind)
    statement = "" if phrase is None else _statement(text[phrase.end() :], kind)
    return statement if box is None or choice_letter(statement) is not None else box


def _last_phrase(text: str, kind: AnswerKind) -> re.Match[str] | None:
    """The last words that announce an answer; for literals not such as stand in a string of an answer before them."""
    phrases = list(_PHRASE.finditer(text))
    while kind in _LITERALS and len(phrases) > 1:
        between = text[phrases[-2].end() : phrases[-1].start()]
        if "\n" in between.lstrip() or not (between.count("'") % 2 or between.count('"') % 2):
            break
        phrases.pop()
    return phrases[-1] if phrases else None


def _statement(text: str, kind: AnswerKind) -> str:
    """What the text says first: a code block, displayed mathematics, a line or a sentence."""
    text = text.lstrip(" \t\n:")
    if (closing := _CLOSING_MARKER.match(text)) is not None:  # of bold type that began before the answer
        text = text[closing.end() :]
    block = (_BLOCK if kind in _LITERALS else _DISPLAY).match(text)
    if block is not None:
        return next(part for part in block.groups() if part is not None)
    text = _line(text, formulas=kind == "maths")
    if kind not in _LITERALS:
        text = _SENTENCE_END.split(_out_of_emphasis(text), maxsplit=1)[0]
    text = text.strip()
    if text.count("**") % 2:  # bold type that began before the answer, or ends after it
        text = text.removeprefix("**") if text.startswith("**") else text.removesuffix("**")
    elif kind not in (*_LITERALS, "maths") and text.count("*") % 2:
        text = text.removesuffix("*")
    return text


def _line(text: str, formulas: bool) -> str:
    """The first line; with `formulas` as many lines as it takes to close what is open."""
    lines = text.split("\n")
    whole = lines[0]
    for line in lines[1:] if formulas else ():
        if all(whole.count(opening) == whole.count(closing) for opening, closing in _PAIRS) and whole.count("$") % 2 == 0:
            break
        whole += "\n" + line
    return whole


def _out_of_emphasis(text: str) -> str:
    """The inside of bold or italic type that the text begins with, if the sentence ends with it: `**24.**`, `*Yes*, since …`."""
    match = _EMPHASISED.match(text)
    if match is None:
        return text
    _, inside, rest = match.groups()
    return inside if inside[-1] in ".!?" or (rest.strip() or ".")[0] in PUNCTUATION else text


def _span_of_paper(text: str) -> str:
    box = _last_box_of_paper(text)
    if box:
        return box
    _, found, after = text.rpartition(_PAPER_PHRASE)
    return after.rpartition(":")[2] if found else ""


def _last_box_of_paper(text: str) -> str:
    """Content of the last box if it closes and is not empty, by the harness's count of braces; else an empty text."""
    start = text.rfind(_PAPER_BOX)
    if start < 0:
        return ""
    content_start = start + len(_PAPER_BOX)
    first_brace = text.find("{", content_start)
    content_end = None if first_brace < 0 else _closing_brace(text, first_brace + 1, escapes=False)
    if content_end is None:
        return ""
    if text[content_start] == " ":
        return text[content_start + 1 : content_end + 1]
    return text[content_start + 1 : content_end] if first_brace == content_start else ""


def last_box(text: str) -> str | None:
    r"""Content of the last closed `\boxed{…}`; braces may nest, and `\{` and `\}` are text. None if there is no such box."""
    start = text.rfind(_BOX)
    while start >= 0:
        content_start = start + len(_BOX)
        content_end = _closing_brace(text, content_start)
        if content_end is not None:
            return text[content_start:content_end]
        start = text.rfind(_BOX, 0, start)
    return None


def _closing_brace(text: str, start: int, escapes: bool = True) -> int | None:
    """Index of the brace that closes the one just before `start`, or None if the text ends first."""
    depth = 1
    position = start
    while position < len(text):
        character = text[position]
        if character == "\\" and escapes:
            position += 1  # the next character is escaped
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None
