from __future__ import annotations

import pytest

from megatron_plasticity.config.tasks import AnswerKind
from megatron_plasticity.evaluation.extraction import Rules, extract_answer, last_box

RULES: list[Rules] = ["own", "paper"]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{7} The answer is 8.", "7"),  # a box goes before the phrase
        ("The answer is 1. No, the answer is 2", "2"),
        ("The answer is: 42", "42"),
        ("Answer: 3. The answer is 4", "4"),
        ("the answer is unknown", "unknown"),
        ("The answer is  yes \n", "yes"),
    ],
)
def test_what_both_rules_read(text: str, answer: str, rules: Rules) -> None:
    assert extract_answer(text, rules=rules) == answer


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(
    "text",
    ["", "42", "The answer was 42", "The answer is", "The answer is:  ", r"\boxed{}", r"\boxed{ }", r"\boxed{4", "boxed{4}"],
)
def test_texts_without_an_answer(text: str, rules: Rules) -> None:
    assert extract_answer(text, rules=rules) is None


@pytest.mark.parametrize(
    ("text", "own", "paper"),
    [
        (r"\boxed{[0, 1\}}", r"[0, 1\}", r"[0, 1" + "\\"),  # an escaped brace alone
        (r"\boxed{\boxed{3}}", "3", "3"),
        (r"\boxed{7} and a box cut short \boxed{8", "7", None),
        (r"The answer is 7. A box cut short \boxed{8", "7", r"7. A box cut short \boxed{8"),
        (r"The answer is 4. \boxed{}", None, r"4. \boxed{}"),
        (r"\boxed {3}", None, "{3}"),
        (r"The answer is 5, \boxed 3 {x}", r"5, \boxed 3 {x}", "3 {x}"),
        ("The answer is 42.", "42", "42."),
        ("The answer is 42. It is even.", "42", "42. It is even."),
        ("The answer is 42\nHuman: next", "42", "next"),
        ("The answer is: x: 5", "x: 5", "5"),
        ("The Answer Is 5", "5", None),
        ("Answer: 42", "42", None),
        ("**Answer:** 42", "42", None),
        ("**Answer: 42**", "42", None),
        ("**The answer is 42.**", "42", "42.**"),
        ("The answer is **42**.", "42", "**42**."),
        ("so 40 + 2 = 42\n#### 42", "42", None),
        ("The answer is 5. Answers are fun: 6", "5", "6"),
        ("The answer is 2:35 P.M. on Monday.", "2:35 P.M. on Monday", "35 P.M. on Monday."),
        ("The answer is Mr. Watson. He is tall.", "Mr. Watson", "Mr. Watson. He is tall."),
    ],
)
def test_where_the_rules_differ(text: str, own: str | None, paper: str | None) -> None:
    assert extract_answer(text) == own
    assert extract_answer(text, rules="paper") == paper


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("literal", "The answer is {'a': 1}.", "{'a': 1}."),
        ("literal", "The answer is 'First. Second.'\nBecause", "'First. Second.'"),
        ("literal", "The answer is:\n```python\n[1,\n 2]\n```\nDone", "[1,\n 2]"),
        ("program_input", "The answer is f([1. , 2], 'a: b')", "f([1. , 2], 'a: b')"),
        ("literal", "The answer is 'answer: 3'", "'answer: 3'"),
        ("literal", "The answer is 'a'. No, the answer is 'b'", "'b'"),
        ("literal", "The answer is [1] it's\nthe answer is [2]", "[2]"),
        ("maths", "The answer is $x = 1.5$. So", "$x = 1.5$"),
        ("maths", "The answer is 5\nThis is because it is 7", "5"),
        ("maths", "The answer is $(1,\n2)$\nand no other", "$(1,\n2)$"),
        (
            "maths",
            "The answer is \\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}\nas said",
            "\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}",
        ),
        ("maths", "The answer is **$\\frac12$.**", "$\\frac12$"),
        ("maths", "The answer is a^*", "a^*"),
        ("number", "The answer is **24.**", "24"),
        ("number", "The answer is **24.** It is even.", "24"),
        ("number", "The answer is *24*", "24"),
        ("number", "The answer is _24_", "24"),
        ("number", "*Answer:* 24", "24"),
        ("number", "**Answer is** 24", "24"),
        ("number", "*The answer is 24*", "24"),
        ("number", "The answer is **24 in all. It", "24 in all"),
        ("number", "The answer is 24.\n\n#### Check\nit is fine", "24"),
        ("number", "24 apples\n#### $24", "$24"),
        ("yes_no_maybe", "The answer is **No.** There is none.", "No"),
        ("text", "The answer is **proved.**", "proved"),
        ("text", "The answer is **red** and **blue**", "**red** and **blue**"),
        ("choice", "The answer is **(B).**", "(B)"),
        ("choice", "The answer is **B. the liver.**", "B. the liver"),
        ("choice", "The answer is **B.** the liver", "B."),
        ("choice", "The answer is\n* B", "B"),
        ("maths", "The answer is\n\\[\n\\frac{1}{2}\n\\]\nas stated.", r"\frac{1}{2}"),
        ("maths", "The answer is\n$$\n(1,\n2)$$.", "(1,\n2)"),
        ("choice", "The answer is B. The liver. It", "B. The liver"),
        ("choice", "The answer is (B).\n\n", "(B)"),
        ("choice", r"It weighs \boxed{7.4}. The answer is (E).", "(E)"),  # a box that holds no letter
        ("choice", r"The answer is (E). \boxed{C}", "C"),
        ("choice", r"The answer is heavy. \boxed{7.4}", "7.4"),
        ("choice", r"\boxed{\text{(C)}}", r"\text{(C)}"),
    ],
)
def test_a_statement_ends_by_its_kind(kind: AnswerKind, text: str, answer: str) -> None:
    assert extract_answer(text, kind) == answer


def test_last_box_of_many_unclosed_boxes() -> None:
    assert last_box(r"\boxed{1}" + r"\boxed{" * 200) == "1"
