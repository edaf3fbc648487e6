"""What fine-tuning and evaluation know of a task: training examples, test sets, and what an answer is graded against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_plasticity.config.tasks import AnswerKind, TaskConfig


@dataclass(frozen=True)
class Reference:
    """What an extracted answer is graded against."""

    kind: AnswerKind
    answer: str
    """A number, LaTeX, a letter, words or a Python literal; for `program_input` the output that the program must give."""
    program: str = ""
    """For `program_input`: Python source that defines the function `f`."""


@dataclass(frozen=True)
class Example:
    """One question of a task."""

    id: str
    """Unique within the task."""
    prompt: str
    response: str
    """Chain of thought that ends with the answer; the target of fine-tuning. Empty where a test set has none."""
    reference: Reference
    choices: tuple[str, ...] = ()
    """Texts of the options A, B, …, for multiple choice."""
    group: str = ""
    """Part of the test set that has scores of its own, such as "level 3"."""


class Task(Protocol):
    """A task of fine-tuning and evaluation. `count` is a number of examples, drawn by `seed`; None takes all."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def identity(self) -> str | None:
        """SHA-256 of the examples, which enters the hash of a run; None where the code alone decides them."""
        ...

    @property
    def answer_kinds(self) -> frozenset[AnswerKind]:
        """Kinds of the answers to its questions."""
        ...

    def train(self, count: int | None, seed: int) -> list[Example]:
        """Training examples; raises `UserError` if the task has fewer than `count`."""
        ...

    def test_sets(self, count: int | None, seed: int) -> Mapping[str, Sequence[Example]]:
        """Questions of each test set by its name, none of them in the training set unless the task says so; raises `UserError` if
        a set has fewer than `count`."""
        ...


def questions_of(task: Task, config: TaskConfig) -> Mapping[str, Sequence[Example]]:
    """What an evaluation of `config` asks, by test set; the training examples are a set called `train`."""
    if config.questions == "train":
        return {"train": task.train(config.train_examples, config.seed)}
    return task.test_sets(config.test_examples, config.seed)
