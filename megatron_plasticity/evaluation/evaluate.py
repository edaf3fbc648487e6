"""Evaluating one model on the test sets of tasks: a greedy and a sampled pass, grading, rewards, metrics."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_plasticity.config.evaluation import EvaluateRecipe
from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.data.sft import render_prompt
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.extraction import Rules
from megatron_plasticity.evaluation.grading import Grader
from megatron_plasticity.evaluation.kept_responses import KeptResponses
from megatron_plasticity.evaluation.responses import (
    Question,
    Response,
    answer_questions,
    room_for_prompts,
    sampling_parameters,
)
from megatron_plasticity.evaluation.rewards import RewardScorer, make_scorer
from megatron_plasticity.evaluation.sampling import Generator
from megatron_plasticity.evaluation.tasks.registry import get_task
from megatron_plasticity.evaluation.tasks.task import Example, questions_of
from megatron_plasticity.evaluation.verdicts import Verdicts, judge, task_metrics
from megatron_plasticity.parallel.grid import ProcessGrid

if TYPE_CHECKING:
    from megatron_plasticity.tracking.progress import Progress

EXAMPLES_SHOWN = 3
_GRADERS = 4
"""Most processes that compare mathematics or run programs."""

GeneratorFactory = Callable[[], Generator]


@dataclass(frozen=True)
class _TestSet:
    """Questions, encoded and known to fit the model."""

    name: str
    questions: tuple[Question, ...]
    sha256: str

    @property
    def examples(self) -> list[Example]:
        return [question.example for question in self.questions]


@dataclass(frozen=True)
class _AskedTask:
    name: str
    test_sets: tuple[_TestSet, ...]


def evaluate_model(
    make_generator: GeneratorFactory,
    tokenizer: Tokenizer,
    context_length: int,
    recipe: EvaluateRecipe,
    tasks: Sequence[TaskConfig],
    grid: ProcessGrid,
    progress: Progress | None = None,
    kept: KeptResponses | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask the model every test question once greedily and `recipe.samples` times at `recipe.temperature`. A collective.

    Returns, on the main process, the content of `results.json` and the rows of `samples.parquet` (see `samples.py`), and two
    empty collections on the others.

    In the results each task has `test_sets`, each with its metrics (`metrics.py`; one that is undefined is absent), its scores by
    group, the `chance` of the questions asked (`chance_of`), their `questions_sha256`, correctness per question in both passes,
    the `most_common_answer` of the greedy pass, the `grader`, and what the other rules of grading would have given. The task
    itself has the plain mean of its test sets' metrics, and their questions end to end. A test set that several tasks share is
    asked once. What is in `kept` is not asked again, and what was asked is put there.

    Raises UserError before anything is generated if a task is unknown or named twice, the template is unusable, a prompt is too
    long for the model's context, or this machine cannot grade what is asked.
    """
    asked = _prepare(tokenizer, recipe, tasks, context_length)
    distinct = {test_set.sha256: test_set for task in asked for test_set in task.test_sets}
    answers = sum(question.fits for test_set in distinct.values() for question in test_set.questions) * (1 + recipe.samples)
    whole = _Whole(progress, answers, grid.data_size)
    rules: Rules = "paper" if recipe.paper_compat else "own"
    with Grader(workers=min(_GRADERS, os.cpu_count() or 1)) as grader:
        if grid.is_main:
            grader.check({e.reference.kind for test_set in distinct.values() for e in test_set.examples}, rules)
        scorer = make_scorer(recipe.reward, grid.device)
        asking = _Asking(make_generator(), tokenizer, recipe, scorer, grid, whole, kept)
        # The same ones in the same order on every rank. Grading comes after all of them, so that no rank waits for it.
        passes = {digest: (asking.ask(test_set, False), asking.ask(test_set, True)) for digest, test_set in distinct.items()}
        judged = {}
        for digest, (greedy, sampled) in passes.items():
            if greedy is not None and sampled is not None:
                whole.repeat()
                judged[digest] = judge(distinct[digest].examples, greedy, sampled, grader, rules)
    if not grid.is_main:
        return {}, []
    results: dict[str, Any] = {"rules": rules, "tasks": {}, "examples": {}}
    rows: list[dict[str, Any]] = []
    for task in asked:
        of_task = {test_set.name: judged[test_set.sha256] for test_set in task.test_sets}
        results["tasks"][task.name] = _task_results(task, of_task, recipe)
        results["examples"][task.name] = [shown for v in of_task.values() for shown in v.shown(EXAMPLES_SHOWN)]
        rows += [row for name, v in of_task.items() for row in v.rows(task.name, name)]
    if asking.cut:
        results["rewarded_conversations_cut"] = asking.cut
    return results, rows


def chance_of(examples: Sequence[Example]) -> float:
    """Accuracy on these questions without understanding: of the best constant answer or, if better, of a uniform guess among the
    options. 0 where what is asked for are inputs of programs: no one input is that of most."""
    if all(example.reference.kind == "program_input" for example in examples):
        return 0.0
    constant = Counter(example.reference.answer for example in examples).most_common(1)[0][1] / len(examples)
    uniform = sum(1 / len(example.choices) for example in examples if example.choices) / len(examples)
    return max(constant, uniform)


def questions_sha256(examples: Sequence[Example]) -> str:
    """SHA-256 of the questions' ids, prompts and references in their order: equal if and only if the same questions were asked
    and graded alike."""
    content = [[example.id, example.prompt, *astuple(example.reference)] for example in examples]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _prepare(tokenizer: Tokenizer, recipe: EvaluateRecipe, tasks: Sequence[TaskConfig], context_length: int) -> list[_AskedTask]:
    if recipe.template.count("{prompt}") != 1:
        raise UserError(f"template={recipe.template!r} must contain {{prompt}} exactly once")
    names = [config.name for config in tasks]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"tasks: {', '.join(repeated)} listed more than once; results are kept by task name")
    room = room_for_prompts(recipe, context_length)
    asked = []
    for config in tasks:
        test_sets = questions_of(get_task(config), config)
        asked.append(
            _AskedTask(
                config.name,
                tuple(_encoded(name, examples, tokenizer, recipe, room, config.name) for name, examples in test_sets.items()),
            )
        )
    return asked


def _encoded(
    name: str, examples: Sequence[Example], tokenizer: Tokenizer, recipe: EvaluateRecipe, room: int, task: str
) -> _TestSet:
    prompts = tokenizer.encode_batch([render_prompt(recipe.template, example.prompt) for example in examples])
    questions = tuple(
        Question(example, tuple(prompt), len(prompt) < room) for example, prompt in zip(examples, prompts, strict=True)
    )
    too_long = sum(not question.fits for question in questions)
    if too_long and (recipe.long_prompts == "refuse" or too_long == len(questions)):
        raise UserError(
            f"prompts of task {task!r}: {too_long} of {len(questions)} do not fit; the longest has "
            f"{max(map(len, prompts))} tokens, but prompt and answer together have room for {room}; "
            "use a model with a longer context" + ("" if too_long == len(questions) else ", or long_prompts=count_as_wrong")
        )
    return _TestSet(name, questions, questions_sha256(examples))


class _Asking:
    """What is needed to put test sets to a model, one pass after the other. Every rank has one, and asks the same of it."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        recipe: EvaluateRecipe,
        scorer: RewardScorer | None,
        grid: ProcessGrid,
        whole: _Whole,
        kept: KeptResponses | None,
    ) -> None:
        self._generator, self._tokenizer, self._recipe, self._scorer = generator, tokenizer, recipe, scorer
        self._grid, self._whole, self._kept = grid, whole, kept
        self.cut = 0
        """On the main process: rewarded conversations that lost their end."""

    def ask(self, test_set: _TestSet, sampled: bool) -> list[list[Response]] | None:
        """One pass over a test set: [question][sample] on the main process, None on the others. A collective."""
        name = f"{test_set.sha256[:16]}-{'sampled' if sampled else 'greedy'}"
        samples = self._recipe.samples if sampled else 1
        part = self._whole.part(samples * sum(question.fits for question in test_set.questions))
        if self._kept is not None:
            found = self._kept.load(name) if self._grid.is_main else None
            if self._grid.from_main(found is not None):
                self._whole.repeat()
                if found is None:
                    return None
                self.cut += found[1]
                return found[0]
        scorer = self._scorer if sampled else None
        before = scorer.cut if scorer is not None else 0
        parameters = sampling_parameters(self._recipe, sampled)
        responses = answer_questions(
            self._generator, self._tokenizer, test_set.questions, samples, parameters, scorer, self._grid, part
        )
        cut = self._grid.gather(scorer.cut - before if scorer is not None else 0)
        if responses is None or cut is None:
            return None
        self.cut += sum(cut)
        if self._kept is not None:
            self._kept.save(name, responses, sum(cut))
        return responses


def _task_results(task: _AskedTask, verdicts: Mapping[str, Verdicts], recipe: EvaluateRecipe) -> dict[str, Any]:
    test_sets = {}
    for test_set in task.test_sets:
        judged = verdicts[test_set.name]
        test_sets[test_set.name] = {
            "questions_sha256": test_set.sha256,
            "chance": chance_of(test_set.examples),
            **judged.results(recipe.bootstrap_resamples, recipe.seed),
        }
    first, *others = test_sets.values()
    whole = dict(first)  # a single test set is its task
    if others:
        parts = list(test_sets.values())
        digests = json.dumps([part["questions_sha256"] for part in parts])
        whole = {
            "answer_kind": _joined(part["answer_kind"] for part in parts),
            "grader": _joined(part["grader"] for part in parts),
            "questions": sum(part["questions"] for part in parts),
            "questions_sha256": hashlib.sha256(digests.encode()).hexdigest(),
            "chance": float(np.mean([part["chance"] for part in parts])),
            "metrics": task_metrics(verdicts, recipe.bootstrap_resamples, recipe.seed),
            "greedy_correct": [correct for part in parts for correct in part["greedy_correct"]],
            "sampled_correct": [correct for part in parts for correct in part["sampled_correct"]],
        }
    if recipe.reward.kind != "none":
        whole["reward"] = {"kind": recipe.reward.kind, **({"model": recipe.reward.model} if recipe.reward.model else {})}
    per_question = ("greedy_correct", "sampled_correct")  # kept once, for the task
    return {
        **{key: value for key, value in whole.items() if key not in ("groups", "other_rules")},
        "test_sets": {
            name: {key: value for key, value in part.items() if key not in per_question} for name, part in test_sets.items()
        },
    }


def _joined(names: Any) -> str:
    return ", ".join(dict.fromkeys(names))


class _Whole:
    """Progress of the whole evaluation, of which each pass knows only its part; ranks are taken to be equally far."""

    def __init__(self, progress: Progress | None, total: int, ranks: int) -> None:
        self.progress, self.total, self.ranks, self.before, self.started = progress, total, ranks, 0, 0

    def part(self, answers: int) -> Progress | None:
        """Progress of the next pass, which will give so many answers on all ranks."""
        self.before, self.started = self.started, self.started + answers
        return self if self.progress is not None else None

    def repeat(self) -> None:
        """Say how far it is: as a sign of life, or since the pass was there already."""
        if self.progress is not None:
            self.progress.update(self.started, self.total, "answers")

    def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
        if self.progress is not None:
            self.progress.update(min(self.before + done * self.ranks, self.started), self.total, unit, **info)
