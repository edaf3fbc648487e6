from __future__ import annotations

from fractions import Fraction

import pytest

from megatron_plasticity.evaluation.answers import choice_letter, number_base, plain_number, unwrapped, verdict_word


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
    ("text", "letter"),
    [
        ("C", "C"),
        ("c", "C"),
        ("(C)", "C"),
        ("[C]", "C"),
        ("C.", "C"),
        ("C)", "C"),
        ("**C**", "C"),
        ("**(C)** the liver", "C"),
        ("**C.** the liver", "C"),
        ("**C. the liver**", "C"),
        ("$C$", "C"),
        (r"\text{C}", "C"),
        (r"\mathbf{(C)}", "C"),
        ("`C`", "C"),
        ("(C) the liver", "C"),
        ("(C), the liver", "C"),
        ("C: the liver", "C"),
        ("the option (C)", "C"),
        ("Choice C.", "C"),
        ("J", "J"),
        ("C. vitamin A", "C"),
        ("(C) Vitamin (K)", "C"),
        ("(C) f(x) = 3", "C"),
        ("(C) To increase it", "C"),
        ("(C) The parent(s)", "C"),
        ("C. B.F. Skinner", "C"),
        ("C. Option (A) is wrong", "C"),
        ("C (the liver)", "C"),
        ("C - the liver", "C"),
        (r"\text{(C) } 5", "C"),
        ("(C) a small dose", "C"),
        ("c, a small dose", "C"),
        ("", None),
        ("the liver", None),
        ("a liver", None),
        ("I think C", None),
        ("neither", None),
        ("none of A, B or C", None),
        ("C or D", None),
        ("C and D", None),
        ("C, D", None),
        ("C/D", None),
        ("C) and D)", None),
        ("(C), (D)", None),
        ("A. B. C", None),
        ("C to E", None),
        ("c or d", None),
        ("(C) or option (D)", None),
        ("a (big) liver", None),
        ("a - b", None),
        ("40", None),
    ],
)
def test_choice_letter(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Yes", "yes"),
        ("**no**.", "no"),
        ("Maybe, it depends", "maybe"),
        ("yes - it grows", "yes"),
        ("yes it grows", None),
        ("no one knows", None),
        ("yes, no", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_verdict_word(text: str, word: str | None) -> None:
    assert verdict_word(text) == word


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        (r"**$\text{yes}$**.", "yes"),
        ("``", "``"),
        ("$x$ or $y$", "$x$ or $y$"),
        ("$5", "$5"),
        (r"\[ 5 \]", "5"),
        ("...", "..."),
        ("", ""),
    ],
)
def test_unwrapped(text: str, bare: str) -> None:
    assert unwrapped(text) == bare


def test_number_base() -> None:
    assert [number_base(text) for text in ("52_8", "$52_{16}$.", "52", "x_8", "52_8 + 1")] == [8, 16, None, None, None]
