"""The harness on our own model: the scores that its Hugging Face model gives of the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_plasticity.config.evaluation import HarnessConfig
from megatron_plasticity.config.interchange import ImportConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.job import harness
from megatron_plasticity.interchange.exporting import export_model
from megatron_plasticity.interchange.importing import import_model
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.tracking.trained_model import TrainedModel
from tests.interchange.folders import write_model

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate", reason="the harness's Hugging Face model needs it")

TASKS: dict[str, dict[str, Any]] = {
    "local_cloze": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["one", "two words", "a third choice"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "local_answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["z", "\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def _text(number: int) -> str:
    return " ".join(f"Word {place} of {number}." for place in range(3 + 6 * number))


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        # Some longer than the context of the model, some without a question. No text repeats itself: of equal windows the
        # harness's own model (0.4.13) takes one for another, and its sum then depends on its batch size.
        {
            "question": "What is " * (1 + 9 * number) if number else "",
            "text": _text(number),
            "label": number % 3,
        }
        for number in range(6)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row | {"answer": "a"}) + "\n" for row in rows))
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder / "source", "olmo2")
    config = ImportConfig(name="model", source=str(folder / "source"), output=folder / "runs", parity=False)
    return import_model(config, NoProgress())


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness loads its rows through `datasets`, whose cache must not outlive the test."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.slow
def test_scores_are_those_of_the_export(model: RunFolder, task_folder: Path, tmp_path: Path) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    config = HarnessConfig(
        name="local", output=tmp_path, run=model.path, tasks=tuple(TASKS), task_folder=task_folder, batch_size=4, device="cpu"
    )
    run = harness(config, NoProgress())
    export = export_model(model.path, tmp_path / "export", NoProgress(), parity=False)
    found: Any = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(export), "device": "cpu", "dtype": "float32"},
        batch_size=4,
        tasks=list(TASKS),
        num_fewshot=0,
        task_manager=TaskManager(include_path=str(task_folder)),
        log_samples=False,
    )
    theirs = found["results"]
    ours = run.results["tasks"]
    compared = 0
    for task, scores in ours.items():
        for metric, score in scores.items():
            assert score["value"] == pytest.approx(theirs[task][f"{metric},none"], rel=1e-4), (task, metric)
            compared += 1
    assert compared == 5
    assert run.results["questions"] == dict.fromkeys(TASKS, 6)


def test_every_answer_is_that_of_the_export(model: RunFolder, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from megatron_plasticity.evaluation.lm_eval import NativeModel, special_ids

    trained = TrainedModel.open(model.path)
    built = trained.checkpoint.build_model(torch.device("cpu"))
    native = NativeModel(built, trained.tokenizer(), batch_size=3, special=special_ids(trained.tokenizer_path))
    export = export_model(model.path, tmp_path / "export", NoProgress(), parity=False)
    settings: dict[str, Any] = {"pretrained": str(export), "device": "cpu", "dtype": "float32", "batch_size": 3}
    theirs = HFLM(**settings)

    def asked(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
        return [Instance(request_type=kind, doc={}, arguments=argument, idx=i) for i, argument in enumerate(arguments)]

    pairs = asked("loglikelihood", [("", "word"), ("The sky is ", "blue"), ("long " * 60, "end"), ("a", "b" * 100)])
    for (ours, greedy), (other, other_greedy) in zip(native.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert ours == pytest.approx(other, rel=1e-4)
        assert greedy == other_greedy
    texts = asked("loglikelihood_rolling", [("short",), ("long text " * 40,)])
    assert native.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-4)
    until = {"until": ["e"], "max_gen_toks": 8, "do_sample": False}
    questions = asked("generate_until", [("One", until), ("Two and " * 30, until), ("Three", {**until, "until": "q"})])
    answers = native.generate_until(questions)
    assert answers == theirs.generate_until(questions)
    assert not any("e" in answer for answer in answers[:2])


def test_settings_of_generation_are_honoured_or_refused() -> None:
    from lm_eval.api.instance import Instance

    from megatron_plasticity.evaluation.lm_eval import _by_settings

    def settings(**asked: Any) -> tuple[int, float, tuple[str, ...]]:
        request = Instance(request_type="generate_until", doc={}, arguments=("", asked), idx=0)
        ((found, _),) = _by_settings([request]).items()
        return found

    assert settings() == (256, 0.0, ())
    assert settings(until="a", max_tokens=7, do_sample=False, temperature=0.5) == (7, 0.0, ("a",))
    assert settings(temperature=0.5) == (256, 0.5, ())
    assert settings(top_p=0.9, top_k=5, repetition_penalty=1.0, num_beams=1) == settings()
    for refused in (
        {"repetition_penalty": 1.2},
        {"num_beams": 4},
        {"do_sample": True, "top_p": 0.9},
        {"temperature": 0.7, "top_k": 50},
        {"surprise": 1},
    ):
        with pytest.raises(UserError, match=f"{list(refused)[-1]}=.* is not supported"):
            settings(**refused)


def test_the_content_of_own_tasks_names_the_run(tmp_path: Path) -> None:
    from megatron_plasticity.evaluation.lm_eval import harness_inputs

    own = tmp_path / "tasks"
    config = HarnessConfig(name="local", run=tmp_path, tasks=("t",), task_folder=own)
    with pytest.raises(UserError, match="is no folder"):
        harness_inputs(config)
    own.mkdir()
    (own / "t.yaml").write_text("task: t")
    before = harness_inputs(config)
    assert before.keys() == {"lm_eval", "task_folder"}
    (own / "__pycache__").mkdir()
    (own / "__pycache__/t.pyc").write_text("")
    assert harness_inputs(config) == before
    (own / "t.yaml").write_text("task: t\nnum_fewshot: 5")
    assert harness_inputs(config) != before
    assert harness_inputs(config.model_copy(update={"task_folder": None})).keys() == {"lm_eval"}


def test_an_unknown_task_names_the_nearest(model: RunFolder, task_folder: Path, tmp_path: Path) -> None:
    config = HarnessConfig(name="local", output=tmp_path, run=model.path, tasks=("local_clozes",), task_folder=task_folder)
    with pytest.raises(UserError, match="did you mean local_cloze"):
        harness(config, NoProgress())
