from __future__ import annotations

import random
from fractions import Fraction

import pytest

from megatron_plasticity.data.problems.problem import AnswerKind
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation import grading
from megatron_plasticity.evaluation.extraction import extract_answer
from megatron_plasticity.evaluation.grading import Grader, equivalent, grade, plain_number
from megatron_plasticity.evaluation.math_pool import math_verify_equal, math_verify_installed

needs_math_verify = pytest.mark.skipif(not math_verify_installed(), reason="needs the `eval` extra")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", Fraction(42)),
        (" 42. ", Fraction(42)),
        ("-1,234.50", Fraction(-2469, 2)),
        ("$1,000,000", Fraction(1_000_000)),
        (r"\$5", Fraction(5)),
        ("-$5", Fraction(-5)),
        ("$7$.", Fraction(7)),
        (".5", Fraction(1, 2)),
        ("−3", Fraction(-3)),
        ("+3", Fraction(3)),
        ("3/4", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"\tfrac{-3}{4}", Fraction(-3, 4)),
        ("0.1", Fraction(1, 10)),
    ],
)
def test_plain_numbers_are_exact(text: str, value: Fraction) -> None:
    assert plain_number(text) == value


@pytest.mark.parametrize(
    "text", ["", "x", "4 apples", "1,23", "1/0", r"\frac{1}{0}", "1 2", "--1", "1e3", "1/2/3", "4.", "x=5", "50%", "9" * 5000]
)
def test_other_texts_are_not_plain_numbers(text: str) -> None:
    assert plain_number(text) == (Fraction(4) if text == "4." else None)


@pytest.mark.parametrize(
    ("kind", "extracted", "answer", "correct"),
    [
        ("number", "1,234.", "1234", True),
        ("number", "42.0", "42", True),
        ("number", r"50\%", "50", True),
        ("number", "50%.", "50", True),
        ("number", "50%", "0.5", False),
        ("number", "142", "42", False),
        ("number", "42 apples", "42", False),
        ("number", "9" * 5000, "42", False),
        ("number", None, "42", False),
        ("choice", "B", "B", True),
        ("choice", "b. The liver", "B", True),
        ("choice", "B,", "B", True),
        ("choice", "AB", "B", False),
        ("choice", "3.5 mg", "3.2 mg", False),  # a decimal point does not end a sentence
        ("choice", "3.5 mg.", "3.5 MG", True),
        ("yes_no_maybe", "No.", "no", True),
        ("yes_no_maybe", "yes. No doubt", "yes", True),
        ("yes_no_maybe", "unknown", "no", False),
        ("yes_no_maybe", "not clear", "no", False),
        ("yes_no_maybe", "maybe!", "maybe", True),
        ("yes_no_maybe", "", "no", False),
    ],
)
def test_number_choice_and_yes_no_maybe(kind: AnswerKind, extracted: str | None, answer: str, correct: bool) -> None:
    assert grade(kind, extracted, answer) is correct


@pytest.mark.parametrize(
    ("extracted", "answer", "correct"),
    [
        ("0.5", r"\frac{1}{2}", True),
        ("-3/2", r"\frac{-3}{2}", True),
        (" 2x  + 1", "2x + 1", True),
        ("7", "8", False),
        ("x=5", "5", False),  # beyond the exact part
        (None, "5", False),
    ],
)
def test_maths_without_math_verify(extracted: str | None, answer: str, correct: bool) -> None:
    with Grader(math_verify=False) as grader:
        assert grader.grade("maths", extracted, answer) is correct
        assert grader.name("maths") == "exact-number"


@needs_math_verify
def test_maths_with_math_verify() -> None:
    cases = [
        ("x=5", "5", True),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"50\%", "0.5", True),
        (r"50\%", "50", True),  # math-verify takes a percentage both ways
        ("(1, 2)", "(1,2)", True),
        (r"\frac12", "0.5", True),
        ("x+1", "1+x", True),
        ("x+1", "x+2", False),
        ("0.333333", "1/3", True),  # its rounding to 6 digits
        ("True", "True", True),  # it can read neither; the same text is the same answer
        (None, "5", False),
    ]
    with Grader() as grader:
        assert grader.name("maths") == "math-verify"
        verdicts = grader.grade_all("maths", [(extracted, answer) for extracted, answer, _ in cases])
        assert verdicts == [correct for *_, correct in cases]
        assert grader.equivalent("maths", "5", "x=5")  # either direction


@needs_math_verify
def test_the_exact_short_cut_changes_no_verdict_of_math_verify() -> None:
    numbers = random.Random(0)

    def some_number() -> str:
        top, bottom = numbers.randint(-6, 6), numbers.randint(1, 4)
        forms = [str(top), f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}", f"{top}.{bottom}", f"{top},000", f"{top}.50"]
        return numbers.choice(forms)

    agreed = 0
    for _ in range(400):
        a, b = some_number(), some_number()
        verdict = grading._equal_by_form("maths", a, b)
        assert verdict is not None, (a, b)
        assert verdict == math_verify_equal(a, b), (a, b)
        agreed += verdict
    assert agreed > 5


@pytest.mark.parametrize("kind", ["number", "choice", "yes_no_maybe"])
def test_equivalence_and_correctness_read_the_same_answer(kind: AnswerKind) -> None:
    answers = ["1", "1.0", "B", "b.", "yes", "Yes. Surely", "no", "unknown", "3.5", "3.2"]
    for a in answers:
        for b in answers:
            assert grade(kind, a, b) == equivalent(kind, a, b) == equivalent(kind, b, a)


def test_from_text_to_verdict() -> None:
    assert grade("yes_no_maybe", extract_answer("It is not known. Therefore, the answer is no."), "no")
    assert not grade("yes_no_maybe", extract_answer("The answer is unknown."), "no")
    assert not grade("number", extract_answer("I do not know 42"), "42")


def test_asking_for_math_verify_without_it_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "math_verify_installed", lambda: False)
    with pytest.raises(UserError, match="eval"):
        Grader(math_verify=True)
    assert Grader().name("maths") == "exact-number"
