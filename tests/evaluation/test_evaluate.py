from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_plasticity.config.evaluation import EvaluateRecipe, RewardConfig
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import TaskConfig
from megatron_plasticity.data.tokenizer import Tokenizer, train_byte_bpe
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation import evaluate
from megatron_plasticity.evaluation.evaluate import chance_of, evaluate_model, questions_sha256
from megatron_plasticity.evaluation.tasks import TASKS, Example
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.transformer import Transformer

QUESTIONS, SAMPLES = 5, 4
ALL_TASKS = [TaskConfig(name=name, test_examples=QUESTIONS) for name in TASKS]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [f"{example.prompt} {example.response}" for task in TASKS.values() for example in task.train(100, 0)]
    return train_byte_bpe(texts, 400)


def _model(tokenizer: Tokenizer, context_length: int = 512) -> Transformer:
    sizes = {"layers": 1, "hidden_size": 16, "mlp_hidden_size": 24, "query_heads": 2, "kv_heads": 1, "head_dim": 8}
    model = Transformer(
        ModelConfig.model_validate(
            {"family": "llama2", "vocab_size": tokenizer.vocab_size, "context_length": context_length, **sizes}
        )
    )
    initialise(model, 0)
    return model


def _recipe(**values: Any) -> EvaluateRecipe:
    return EvaluateRecipe.model_validate({"samples": SAMPLES, "max_new_tokens": 12, "bootstrap_resamples": 50, **values})


def test_results_and_rows_have_the_documented_shape(tokenizer: Tokenizer) -> None:
    updates: list[tuple[float, float]] = []

    class Seen:
        def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
            updates.append((done, total))

    results, rows = evaluate_model(_model(tokenizer), tokenizer, _recipe(reward={"kind": "length"}), ALL_TASKS, progress=Seen())
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert list(results["tasks"]) == list(results["examples"]) == list(TASKS)
    for name, task in results["tasks"].items():
        assert task["answer_kind"] == TASKS[name].answer_kind
        assert task["questions"] == QUESTIONS
        asked = TASKS[name].test(QUESTIONS, TaskConfig(name=name).seed)
        assert task["chance"] == chance_of(asked)
        assert task["questions_sha256"] == questions_sha256(asked)
        assert task["reward"] == {"kind": "length"}
        assert set(task["most_common_answer"]) == {"answer", "share"}
        assert len(task["greedy_correct"]) == QUESTIONS
        assert [len(row) for row in task["sampled_correct"]] == [SAMPLES] * QUESTIONS
        assert {"greedy", "maj", "rm", "pass", "orm", "format_rate"} <= set(task["metrics"])
        for metric in task["metrics"].values():
            assert metric["low"] <= metric["high"]
        assert [set(example) for example in results["examples"][name]] == [
            {"prompt", "response", "extracted", "answer", "correct"}
        ] * 3
    answers = len(TASKS) * QUESTIONS * (1 + SAMPLES)
    assert len(rows) == len({(row["question"], row["pass"], row["sample"]) for row in rows}) == answers
    assert set(rows[0]) == {"task", "question", "pass", "sample", "text", "extracted", "correct", "reward"}
    assert all((row["reward"] is None) == (row["pass"] == "greedy") for row in rows)
    assert updates[-1] == (answers, answers)
    assert updates == sorted(updates)


def test_an_evaluation_is_a_function_of_its_seed_and_not_of_the_batch_size(tokenizer: Tokenizer) -> None:
    model, tasks = _model(tokenizer).double(), ALL_TASKS[:2]
    first = evaluate_model(model, tokenizer, _recipe(), tasks)
    assert evaluate_model(model, tokenizer, _recipe(), tasks) == first
    assert evaluate_model(model, tokenizer, _recipe(batch_size=3), tasks) == first
    assert evaluate_model(model, tokenizer, _recipe(seed=1), tasks)[1] != first[1]


def test_no_scorer_means_no_reward_metrics_and_no_resamples_no_intervals(tokenizer: Tokenizer) -> None:
    results, rows = evaluate_model(_model(tokenizer), tokenizer, _recipe(bootstrap_resamples=0), ALL_TASKS[:1])
    task = results["tasks"][ALL_TASKS[0].name]
    assert "reward" not in task
    metrics = task["metrics"]
    assert not {"rm", "orm"} & set(metrics)
    assert all((metric["low"], metric["high"]) == (None, None) for metric in metrics.values())
    assert all(row["reward"] is None for row in rows)


def test_reference_responses_are_right_and_the_metrics_follow_their_definitions(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's place is taken by one that gives the reference response greedily, and in samples 1 and 3 of even questions."""
    responses = {
        tuple(tokenizer.encode(f"Human: {example.prompt}\nAssistant:")): tokenizer.encode(example.response)
        for task in TASKS.values()
        for example in task.test(QUESTIONS, TaskConfig(name=task.name).seed)
    }
    nonsense = tokenizer.encode("I do not know.")

    def fake_generate(model: Transformer, prompts: Sequence[list[int]], *, samples: int, temperature: float, **_: Any) -> list:
        right = [responses[tuple(prompt)] for prompt in prompts]
        if temperature == 0:
            return [[response] for response in right]
        return [
            [response if number % 2 == 0 and sample in (1, 3) else nonsense for sample in range(samples)]
            for number, response in enumerate(right)
        ]

    monkeypatch.setattr(evaluate, "generate", fake_generate)
    results, rows = evaluate_model(_model(tokenizer), tokenizer, _recipe(), ALL_TASKS)
    for name, task in results["tasks"].items():
        answers = [example.answer for example in TASKS[name].test(QUESTIONS, TaskConfig(name=name).seed)]
        common = task["most_common_answer"]
        assert common["share"] == max(map(answers.count, answers)) / QUESTIONS == answers.count(common["answer"]) / QUESTIONS
        values = {name: metric["value"] for name, metric in task["metrics"].items()}
        expected = {"greedy": 1.0, "maj": 3 / 5, "pass": 3 / 5, "correct_ratio": 0.5, "format_rate": 3 / 5 * 0.5}
        assert values == pytest.approx(expected)
        assert task["sampled_correct"] == [[0, 1, 0, 1] if question % 2 == 0 else [0] * 4 for question in range(QUESTIONS)]
    assert [row["correct"] for row in rows if row["pass"] == "greedy"] == [True] * len(TASKS) * QUESTIONS
    assert {row["extracted"] for row in rows if not row["correct"]} == {None}


def test_chance_is_that_of_the_questions_asked() -> None:
    def example(answer: str, options: int) -> Example:
        return Example("", "", "", answer, tuple("ABCDEFGH"[:options]))

    assert chance_of([example(answer, 0) for answer in ("1", "2", "2", "3")]) == 0.5
    assert chance_of([example(answer, 4) for answer in "AABC"]) == 0.5
    assert chance_of([example(answer, 4) for answer in "ABCD"]) == 0.25
    assert chance_of([example(answer, 2) for answer in "CDEF"]) == 0.5
    assert chance_of([*(example(answer, 4) for answer in "ABCD"), *(example(answer, 8) for answer in "EFGH")]) == 3 / 16
    assert chance_of(TASKS["trials"].test(100, 0)) == 0.34
    assert 0.25 <= chance_of(TASKS["categories"].test(500, 0)) < 0.33
    assert 0.25 <= chance_of(TASKS["passage"].test(500, 0)) < 0.33


def test_the_digest_of_the_questions_changes_with_each_of_its_parts() -> None:
    first, second = TASKS["algebra"].test(2, 0)
    digest = questions_sha256([first, second])
    assert digest == questions_sha256([first, replace(second, response="another chain of thought")])
    others = [replace(second, id="other"), replace(second, prompt="other"), replace(second, answer="other")]
    changed = [[second, first], [first], *([first, other] for other in others)]
    assert len({digest, *map(questions_sha256, changed)}) == 1 + len(changed)


def test_most_common_answer() -> None:
    assert evaluate._most_common_answer([None, "B", "Yes.", "yes", None, None]) == {"answer": "Yes", "share": 2 / 6}
    assert evaluate._most_common_answer([None, None]) == {"answer": None, "share": 0.0}


def test_the_reward_model_is_named() -> None:
    config = RewardConfig(kind="sequence_classifier", model="folder/model")
    assert evaluate._reward_record(config) == {"kind": "sequence_classifier", "model": "folder/model"}


def test_prompts_longer_than_the_context_name_the_task_and_the_lengths(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"task 'passage'.*the longest has \d+ tokens.*context_length is 24"):
        evaluate_model(_model(tokenizer, context_length=24), tokenizer, _recipe(), [TaskConfig(name="passage", test_examples=3)])


@pytest.mark.parametrize(
    ("recipe", "tasks", "message"),
    [
        ({}, ["arithmatic"], "arithmetic"),
        ({}, ["algebra", "steps", "algebra"], "algebra listed more than once"),
        ({"template": "Human:"}, ["algebra"], "exactly once"),
        ({"reward": {"kind": "sequence_classifier"}}, ["algebra"], r"reward\.model"),
    ],
)
def test_bad_input_is_a_user_error_before_anything_is_generated(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], tasks: list[str], message: str
) -> None:
    monkeypatch.delattr(evaluate, "generate")
    with pytest.raises(UserError, match=message):
        evaluate_model(
            _model(tokenizer), tokenizer, _recipe(**recipe), [TaskConfig(name=name, test_examples=2) for name in tasks]
        )


def test_a_tokenizer_of_another_model_is_a_user_error(tokenizer: Tokenizer) -> None:
    smaller = ModelConfig.model_validate({**_model(tokenizer).config.model_dump(), "vocab_size": 300})
    with torch.device("meta"), pytest.raises(UserError, match="vocab_size"):
        evaluate_model(Transformer(smaller), tokenizer, _recipe(), ALL_TASKS[:1])
