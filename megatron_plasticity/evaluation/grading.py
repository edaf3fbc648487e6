r"""Whether an extracted answer is right, and whether two answers are the same.

Both questions go through one `equivalent`, so that majority vote and correctness read answers in the same way.

| kind | same when |
|---|---|
| `number` | the same rational number exactly (`plain_number`; a percent sign is dropped), or the same text |
| `choice`, `yes_no_maybe` | the same words: cut at the first "." that ends a sentence, final punctuation stripped, case ignored |
| `maths` | the same text, or the same plain number exactly, or equal for math-verify in either direction (`eval` extra) |

`maths` without math-verify keeps its exact part: plain numbers and fractions (`1/2`, `\frac{1}{2}`, `0.5`) by value, anything
else by text. With math-verify, too, plain numbers that differ by more than its rounding are told apart here, which saves 7 ms an
item and changes no verdict. A task's results name the grader that was used (`Grader.name`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from types import TracebackType
from typing import Self

from megatron_plasticity.data.problems.problem import AnswerKind
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.math_pool import MathPool, math_verify_installed

_PUNCTUATION = ".,;:!?"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_PLAIN_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\$?(?:\\[dt]?frac\{{(?P<top>-?{_DECIMAL})\}}\{{(?P<bottom>-?{_DECIMAL})\}}"
    rf"|(?P<value>{_DECIMAL})(?:/(?P<divisor>{_DECIMAL}))?)"
)
_SENTENCE_END = re.compile(r"\.(?!\d)")
_LONGEST_NUMBER = 200
_ROUNDING = Fraction(1, 10**5)
"""math-verify compares floats rounded to 6 digits; numbers further apart than this it never calls equal."""


def plain_number(text: str) -> Fraction | None:
    r"""The exact value of a plain number such as `-1,234.50`, `$3.`, `2/3` or `\frac{-2}{3}`, or None for anything else.

    Currency signs, thousands separators, dollar signs around mathematics, and final punctuation are dropped.
    """
    text = text.replace("\\$", "").replace("−", "-").lstrip(" \t\n$").rstrip(f" \t\n${_PUNCTUATION}")
    match = _PLAIN_NUMBER.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    if match is None:
        return None
    numerator = _fraction(match["top"] or match["value"])
    denominator = _fraction(match["bottom"] or match["divisor"] or "1")
    if denominator == 0:
        return None
    return (-1 if match["sign"] == "-" else 1) * numerator / denominator


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def plain_words(text: str) -> str:
    """Canonical form of a choice or a yes/no/maybe: up to the end of the first sentence, no final punctuation, one case."""
    sentence = _SENTENCE_END.split(text.strip(), maxsplit=1)[0]
    return _one_spaced(sentence).rstrip(_PUNCTUATION + " ").casefold()


def _one_spaced(text: str) -> str:
    return " ".join(text.split())


class Grader:
    """Compares answers; remembers what it compared, and owns the math-verify processes. Close it, or use it in a `with` block."""

    def __init__(self, workers: int = 1, math_verify: bool | None = None) -> None:
        """`math_verify`: use it or not; by default if it is installed."""
        if math_verify and not math_verify_installed():
            raise UserError("math-verify is not installed; install the `eval` extra: pip install 'megatron-plasticity[eval]'")
        use_library = math_verify_installed() if math_verify is None else math_verify
        self._pool = MathPool(workers) if use_library else None
        self._verified: dict[frozenset[str], bool] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the math-verify processes."""
        if self._pool is not None:
            self._pool.close()

    def name(self, kind: AnswerKind) -> str:
        """How answers of this kind are compared: `math-verify`, `exact-number` or `words`."""
        if kind == "maths" and self._pool is not None:
            return "math-verify"
        return "exact-number" if kind in ("maths", "number") else "words"

    def grade(self, kind: AnswerKind, extracted: str | None, answer: str) -> bool:
        """Whether the extracted answer is right; None (no answer) is wrong."""
        return extracted is not None and self.equivalent(kind, extracted, answer)

    def grade_all(self, kind: AnswerKind, pairs: Sequence[tuple[str | None, str]]) -> list[bool]:
        """`grade` of many (extracted, answer) pairs; each distinct pair that needs math-verify goes to the pool once."""
        self._verify(
            [(a, b) for a, b in dict.fromkeys(pairs) if a is not None and _equal_by_form(kind, a, b) is None],
        )
        return [self.grade(kind, extracted, answer) for extracted, answer in pairs]

    def equivalent(self, kind: AnswerKind, a: str, b: str) -> bool:
        """Whether two answers are the same answer. Symmetric; not transitive for `maths`."""
        verdict = _equal_by_form(kind, a, b)
        if verdict is not None:
            return verdict
        self._verify([(a, b)])
        return self._verified.get(frozenset((a, b)), False)

    def _verify(self, pairs: Sequence[tuple[str, str]]) -> None:
        unknown = [pair for pair in pairs if frozenset(pair) not in self._verified]
        if self._pool is None or not unknown:
            return
        for pair, verdict in zip(unknown, self._pool.equal_all(unknown), strict=True):
            self._verified[frozenset(pair)] = verdict


def _equal_by_form(kind: AnswerKind, a: str, b: str) -> bool | None:
    """The verdict where the texts alone decide it; None where it takes math-verify."""
    if kind in ("choice", "yes_no_maybe"):
        return plain_words(a) == plain_words(b)
    if _one_spaced(a) == _one_spaced(b):
        return True
    if kind == "number":
        a, b = _without_percent(a), _without_percent(b)
    first, second = plain_number(a), plain_number(b)
    if first is None or second is None:
        return False if kind == "number" else None
    if kind == "number" or first == second or abs(first - second) > _ROUNDING:
        return first == second
    return None


def _without_percent(text: str) -> str:
    return text.rstrip(f" ${_PUNCTUATION}").removesuffix("%").removesuffix("\\")


def grade(kind: AnswerKind, extracted: str | None, answer: str) -> bool:
    """`Grader.grade` for a single answer."""
    with Grader() as grader:
        return grader.grade(kind, extracted, answer)


def equivalent(kind: AnswerKind, a: str, b: str) -> bool:
    """`Grader.equivalent` for a single pair."""
    with Grader() as grader:
        return grader.equivalent(kind, a, b)
