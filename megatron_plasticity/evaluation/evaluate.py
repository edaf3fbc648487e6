"""Evaluating one model on test sets: prompts, a greedy and a sampled pass, grading, rewards, metrics."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_plasticity.config.evaluation import EvaluateRecipe, RewardConfig
from megatron_plasticity.config.training import TaskConfig
from megatron_plasticity.data.sft import render_prompt
from megatron_plasticity.data.tokenizer import Tokenizer, check_tokenizer_fits
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.extraction import extract_answer
from megatron_plasticity.evaluation.grading import Grader, plain_words
from megatron_plasticity.evaluation.metrics import Outcomes, bootstrap_metrics, cluster_answers, question_values
from megatron_plasticity.evaluation.rewards import RewardScorer, make_scorer
from megatron_plasticity.evaluation.sampler import check_prompts, generate
from megatron_plasticity.evaluation.streams import derived_seed
from megatron_plasticity.evaluation.tasks import Example, Task, get_task
from megatron_plasticity.models.transformer import Transformer

if TYPE_CHECKING:
    from megatron_plasticity.tracking.progress import Progress

EXAMPLES_SHOWN = 3


@dataclass(frozen=True)
class Answer:
    """One response to one question, read and graded."""

    text: str
    extracted: str | None
    correct: bool
    reward: float | None = None


@dataclass(frozen=True)
class _TestSet:
    """A task's questions, encoded and known to fit the model."""

    task: Task
    examples: list[Example]
    prompts: list[list[int]]


def evaluate_model(
    model: Transformer,
    tokenizer: Tokenizer,
    recipe: EvaluateRecipe,
    tasks: Sequence[TaskConfig],
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask the model every test question once greedily and `recipe.samples` times at `recipe.temperature`.

    Returns the content of `results.json` and the rows of `samples.jsonl`, one per response:
    `{"task", "question" (its id), "pass": "greedy" | "sampled", "sample", "text", "extracted", "correct", "reward"}`.
    In the results each task has its metrics (`metrics.py`; one that is undefined is absent), the `chance` of the questions asked
    (`chance_of`), their `questions_sha256` (`questions_sha256`), the greedy pass's `most_common_answer`, correctness per question
    in both passes, the `grader` and, if there was one, the `reward` scorer. The model is moved to `device` and stays there.

    Raises UserError before anything is generated if a task is unknown or named twice, the template is unusable, or a prompt is
    too long for the model's context.
    """
    check_tokenizer_fits(tokenizer, model.config)
    test_sets = _prepare(tokenizer, recipe, tasks, model.config.context_length)
    scorer = make_scorer(recipe.reward, device)
    model.to(device)
    answers_per_question = 1 + recipe.samples
    whole = _Whole(progress, total=answers_per_question * sum(len(test_set.examples) for test_set in test_sets))
    results: dict[str, Any] = {"tasks": {}, "examples": {}}
    rows: list[dict[str, Any]] = []
    with Grader() as grader:
        for test_set in test_sets:
            name = test_set.task.name
            greedy = _ask(model, tokenizer, recipe, test_set, 1, 0.0, grader, None, whole)
            sampled = _ask(model, tokenizer, recipe, test_set, recipe.samples, recipe.temperature, grader, scorer, whole)
            results["tasks"][name] = _task_results(test_set, recipe, [row[0] for row in greedy], sampled, grader)
            results["examples"][name] = [
                _shown(example, row[0]) for example, row in list(zip(test_set.examples, greedy, strict=True))[:EXAMPLES_SHOWN]
            ]
            rows += [*_sample_rows(test_set, "greedy", greedy), *_sample_rows(test_set, "sampled", sampled)]
    return results, rows


def chance_of(examples: Sequence[Example]) -> float:
    """Accuracy on these questions without understanding: of the best constant answer or, if better, of a uniform guess among the
    options."""
    constant = Counter(example.answer for example in examples).most_common(1)[0][1] / len(examples)
    uniform = sum(1 / len(example.choices) for example in examples if example.choices) / len(examples)
    return max(constant, uniform)


def questions_sha256(examples: Sequence[Example]) -> str:
    """SHA-256 of the questions' ids, prompts and answers in their order: equal if and only if the same questions were asked."""
    content = [[example.id, example.prompt, example.answer] for example in examples]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _prepare(tokenizer: Tokenizer, recipe: EvaluateRecipe, tasks: Sequence[TaskConfig], context_length: int) -> list[_TestSet]:
    if recipe.template.count("{prompt}") != 1:
        raise UserError(f"template={recipe.template!r} must contain {{prompt}} exactly once")
    names = [config.name for config in tasks]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"tasks: {', '.join(repeated)} listed more than once; results are kept by task name")
    test_sets = []
    for config in tasks:
        task = get_task(config.name)
        examples = task.test(config.test_examples, config.seed)
        prompts = tokenizer.encode_batch([render_prompt(recipe.template, example.prompt) for example in examples])
        check_prompts(prompts, context_length, what=f"prompts of task {config.name!r}")
        test_sets.append(_TestSet(task, examples, prompts))
    return test_sets


def _ask(
    model: Transformer,
    tokenizer: Tokenizer,
    recipe: EvaluateRecipe,
    test_set: _TestSet,
    samples: int,
    temperature: float,
    grader: Grader,
    scorer: RewardScorer | None,
    whole: _Whole,
) -> list[list[Answer]]:
    """One pass over the questions: result[question][sample]."""
    generated = generate(
        model,
        test_set.prompts,
        max_new_tokens=recipe.max_new_tokens,
        end_of_text=tokenizer.end_of_text,
        samples=samples,
        temperature=temperature,
        seed=derived_seed(recipe.seed, test_set.task.name),
        batch_size=recipe.batch_size,
        progress=whole.part(samples * len(test_set.examples)),
    )
    texts = [tokenizer.decode(tokens) for row in generated for tokens in row]
    asked = [example for example in test_set.examples for _ in range(samples)]
    extracted = [extract_answer(text) for text in texts]
    pairs = [(answer, example.answer) for answer, example in zip(extracted, asked, strict=True)]
    correct = grader.grade_all(test_set.task.answer_kind, pairs)
    rewards = [None] * len(texts) if scorer is None else scorer.score([example.prompt for example in asked], texts)
    answers = [Answer(*fields) for fields in zip(texts, extracted, correct, rewards, strict=True)]
    return [answers[start : start + samples] for start in range(0, len(answers), samples)]


def _task_results(
    test_set: _TestSet, recipe: EvaluateRecipe, greedy: list[Answer], sampled: list[list[Answer]], grader: Grader
) -> dict[str, Any]:
    task = test_set.task

    def same(a: str, b: str) -> bool:
        return grader.equivalent(task.answer_kind, a, b)

    rewarded = recipe.reward.kind != "none"
    outcomes = Outcomes(
        greedy_correct=np.array([answer.correct for answer in greedy]),
        sampled_correct=np.array([[answer.correct for answer in row] for row in sampled]),
        clusters=np.array([cluster_answers([answer.extracted for answer in row], same) for row in sampled]),
        answered=np.array([[answer.extracted is not None for answer in row] for row in sampled]),
        rewards=np.array([[answer.reward for answer in row] for row in sampled], dtype=np.float64) if rewarded else None,
    )
    metrics = bootstrap_metrics(question_values(outcomes), recipe.bootstrap_resamples, derived_seed(recipe.seed, "bootstrap"))
    results = {
        "answer_kind": task.answer_kind,
        "grader": grader.name(task.answer_kind),
        "questions": len(test_set.examples),
        "questions_sha256": questions_sha256(test_set.examples),
        "chance": chance_of(test_set.examples),
        "most_common_answer": _most_common_answer([answer.extracted for answer in greedy]),
        "metrics": {name: metric.as_json() for name, metric in metrics.items()},
        "greedy_correct": outcomes.greedy_correct.astype(int).tolist(),
        "sampled_correct": outcomes.sampled_correct.astype(int).tolist(),
    }
    if rewarded:
        results["reward"] = _reward_record(recipe.reward)
    return results


def _most_common_answer(extracted: list[str | None]) -> dict[str, Any]:
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


def _reward_record(config: RewardConfig) -> dict[str, Any]:
    return {"kind": config.kind, **({"model": config.model} if config.kind == "sequence_classifier" else {})}


def _shown(example: Example, answer: Answer) -> dict[str, Any]:
    return {
        "prompt": example.prompt,
        "response": answer.text,
        "extracted": answer.extracted,
        "answer": example.answer,
        "correct": answer.correct,
    }


def _sample_rows(test_set: _TestSet, which: str, answers: list[list[Answer]]) -> list[dict[str, Any]]:
    return [
        {
            "task": test_set.task.name,
            "question": example.id,
            "pass": which,
            "sample": sample,
            "text": answer.text,
            "extracted": answer.extracted,
            "correct": answer.correct,
            "reward": answer.reward,
        }
        for example, row in zip(test_set.examples, answers, strict=True)
        for sample, answer in enumerate(row)
    ]


class _Whole:
    """Progress of the whole evaluation, of which each pass knows only its part."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.before, self.started = progress, total, 0, 0

    def part(self, answers: int) -> Progress | None:
        """Progress of the next pass, which will give so many answers."""
        self.before, self.started = self.started, self.started + answers
        return self if self.progress is not None else None

    def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
        if self.progress is not None:
            self.progress.update(self.before + done, self.total, unit, **info)
