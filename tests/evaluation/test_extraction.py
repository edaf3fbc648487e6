from __future__ import annotations

import pytest

from megatron_plasticity.evaluation.extraction import extract_answer, last_box


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{[0, 1\}}", r"[0, 1\}"),  # an escaped brace alone is text
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{7} The answer is 8.", "7"),  # a box goes before the phrase
        (r"\boxed{7} and a box cut short \boxed{8", "7"),
        ("The answer is 42.", "42."),
        ("The answer is 1. No, the answer is 2", "2"),
        ("The answer is: 42", "42"),
        ("The answer is: x: 5", "5"),  # after the last colon
        ("Answer: 3. The answer is 4", "4"),  # a colon before the phrase does not count
        ("the answer is unknown", "unknown"),
        ("The answer is  yes \n", "yes"),
    ],
)
def test_the_rules_of_the_paper(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        "Answer: 42",
        "The answer was 42",
        "The answer is",
        "The answer is:  ",
        r"\boxed{}",
        r"\boxed{ }",
        r"\boxed{4",
        "boxed{4}",
    ],
)
def test_texts_without_an_answer(text: str) -> None:
    assert extract_answer(text) is None


def test_an_empty_last_box_is_no_answer_even_beside_the_phrase() -> None:
    assert extract_answer(r"The answer is 4. \boxed{}") is None


def test_last_box_of_many_unclosed_boxes() -> None:
    assert last_box(r"\boxed{1}" + r"\boxed{" * 200) == "1"
