from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.tracking.metrics import MetricLog
from megatron_plasticity.tracking.mlflow_content import (
    KEY_CHARACTERS,
    NOTE,
    PARAM_CHARACTERS,
    allowed_name,
    flat_numbers,
    flat_params,
    run_content,
    study_content,
)
from megatron_plasticity.tracking.mlflow_cursor import Cursor, Measurement
from megatron_plasticity.tracking.mlflow_origin import short_count
from megatron_plasticity.tracking.mlflow_store import tracking_uri, without_credentials
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.tracking.run_state import RunState


def test_params_are_flat_and_within_the_limits() -> None:
    config = {"a": {"b": 0.5, "none": None, "yes": True}, "betas": [0.9, 0.95], "empty": {}, "text": "x y", "long": "z" * 7000}
    params = flat_params(config)
    assert params["long"] == "z" * (PARAM_CHARACTERS - 1) + "…"
    del params["long"]
    assert params == {"a.b": "0.5", "a.none": "null", "a.yes": "true", "betas": "[0.9, 0.95]", "empty": "{}", "text": "x y"}


def test_results_become_scalars() -> None:
    results = {
        "tasks": {"arithmetic": {"answer_kind": "number", "metrics": {"greedy": {"value": 0.4, "low": 0.3, "high": 0.5}}}},
        "greedy_correct": [0, 1],
        "complete": True,
        "held_out_loss": math.nan,
        "steps": 30,
    }
    numbers = flat_numbers(results)
    assert math.isnan(numbers.pop("results/held_out_loss"))
    assert numbers == {
        "results/tasks/arithmetic/metrics/greedy": 0.4,
        "results/tasks/arithmetic/metrics/greedy/low": 0.3,
        "results/tasks/arithmetic/metrics/greedy/high": 0.5,
        "results/steps": 30.0,
    }


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("train/loss", "train/loss"), ("a%b(λ)", "a_b___"), ("/a//../b", "a/b"), ("x" * 300, "x" * KEY_CHARACTERS)],
)
def test_names_are_made_such_that_mlflow_takes_them(name: str, allowed: str) -> None:
    assert allowed_name(name) == allowed


@pytest.mark.parametrize(
    ("statuses", "over", "status"),
    [
        (["done", "done"], False, "FINISHED"),
        (["done", "running", "failed"], False, "RUNNING"),
        (["done", "pending"], False, "RUNNING"),
        (["done", "pending"], True, "KILLED"),
        (["done", "interrupted", "pending"], True, "KILLED"),
        (["done", "failed", "pending"], True, "FAILED"),
        (["done", "running"], True, "RUNNING"),
    ],
)
def test_status_of_a_study(tmp_path: Path, statuses: list, over: bool, status: str) -> None:
    states = [RunState(status=s) for s in statuses]
    assert study_content({"name": "s", "cells": []}, tmp_path, states, over).status == status


def test_a_pretraining_run_names_its_corpus(tmp_path: Path, make_config: Callable[..., PretrainConfig]) -> None:
    corpus = tmp_path / "quickstart-01234567"
    corpus.mkdir()
    config = make_config(data={"folder": str(corpus)})
    folder = RunFolder.create(tmp_path, "pretrain", "wd0.5", config, {"corpus": "ab" * 32})
    (without_manifest,) = run_content(folder.path).datasets
    assert (without_manifest.name, without_manifest.digest) == ("quickstart-01234567", "ab" * 18)
    (corpus / "manifest.json").write_text(json.dumps({"sha256": "cd" * 32, "train_tokens": 5, "sources": [1]}))
    (with_manifest,) = run_content(folder.path).datasets
    assert (with_manifest.digest, with_manifest.profile["train_tokens"]) == ("cd" * 18, 5)
    assert "sources" not in with_manifest.profile


@pytest.mark.parametrize(
    ("optimizer", "weight_decay"),
    [
        ({"learning_rate": 1e-3, "weight_decay": 0.5}, "0.5"),
        ({"learning_rate": 0.01, "adamw_timescale": 0.5}, "6.66667"),
        ({"learning_rate": 0.01, "adamw_timescale": math.inf}, "0"),
    ],
)
def test_weight_decay_is_a_tag_however_it_was_stated(
    tmp_path: Path, make_config: Callable[..., PretrainConfig], optimizer: dict[str, float], weight_decay: str
) -> None:
    folder = RunFolder.create(tmp_path, "pretrain", "x", make_config(optimizer=optimizer), {})
    assert run_content(folder.path).tags["weight_decay"] == weight_decay


def test_the_way_of_fine_tuning_and_the_step_are_tags(tmp_path: Path, make_config: Callable[..., PretrainConfig]) -> None:
    folder = RunFolder.create(tmp_path, "pretrain", "x", make_config(), {})
    cell = {"variant": {"optimizer.learning_rate": 3e-5, "seed": 2}, "step": 200}
    tags = run_content(folder.path, {"name": "s"}, cell).tags
    assert (tags["finetune.optimizer.learning_rate"], tags["finetune.seed"], tags["pretraining_step"]) == ("3e-05", "2", "200")
    plain = run_content(folder.path, {"name": "s"}, {"variant": {}, "step": None}).tags
    assert not [tag for tag in plain if tag.startswith(("finetune.", "pretraining_step"))]


class TestOrigin:
    def tuned(self, tmp_path: Path, base: Path, name: str = "t") -> RunFolder:
        tree = {"name": name, "base": str(base), "task": {"name": "arithmetic", "train_examples": 10}, "max_length": 64}
        shared = {
            "optimizer": {"learning_rate": 1e-4, "weight_decay": 0.0},
            "batch": {"global_batch_size": 2, "micro_batch_size": 2},
        }
        return RunFolder.create(tmp_path, "finetune", name, FinetuneConfig.model_validate(tree | shared), {"base": "ab@10"})

    def test_a_fine_tuning_tells_of_the_pretraining(self, tmp_path: Path, make_config: Callable[..., PretrainConfig]) -> None:
        base = RunFolder.create(tmp_path, "pretrain", "x", make_config(seed=7), {})
        content = run_content(self.tuned(tmp_path, base.path / "checkpoints" / "step-10").path)
        assert (
            content.tags.items()
            >= {
                "weight_decay": "0.5",  # of the pretraining, not its own
                "family": "llama2",
                "size": "38k",
                "seed": "7",
                "tokens_per_parameter": "0.102",
                "task": "arithmetic",
                "model": "ab@10",
                "pretraining_step": "10",
            }.items()
        )
        assert content.params.items() >= {"pretraining.weight_decay": "0.5", "optimizer.weight_decay": "0.0"}.items()
        assert content.tags[NOTE].startswith(
            "Fine-tuning of a 38k llama2 pretrained with λ = 0.5 on 3.8k tokens (0.102 per parameter), taken at step 10; "
            "task: arithmetic"
        )

    def test_folders_may_have_moved_together(self, tmp_path: Path, make_config: Callable[..., PretrainConfig]) -> None:
        base = RunFolder.create(tmp_path / "before", "pretrain", "x", make_config(), {})
        tuned = self.tuned(tmp_path / "before", base.path)
        (tmp_path / "before").rename(tmp_path / "after")
        assert run_content(tmp_path / "after" / tuned.path.name).tags["size"] == "38k"

    def test_what_is_not_known_is_left_out(self, tmp_path: Path) -> None:
        tags = run_content(self.tuned(tmp_path, Path("gone/pretrain-x-0123456789")).path).tags
        assert not {"weight_decay", "family", "size", "seed", "tokens_per_parameter"} & set(tags)
        circle = self.tuned(tmp_path, Path("finetune-u-0123456789"), "u")
        (circle.path / "config.yaml").write_text(f"base: {circle.path}\n")
        assert "family" not in run_content(circle.path).tags

    @pytest.mark.parametrize(
        ("number", "text"), [(999, "999"), (37_792, "38k"), (1_000_576, "1M"), (500_921_856, "0.5B"), (4_000_288_768, "4B")]
    )
    def test_numbers_are_short(self, number: int, text: str) -> None:
        assert short_count(number) == text


def test_settings_and_tags_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted")  # pragma: allowlist secret
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    params = flat_params({"source": "https://ada:pw@hub/x", "key": "is hf_planted", "flag": False})  # pragma: allowlist secret
    assert params == {"source": "https://hub/x", "key": "is ***", "flag": "false"}


def test_an_unknown_status_is_named(tmp_path: Path, make_config: Callable[..., PretrainConfig]) -> None:
    folder = RunFolder.create(tmp_path, "pretrain", "x", make_config(), {})
    (folder.path / "state.json").write_text('{"status": "sleeping"}')
    with pytest.raises(UserError, match="unknown status 'sleeping'; expected one of running, done"):
        run_content(folder.path)


class TestCursor:
    def names_and_steps(self, measurements: list[Measurement]) -> list[tuple[str, int]]:
        return [(m.name, m.step) for m in measurements]

    def test_takes_each_line_once_and_waits_for_torn_ones(self, tmp_path: Path) -> None:
        path, cursor = tmp_path / "metrics.jsonl", Cursor("r")
        assert cursor.take_new(tmp_path) == []
        with MetricLog(path) as log:
            log.write(1, {"a": 1.0})
            assert self.names_and_steps(cursor.take_new(tmp_path)) == [("a", 1)]
            assert cursor.take_new(tmp_path) == []
            log.write(1, {"b": 2.0})  # same step, another metric, later
            log.write(2, {"a": 3.0, "b": math.inf})
        with path.open("a") as file:
            file.write('{"step": 3, "a"')
        assert self.names_and_steps(cursor.take_new(tmp_path)) == [("b", 1), ("a", 2), ("b", 2)]
        with path.open("a") as file:
            file.write(': 4.0, "time": 1.0, "note": "x", "flag": true}\n')
        assert cursor.take_new(tmp_path) == [Measurement("a", 4.0, 1.0, 3)]

    def test_survives_writing_and_reading(self, tmp_path: Path) -> None:
        with MetricLog(tmp_path / "metrics.jsonl") as log:
            log.write(1, {"a": 1.0})
        cursor = Cursor("r")
        cursor.take_new(tmp_path)
        cursor.write(tmp_path)
        assert Cursor.read(tmp_path) == cursor
        (tmp_path / "mlflow.json").write_text("{torn")
        assert Cursor.read(tmp_path) is None

    def test_of_a_rewritten_file_only_the_store_knows_what_is_new(self, tmp_path: Path) -> None:
        path, cursor = tmp_path / "metrics.jsonl", Cursor("r")
        with MetricLog(path) as log:
            for step in (10, 20, 30):
                log.write(step, {"a": float(step)})
        cursor.take_new(tmp_path)
        assert cursor.goes_on(tmp_path)
        with MetricLog(path, 20) as log:  # resumed at step 20, with rows twice as often
            assert not cursor.goes_on(tmp_path)
            for step in (25, 30, 35):
                log.write(step, {"a": float(step), "b": 1.0})
        new = Cursor("r").take_new(tmp_path, known={"a": {10, 20, 30}})
        assert sorted(self.names_and_steps(new)) == [("a", 25), ("a", 35), ("b", 25), ("b", 30), ("b", 35)]

    def test_reads_the_files_of_all_hosts(self, tmp_path: Path) -> None:
        cursor = Cursor("r")
        for name in ("metrics.jsonl", "system.jsonl", "system-node2.jsonl"):
            with MetricLog(tmp_path / name) as log:
                log.write(1, {name.partition(".")[0]: 1.0})
        assert self.names_and_steps(cursor.take_new(tmp_path)) == [("metrics", 1), ("system-node2", 1), ("system", 1)]
        with MetricLog(tmp_path / "system-node2.jsonl", 1) as log:
            log.write(2, {"system-node2": 1.0})
        assert cursor.goes_on(tmp_path)
        assert self.names_and_steps(cursor.take_new(tmp_path)) == [("system-node2", 2)]
        (tmp_path / "system.jsonl").unlink()
        assert not cursor.goes_on(tmp_path)

    def test_a_damaged_line_is_named_by_its_number_in_the_file(self, tmp_path: Path) -> None:
        path, cursor = tmp_path / "metrics.jsonl", Cursor("r")
        path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 1.0}\n')
        cursor.take_new(tmp_path)
        with path.open("a") as file:
            file.write("garbage\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 3"):
            cursor.take_new(tmp_path)


class TestStoreAddress:
    def test_default_is_a_file_in_the_folder_and_the_environment_wins(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
        assert tracking_uri(tmp_path) == "http://host:5000"

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("http://ada:pw@host/api", "http://host/api"),  # pragma: allowlist secret
            (
                "to 'postgresql://ada:p@ss/w0rd@db:5432/x' failed",
                "to 'postgresql://db:5432/x' failed",
            ),  # pragma: allowlist secret
            ("https://host/a and http://u:v@other", "https://host/a and http://other"),  # pragma: allowlist secret
            ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
        ],
    )
    def test_credentials_are_left_out(self, text: str, shown: str) -> None:
        assert without_credentials(text) == shown

    def test_secrets_of_the_environment_are_starred_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0k3n")  # pragma: allowlist secret
        assert without_credentials("header Bearer t0k3n refused") == "header Bearer *** refused"
