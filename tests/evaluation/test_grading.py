from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import pytest

from megatron_plasticity.config.tasks import AnswerKind
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation import grading
from megatron_plasticity.evaluation.extraction import Rules, extract_answer
from megatron_plasticity.evaluation.grading import Grader
from megatron_plasticity.evaluation.math_pool import bare_math_verify_equal, math_verify_equal, math_verify_installed
from megatron_plasticity.evaluation.sandbox import Call, Sandbox
from megatron_plasticity.evaluation.tasks.task import Reference

needs_math_verify = pytest.mark.skipif(not math_verify_installed(), reason="needs the `eval` extra")
needs_sandbox = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

# kind, extracted, reference, whether right by our own rules, whether right by the paper's (None where math-verify decides)
CASES: list[tuple[AnswerKind, str | None, str, bool, bool | None]] = [
    ("number", "1,234.", "1234", True, None),
    ("number", "42.0", "42", True, None),
    ("number", "$12.00", "12", True, None),
    ("number", r"**\$12**", "12", True, None),
    ("number", r"50\%", "50", True, None),
    ("number", "50%.", "50", True, None),
    ("number", r"$50\%$", "50", True, None),
    ("number", "50%", "0.5", False, None),
    ("number", "142", "42", False, None),
    ("number", "-42", "42", False, None),
    ("number", "42 apples", "42", False, None),
    ("number", "42 million", "42", False, None),
    ("number", "9" * 5000, "42", False, None),
    ("number", None, "42", False, None),
    ("choice", "B", "B", True, True),
    ("choice", "(B)", "B", True, False),
    ("choice", "**B**", "B", True, False),
    ("choice", r"\text{(B)}", "B", True, False),
    ("choice", "B) the liver", "B", True, False),
    ("choice", "option B", "B", True, False),
    ("choice", "b. The liver", "B", True, True),
    ("choice", "B,", "B", True, True),
    ("choice", "B: see (A) above", "B", True, False),
    ("choice", "B and C", "B", False, False),
    ("choice", "(B) or (C)", "B", False, False),
    ("choice", "B, C", "B", False, False),
    ("choice", "AB", "B", False, False),
    ("choice", "a decrease", "A", False, False),
    ("choice", "not B", "B", False, False),
    ("choice", "3.5 mg", "3.2 mg", False, False),  # a decimal point does not end a sentence
    ("choice", "3.5 mg.", "3.5 MG", True, True),
    ("yes_no_maybe", "No.", "no", True, True),
    ("yes_no_maybe", "**No**", "no", True, False),
    ("yes_no_maybe", r"\text{no}", "no", True, False),
    ("yes_no_maybe", "yes. No doubt", "yes", True, True),
    ("yes_no_maybe", "yes, no doubt", "yes", False, False),  # names both
    ("yes_no_maybe", "yes, because it grows", "yes", True, False),
    ("yes_no_maybe", "no doubt it does", "no", False, False),
    ("yes_no_maybe", "yes and no", "yes", False, False),
    ("yes_no_maybe", "unknown", "no", False, False),
    ("yes_no_maybe", "not clear", "no", False, False),
    ("yes_no_maybe", "maybe!", "maybe", True, True),
    ("yes_no_maybe", "", "no", False, False),
    ("text", "Proved.", "proved", True, True),
    ("text", "`proved`", "proved", True, False),
    ("text", '"the  red one"', "the red one", True, False),
    ("text", "disproved", "proved", False, False),
    ("text", "2:35 P.M.", "2:35 A.M.", False, False),
    ("text", "2:35 P.M", "2:35 P.M.", True, True),
    ("literal", "[1, 2]", "[1,2]", True, True),
    ("literal", "`[1, 2]`.", "[1, 2]", True, False),
    ("literal", r"\{'a': 1\}", "{'a': 1}", True, False),
    ("literal", '"a"', "'a'", True, True),
    ("literal", "a", "'a'", False, True),  # Python would not find the name
    ("literal", "'1'", "1", False, True),
    ("literal", "1", "1.0", True, True),  # CRUXEval asserts ==
    ("literal", "1", "True", True, True),
    ("literal", "[1]", "(1,)", False, False),
    ("literal", "{1, 2}", "{2, 1}", True, True),
    ("literal", "None", "None", True, True),
    ("literal", "0", "None", False, False),
    ("literal", "print(1)", "None", False, False),
    ("literal", "(" * 3000, "[]", False, False),
    ("literal", "-" * 3000 + "1", "1", False, False),
    ("literal", "[" * 150 + "]" * 150, "[]", False, False),
    ("literal", "9" * 5000, "[]", False, False),
]


def _grade(kind: AnswerKind, extracted: str | None, answer: str, rules: Rules = "own") -> bool:
    with Grader(math_verify=False) as grader:
        return grader.grade(Reference(kind, answer), extracted, rules)


@pytest.mark.parametrize(("kind", "extracted", "answer", "own", "paper"), CASES)
def test_rules(kind: AnswerKind, extracted: str | None, answer: str, own: bool, paper: bool | None) -> None:
    assert _grade(kind, extracted, answer) is own
    if paper is not None:
        assert _grade(kind, extracted, answer, "paper") is paper


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
    assert _grade("maths", extracted, answer) is correct
    with Grader(math_verify=False) as grader:
        assert grader.name("maths") == grader.name("number", "paper") == "exact-number"


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
        ("0.0000672", "0.0000673", False),  # which is ours to correct
        ("52_8", "52_{8}", True),
        ("52_8", "52_9", False),  # as is its reading of indices
        ("True", "True", True),  # it can read neither; the same text is the same answer
        (None, "5", False),
    ]
    with Grader(workers=2) as grader:
        assert grader.name("maths") == "math-verify"
        verdicts = grader.grade_all(
            [Reference("maths", answer) for _, answer, _ in cases], [extracted for extracted, *_ in cases]
        )
        assert verdicts == [correct for *_, correct in cases]
        assert grader.equivalent(Reference("maths", ""), "5", "x=5")  # either direction


@needs_math_verify
def test_the_papers_maths_reads_bare_texts() -> None:
    cases = [
        ("42 apples", "42", True),
        ("1,234", "1234", True),
        ("x=5", "5", True),
        ("1/2", r"\frac{1}{2}", True),
        ("p - q", "p - q", False),  # not read at all
        (r"50\%", "0.5", False),
    ]
    with Grader() as grader:
        kinds: Sequence[AnswerKind] = ("number", "maths")
        for kind in kinds:
            references = [Reference(kind, answer) for _, answer, _ in cases]
            assert grader.grade_all(references, [a for a, *_ in cases], "paper") == [verdict for *_, verdict in cases]
        assert grader.grade(Reference("maths", "p - q"), "p - q")  # the rules do not share what they remember


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
        verdict = grading._equal_by_form("maths", a, b, "own")
        assert verdict is not None, (a, b)
        assert verdict == math_verify_equal(a, b), (a, b)
        agreed += verdict
    assert agreed > 5


@needs_math_verify
def test_the_papers_short_cut_changes_no_verdict_of_math_verify() -> None:
    numbers = random.Random(0)

    def some_number() -> str:
        whole, decimals = numbers.randint(-12, 12), numbers.choice(["", ".0", ".00", ".5", ".50", ".25", "."])
        return f"{whole}{numbers.choice(['', '', ',000', '000'])}{decimals}"

    decided = 0
    for _ in range(400):
        a, b = some_number(), some_number()
        verdict = grading._equal_by_form("number", a, b, "paper")
        assert verdict in (None, bare_math_verify_equal(a, b)), (a, b)
        decided += verdict is not None
    assert decided > 300
    for a, b in [("0.1234567", "0.1234568"), ("+6", "6"), ("$5", "5"), ("-$5", "-5")]:
        assert grading._equal_by_form("number", a, b, "paper") is None


@pytest.mark.parametrize("rules", ["own", "paper"])
@pytest.mark.parametrize("kind", ["number", "choice", "yes_no_maybe", "text", "literal"])
def test_equivalence_and_correctness_read_the_same_answer(kind: AnswerKind, rules: Rules) -> None:
    answers = ["1", "1.0", "B", "b.", "(B)", "yes", "Yes. Surely", "no", "unknown", "3.5", "3.2", "[1]", "'a'"]
    with Grader(math_verify=False) as grader:
        for a in answers:
            for b in answers:
                same = grader.equivalent(Reference(kind, "whatever"), a, b, rules)
                assert grader.grade(Reference(kind, b), a, rules) == same == grader.equivalent(Reference(kind, ""), b, a, rules)


def test_from_text_to_verdict() -> None:
    def right(kind: AnswerKind, text: str, answer: str, rules: Rules = "own") -> bool:
        return _grade(kind, extract_answer(text, kind, rules), answer, rules)

    assert right("yes_no_maybe", "It is not known. Therefore, the answer is no.", "no")
    assert not right("yes_no_maybe", "The answer is unknown.", "no")
    assert not right("number", "I do not know 42", "42")
    assert right("number", "The answer is 42. I am sure.", "42")
    assert right("choice", "The answer is (B). It is not (C).", "B")
    assert right("literal", "The answer is {'a': 1}.", "{'a': 1}")
    assert not right("literal", "The answer is {'a': 1}", "{'a': 1}", "paper")  # cut at its colon


# Programs


@needs_sandbox
def test_an_input_is_right_if_the_program_gives_the_output() -> None:
    double = Reference("program_input", "[2, 4]", "def f(numbers, factor=2):\n    return [factor * n for n in numbers]")
    nothing = Reference("program_input", "1", "def f():\n    return 1")
    cases: list[tuple[Reference, str | None, bool]] = [
        (double, "[1, 2]", True),
        (double, "f([1, 2])", True),
        (double, "`f([1, 2])`.", True),
        (double, "(1, 2), 2", True),
        (double, "numbers=[1, 2]", True),
        (double, "list(range(1, 3))", True),
        (double, "[1, 2], 3", False),
        (double, "[2, 1]", False),
        (double, "[1, 2], 2, 2", False),
        (double, "*[[1, 2]]", False),
        (double, "[1, 2]) + f([]", False),
        (double, "__import__('os')", False),
        (double, "", False),
        (double, None, False),
        (nothing, "f()", True),
        (nothing, "1", False),
    ]
    with Grader(workers=2) as grader:
        references = [reference for reference, *_ in cases]
        assert grader.grade_all(references, [answer for _, answer, _ in cases]) == [right for *_, right in cases]
        assert grader.grade_all(references, [answer for _, answer, _ in cases], "paper") == [right for *_, right in cases]
        assert grader.name("program_input") == "program"


def test_inputs_are_the_same_answer_if_they_are_the_same_arguments() -> None:
    reference = Reference("program_input", "1", "def f(a): return 1")
    with Grader(math_verify=False) as grader:
        assert grader.equivalent(reference, "f([1,2])", "[1, 2]")
        assert grader.equivalent(reference, "a=1, b=2", "b=2, a=1")
        assert grader.equivalent(reference, "lambda x:x", "lambda x: x")
        assert grader.equivalent(reference, "not python", "not python")
        assert not grader.equivalent(reference, "[1, 2]", "[2, 1]")
        assert not grader.equivalent(reference, "1", "a=1")
        assert not grader.equivalent(reference, "1", "not python")


def test_programs_run_once_and_only_for_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Call] = []
    monkeypatch.setattr(Sandbox, "run_all", lambda self, calls: ran.extend(calls) or [None] * len(calls))
    reference = Reference("program_input", "1", "def f(a): return 1")
    with Grader(math_verify=False) as grader:
        assert grader.grade_all([reference] * 4, ["1", "f(1)", "import os", None]) == [False] * 4
        assert grader.grade(reference, "1") is False
    assert ran == [Call(reference.program, "1")]


def test_asking_for_math_verify_without_it_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "math_verify_installed", lambda: False)
    with pytest.raises(UserError, match="eval"):
        Grader(math_verify=True)
    assert Grader().name("maths") == "exact-number"


@pytest.mark.parametrize(
    "text", ["not " * 330 + "1", "'a'" + ".strip()" * 200, "1" + "+1" * 1500, "[0]" * 900, "lambda:" * 400 + "1"]
)
def test_an_answer_of_endless_repetition_is_only_wrong(text: str) -> None:
    reference = Reference("program_input", "1", "def f(x): return 1")
    with Grader() as grader:
        assert grader.grade_all([reference, reference], [text, "3"]) == [False, True]
        assert grader.equivalent(reference, text, "3") is False
        assert grader.grade(Reference("literal", "1"), text) is False


def test_the_grader_is_named_by_the_rules_that_count() -> None:
    with Grader(math_verify=False) as grader:
        assert grader.can_grade({"choice", "text"}, "paper")
        assert grader.can_grade({"number"}, "own")
        assert not grader.can_grade({"choice", "number"}, "paper")
