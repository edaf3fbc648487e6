from __future__ import annotations

from collections import Counter

import pytest

from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.extraction import extract_answer
from megatron_plasticity.evaluation.grading import Grader
from megatron_plasticity.evaluation.tasks.procedural import PROCEDURAL_TASKS as TASKS
from megatron_plasticity.evaluation.tasks.task import Example

KINDS = {
    "arithmetic": "number",
    "algebra": "maths",
    "categories": "choice",
    "trials": "yes_no_maybe",
    "passage": "choice",
    "steps": "choice",
}


def asked(name: str, count: int, seed: int) -> list[Example]:
    return TASKS[name].test_sets(count, seed)[name]


def test_names_and_kinds() -> None:
    assert {name: task.answer_kind for name, task in TASKS.items()} == KINDS


@pytest.mark.parametrize("name", TASKS)
def test_examples_are_distinct_and_deterministic(name: str) -> None:
    task = TASKS[name]
    train, test = task.train(400, seed=1), asked(name, 200, seed=1)
    assert train == task.train(400, seed=1)
    assert train[:50] == task.train(50, seed=1)
    assert [e.prompt for e in train] != [e.prompt for e in task.train(400, seed=2)]
    assert len({e.id for e in train + test}) == 600
    assert not {e.prompt for e in train} & {e.prompt for e in test}


@pytest.mark.parametrize("name", TASKS)
def test_the_reference_response_is_graded_as_right_and_another_one_as_wrong(name: str) -> None:
    examples = asked(name, 100, seed=0)
    first = examples[0].reference
    other = next(e for e in examples if e.reference.answer != first.answer)
    extracted = [extract_answer(e.response, e.reference.kind) for e in [*examples, other]]
    with Grader(math_verify=False) as grader:
        assert grader.grade_all([*(e.reference for e in examples), first], extracted) == [True] * 100 + [False]


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind == "choice"])
def test_positions_are_balanced(name: str) -> None:
    examples = TASKS[name].train(1200, seed=0)
    by_options: dict[int, Counter[str]] = {}
    for example in examples:
        assert example.reference.answer in "ABCDEFGH"[: len(example.choices)]
        assert len(set(example.choices)) == len(example.choices)
        by_options.setdefault(len(example.choices), Counter())[example.reference.answer] += 1
    for options, counts in by_options.items():
        assert len(counts) == options
        assert max(counts.values()) < 1.7 * sum(counts.values()) / options  # options stand in order, so roughly


def test_steps_has_up_to_eight_options() -> None:
    assert {len(e.choices) for e in TASKS["steps"].train(200, seed=0)} == {4, 6, 8}


@pytest.mark.parametrize("side", ["train", "test"])
def test_any_number_of_yes_no_maybe_questions_is_balanced(side: str) -> None:
    task = TASKS["trials"]
    for seed in range(3):
        examples = task.train(1000, seed) if side == "train" else asked("trials", task.size("test"), seed)
        answers = [example.reference.answer for example in examples]
        for count in range(1, len(answers) + 1):
            counts = [answers[:count].count(answer) for answer in ("yes", "no", "maybe")]
            assert max(counts) - min(counts) <= 1
        assert len({tuple(answers[start : start + 3]) for start in range(0, 300, 3)}) == 6  # the number does not tell the answer


def test_too_many_examples_are_refused() -> None:
    task = TASKS["algebra"]
    with pytest.raises(UserError, match="lower train_examples to at most"):
        task.train(task.size("train") + 1, seed=0)
