"""The six tasks: a family of procedural problems with a train set and a test set that share no problem."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from random import Random

from megatron_plasticity.data.problems.problem import AnswerKind
from megatron_plasticity.data.problems.registry import FAMILIES, draw_problems, problems
from megatron_plasticity.data.problems.split import Side
from megatron_plasticity.errors import UserError


@dataclass(frozen=True)
class Example:
    """One question of a task."""

    id: str
    prompt: str
    response: str
    """Chain of thought that ends with the answer; the target of fine-tuning."""
    answer: str
    """What the extracted answer is graded against: a number, LaTeX, a letter, or yes, no or maybe."""
    choices: tuple[str, ...] = ()
    """Texts of the options A, B, …, for multiple choice."""


@dataclass(frozen=True)
class Task:
    """A task of fine-tuning and evaluation."""

    name: str
    answer_kind: AnswerKind
    description: str

    def train(self, count: int, seed: int) -> list[Example]:
        """`count` training examples, distinct in content; raises `UserError` if the task has fewer.

        Of yes, no and maybe each is right equally often, up to one question, for any `count`; so too in the test set.
        """
        return self._examples("train", count, seed)

    def test(self, count: int, seed: int) -> list[Example]:
        """`count` test questions, none of them on the train side; raises `UserError` if the task has fewer."""
        return self._examples("test", count, seed)

    def size(self, side: Side) -> int:
        """Number of distinct problems on one side."""
        return len(problems(self.name, side))

    def _examples(self, side: Side, count: int, seed: int) -> list[Example]:
        examples = []
        for number, problem in enumerate(draw_problems(self.name, side, count, seed)):
            question = problem.ask(Random(f"{seed}/{self.name}/{side}/{number}"))
            name = f"{self.name}/{side}/{seed}/{number}"
            examples.append(Example(name, question.prompt, question.response, question.answer, question.choices))
        return examples


TASKS: dict[str, Task] = {family.name: Task(family.name, family.answer_kind, family.description) for family in FAMILIES.values()}


def get_task(name: str) -> Task:
    """The task called `name`; raises `UserError` that names the nearest ones."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=2)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise UserError(f"unknown task {name!r}: {hint}the tasks are {', '.join(TASKS)}")
