from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_plasticity.config.evaluation import EvaluateRecipe
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.tasks import AnswerKind, TaskConfig
from megatron_plasticity.data.tokenizer import Tokenizer, train_byte_bpe
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation import evaluate
from megatron_plasticity.evaluation.evaluate import chance_of, evaluate_model, questions_sha256
from megatron_plasticity.evaluation.kept_responses import KeptResponses
from megatron_plasticity.evaluation.responses import PAPER_STOP, sampling_parameters
from megatron_plasticity.evaluation.sampler import NativeGenerator
from megatron_plasticity.evaluation.samples import SCHEMA, page, read_samples, write_samples
from megatron_plasticity.evaluation.sampling import Continuation, Generator, SamplingParameters
from megatron_plasticity.evaluation.tasks.procedural import PROCEDURAL_TASKS as TASKS
from megatron_plasticity.evaluation.tasks.task import Example, Reference
from megatron_plasticity.evaluation.verdicts import most_common_answer
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.parallel.grid import ProcessGrid

QUESTIONS, SAMPLES = 5, 4
ALL_TASKS = [TaskConfig(name=name, test_examples=QUESTIONS) for name in TASKS]
ALONE = ProcessGrid(data_rank=0, data_size=1, device=torch.device("cpu"))


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


def _asked(name: str) -> list[Example]:
    return TASKS[name].test_sets(QUESTIONS, TaskConfig(name=name).seed)[name]


def _evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    recipe: EvaluateRecipe,
    tasks: Sequence[TaskConfig],
    grid: ProcessGrid = ALONE,
    progress: Any = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    def generator() -> Generator:
        return NativeGenerator(model, tokenizer, recipe.batch_size)

    return evaluate_model(generator, tokenizer, model.config.context_length, recipe, tasks, grid, progress)


def test_results_and_rows_have_the_documented_shape(tokenizer: Tokenizer) -> None:
    updates: list[tuple[float, float]] = []

    class Seen:
        def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
            updates.append((done, total))

    recipe = _recipe(reward={"kind": "length"})
    results, rows = _evaluate(_model(tokenizer), tokenizer, recipe, ALL_TASKS, progress=Seen())
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert list(results["tasks"]) == list(results["examples"]) == list(TASKS)
    assert results["rules"] == "own"
    for name, task in results["tasks"].items():
        assert task["answer_kind"] == TASKS[name].answer_kind
        assert task["questions"] == QUESTIONS
        asked = _asked(name)
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
        ((set_name, test_set),) = task["test_sets"].items()
        assert set_name == name
        assert test_set["metrics"] == task["metrics"]
        assert test_set["other_rules"]["rules"] == "paper"
        assert "greedy_correct" not in test_set
    answers = len(TASKS) * QUESTIONS * (1 + SAMPLES)
    assert len(rows) == len({(row["question"], row["pass"], row["sample"]) for row in rows}) == answers
    assert [set(row) for row in rows] == [set(SCHEMA.names)] * answers
    assert all((row["reward"] is None) == (row["pass"] == "greedy") for row in rows)
    assert updates[-1] == (answers, answers)
    assert updates == sorted(updates)


def test_an_evaluation_is_a_function_of_its_seed_and_not_of_the_batch_size_or_the_other_tasks(tokenizer: Tokenizer) -> None:
    model, tasks = _model(tokenizer).double(), ALL_TASKS[:2]
    first = _evaluate(model, tokenizer, _recipe(), tasks)
    assert _evaluate(model, tokenizer, _recipe(), tasks) == first
    assert _evaluate(model, tokenizer, _recipe(batch_size=3), tasks) == first
    assert _evaluate(model, tokenizer, _recipe(), tasks[1:])[1] == [row for row in first[1] if row["task"] == tasks[1].name]
    assert _evaluate(model, tokenizer, _recipe(seed=1), tasks)[1] != first[1]


@dataclass(frozen=True)
class _Rank(ProcessGrid):
    """One of several ranks that run one after the other, the main one last."""

    gathered: list[list[Any]] = field(default_factory=list)
    """Of each rank that is not the main one, what it gave to one `gather` after the other."""

    def gather(self, value: Any) -> list[Any] | None:
        if self.is_main:
            return [value, *(of_rank.pop(0) for of_rank in self.gathered)]
        self.gathered[self.data_rank - 1].append(value)
        return None


def test_any_number_of_ranks_gives_the_same_results(tokenizer: Tokenizer) -> None:
    model, recipe = _model(tokenizer).double(), _recipe(reward={"kind": "length"})
    alone = _evaluate(model, tokenizer, recipe, ALL_TASKS[:2])
    gathered: list[list[Any]] = [[], []]
    for rank in (1, 2):
        grid = _Rank(rank, 3, torch.device("cpu"), gathered=gathered)
        assert _evaluate(model, tokenizer, recipe, ALL_TASKS[:2], grid) == ({}, [])
    main = _Rank(0, 3, torch.device("cpu"), gathered=gathered)
    assert _evaluate(model, tokenizer, recipe, ALL_TASKS[:2], main) == alone
    assert gathered == [[], []]


def test_tasks_that_share_a_test_set_can_be_asked_by_any_number_of_ranks(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [_asked(name) for name in TASKS][:3]
    sets = {"one": {"b": parts[1]}, "two": {"a": parts[0], "b": parts[1]}, "three": {"c": parts[2][:2]}}
    tasks = {name: _Shared(name, of_task) for name, of_task in sets.items()}
    monkeypatch.setattr(evaluate, "get_task", lambda config: tasks[config.name])
    model, configs = _model(tokenizer).double(), [TaskConfig(name=name) for name in tasks]
    alone = _evaluate(model, tokenizer, _recipe(), configs)
    gathered: list[list[Any]] = [[]]
    assert _evaluate(model, tokenizer, _recipe(), configs, _Rank(1, 2, torch.device("cpu"), gathered=gathered)) == ({}, [])
    assert _evaluate(model, tokenizer, _recipe(), configs, _Rank(0, 2, torch.device("cpu"), gathered=gathered)) == alone
    assert gathered == [[]]


def test_an_evaluation_that_was_stopped_asks_nothing_twice(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, recipe, tasks = _model(tokenizer).double(), _recipe(reward={"kind": "length"}), ALL_TASKS[:2]
    alone = _evaluate(model, tokenizer, recipe, tasks)
    asked: list[int] = []

    class Stopping:
        """Answers three passes, and after that one is told to stop."""

        def __init__(self) -> None:
            self.own, self.passes_left = NativeGenerator(model, tokenizer, recipe.batch_size), 3

        def generate(
            self,
            prompts: Sequence[Sequence[int]],
            keys: Sequence[int],
            samples: int,
            parameters: SamplingParameters,
            progress: Any = None,
        ) -> list[list[Continuation]]:
            if self.passes_left == 0:
                raise KeyboardInterrupt
            self.passes_left -= 1
            asked.append(len(prompts))
            return self.own.generate(prompts, keys, samples, parameters, progress)

    def generator() -> Generator:
        return Stopping()

    kept = KeptResponses(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(generator, tokenizer, 512, recipe, tasks, ALONE, kept=kept)
    files = sorted((tmp_path / "responses").iterdir())
    assert len(files) == len(asked) == 3
    files[0].write_bytes(files[0].read_bytes()[:-9])  # what is damaged is asked again
    assert evaluate_model(generator, tokenizer, 512, recipe, tasks, ALONE, kept=kept) == alone
    assert len(asked) == 5
    kept.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_graded_is_found_before_the_model_is_loaded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted() -> Generator:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("megatron_plasticity.evaluation.grading.math_verify_installed", lambda: False)
    config = TaskConfig(name="arithmetic", test_examples=2)
    with pytest.raises(UserError, match="math-verify, which is not installed"):
        evaluate_model(unwanted, tokenizer, 512, _recipe(paper_compat=True), [config], ALONE)
    results, rows = _evaluate(_model(tokenizer), tokenizer, _recipe(), [config])
    (test_set,) = results["tasks"]["arithmetic"]["test_sets"].values()
    assert "other_rules" not in test_set
    assert {row["correct_by_other_rules"] for row in rows} == {None}
    assert list(page(rows))

    def unconfined(_: Any) -> None:
        raise UserError("cannot be closed")

    monkeypatch.setattr("megatron_plasticity.evaluation.sandbox.Sandbox.check_confinement", unconfined)
    program = Example("q", "What?", "", Reference("program_input", "1", "def f(x): return x"))
    monkeypatch.setattr(evaluate, "get_task", lambda _: _Shared("programs", {"programs": [program]}))
    with pytest.raises(UserError, match="cannot be closed"):
        evaluate_model(unwanted, tokenizer, 512, _recipe(), [TaskConfig(name="programs")], ALONE)


def test_no_scorer_means_no_reward_metrics_and_no_resamples_no_intervals(tokenizer: Tokenizer) -> None:
    results, rows = _evaluate(_model(tokenizer), tokenizer, _recipe(bootstrap_resamples=0), ALL_TASKS[:1])
    task = results["tasks"][ALL_TASKS[0].name]
    assert "reward" not in task
    metrics = task["metrics"]
    assert not {"rm", "orm"} & set(metrics)
    assert all((metric["low"], metric["high"]) == (None, None) for metric in metrics.values())
    assert all(row["reward"] is None for row in rows)


class _Parrot:
    """Takes the model's place: gives the reference response greedily, and in samples 1 and 3 of even questions."""

    def __init__(self, tokenizer: Tokenizer, examples: Sequence[Example], template: str = "Human: {}\nAssistant:") -> None:
        self.right = {
            tuple(tokenizer.encode(template.format(example.prompt))): (number, tokenizer.encode(example.response))
            for number, example in enumerate(examples)
        }
        self.nonsense = tokenizer.encode("I do not know.")
        self.prompts_asked = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        samples: int,
        parameters: SamplingParameters,
        progress: Any = None,
    ) -> list[list[Continuation]]:
        self.prompts_asked += len(prompts)
        assert len(set(keys)) == len(prompts)
        rows = []
        for prompt in prompts:
            number, right = self.right[tuple(prompt)]
            knows = [parameters.temperature == 0 or (number % 2 == 0 and sample in (1, 3)) for sample in range(samples)]
            rows.append([Continuation(right if known else self.nonsense, "end_of_text") for known in knows])
        return rows


def test_reference_responses_are_right_and_the_metrics_follow_their_definitions(tokenizer: Tokenizer) -> None:
    for name in TASKS:
        parrot = _Parrot(tokenizer, _asked(name))
        config = TaskConfig(name=name, test_examples=QUESTIONS)
        results, rows = evaluate_model(lambda parrot=parrot: parrot, tokenizer, 512, _recipe(), [config], ALONE)
        task = results["tasks"][name]
        answers = [example.reference.answer for example in _asked(name)]
        common = task["most_common_answer"]
        assert common["share"] == max(map(answers.count, answers)) / QUESTIONS == answers.count(common["answer"]) / QUESTIONS
        values = {name: metric["value"] for name, metric in task["metrics"].items()}
        expected = {"greedy": 1.0, "maj": 3 / 5, "pass": 3 / 5, "correct_ratio": 0.5, "format_rate": 3 / 5 * 0.5}
        assert {name: values[name] for name in expected} == pytest.approx(expected)
        assert task["sampled_correct"] == [[0, 1, 0, 1] if question % 2 == 0 else [0] * 4 for question in range(QUESTIONS)]
        assert all(row["correct"] for row in rows if row["pass"] == "greedy")
        assert {row["extracted"] for row in rows if not row["correct"]} == {None}


@dataclass(frozen=True)
class _Shared:
    """A task with the test sets given."""

    name: str
    sets: dict[str, list[Example]]
    description: str = ""
    identity: str | None = None
    answer_kinds: frozenset[AnswerKind] = frozenset()

    def train(self, count: int | None, seed: int) -> list[Example]:
        return []

    def test_sets(self, count: int | None, seed: int) -> dict[str, list[Example]]:
        return self.sets


def test_a_task_is_the_mean_of_its_test_sets_and_a_shared_one_is_asked_once(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def example(number: int, answer: str, says: str, group: str = "") -> Example:
        return Example(f"q{number}", f"Question {number}?", f"The answer is {says}.", Reference("choice", answer), (), group)

    easy = [example(number, "A", "A") for number in range(2)]
    hard = [example(10 + number, "B", "B" if number < 2 else "C", f"level {1 + number // 2}") for number in range(8)]
    tasks = {"both": _Shared("both", {"easy": easy, "hard": hard}), "hard": _Shared("hard", {"hard": hard})}
    monkeypatch.setattr(evaluate, "get_task", lambda config: tasks[config.name])
    parrot = _Parrot(tokenizer, [*easy, *hard])
    configs = [TaskConfig(name=name) for name in tasks]
    results, rows = evaluate_model(lambda: parrot, tokenizer, 512, _recipe(), configs, ALONE)
    assert parrot.prompts_asked == 2 * (len(easy) + len(hard))
    both, alone = results["tasks"]["both"], results["tasks"]["hard"]
    assert both["metrics"]["greedy"]["value"] == pytest.approx((1 + 0.25) / 2)
    assert both["metrics"]["greedy"]["low"] < (1 + 0.25) / 2 < both["metrics"]["greedy"]["high"]
    assert (both["questions"], both["greedy_correct"]) == (10, [1, 1, 1, 1] + [0] * 6)
    assert both["test_sets"]["hard"]["metrics"] == alone["metrics"]
    groups = both["test_sets"]["hard"]["groups"]
    assert {name: (group["questions"], group["greedy"]) for name, group in groups.items()} == {
        "level 1": (2, 1.0),
        "level 2": (2, 0.0),
        "level 3": (2, 0.0),
        "level 4": (2, 0.0),
    }
    assert len([row for row in rows if row["test_set"] == "hard" and row["pass"] == "greedy"]) == 2 * len(hard)


def test_the_training_examples_can_be_asked(tokenizer: Tokenizer) -> None:
    config = TaskConfig(name="arithmetic", train_examples=3, questions="train")
    _, rows = _evaluate(_model(tokenizer), tokenizer, _recipe(), [config])
    assert {row["test_set"] for row in rows} == {"train"}
    assert {row["prompt"] for row in rows} == {example.prompt for example in TASKS["arithmetic"].train(3, config.seed)}


def test_chance_is_that_of_the_questions_asked() -> None:
    def example(answer: str, options: int) -> Example:
        return Example("", "", "", Reference("choice", answer), tuple("ABCDEFGH"[:options]))

    assert chance_of([example(answer, 0) for answer in ("1", "2", "2", "3")]) == 0.5
    assert chance_of([example(answer, 4) for answer in "AABC"]) == 0.5
    assert chance_of([example(answer, 4) for answer in "ABCD"]) == 0.25
    assert chance_of([example(answer, 2) for answer in "CDEF"]) == 0.5
    assert chance_of([Example("", "", "", Reference("program_input", "1", "def f(): ..."))] * 3) == 0
    assert chance_of([*(example(answer, 4) for answer in "ABCD"), *(example(answer, 8) for answer in "EFGH")]) == 3 / 16
    assert chance_of(TASKS["trials"].test_sets(100, 0)["trials"]) == 0.34
    assert 0.25 <= chance_of(TASKS["categories"].test_sets(500, 0)["categories"]) < 0.33
    assert 0.25 <= chance_of(TASKS["passage"].test_sets(500, 0)["passage"]) < 0.33


def test_the_digest_of_the_questions_changes_with_each_of_its_parts() -> None:
    first, second = TASKS["algebra"].test_sets(2, 0)["algebra"]
    digest = questions_sha256([first, second])
    assert digest == questions_sha256([first, replace(second, response="another chain of thought")])
    right = second.reference
    references = [replace(right, answer="other"), replace(right, kind="number"), replace(right, program="def f(): ...")]
    others = [replace(second, id="other"), replace(second, prompt="other")]
    others += [replace(second, reference=reference) for reference in references]
    changed = [[second, first], [first], *([first, other] for other in others)]
    assert len({digest, *map(questions_sha256, changed)}) == 1 + len(changed)


def test_most_common_answer() -> None:
    assert most_common_answer([None, "B", "Yes.", "yes", None, None]) == {"answer": "Yes", "share": 2 / 6}
    assert most_common_answer([None, None]) == {"answer": None, "share": 0.0}


def test_paper_compat_decides_the_settings_of_the_public_code() -> None:
    recipe = _recipe(paper_compat=True, max_new_tokens=2048)
    for sampled in (False, True):
        parameters = sampling_parameters(recipe, sampled)
        assert (parameters.repetition_penalty, parameters.stop, parameters.max_total_tokens) == (1.1, PAPER_STOP, 2048)
        assert (parameters.temperature, parameters.top_p, parameters.top_k) == (float(sampled), 1.0, None)
    with pytest.raises(ValueError, match="`stop` is decided by `paper_compat`"):
        _recipe(paper_compat=True, stop=["Human"])


def test_prompts_longer_than_the_context_name_the_task_and_the_lengths(tokenizer: Tokenizer) -> None:
    task = TaskConfig(name="passage", test_examples=3)
    with pytest.raises(UserError, match=r"task 'passage'.*the longest has \d+ tokens.*room for 24"):
        _evaluate(_model(tokenizer, context_length=24), tokenizer, _recipe(), [task])


def test_long_prompts_can_count_as_wrong(tokenizer: Tokenizer) -> None:
    lengths = sorted(len(tokenizer.encode(f"Human: {example.prompt}\nAssistant:")) for example in _asked("steps"))
    model, recipe = (
        _model(tokenizer, context_length=lengths[2]),
        _recipe(long_prompts="count_as_wrong", reward={"kind": "length"}),
    )
    results, rows = _evaluate(model, tokenizer, recipe, [TaskConfig(name="steps", test_examples=QUESTIONS)])
    too_long = sum(length >= lengths[2] for length in lengths)
    assert 0 < too_long < QUESTIONS
    task = results["tasks"]["steps"]
    assert task["prompts_too_long"] == too_long
    assert task["questions"] == QUESTIONS
    not_asked = [row for row in rows if row["finish"] == "prompt_too_long"]
    assert len(not_asked) == too_long * (1 + SAMPLES)
    assert not any(row["correct"] for row in not_asked)
    assert task["metrics"]["orm"]["value"] < 0  # of the questions that were asked


@pytest.mark.parametrize(
    ("recipe", "tasks", "message"),
    [
        ({}, ["arithmatic"], "arithmetic"),
        ({}, ["algebra", "steps", "algebra"], "algebra listed more than once"),
        ({"template": "Human:"}, ["algebra"], "exactly once"),
        ({"reward": {"kind": "sequence_classifier"}}, ["algebra"], r"reward\.model"),
    ],
)
def test_bad_input_is_a_user_error_before_the_model_is_loaded(
    tokenizer: Tokenizer, recipe: dict[str, Any], tasks: list[str], message: str
) -> None:
    def unwanted() -> Generator:
        raise AssertionError("the model was loaded")

    configs = [TaskConfig(name=name, test_examples=2) for name in tasks]
    with pytest.raises(UserError, match=message):
        evaluate_model(unwanted, tokenizer, 512, _recipe(**recipe), configs, ALONE)


def test_the_table_of_samples_comes_back_and_is_shown_with_its_verdicts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    parrot = _Parrot(tokenizer, _asked("arithmetic"))
    config = TaskConfig(name="arithmetic", test_examples=QUESTIONS)
    _, rows = evaluate_model(lambda: parrot, tokenizer, 512, _recipe(), [config], ALONE)
    rows[0]["text"] += "\x1b[2J"  # what a terminal takes for a command
    write_samples(tmp_path / "samples.parquet", rows)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.parquet"]
    assert read_samples(tmp_path) == rows
    for number in (1, 3, 4, QUESTIONS, 2 * QUESTIONS):
        assert len({row["question"] for row in read_samples(tmp_path, number)}) == min(number, QUESTIONS)
    some = read_samples(tmp_path, 2)
    assert len({row["question"] for row in some}) == 2
    lines = list(page(some))
    assert sum(line.startswith("━━ arithmetic") for line in lines) == 2
    assert sum(line.startswith((" ✓", " ✗")) for line in lines) == 2 * (1 + SAMPLES)
    assert not any("\x1b" in line for line in lines)
    with pytest.raises(UserError, match="cannot read the table of samples"):
        read_samples(tmp_path / "elsewhere")
