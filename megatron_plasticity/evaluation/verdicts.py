"""From responses to verdicts: what answer each holds, whether it is right, and the metrics of a test set.

Every response is graded by two sets of rules, our own and those of the paper's public code (see `grading.py`). One of them
counts; what the other would have given stands beside it, so that a difference in rules never passes for one between models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from megatron_plasticity.config.tasks import AnswerKind
from megatron_plasticity.evaluation.extraction import extract_answer
from megatron_plasticity.evaluation.grading import Grader, Rules, plain_words
from megatron_plasticity.evaluation.metrics import (
    Outcomes,
    bootstrap_metrics,
    bootstrap_task_metrics,
    cluster_answers,
    group_values,
    question_values,
)
from megatron_plasticity.evaluation.responses import Response
from megatron_plasticity.evaluation.streams import derived_seed
from megatron_plasticity.evaluation.tasks.task import Example, Reference

OTHER: dict[Rules, Rules] = {"own": "paper", "paper": "own"}


@dataclass(frozen=True)
class Answer:
    """One response, read and graded."""

    response: Response
    extracted: str | None
    correct: bool


@dataclass(frozen=True)
class Graded:
    """The responses to one test set under one set of rules."""

    greedy: list[Answer]
    """One for each question."""
    sampled: list[list[Answer]]
    """[question][sample]"""
    clusters: list[list[int]]
    """[question][sample]: cluster of equal answers, as `cluster_answers` numbers them."""

    @cached_property
    def values(self) -> dict[str, np.ndarray]:
        """Each metric's number per question (`metrics.question_values`)."""
        rewards = np.array([[answer.response.reward for answer in row] for row in self.sampled], dtype=np.float64)
        return question_values(
            Outcomes(
                greedy_correct=np.array([answer.correct for answer in self.greedy]),
                sampled_correct=np.array([[answer.correct for answer in row] for row in self.sampled]),
                clusters=np.array(self.clusters),
                answered=np.array([[answer.extracted is not None for answer in row] for row in self.sampled]),
                rewards=None if np.isnan(rewards).all() else rewards,
            )
        )


@dataclass(frozen=True)
class Verdicts:
    """A test set's responses under both sets of rules."""

    examples: list[Example]
    rules: Rules
    """Those that count."""
    by_rules: dict[Rules, Graded]
    grader: str
    """How answers were compared."""

    @property
    def graded(self) -> Graded:
        return self.by_rules[self.rules]

    @property
    def other(self) -> Graded | None:
        """None if this machine cannot grade by the other rules."""
        return self.by_rules.get(OTHER[self.rules])

    def results(self, resamples: int, seed: int) -> dict[str, Any]:
        """The test set's part of `results.json`."""
        graded, responses = self.graded, [row[0].response for row in self._rows(self.graded)]
        metrics = bootstrap_metrics(graded.values, resamples, _bootstrap_seed(seed))
        results = {
            "answer_kind": ", ".join(dict.fromkeys(example.reference.kind for example in self.examples)),
            "grader": self.grader,
            "questions": len(self.examples),
            "metrics": {name: metric.as_json() for name, metric in metrics.items()},
            "most_common_answer": most_common_answer([answer.extracted for answer in graded.greedy]),
            **({} if self.other is None else {"other_rules": self._under_other_rules(self.other)}),
            "greedy_correct": [int(answer.correct) for answer in graded.greedy],
            "sampled_correct": [[int(answer.correct) for answer in row] for row in graded.sampled],
        }
        if (too_long := sum(response.finish == "prompt_too_long" for response in responses)) > 0:
            results["prompts_too_long"] = too_long
        if groups := group_values(graded.values, [example.group for example in self.examples]):
            results["groups"] = groups
        return results

    def shown(self, number: int) -> list[dict[str, Any]]:
        """The first questions with their greedy answers, for the report."""
        return [
            {
                "prompt": example.prompt,
                "response": answer.response.text,
                "extracted": answer.extracted,
                "answer": example.reference.answer,
                "correct": answer.correct,
            }
            for example, answer in list(zip(self.examples, self.graded.greedy, strict=True))[:number]
        ]

    def rows(self, task: str, test_set: str) -> list[dict[str, Any]]:
        """One row of `samples.parquet` for each response (`samples.SCHEMA`)."""
        rows = []
        others = [[None] * len(row) for row in self._rows(self.graded)] if self.other is None else self._rows(self.other)
        for example, own, other in zip(self.examples, self._rows(self.graded), others, strict=True):
            for number, (answer, otherwise) in enumerate(zip(own, other, strict=True)):
                rows.append(
                    {
                        "task": task,
                        "test_set": test_set,
                        "group": example.group,
                        "question": example.id,
                        "pass": "sampled" if number else "greedy",
                        "sample": max(0, number - 1),
                        "prompt": example.prompt,
                        "text": answer.response.text,
                        "tokens": answer.response.tokens,
                        "finish": answer.response.finish,
                        "extracted": answer.extracted,
                        "answer": example.reference.answer,
                        "correct": answer.correct,
                        "correct_by_other_rules": None if otherwise is None else otherwise.correct,
                        "reward": answer.response.reward,
                    }
                )
        return rows

    @staticmethod
    def _rows(graded: Graded) -> list[list[Answer]]:
        """[question]: the greedy answer, then the samples."""
        return [[first, *others] for first, others in zip(graded.greedy, graded.sampled, strict=True)]

    def _under_other_rules(self, other: Graded) -> dict[str, Any]:
        metrics = bootstrap_metrics(other.values, 0, 0)
        pairs = zip(self._rows(self.graded), self._rows(other), strict=True)
        return {
            "rules": OTHER[self.rules],
            "responses_that_differ": sum(
                answer.correct != otherwise.correct for own, other in pairs for answer, otherwise in zip(own, other, strict=True)
            ),
            "metrics": {name: metric.value for name, metric in metrics.items()},
        }


def judge(
    examples: list[Example],
    greedy: Sequence[Sequence[Response]],
    sampled: Sequence[Sequence[Response]],
    grader: Grader,
    rules: Rules,
) -> Verdicts:
    """Read and grade the responses to `examples`: greedy[question][0] and sampled[question][sample]."""
    by_rules: dict[Rules, Graded] = {}
    kinds: list[AnswerKind] = list(dict.fromkeys(example.reference.kind for example in examples))
    for each in OTHER:
        if each != rules and not grader.can_grade(kinds, each):
            continue
        answers = _answers(examples, [[*first, *others] for first, others in zip(greedy, sampled, strict=True)], grader, each)
        same = partial(_equivalent, [example.reference for example in examples], grader, each)
        clusters = cluster_answers([[answer.extracted for answer in row[1:]] for row in answers], same)
        by_rules[each] = Graded([row[0] for row in answers], [row[1:] for row in answers], clusters)
    return Verdicts(examples, rules, by_rules, ", ".join(dict.fromkeys(grader.name(kind, rules) for kind in kinds)))


def _equivalent(
    references: Sequence[Reference], grader: Grader, rules: Rules, pairs: Sequence[tuple[int, str, str]]
) -> list[bool]:
    return grader.equivalent_all([(references[question], a, b) for question, a, b in pairs], rules)


def task_metrics(test_sets: Mapping[str, Verdicts], resamples: int, seed: int) -> dict[str, Any]:
    """Metrics of a task: the plain mean over its test sets, whose questions are resampled set by set."""
    values = {name: judged.graded.values for name, judged in test_sets.items()}
    metrics = bootstrap_task_metrics(values, resamples, _bootstrap_seed(seed))
    return {name: metric.as_json() for name, metric in metrics.items()}


def most_common_answer(extracted: Sequence[str | None]) -> dict[str, Any]:
    """The answer given most often, as first given but for a final full stop, and its share of all questions.

    A share far above that of the right answers says that the model answers without reading. Answers are compared as words:
    by value would take math-verify for every pair of questions. The answer is null and its share 0 if no question has one.
    """
    answered = [answer for answer in extracted if answer is not None]
    if not answered:
        return {"answer": None, "share": 0.0}
    words, times = Counter(map(plain_words, answered)).most_common(1)[0]
    first = next(answer for answer in answered if plain_words(answer) == words)
    return {"answer": first.strip().rstrip("."), "share": times / len(extracted)}


def _answers(
    examples: Sequence[Example], responses: Sequence[Sequence[Response]], grader: Grader, rules: Rules
) -> list[list[Answer]]:
    """Each question's responses, read and graded."""
    asked = [(example, response) for example, row in zip(examples, responses, strict=True) for response in row]
    extracted = [extract_answer(response.text, example.reference.kind, rules) for example, response in asked]
    correct = grader.grade_all([example.reference for example, _ in asked], extracted, rules)
    answers = iter(Answer(*fields) for fields in zip([response for _, response in asked], extracted, correct, strict=True))
    return [[next(answers) for _ in row] for row in responses]


def _bootstrap_seed(seed: int) -> int:
    return derived_seed(seed, "bootstrap")
