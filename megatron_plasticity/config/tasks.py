"""Which task a run fine-tunes on or is asked, and how much of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from megatron_plasticity.config.base import Section, added_later, neutral

AnswerKind = Literal["number", "maths", "choice", "yes_no_maybe", "text", "literal", "program_input"]
"""How an answer is graded: an exact number, a mathematical expression, the letter of an option, yes, no or maybe, other words, a
Python literal, or an input for which a program must give the expected output."""


class TaskConfig(Section):
    """One task of fine-tuning and evaluation."""

    name: str
    """Name of a procedural task, or of one that `tasks prepare` has prepared."""
    folder: Path = neutral(Path("data/tasks"))
    """Folder of the prepared tasks; the hash of the one that is read enters the run's hash. Procedural tasks need none."""
    train_examples: PositiveInt | None = 1000
    """Number of training examples; null takes all of a prepared task."""
    test_examples: PositiveInt | None = 200
    """Number of questions of each test set; null takes all of a prepared task."""
    questions: Literal["test", "train"] = added_later("test")
    """What an evaluation asks: the test sets, or the training examples themselves, which shows what was memorised."""
    seed: int = 42
    """Seed of the choice of examples."""
