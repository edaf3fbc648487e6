"""The six procedural tasks: families of problems with a train set and a test set that share no problem."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from megatron_plasticity.config.tasks import AnswerKind
from megatron_plasticity.data.problems.registry import FAMILIES, draw_problems, problems
from megatron_plasticity.data.problems.split import Side
from megatron_plasticity.evaluation.tasks.task import Example, Reference


@dataclass(frozen=True)
class ProceduralTask:
    """A family of problems as a task; its only test set has its name."""

    name: str
    answer_kind: AnswerKind
    description: str
    identity: str | None = None

    @property
    def answer_kinds(self) -> frozenset[AnswerKind]:
        return frozenset((self.answer_kind,))

    def train(self, count: int | None, seed: int) -> list[Example]:
        """`count` training examples, distinct in content; raises `UserError` if the task has fewer.

        Of yes, no and maybe each is right equally often, up to one question, for any `count`; so too in the test set.
        """
        return self._examples("train", count, seed)

    def test_sets(self, count: int | None, seed: int) -> dict[str, list[Example]]:
        """`count` test questions, none of them on the train side; raises `UserError` if the task has fewer."""
        return {self.name: self._examples("test", count, seed)}

    def size(self, side: Side) -> int:
        """Number of distinct problems on one side."""
        return len(problems(self.name, side))

    def _examples(self, side: Side, count: int | None, seed: int) -> list[Example]:
        examples = []
        for number, problem in enumerate(draw_problems(self.name, side, self.size(side) if count is None else count, seed)):
            question = problem.ask(Random(f"{seed}/{self.name}/{side}/{number}"))
            name = f"{self.name}/{side}/{seed}/{number}"
            reference = Reference(self.answer_kind, question.answer)
            examples.append(Example(name, question.prompt, question.response, reference, question.choices))
        return examples


PROCEDURAL_TASKS = {
    family.name: ProceduralTask(family.name, family.answer_kind, family.description) for family in FAMILIES.values()
}
