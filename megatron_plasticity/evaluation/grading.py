r"""Whether an extracted answer is right, and whether two answers are the same.

Correctness and majority vote read the same extracted text and, but for `program_input`, ask the same question of it.

| kind | `own` rules: same when |
|---|---|
| `number` | the same rational number exactly (`plain_number`; a percent sign is dropped), or the same text |
| `maths` | the same text, the same plain number exactly, or equal for math-verify in either direction; never in two bases |
| `choice` | the same letter (`choice_letter`); without letters, the same words |
| `yes_no_maybe` | the same verdict (`verdict_word`); without one, the same words |
| `text` | the same words (`plain_text`) |
| `literal` | equal Python values, by `==` |
| `program_input` | right if the program gives the expected output, in the sandbox; the same if the same arguments |

The `paper` rules are the public harness's: numbers and mathematics by math-verify on the bare text; choices and yes/no/maybe by
`plain_words`; text in one case without final punctuation; literals by `==` after quotes are stripped, unreadable ones as text.

`maths` without math-verify keeps its exact part: plain numbers and fractions (`1/2`, `\frac{1}{2}`, `0.5`) by value, anything
else by text. With math-verify, too, plain numbers that differ by more than its rounding are told apart here, which saves 7 ms an
item; it also tells apart small numbers (0.0000672 and 0.0000673) that its rounding makes equal. A task's results name the grader
that was used (`Grader.name`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from fractions import Fraction
from types import TracebackType
from typing import Self

from megatron_plasticity.config.tasks import AnswerKind
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.answers import (
    PUNCTUATION,
    choice_letter,
    number_base,
    one_spaced,
    plain_number,
    plain_text,
    plain_words,
    unwrapped,
    verdict_word,
    without_percent,
)
from megatron_plasticity.evaluation.extraction import Rules
from megatron_plasticity.evaluation.literals import equal_values, literal_of_paper, read_arguments, read_literal, same_arguments
from megatron_plasticity.evaluation.math_pool import MathPool, bare_math_verify_equal, math_verify_equal, math_verify_installed
from megatron_plasticity.evaluation.sandbox import Call, Sandbox
from megatron_plasticity.evaluation.tasks.task import Reference

_ROUNDING = Fraction(1, 10**5)
"""math-verify rounds to 6 decimals. Plain numbers that differ by more than this, or by more than this share, are different."""
_BARE_NUMBER = re.compile(r"-?(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d+)?\.?")
_COMPARISONS = {"own": math_verify_equal, "paper": bare_math_verify_equal}


class Grader:
    """Compares answers, and remembers what it compared and ran. It owns processes: close it, or use it in a `with` block."""

    def __init__(self, workers: int = 1, math_verify: bool | None = None) -> None:
        """`workers`: processes at a time. `math_verify`: use it or not; by default if it is installed."""
        if math_verify and not math_verify_installed():
            raise UserError("math-verify is not installed; install the `eval` extra: pip install 'megatron-plasticity[eval]'")
        use_library = math_verify_installed() if math_verify is None else math_verify
        self._pools = {rules: MathPool(workers, compare=compare) for rules, compare in _COMPARISONS.items() if use_library}
        self._sandbox = Sandbox(workers)
        self._verified: dict[tuple[Rules, frozenset[str]], bool] = {}
        self._gives: dict[tuple[Call, str], bool] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the math-verify processes."""
        for pool in self._pools.values():
            pool.close()

    def name(self, kind: AnswerKind, rules: Rules = "own") -> str:
        """How answers of this kind are compared: `math-verify`, `exact-number`, `words`, `python-literal` or `program`."""
        if kind == "maths" or (kind == "number" and rules == "paper"):
            return "math-verify" if self._pools else "exact-number"
        return {"number": "exact-number", "literal": "python-literal", "program_input": "program"}.get(kind, "words")

    def can_grade(self, kinds: Iterable[AnswerKind], rules: Rules) -> bool:
        """Whether answers of all these kinds can be compared by these rules: the paper's need math-verify for numbers."""
        return rules == "own" or bool(self._pools) or not {"number", "maths"}.intersection(kinds)

    def check(self, kinds: Collection[AnswerKind], rules: Rules) -> None:
        """Find out now what grading these kinds would find out.

        Raises UserError if programs cannot be confined here, or math-verify is needed and not installed.
        """
        if not self.can_grade(kinds, rules):
            raise UserError(
                "paper_compat=true compares numbers and mathematics by math-verify, which is not installed; install the `eval` "
                "extra: pip install 'megatron-plasticity[eval]'"
            )
        if "maths" in kinds and self._pools:
            self._pools[rules].equal_all([("1", "1")])
        if "program_input" in kinds:
            self._sandbox.check_confinement()

    def grade(self, reference: Reference, extracted: str | None, rules: Rules = "own") -> bool:
        """Whether the extracted answer is right; None (no answer) is wrong."""
        return self.grade_all([reference], [extracted], rules)[0]

    def grade_all(self, references: Sequence[Reference], extracted: Sequence[str | None], rules: Rules = "own") -> list[bool]:
        """`grade` of many answers, each against its reference; what takes a process is done once and by all workers.

        Raises UserError if a program must be run on a machine that cannot confine it.
        """
        pairs = [(reference, answer) for reference, answer in zip(references, extracted, strict=True)]
        answered = [(reference, answer) for reference, answer in pairs if answer is not None]
        self._run([call for pair in answered if pair[0].kind == "program_input" and (call := _call(*pair)) is not None])
        self._verify(
            [(answer, ref.answer) for ref, answer in answered if _needs_maths(ref.kind, answer, ref.answer, rules)], rules
        )
        return [answer is not None and self._is_right(reference, answer, rules) for reference, answer in pairs]

    def _is_right(self, reference: Reference, answer: str, rules: Rules) -> bool:
        if reference.kind == "program_input":
            call = _call(reference, answer)
            return call is not None and self._gives[call]
        return self.equivalent(reference, answer, reference.answer, rules)

    def equivalent_all(self, pairs: Sequence[tuple[Reference, str, str]], rules: Rules = "own") -> list[bool]:
        """`equivalent` of many pairs; what takes a process is done by all workers."""
        self._verify([(a, b) for reference, a, b in pairs if _needs_maths(reference.kind, a, b, rules)], rules)
        return [self.equivalent(*pair, rules) for pair in pairs]

    def equivalent(self, reference: Reference, a: str, b: str, rules: Rules = "own") -> bool:
        """Whether two answers to a question of the reference's kind are the same. Symmetric; not transitive for `maths`."""
        if reference.kind == "program_input":
            return same_arguments(a, b)
        verdict = _equal_by_form(reference.kind, a, b, rules)
        if verdict is not None:
            return verdict
        self._verify([(a, b)], rules)
        return self._verified.get((rules, frozenset((a, b))), False)

    def _verify(self, pairs: Sequence[tuple[str, str]], rules: Rules) -> None:
        unknown = {key: pair for pair in pairs if (key := (rules, frozenset(pair))) not in self._verified}
        if unknown and self._pools:
            self._verified.update(zip(unknown, self._pools[rules].equal_all(list(unknown.values())), strict=True))

    def _run(self, calls_and_expected: Sequence[tuple[Call, str]]) -> None:
        unknown = [pair for pair in dict.fromkeys(calls_and_expected) if pair not in self._gives]
        calls = list(dict.fromkeys(call for call, _ in unknown))
        values = dict(zip(calls, self._sandbox.run_all(calls), strict=True))
        for call, expected in unknown:
            value, wanted = values[call], read_literal(expected)
            self._gives[call, expected] = value is not None and wanted is not None and equal_values(value.value, wanted.value)


def _call(reference: Reference, answer: str) -> tuple[Call, str] | None:
    """What to run and the output that it must give; None if the answer is no argument list."""
    arguments = read_arguments(answer)
    return None if arguments is None else (Call(reference.program, arguments), reference.answer)


def _needs_maths(kind: AnswerKind, a: str, b: str, rules: Rules) -> bool:
    return kind in ("number", "maths") and _equal_by_form(kind, a, b, rules) is None


def _equal_by_form(kind: AnswerKind, a: str, b: str, rules: Rules) -> bool | None:
    """The verdict where the texts alone decide it; None where it takes math-verify."""
    return _equal_by_form_in_paper(kind, a, b) if rules == "paper" else _equal_by_own_form(kind, a, b)


def _equal_by_own_form(kind: AnswerKind, a: str, b: str) -> bool | None:
    if kind in ("choice", "yes_no_maybe"):
        read = choice_letter if kind == "choice" else verdict_word
        first, second = read(a), read(b)
        return first == second and (first is not None or plain_words(unwrapped(a)) == plain_words(unwrapped(b)))
    if kind == "text":
        return plain_text(a) == plain_text(b)
    if kind == "literal":
        first, second = read_literal(a), read_literal(b)
        return first is second and a == b if first is None or second is None else equal_values(first.value, second.value)
    return _equal_numbers(kind, a, b)


def _equal_numbers(kind: AnswerKind, a: str, b: str) -> bool | None:
    if one_spaced(a) == one_spaced(b):
        return True
    if kind == "number":
        a, b = without_percent(unwrapped(a)), without_percent(unwrapped(b))
    first, second = plain_number(a), plain_number(b)
    if kind == "maths" and None not in (bases := (number_base(a), number_base(b))) and bases[0] != bases[1]:
        return False  # math-verify drops the index
    if first is None or second is None:
        return False if kind == "number" else None
    if kind == "number" or first == second or abs(first - second) > _ROUNDING * min(1, abs(first), abs(second)):
        return first == second
    return None


def _equal_by_form_in_paper(kind: AnswerKind, a: str, b: str) -> bool | None:
    if kind in ("number", "maths"):
        return _equal_bare_numbers(a, b)
    if kind == "literal":
        return equal_values(literal_of_paper(a), literal_of_paper(b))
    if kind == "text":
        return one_spaced(a).rstrip(PUNCTUATION).lower() == one_spaced(b).rstrip(PUNCTUATION).lower()
    return plain_words(a) == plain_words(b)


def _equal_bare_numbers(a: str, b: str) -> bool | None:
    """The harness's verdict on numbers without signs of currency and the like, which spares math-verify most of its work."""
    if not (_BARE_NUMBER.fullmatch(a) and _BARE_NUMBER.fullmatch(b)):
        return None
    first, second = plain_number(a), plain_number(b)
    if first is None or second is None or 0 < abs(first - second) <= _ROUNDING:
        return None
    return first == second
