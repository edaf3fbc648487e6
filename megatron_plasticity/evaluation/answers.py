r"""What an answer says once its dress is off: the canonical form in which answers of each kind are compared.

Models wrap answers in Markdown (`**B**`, a code span), LaTeX (`$3$`, `\text{yes}`) and quotes. Forms here take those off, and
never guess: a text that might say two things ("B or C", "yes and no") has no letter and no word.
"""

from __future__ import annotations

import re
from fractions import Fraction

PUNCTUATION = ".,;:!?"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_PLAIN_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\$?(?:\\[dt]?frac\{{(?P<top>-?{_DECIMAL})\}}\{{(?P<bottom>-?{_DECIMAL})\}}"
    rf"|(?P<value>{_DECIMAL})(?:/(?P<divisor>{_DECIMAL}))?)"
)
_BASE = re.compile(r"\d_\{?(\d+)\}?[\s$.]*$")
_SENTENCE_END = re.compile(r"\.(?!\d)")
_LONGEST_NUMBER = 200

_WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\*\*(.+)\*\*",
        r"__(.+)__",
        r"`([^`]+)`",
        r"\$\$?([^$]+?)\$\$?",
        r"\\\((.+)\\\)",
        r"\\\[(.+)\\\]",
        r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|texttt|textsf)\{([^{}]*)\}",
    )
]
_QUOTED = re.compile(r"\"([^\"]*)\"|'([^']*)'|“([^”]*)”|‘([^’]*)’")
_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:option|choice|answer)\s+)?"
    r"(?:\(([A-Z])\)|\[([A-Z])\]|\*\*\(?([A-Z])[.)]?\*\*|\\(?:text|mathrm|mathbf|textbf)\{\s*\(?([A-Z])[.)]*\s*\}"
    r"|([A-Z])(?=\s*(?:[.):,;]|$))|(?-i:([A-Z]))(?=\s+(?:[-–—]\s|\()))\s*[.):,;]?(.*)",
    re.IGNORECASE | re.DOTALL,
)
"""A letter in one of its forms; bare ones before a bracket or a dash are capitals, since "a (small) dose" names no option."""
_CONNECTIVE = r"(?:and|or|nor|to|through|&|/|\+|,)"
_ANOTHER_LETTER = re.compile(
    # Directly after the first: "or (D)", ", D", "/D", "D.". A letter further on belongs to what is said about the answer, or to
    # the option's own text: "(B) Vitamin (K)". Lower-case ones stand alone: "c or d", but not "c, a small dose".
    rf"\s*(?:(?i:{_CONNECTIVE})\s*)?(?:\(?[A-Z]\)?|\(?[a-z]\)?(?=[.)\s]*$))(?![\w'])(?!\.\w)"
    rf"(?:\s*(?:[.):,;]|$)|(?<=\)))|\s*(?i:{_CONNECTIVE})\s*(?i:(?:option|choice)\s+)?\(?[A-Z]\)?(?![\w'])",
)
_VERDICT = re.compile(r"(yes|no|maybe)\b\s*(?:[,;:!)–—-]|$)(.*)")
_ANOTHER_VERDICT = re.compile(r"\b(?:yes|no|maybe)\b")


def plain_number(text: str) -> Fraction | None:
    r"""The exact value of a plain number such as `-1,234.50`, `$3.`, `2/3` or `\frac{-2}{3}`, or None for anything else.

    Currency signs, thousands separators, dollar signs around mathematics, and final punctuation are dropped.
    """
    text = text.replace("\\$", "").replace("−", "-").lstrip(" \t\n$").rstrip(f" \t\n${PUNCTUATION}")
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


def number_base(text: str) -> int | None:
    """The base that a number in digits states as its index, 8 in `52_8` and `52_{8}`, or None."""
    match = _BASE.search(text)
    return None if match is None else int(match[1])


def without_percent(text: str) -> str:
    """The text without a percent sign at its end."""
    return text.rstrip(f" ${PUNCTUATION}").removesuffix("%").removesuffix("\\")


def plain_words(text: str) -> str:
    """The paper's form of a choice or a yes/no/maybe: up to the end of the first sentence, no final punctuation, one case."""
    sentence = _SENTENCE_END.split(text.strip(), maxsplit=1)[0]
    return one_spaced(sentence).rstrip(PUNCTUATION + " ").casefold()


def one_spaced(text: str) -> str:
    """The text with every run of white space as one space, and none at its ends."""
    return " ".join(text.split())


def unwrapped(text: str) -> str:
    r"""The text without Markdown, LaTeX and final punctuation around the whole of it: `**$\text{yes}$**.` says "yes"."""
    while True:
        before = text
        text = text.strip().rstrip(PUNCTUATION + " ") or text.strip()
        for wrapper in _WRAPPERS:
            match = wrapper.fullmatch(text)
            if match is not None:
                text = match[1]
        if text == before:
            return text


def choice_letter(text: str) -> str | None:
    """The letter of an option, as in `B`, `(B)`, `**B**`, `B. its text`, `B - its text`, `option B`; None if there is none, or if
    another one follows directly.

    A letter counts at the start only, and only if it stands apart from what follows: "a decrease" names no option.
    """
    match = _LETTER.fullmatch(unwrapped(text))
    if match is None:
        return None
    *letters, rest = match.groups()
    return None if _ANOTHER_LETTER.match(rest) else next(letter for letter in letters if letter).upper()


def verdict_word(text: str) -> str | None:
    """`yes`, `no` or `maybe` where the first sentence is that word, or begins with it and a mark and names no other."""
    match = _VERDICT.fullmatch(plain_words(unwrapped(text)))
    return None if match is None or _ANOTHER_VERDICT.search(match[2]) else match[1]


def plain_text(text: str) -> str:
    """Canonical form of other words: out of its wrappers and quotes, one case, single spaces, no final punctuation."""
    text = unwrapped(text)
    quoted = _QUOTED.fullmatch(text)
    if quoted is not None:
        text = next(part for part in quoted.groups() if part is not None)
    return one_spaced(text).rstrip(PUNCTUATION + " ").casefold()
