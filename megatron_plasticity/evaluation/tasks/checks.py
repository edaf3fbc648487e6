"""What a task is looked at for before anybody trains on it: answers that cannot be read, and questions asked twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_plasticity.evaluation.extraction import extract_answer
from megatron_plasticity.evaluation.grading import Grader
from megatron_plasticity.evaluation.tasks.overlap import normalised
from megatron_plasticity.evaluation.tasks.task import Example

FEW_QUESTIONS = 100
"""Fewer distinct questions than this measure a difference between two models to no better than ten points."""
_SHOWN = 5


@dataclass(frozen=True)
class ResponseCheck:
    """Whether the responses of some examples end in the answer that they are graded against."""

    responses: int
    unreadable: list[str]
    """Ids of examples from whose response no answer can be read."""
    wrong: list[str]
    """Ids of examples whose response has another answer than their reference."""

    def as_json(self) -> dict[str, Any]:
        return {
            "responses": self.responses,
            "unreadable": len(self.unreadable),
            "wrong": len(self.wrong),
            "first_unreadable": self.unreadable[:_SHOWN],
            "first_wrong": self.wrong[:_SHOWN],
        }

    def complaint(self, where: str) -> str | None:
        """One line on what is wrong, None if nothing is."""
        if not self.unreadable and not self.wrong:
            return None
        first = ", ".join([*self.unreadable, *self.wrong][:3])
        return (
            f"{where}: of {self.responses:,} responses {len(self.unreadable):,} state no answer that can be read and "
            f"{len(self.wrong):,} another one than the reference ({first} …)"
        )


def check_responses(examples: Sequence[Example], grader: Grader) -> ResponseCheck:
    """Read the answer out of every response and grade it as a model's would be."""
    answered = [example for example in examples if example.response]
    extracted = [extract_answer(example.response, example.reference.kind) for example in answered]
    right = grader.grade_all([example.reference for example in answered], extracted)
    return ResponseCheck(
        len(answered),
        [example.id for example, answer in zip(answered, extracted, strict=True) if answer is None],
        [
            example.id
            for example, answer, is_right in zip(answered, extracted, right, strict=True)
            if answer is not None and not is_right
        ],
    )


def distinct_questions(examples: Sequence[Example]) -> int:
    """Number of different prompts, but for white space and case."""
    return len({normalised(example.prompt) for example in examples})


def question_flag(examples: int, distinct: int) -> str | None:
    """What to know of a test set that asks few questions, or some of them more than once."""
    if distinct < examples:
        return f"{distinct:,} distinct questions in {examples:,} rows"
    return f"only {distinct:,} questions" if distinct < FEW_QUESTIONS else None
