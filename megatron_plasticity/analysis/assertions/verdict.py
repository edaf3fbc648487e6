"""What the paper states, and what a study says about it.

The ten statements are those that a reproduction of Han et al. (2602.11137) should meet, numbered as in docs/assertions.md. A9
speaks of fine-tuning and of pretraining; each half takes other runs to test, so that each has its own verdict.

How sure it is that the paper says so is part of a statement: it was read in articles and notes about the paper as well as in its
public code, and a statement that rests on one reading should not be mistaken for one that was checked twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["holds", "does not hold", "cannot be said"]
HOLDS: Verdict = "holds"
DOES_NOT_HOLD: Verdict = "does not hold"
CANNOT_BE_SAID: Verdict = "cannot be said"

_TWO_READINGS = "Two or more independent readings of the paper agree."
_ONE_READING = "One reading of the paper says so."
_UNGRADED = "One reading of the paper's results says so, and no second one was recorded."


@dataclass(frozen=True)
class Statement:
    """What the paper says, and how sure it is that it does."""

    key: str
    text: str
    certainty: str


@dataclass(frozen=True)
class Assertion:
    """A statement with its verdict on one study."""

    key: str
    statement: str
    verdict: Verdict
    evidence: str
    """What the verdict rests on, or what is lacking and what to run, in one to three sentences."""
    certainty: str
    """How sure it is that the paper states this, in words."""


_ALL = (
    Statement("A1", "At 20 tokens per parameter, validation loss is U-shaped in λ, with its optimum above 0.1.", _UNGRADED),
    Statement("A2", "At 140 tokens per parameter, the λ with the best validation loss drops to about 0.1.", _UNGRADED),
    Statement(
        "A3",
        "The best λ by score after fine-tuning is at least the best λ by validation loss, and larger in four of the paper's five "
        "settings.",
        _UNGRADED,
    ),
    Statement("A4", "Some pair of λ has worse validation loss and a better score after fine-tuning.", _UNGRADED),
    Statement("A5", "The accuracy of linear probes rises with λ at each layer.", _TWO_READINGS),
    Statement(
        "A6",
        "The pseudo-rank of W_QK falls with λ, that of W_VP is nearly flat.",
        "Two or more independent readings of the paper agree; the formula of the pseudo-rank rests on one.",
    ),
    Statement("A7", "The train–validation gap falls with λ.", _TWO_READINGS),
    Statement("A8", "The effect of λ is flat below 0.1, and models collapse at 10.", _UNGRADED),
    Statement(
        "A9a",
        "The order of λ survives other learning rates, batch sizes and weight decays of fine-tuning.",
        "Two readings agree that the paper's second version has such a sweep; its outcome rests on one.",
    ),
    Statement(
        "A9b",
        "The order of λ survives other learning rates of pretraining.",
        "The paper's public code has such a sweep, for the second version; its outcome rests on one reading.",
    ),
    Statement("A10", "The correlation of validation loss and score after fine-tuning is unstable.", _ONE_READING),
)
STATEMENTS: Mapping[str, Statement] = {statement.key: statement for statement in _ALL}
"""By key, in the order in which they are shown."""


def assertion(key: str, verdict: Verdict, *evidence: str) -> Assertion:
    """The verdict on the statement `key`; empty sentences of the evidence are left out."""
    statement = STATEMENTS[key]
    return Assertion(key, statement.text, verdict, " ".join(text for text in evidence if text), statement.certainty)


def verdict_on_all(parts: Iterable[bool | None]) -> Verdict:
    """Of a statement with several parts, each true, false or (None) open: one that is false is enough to refute it."""
    found = list(parts)
    if any(part is False for part in found):
        return DOES_NOT_HOLD
    return HOLDS if found and all(found) else CANNOT_BE_SAID


def combined(found: Sequence[Assertion]) -> Assertion:
    """One statement tested in several places, of which all have to agree; with the evidence of one that decides."""
    values: dict[Verdict, bool | None] = {HOLDS: True, DOES_NOT_HOLD: False, CANNOT_BE_SAID: None}
    verdict = verdict_on_all(values[item.verdict] for item in found)
    return next(item for item in found if item.verdict == verdict)


def in_order(found: Iterable[Assertion]) -> list[Assertion]:
    """Assertions in the order of their statements."""
    places = list(STATEMENTS)
    return sorted(found, key=lambda item: places.index(item.key))


def decay_text(weight_decay: float) -> str:
    return f"λ = {weight_decay:.3g}"


def decays_text(weight_decays: Iterable[float]) -> str:
    """`λ = 0.1, 1`."""
    return "λ = " + ", ".join(f"{decay:.3g}" for decay in weight_decays)


def fixed(value: float, digits: int) -> str:
    """With a true minus sign, and no minus before a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def percent_text(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"
