from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from megatron_plasticity.config.evaluation import EvaluateConfig
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.tracking import mlflow_background, mlflow_metrics
from megatron_plasticity.tracking.metrics import MetricLog
from megatron_plasticity.tracking.mlflow_mirror import MlflowMirror, mirror_in_background
from megatron_plasticity.tracking.mlflow_store import StoreError, connect
from megatron_plasticity.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "plasticity"
ConfigMaker = Callable[..., PretrainConfig]


class Store:
    """What a person would find in the store in `folder`."""

    def __init__(self, folder: Path) -> None:
        from mlflow import MlflowClient

        self.client: MlflowClient = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")

    def runs(self) -> dict[str, Run]:
        """Name → run; names must not repeat."""
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        runs = self.client.search_runs([experiment.experiment_id]) if experiment else []
        by_name = {run.info.run_name or "": run for run in runs}
        assert len(by_name) == len(runs)
        return by_name

    def only(self) -> Run:
        (run,) = self.runs().values()
        return run

    def datasets(self, run: Run) -> list[tuple[str, str, str]]:
        """Name, digest and context of each dataset."""
        assert run.inputs is not None
        return [(d.dataset.name, d.dataset.digest, d.tags[0].value) for d in run.inputs.dataset_inputs]

    def history(self, run: Run, name: str) -> list[tuple[int, float]]:
        return sorted((m.step, m.value) for m in self.client.get_metric_history(run.info.run_id, name))


@pytest.fixture
def folder(store: Path, make_config: ConfigMaker) -> RunFolder:
    return RunFolder.create(store, "pretrain", "wd0.5", make_config(), {"corpus": "ab" * 32})


def log_steps(folder: RunFolder, steps: range, start_step: int = 0, scale: float = 1.0) -> None:
    with MetricLog(folder.metrics_path, start_step) as log:
        for step in steps:
            log.write(step, {"train/loss": scale * step, "train/learning_rate": 0.1})


class TestSingleRun:
    def test_a_run_from_its_begin_to_its_end(self, store: Path, folder: RunFolder) -> None:
        mirror = MlflowMirror(store, EXPERIMENT)
        with folder.running():
            log_steps(folder, range(1, 4))
            mirror.sync(folder.path)
            assert Store(store).only().info.status == "RUNNING"
            log_steps(folder, range(4, 6), start_step=3)
            folder.mark_done({"held_out_loss": 3.5, "parameters": {"total": 7}, "checkpoint": "checkpoints/step-5"})
        mirror.sync(folder.path)
        run = Store(store).only()
        state = folder.state
        assert state.started is not None
        assert state.finished is not None
        assert (run.info.status, run.info.run_name) == ("FINISHED", "pretrain-wd0.5")
        assert (run.info.start_time, run.info.end_time) == (round(state.started * 1000), round(state.finished * 1000))
        expected = {"kind": "pretrain", "weight_decay": "0.5", "hash": folder.hash, "folder": str(folder.path)}
        assert run.data.tags.items() >= expected.items()
        assert (
            run.data.params.items()
            >= {"optimizer.weight_decay": "0.5", "model.layers": "2", "optimizer.betas": "[0.9, 0.95]"}.items()
        )
        assert Store(store).history(run, "train/loss") == [(step, float(step)) for step in range(1, 6)]
        assert Store(store).history(run, "results/held_out_loss") == [(5, 3.5)]
        assert Store(store).history(run, "results/parameters/total") == [(5, 7.0)]
        assert Store(store).datasets(run) == [("tiny", "ab" * 18, "training")]

    def test_failure_and_retry(self, store: Path, folder: RunFolder) -> None:
        mirror = MlflowMirror(store, EXPERIMENT)
        with pytest.raises(ZeroDivisionError), folder.running():
            _ = 1 / 0
        mirror.sync_run(folder.path)
        failed = Store(store).only()
        assert (failed.info.status, failed.data.tags["error"]) == ("FAILED", "ZeroDivisionError: division by zero")
        with folder.running():
            mirror.sync_run(folder.path)
            assert Store(store).only().info.status == "RUNNING"
            folder.mark_done({})
        mirror.sync_run(folder.path)
        assert Store(store).only().info.status == "FINISHED"
        assert "error" not in Store(store).only().data.tags

    def test_interruption(self, store: Path, folder: RunFolder) -> None:
        with pytest.raises(KeyboardInterrupt), folder.running():
            raise KeyboardInterrupt
        MlflowMirror(store, EXPERIMENT).sync_run(folder.path)
        assert Store(store).only().info.status == "KILLED"

    def test_more_metrics_than_fit_into_one_request(
        self, store: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mlflow_metrics, "METRICS_PER_BATCH", 7)
        log_steps(folder, range(1, 11))
        MlflowMirror(store, EXPERIMENT).sync_run(folder.path)
        run = Store(store).only()
        assert len(Store(store).history(run, "train/loss")) == len(Store(store).history(run, "train/learning_rate")) == 10

    def test_the_real_limit_of_a_request_is_taken_by_the_store(self, store: Path, folder: RunFolder) -> None:
        log_steps(folder, range(1, 602))
        MlflowMirror(store, EXPERIMENT).sync_run(folder.path)
        assert len(Store(store).history(Store(store).only(), "train/loss")) == 601

    def test_what_is_not_a_run_is_refused(self, store: Path) -> None:
        with pytest.raises(UserError, match="not a run folder"):
            MlflowMirror(store, EXPERIMENT).sync(store)


class TestIdempotence:
    @pytest.fixture
    def sent(self, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
        """Counts the numbers, params and tags that are sent, and the runs that are made."""
        from mlflow import MlflowClient

        counts: Counter[str] = Counter()
        log_batch, create_run, log_inputs = MlflowClient.log_batch, MlflowClient.create_run, MlflowClient.log_inputs

        def counting_log_batch(self: Any, run_id: str, **what: Any) -> None:
            counts.update({key: len(what[key]) for key in ("metrics", "params", "tags") if key in what})
            log_batch(self, run_id, **what)

        def counting_create_run(self: Any, *args: Any, **options: Any) -> Run:
            counts["runs"] += 1
            return create_run(self, *args, **options)

        def counting_log_inputs(self: Any, *args: Any, **options: Any) -> None:
            counts["inputs"] += 1
            log_inputs(self, *args, **options)

        monkeypatch.setattr(MlflowClient, "log_batch", counting_log_batch)
        monkeypatch.setattr(MlflowClient, "create_run", counting_create_run)
        monkeypatch.setattr(MlflowClient, "log_inputs", counting_log_inputs)
        return counts

    def test_only_what_is_new_is_sent(self, store: Path, folder: RunFolder, sent: Counter[str]) -> None:
        mirror = MlflowMirror(store, EXPERIMENT)
        log_steps(folder, range(1, 4))
        mirror.sync_run(folder.path)
        sent.clear()
        mirror.sync_run(folder.path)
        MlflowMirror(store, EXPERIMENT).sync_run(folder.path)  # another process, later
        assert sent.total() == 0
        log_steps(folder, range(4, 5), start_step=3)
        MlflowMirror(store, EXPERIMENT).sync_run(folder.path)
        assert sent == {"metrics": 2}

    def test_replayed_steps_are_sent_once(self, store: Path, folder: RunFolder, sent: Counter[str]) -> None:
        mirror = MlflowMirror(store, EXPERIMENT)
        log_steps(folder, range(1, 8))
        mirror.sync_run(folder.path)
        log_steps(folder, range(5, 10), start_step=4, scale=1.001)
        mirror.sync_run(folder.path)
        history = Store(store).history(Store(store).only(), "train/loss")
        assert [step for step, _ in history] == list(range(1, 10))
        assert history[6] == (7, 7.0)  # the first measurement stays
        assert sent["metrics"] == 2 * 9

    def test_a_run_started_over_is_the_same_run(self, store: Path, folder: RunFolder) -> None:
        mirror = MlflowMirror(store, EXPERIMENT)
        log_steps(folder, range(1, 4))
        mirror.sync_run(folder.path)
        log_steps(folder, range(1, 6))
        mirror.sync_run(folder.path)
        assert [step for step, _ in Store(store).history(Store(store).only(), "train/loss")] == [1, 2, 3, 4, 5]

    @pytest.mark.parametrize("content", [None, "{torn"])
    def test_a_lost_cursor_is_restored_from_the_store(
        self, store: Path, folder: RunFolder, sent: Counter[str], content: str | None
    ) -> None:
        log_steps(folder, range(1, 4))
        MlflowMirror(store, EXPERIMENT).sync_run(folder.path)
        sent.clear()
        cursor = folder.path / "mlflow.json"
        cursor.unlink() if content is None else cursor.write_text(content)
        log_steps(folder, range(4, 6), start_step=3)
        MlflowMirror(store, EXPERIMENT).sync_run(folder.path)
        assert sent == {"metrics": 4}

    def test_a_kill_between_sending_and_noting_it_down(
        self, store: Path, folder: RunFolder, sent: Counter[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlflow import MlflowClient

        counting = MlflowClient.log_batch

        def sends_and_dies(self: Any, run_id: str, **what: Any) -> None:
            counting(self, run_id, **what)
            if "metrics" in what:
                raise KeyboardInterrupt

        log_steps(folder, range(1, 4))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(MlflowClient, "log_batch", sends_and_dies)
            MlflowMirror(store, EXPERIMENT).sync_run(folder.path)
        MlflowMirror(store, EXPERIMENT).sync_run(folder.path)
        assert sent["metrics"] == 6
        assert sent["runs"] == 1

    def test_an_error_in_the_middle_is_made_up_for_by_the_same_mirror(
        self, store: Path, folder: RunFolder, sent: Counter[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlflow import MlflowClient

        counting = MlflowClient.log_batch

        def refuses_metrics(self: Any, run_id: str, **what: Any) -> None:
            if "metrics" in what:
                raise ConnectionError("gone")
            counting(self, run_id, **what)

        mirror = MlflowMirror(store, EXPERIMENT)
        log_steps(folder, range(1, 4))
        with monkeypatch.context() as patch, pytest.raises(UserError, match=r"MLflow at sqlite.*gone"):
            patch.setattr(MlflowClient, "log_batch", refuses_metrics)
            mirror.sync_run(folder.path)
        mirror.sync_run(folder.path)
        assert sent["metrics"] == 6

    def test_a_deleted_run_is_made_anew(self, store: Path, folder: RunFolder) -> None:
        mirror = MlflowMirror(store, EXPERIMENT)
        log_steps(folder, range(1, 4))
        mirror.sync_run(folder.path)
        first = Store(store).only()
        Store(store).client.delete_run(first.info.run_id)
        MlflowMirror(store, EXPERIMENT).sync_run(folder.path)
        second = Store(store).only()
        assert second.info.run_id != first.info.run_id
        assert len(Store(store).history(second, "train/loss")) == 3

    def test_a_changed_neutral_field_is_no_error(self, store: Path, folder: RunFolder, make_config: ConfigMaker) -> None:
        MlflowMirror(store, EXPERIMENT).sync_run(folder.path)
        again = RunFolder.create(store, "pretrain", "wd0.5", make_config(logging={"every_steps": 3}), {"corpus": "ab" * 32})
        assert again == folder
        MlflowMirror(store, EXPERIMENT).sync_run(folder.path)
        assert Store(store).only().data.params["logging.every_steps"] == "10"

    def test_a_description_that_a_person_wrote_stays(self, store: Path, folder: RunFolder) -> None:
        MlflowMirror(store, EXPERIMENT).sync_run(folder.path)
        run = Store(store).only()
        assert "λ = 0.5" in run.data.tags["mlflow.note.content"]
        Store(store).client.set_tag(run.info.run_id, "mlflow.note.content", "the good one")
        MlflowMirror(store, EXPERIMENT).sync_run(folder.path)
        assert Store(store).only().data.tags["mlflow.note.content"] == "the good one"

    def test_a_deleted_experiment_is_said(self, store: Path, folder: RunFolder) -> None:
        client = Store(store).client
        client.delete_experiment(client.create_experiment(EXPERIMENT))
        with pytest.raises(UserError, match="experiment 'plasticity' was deleted; restore it"):
            MlflowMirror(store, EXPERIMENT).sync_run(folder.path)


class StudyOnDisk:
    """A study of one base model, fine-tuned on one task, with evaluations of both."""

    def __init__(self, folder: Path, make_config: ConfigMaker) -> None:
        self.folder = folder
        task = {"name": "arithmetic", "train_examples": 10}
        shared = make_config().model_dump(include={"optimizer", "batch"})
        evaluate = {"run": "somewhere", "tasks": [task]}
        configs = {
            "pretrain-wd0.5": make_config(),
            "finetune-wd0.5-arithmetic": FinetuneConfig.model_validate(
                {"name": "wd0.5-arithmetic", "base": "somewhere", "task": task, "max_length": 64, **shared}
            ),
            "evaluate-wd0.5": EvaluateConfig.model_validate({"name": "wd0.5", **evaluate}),
            "evaluate-wd0.5-arithmetic": EvaluateConfig.model_validate({"name": "wd0.5-arithmetic", "seed": 7, **evaluate}),
        }
        self.runs = {
            name: RunFolder.create(folder, name.partition("-")[0], name.partition("-")[2], config, {})
            for name, config in configs.items()
        }
        parents = {
            "finetune-wd0.5-arithmetic": "pretrain-wd0.5",
            "evaluate-wd0.5": "pretrain-wd0.5",
            "evaluate-wd0.5-arithmetic": "finetune-wd0.5-arithmetic",
        }
        cells = [
            {
                "id": name,
                "kind": run.kind,
                "folder": run.path.name,
                "point": {"optimizer.weight_decay": 0.5},
                "weight_decay": 0.5,
                "adamw_timescale": None,
                "task": "arithmetic" if "arithmetic" in name else None,
                "parent": parents.get(name),
                "needs": [],
            }
            for name, run in self.runs.items()
        ]
        cells.reverse()  # an order in which children come before their parents
        self.json = {
            "name": "quickstart",
            "description": "Does λ help?",
            "config": {"axes": {"optimizer.weight_decay": [0.5]}},
            "corpus": {"folder": "data/tiny-0123", "manifest": {"sha256": "ef" * 32, "train_tokens": 9}},
            "cells": cells,
        }
        (folder / "study.json").write_text(json.dumps(self.json))

    def finish(self, *names: str) -> None:
        for name in names:
            run = self.runs[name]
            with run.running():
                log_steps(run, range(1, 3))
                run.mark_done({"steps": 2})


@pytest.fixture
def study(store: Path, make_config: ConfigMaker) -> StudyOnDisk:
    return StudyOnDisk(store, make_config)


def nesting(store: Path) -> dict[str, str | None]:
    runs = Store(store).runs()
    names = {run.info.run_id: name for name, run in runs.items()}
    return {name: names.get(run.data.tags.get("mlflow.parentRunId", "")) for name, run in runs.items()}


class TestStudy:
    def test_runs_are_nested_as_they_descend(self, store: Path, study: StudyOnDisk) -> None:
        study.finish(*study.runs)
        MlflowMirror(store, EXPERIMENT).sync(store)
        assert nesting(store) == {
            "quickstart": None,
            "pretrain-wd0.5": "quickstart",
            "finetune-wd0.5-arithmetic": "pretrain-wd0.5",
            "evaluate-wd0.5": "pretrain-wd0.5",
            "evaluate-wd0.5-arithmetic": "finetune-wd0.5-arithmetic",
        }
        runs = Store(store).runs()
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        root = runs["quickstart"]
        assert root.data.tags.items() >= {"kind": "study", "study": "quickstart", "mlflow.note.content": "Does λ help?"}.items()
        assert root.data.params == {"axes.optimizer.weight_decay": "[0.5]"}
        assert Store(store).datasets(root) == [("tiny-0123", "ef" * 18, "training")]
        leaf = runs["evaluate-wd0.5-arithmetic"]
        expected = {"kind": "evaluate", "study": "quickstart", "task": "arithmetic", "weight_decay": "0.5"}
        assert leaf.data.tags.items() >= expected.items()
        ((name, _, context),) = Store(store).datasets(leaf)
        assert (name, context) == ("arithmetic", "evaluation")

    def test_grows_while_it_runs(self, store: Path, study: StudyOnDisk) -> None:
        mirror = MlflowMirror(store, EXPERIMENT)
        mirror.sync_study(study.json, store)
        assert nesting(store) == {"quickstart": None}
        study.finish("pretrain-wd0.5")
        mirror.sync_study(study.json, store)
        mirror.sync_study(study.json, store)
        assert nesting(store) == {"quickstart": None, "pretrain-wd0.5": "quickstart"}
        assert Store(store).runs()["quickstart"].info.status == "RUNNING"
        mirror.sync(store)  # nobody works on it any more
        assert Store(store).runs()["quickstart"].info.status == "KILLED"
        study.finish("evaluate-wd0.5", "finetune-wd0.5-arithmetic", "evaluate-wd0.5-arithmetic")
        MlflowMirror(store, EXPERIMENT).sync_study(study.json, store)
        assert len(nesting(store)) == 5
        assert Store(store).runs()["quickstart"].info.status == "FINISHED"

    def test_a_lost_cursor_of_the_study_makes_no_second_tree(self, store: Path, study: StudyOnDisk) -> None:
        study.finish("pretrain-wd0.5")
        MlflowMirror(store, EXPERIMENT).sync(store)
        before = {name: run.info.run_id for name, run in Store(store).runs().items()}
        for path in store.rglob("mlflow.json"):
            path.unlink()
        MlflowMirror(store, EXPERIMENT).sync(store)
        assert {name: run.info.run_id for name, run in Store(store).runs().items()} == before

    def test_a_damaged_cell_does_not_hold_up_the_others(self, store: Path, study: StudyOnDisk) -> None:
        study.finish("pretrain-wd0.5", "evaluate-wd0.5", "finetune-wd0.5-arithmetic")
        with study.runs["evaluate-wd0.5"].metrics_path.open("a") as file:
            file.write("garbage\n")
        (study.runs["evaluate-wd0.5-arithmetic"].path / "state.json").write_text("garbage")
        with pytest.raises(
            UserError, match=r"(?s)could not be mirrored.*arithmetic: .*state\.json.*evaluate-wd0.5: .*metrics\.jsonl, line 3"
        ):
            MlflowMirror(store, EXPERIMENT).sync(store)
        assert Store(store).runs()["finetune-wd0.5-arithmetic"].info.status == "FINISHED"

    def test_a_damaged_study_is_named(self, store: Path) -> None:
        (store / "study.json").write_text('{"name": "x"}')
        with pytest.raises(UserError, match=r"study\.json: is not the description of a study"):
            MlflowMirror(store, EXPERIMENT).sync(store)


class TestUnreachable:
    @pytest.fixture(autouse=True)
    def _impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")

    def test_a_dead_server_is_one_warning_without_credentials(
        self, store: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:s3cret@127.0.0.1:9")  # pragma: allowlist secret
        mirror = MlflowMirror(store, EXPERIMENT)
        warnings: list[str] = []
        with mirror_in_background(mirror, folder.path, interval=0.01, warn=warnings.append), folder.running():
            log_steps(folder, range(1, 4))
            wait_until(lambda: bool(warnings))
            folder.mark_done({"steps": 3})
        assert folder.is_done
        (warning,) = warnings
        assert "MLflow at http://127.0.0.1:9: " in warning
        assert f"`megatron-plasticity mlflow sync {folder.path}` completes it" in warning
        assert "s3cret" not in warning
        assert "ada" not in warning
        assert not (folder.path / "mlflow.json").exists()

        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        MlflowMirror(store, EXPERIMENT).sync(folder.path)
        assert Store(store).only().info.status == "FINISHED"
        assert len(Store(store).history(Store(store).only(), "train/loss")) == 3

    def test_errors_of_a_direct_sync_hold_no_credentials_in_their_chain_either(self, store: Path, folder: RunFolder) -> None:
        mirror = MlflowMirror(store, EXPERIMENT, uri="http://ada:s3cret@127.0.0.1:9")  # pragma: allowlist secret
        with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9: ") as caught:
            mirror.sync(folder.path)
        assert caught.value.__suppress_context__
        assert "s3cret" not in str(caught.value)

    def test_without_mlflow_the_work_goes_on(self, store: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "mlflow", None)
        warnings: list[str] = []
        with mirror_in_background(MlflowMirror(store, EXPERIMENT), folder.path, warn=warnings.append), folder.running():
            folder.mark_done({})
        (warning,) = warnings
        assert "MLflow cannot be imported" in warning
        assert folder.is_done

    def test_an_unknown_kind_of_store_is_said(self, store: Path, folder: RunFolder) -> None:
        with pytest.raises(UserError, match="MLflow at carrier-pigeon://coop: "):
            MlflowMirror(store, EXPERIMENT, uri="carrier-pigeon://coop").sync(folder.path)


class TestBackground:
    def test_a_new_store_is_made_by_one_process_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        inside: list[int] = []
        most: list[int] = []

        def slow_client(tracking_uri: str) -> str:
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()
            return tracking_uri

        monkeypatch.setattr("mlflow.MlflowClient", slow_client)
        uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
        threads = [threading.Thread(target=connect, args=(uri,)) for _ in range(4)]  # locked like processes: by descriptor
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert most == [1, 1, 1, 1]

    def test_syncs_while_the_work_goes_on_and_once_at_the_end(self, store: Path, folder: RunFolder) -> None:
        warnings: list[str] = []
        mirror = MlflowMirror(store, EXPERIMENT)
        with mirror_in_background(mirror, folder.path, interval=0.05, warn=warnings.append), folder.running():
            log_steps(folder, range(1, 4))
            wait_until(lambda: bool(Store(store).runs()) and Store(store).only().data.metrics.get("train/loss") == 3.0)
            folder.mark_done({"steps": 3})
        run = Store(store).only()
        assert (run.info.status, run.data.metrics["results/steps"]) == ("FINISHED", 3.0)
        assert warnings == []

    def test_the_end_is_not_held_up_by_a_mirror_that_hangs(self, folder: RunFolder) -> None:
        release = threading.Event()

        class Hanging:
            answers = 0

            def sync(self, folder: Path, over: bool = True) -> None:
                release.wait()

        warnings: list[str] = []
        began = time.monotonic()
        with mirror_in_background(Hanging(), folder.path, interval=0.01, final_seconds=0.2, warn=warnings.append):
            pass
        assert time.monotonic() - began < 2.0
        release.set()
        (warning,) = warnings
        assert "took more than 0.2 s to send the rest" in warning

    @pytest.mark.parametrize(("answers", "finished"), [(True, True), (False, False)])
    def test_a_server_that_failed_is_waited_for_while_it_answers(
        self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, answers: bool, finished: bool
    ) -> None:
        done: list[bool] = []

        class Recovered:
            answers = 0

            def sync(self, folder: Path, over: bool = True) -> None:
                if not over:
                    raise StoreError("away")
                for _ in range(12):
                    time.sleep(0.1)
                    self.answers += answers
                done.append(True)

        monkeypatch.setattr(mlflow_background, "SECONDS_FOR_AN_ANSWER", 0.6)
        warnings: list[str] = []
        with mirror_in_background(Recovered(), folder.path, interval=0.01, warn=warnings.append):
            wait_until(lambda: bool(warnings))
        assert bool(done) == finished

    def test_a_failing_mirror_changes_no_outcome_and_says_so_once(self, folder: RunFolder) -> None:
        calls: list[bool] = []

        class Broken:
            answers = 0

            def sync(self, folder: Path, over: bool = True) -> None:
                calls.append(over)
                raise KeyError("a defect of ours")

        warnings: list[str] = []
        with (
            pytest.raises(ZeroDivisionError),
            mirror_in_background(Broken(), folder.path, interval=0.001, warn=warnings.append),
        ):
            wait_until(lambda: len(calls) >= 3)
            _ = 1 / 0
        assert calls[-1] is True
        assert True not in calls[:-1]
        assert len(warnings) == 1


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class TestModels:
    def test_an_evaluation_names_the_model_and_shows_samples(self, store: Path, folder: RunFolder) -> None:
        from megatron_plasticity.evaluation.samples import SCHEMA, write_samples

        with folder.running():
            folder.mark_done({"held_out_loss": 3.5, "checkpoint": "checkpoints/step-9"})
        config = EvaluateConfig.model_validate({"name": "e", "run": str(folder.path), "tasks": [{"name": "arithmetic"}]})
        evaluation = RunFolder.create(store, "evaluate", "e", config, {"model": folder.hash})
        earlier = RunFolder.create(store, "evaluate", "earlier", config, {"model": f"{folder.hash}@5"})
        row = dict.fromkeys(SCHEMA.names) | {"task": "arithmetic", "text": "2 + 2 = 4.", "correct": True}
        for run in (evaluation, earlier):
            with run.running():
                write_samples(run.path / "samples.parquet", [row] * 1000)
                run.mark_done({"tasks": {}})
        for _ in range(2):  # the second time nothing is new
            mirror = MlflowMirror(store, EXPERIMENT)
            for run in (folder, evaluation, earlier):
                mirror.sync(run.path)
        found = Store(store)
        runs = {name: found.client.get_run(run.info.run_id) for name, run in found.runs().items()}  # a search leaves models out
        made: Any = runs["pretrain-wd0.5"].outputs
        read: Any = runs["evaluate-e"].inputs
        read_earlier: Any = runs["evaluate-earlier"].inputs
        (output,) = made.model_outputs
        (link,) = read.model_inputs
        (earlier_link,) = read_earlier.model_inputs
        assert link.model_id == output.model_id != earlier_link.model_id
        model = found.client.get_logged_model(earlier_link.model_id)
        assert (model.name, model.tags["step"], model.source_run_id) == (
            "pretrain-wd0_5-step-5",
            "5",
            runs["pretrain-wd0.5"].info.run_id,
        )
        table = json.loads(Path(found.client.download_artifacts(runs["evaluate-e"].info.run_id, "samples.json")).read_text())
        assert len(table["data"]) == 200
        assert table["data"][0][table["columns"].index("text")] == "2 + 2 = 4."

    def test_a_store_that_takes_no_artifacts_holds_up_nothing_else(
        self, store: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlflow import MlflowClient

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError("no such bucket")

        config = EvaluateConfig.model_validate({"name": "e", "run": str(folder.path), "tasks": [{"name": "arithmetic"}]})
        evaluation = RunFolder.create(store, "evaluate", "e", config, {"model": folder.hash})
        with evaluation.running():
            from megatron_plasticity.evaluation.samples import SCHEMA, write_samples

            write_samples(evaluation.path / "samples.parquet", [dict.fromkeys(SCHEMA.names)])
            evaluation.mark_done({"tasks": {"arithmetic": {"questions": 3}}})
        monkeypatch.setattr(MlflowClient, "log_text", refuse)
        with pytest.raises(UserError, match="no such bucket"):
            MlflowMirror(store, EXPERIMENT).sync(evaluation.path)
        run = Store(store).only()
        assert run.info.status == "FINISHED"
        assert run.data.metrics["results/tasks/arithmetic/questions"] == 3
