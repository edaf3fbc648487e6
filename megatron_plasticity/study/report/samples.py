"""Sample answers: the same few questions, with what each model said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_plasticity.study.report.tables import stages_of
from megatron_plasticity.study.results import BaseModel, Outcome

LONGEST_ANSWER = 600
"""Characters of an answer that are shown."""
_LONGEST_PROMPT = 3000
_QUESTIONS = 2


@dataclass(frozen=True)
class Answer:
    """What one model said; plain text, to be escaped by the page."""

    weight_decay: str
    stage: str
    response: str
    extracted: str
    correct: bool


@dataclass(frozen=True)
class Question:
    """A test question with everybody's answer."""

    prompt: str
    answer: str
    rows: tuple[Answer, ...]


@dataclass(frozen=True)
class SampleSet:
    """The sample questions of one task."""

    task: str
    questions: tuple[Question, ...]


def sample_sets(models: Sequence[BaseModel], outcomes: Sequence[Outcome]) -> list[SampleSet]:
    """The first questions of each task, after the first way of fine-tuning; tasks without examples are left out."""
    sets = []
    for task in dict.fromkeys(outcome.task for outcome in outcomes):
        first = next(outcome for outcome in outcomes if outcome.task == task)
        asked: dict[str, tuple[str, list[Answer]]] = {}
        for index in range(2):
            for model in models:
                stage, _variant, found = stages_of(model, [first])[index]
                for example in found.examples if found else ():
                    _right, rows = asked.setdefault(str(example.get("prompt", "")), (str(example.get("answer", "")), []))
                    rows.append(_answer(f"{model.weight_decay:.3g}", stage, example))
        questions = [Question(shorten(prompt, _LONGEST_PROMPT), right, tuple(rows)) for prompt, (right, rows) in asked.items()]
        if questions:
            sets.append(SampleSet(task, tuple(questions[:_QUESTIONS])))
    return sets


def _answer(weight_decay: str, stage: str, example: Mapping[str, Any]) -> Answer:
    extracted = example.get("extracted")
    return Answer(
        weight_decay,
        stage,
        shorten(str(example.get("response", "")), LONGEST_ANSWER),
        "no answer" if extracted is None else shorten(str(extracted), 80),
        bool(example.get("correct")),
    )


def shorten(text: str, most: int) -> str:
    """`text` cut to `most` characters, with an ellipsis if something is missing; control characters become visible."""
    shown = "".join(sign if sign.isprintable() or sign in "\n\t" else "�" for sign in text[:most])
    return shown + ("…" if len(text) > most else "")
