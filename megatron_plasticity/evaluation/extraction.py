r"""Reading the answer out of a model's text.

The rules are the paper's and the only ones: correctness, majority vote and format rate all read what `extract_answer` returns.

1. The content of the last `\boxed{…}`. A box that is never closed (a text cut at its token limit) is not a box.
2. Without a box, the text after the last "answer is", and if that text has a ":", after its last ":".
3. Otherwise there is no answer, which counts as wrong. An empty span is no answer either.
"""

from __future__ import annotations

_BOX = r"\boxed{"
_PHRASE = "answer is"


def extract_answer(text: str) -> str | None:
    """The answer span of a response, stripped of white space, or None if it states none."""
    span = last_box(text)
    if span is None:
        _, found, after = text.rpartition(_PHRASE)
        span = after.rpartition(":")[2] if found else ""
    return span.strip() or None


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


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the one just before `start`, or None if the text ends first."""
    depth = 1
    position = start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1  # the next character is escaped
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None
