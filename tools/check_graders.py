"""Grade the reference solutions of real tasks, which are right, and changed ones, which are wrong.

    python tools/check_graders.py --from FOLDER --workers 2

Prepares the shipped tasks (docs/tasks.md), or those named, from the files in FOLDER, leaving out tasks whose files are not there,
and reads and grades each solution: against its reference, and against references that were changed so that their value is
another one: another digit, sign, letter, label or element. Answers that Llama 3.1 wrote to MMLU-Pro are read as they stand, right
ones and wrong ones. The table gives the share of right verdicts by our own rules and by the paper's.
Exit code: 0 if every set reaches --least in both columns of our own rules, 1 if not, 2 for bad input.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_plasticity.data.tables import table_rows
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.extraction import Rules, extract_answer
from megatron_plasticity.evaluation.grading import Grader
from megatron_plasticity.evaluation.literals import read_literal
from megatron_plasticity.evaluation.tasks.catalogue import find_task_files, load_task_file, shipped_tasks
from megatron_plasticity.evaluation.tasks.prepare import find_origins, prepare_task
from megatron_plasticity.evaluation.tasks.prepared import PreparedTask
from megatron_plasticity.evaluation.tasks.task import Example, Reference

LEAST = 0.99
CHAINS_OF_THOUGHT = "mmlu_pro/model_outputs_Meta-Llama-3_1-70B-Instruct_5shots.zip"
"""From TIGER-AI-Lab/MMLU-Pro: eval_results/."""


@dataclass(frozen=True)
class Solution:
    """A text, what its answer is graded against, and whether it is right."""

    id: str
    text: str
    reference: Reference
    right: bool
    others: tuple[str, ...] = ()
    """Wrong answers that the set itself offers: other options, other labels."""


def main(arguments: list[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    try:
        return _check(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="tasks, suites or task files [all shipped tasks]")
    parser.add_argument("--from", dest="folder", type=Path, required=True, metavar="FOLDER", help="folder of the tasks' files")
    parser.add_argument("--workers", type=int, default=1, help="processes that compare or run programs at a time [1]")
    parser.add_argument("--least", type=float, default=LEAST, help=f"share of right verdicts that a set must reach [{LEAST}]")
    parser.add_argument("--show", type=int, default=20, metavar="N", help="failures of each set and column to list [20]")
    return parser


def _check(parsed: argparse.Namespace) -> int:
    passed, failures = True, []
    print("| set | kind | right: graded right | wrong: graded wrong | paper's rules: right | paper's rules: wrong |")
    print("|---|---|---|---|---|---|")
    with Grader(parsed.workers) as grader:
        for name, solutions in _sets(parsed.tasks or list(shipped_tasks()), parsed.folder):
            gold = [solution for solution in solutions if solution.right]
            wrong = [solution for solution in solutions if not solution.right]
            wrong += [changed for solution in gold for changed in changed_references(solution)]
            columns = [
                (gold, "own", _failures(grader, gold, "own")),
                (wrong, "own", _failures(grader, wrong, "own")),
                (gold, "paper", _failures(grader, gold, "paper")),
                (wrong, "paper", _failures(grader, wrong, "paper")),
            ]
            kinds = ", ".join(sorted({solution.reference.kind for solution in solutions}))
            cells = [_share(len(asked) - len(failed), len(asked)) for asked, _, failed in columns]
            print(f"| {name} | {kinds} | {' | '.join(cells)} |", flush=True)
            passed &= all(len(failed) <= (1 - parsed.least) * len(asked) for asked, rules, failed in columns if rules == "own")
            failures += [(name, solution) for _, rules, failed in columns if rules == "own" for solution in failed[: parsed.show]]
    for name, solution in failures:
        extracted = extract_answer(solution.text, solution.reference.kind)
        verdict = "right, graded wrong" if solution.right else "wrong, graded right"
        print(f"{name} {solution.id}: {verdict}: extracted {extracted!r}, reference {solution.reference.answer!r}")
    return 0 if passed else 1


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole}, {100 * part / whole:.2f} %" if whole else "none"


def _failures(grader: Grader, solutions: Sequence[Solution], rules: Rules) -> list[Solution]:
    extracted = [extract_answer(solution.text, solution.reference.kind, rules) for solution in solutions]
    verdicts = grader.grade_all([solution.reference for solution in solutions], extracted, rules)
    return [solution for solution, verdict in zip(solutions, verdicts, strict=True) if verdict != solution.right]


# Sets


def _sets(words: Sequence[str], folder: Path) -> Iterator[tuple[str, list[Solution]]]:
    """Name and solutions of each set whose files are there."""
    for path in find_task_files(words):
        task = load_task_file(path)
        try:
            find_origins(task, folder, path.name)
        except UserError as error:
            print(f"{task.name} is left out: {error}", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as output:
            prepared = PreparedTask(prepare_task(task, folder, Path(output), path.name)[0])
            sets = {"train": prepared.train(None, 0), **prepared.test_sets(None, 0)}
        for name, examples in sets.items():
            yield f"{task.name}: {name}", list(_solutions(examples))
    if (folder / CHAINS_OF_THOUGHT).exists():
        yield "MMLU-Pro as answered", list(_chains_of_thought(folder / CHAINS_OF_THOUGHT))


def _solutions(examples: Sequence[Example]) -> Iterator[Solution]:
    """The responses; where a test set has none, the bare answers."""
    labels = sorted({example.reference.answer for example in examples if example.reference.kind in ("text", "yes_no_maybe")})
    for example in examples:
        reference = example.reference
        others = example.choices if reference.kind == "text" and example.choices else labels[:3]
        wrong = (
            tuple(other for other in others if other != reference.answer) if reference.kind in ("text", "yes_no_maybe") else ()
        )
        yield Solution(example.id, example.response or f"The answer is {reference.answer}.", reference, True, wrong)


def _chains_of_thought(path: Path) -> Iterator[Solution]:
    for row in table_rows(path):
        right = row["pred"] == row["answer"]
        yield Solution(str(row["question_id"]), row["generated_text"], Reference("choice", row["answer"]), right)


# Changes of a reference, all of which change its value.


def changed_references(solution: Solution) -> Iterator[Solution]:
    """The solution against wrong references."""
    for number, answer in enumerate(_changes(solution.reference) + list(solution.others)):
        if answer != solution.reference.answer:
            reference = replace(solution.reference, answer=answer)
            yield replace(solution, id=f"{solution.id}, change {number}", reference=reference, right=False)


def _changes(reference: Reference) -> list[str]:
    kind, answer = reference.kind, reference.answer
    if kind == "number":
        return [_another_digit(answer), *([_another_sign(answer)] if re.search("[1-9]", answer) else [])]
    if kind == "maths":
        return _changed_maths(answer)
    if kind == "choice":
        return ["ABCDEFGHIJ"[("ABCDEFGHIJ".index(answer) + step) % 10] for step in (1, 2)]
    if kind in ("literal", "program_input"):
        value = read_literal(answer)
        return [] if value is None else [repr(another) for another in _other_values(value.value)]
    return []


def _another_digit(text: str) -> str:
    """The text with its last digit one higher, or one lower for 9."""
    return re.sub(r"\d(?=\D*$)", lambda digit: str(int(digit[0]) + 1) if digit[0] != "9" else "8", text)


def _another_sign(text: str) -> str:
    return text[1:] if text.startswith("-") else f"-{text}"


def _changed_maths(answer: str) -> list[str]:
    """Another digit, and one more; the latter only for what is a single expression."""
    changes = [_another_digit(answer)] if re.search(r"\d", answer) else []
    is_expression = not re.search(r"\\text|\\in|\\cup|\\begin|\\infty|\\pm|[,=<>:%]|\\l?eq?\b|\\g?eq?\b|\\%", answer)
    if is_expression and not answer.startswith(("(", "[", "\\{")):
        changes.append(f"{answer} + 1")
    return changes


def _other_values(value: Any) -> list[Any]:
    """One element less, one more, and another one; a bool is negated, numbers are one higher and, unless 0, of the other sign."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, *([-value] if value else [])]
    if isinstance(value, str):
        return [f"{value}x", *([value[1:]] if value else [])]
    if isinstance(value, bytes):
        return [value + b"x"]
    if isinstance(value, dict):
        keys = list(value)
        less = [dict(list(value.items())[:-1])] if keys else []
        other = [{**value, keys[0]: another} for another in _other_values(value[keys[0]])[:1]] if keys else []
        return [*less, *other, {**value, "another key": 0}]
    if isinstance(value, list | tuple):
        make = type(value)
        items = list(value)
        changed = [make([*items[:-1], another]) for another in _other_values(items[-1])[:1]] if items else []
        swapped = [make([items[-1], *items[1:-1], items[0]])] if len(items) > 1 and items[0] != items[-1] else []
        return [make([*items, 0]), *([make(items[:-1])] if items else []), *changed, *swapped]
    return [0]


if __name__ == "__main__":
    sys.exit(main())
