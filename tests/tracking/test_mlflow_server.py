"""The mirror against a real `mlflow server`, on SQLite and on PostgreSQL, on good days and on bad ones."""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import re
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from megatron_plasticity import verbs
from megatron_plasticity.config.evaluation import EvaluateConfig
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.errors import Interrupted, UserError
from megatron_plasticity.evaluation.samples import SCHEMA, write_samples
from megatron_plasticity.tracking import mlflow_metrics
from megatron_plasticity.tracking.metrics import MetricLog, read_metrics
from megatron_plasticity.tracking.mlflow_background import mirror_in_background, sync_patiently
from megatron_plasticity.tracking.mlflow_content import allowed_name, flat_numbers
from megatron_plasticity.tracking.mlflow_mirror import MlflowMirror
from megatron_plasticity.tracking.run_folder import RunFolder
from tests.commands import Run as RunCommand
from tests.tracking.mlflow_servers import Fault, Proxy, Request, mlflow_server, postgresql

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ConfigMaker = Callable[..., PretrainConfig]
DOCUMENT = Path(__file__).resolve().parents[2] / "docs/mlflow.md"
GREATEST = 1.7976931348623157e308  # what MLflow's databases hold for infinity


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a server on each database; the SQLite one starts from a store that is migrated already, which costs 9 s."""
    folder = tmp_path_factory.mktemp(f"server-{request.param}")
    with ExitStack() as stack:
        if request.param == "postgresql":
            backend = stack.enter_context(postgresql(folder))
        else:
            shutil.copy(request.getfixturevalue("template_store"), folder / "mlflow.db")
            backend = f"sqlite:///{folder / 'mlflow.db'}"
        yield stack.enter_context(mlflow_server(backend, folder / "artifacts", folder / "server.log"))


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server, as the store of everything that this test mirrors."""
    proxy = Proxy(server)
    proxy.up()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    yield proxy
    proxy.close()


@pytest.fixture
def client(server: int) -> MlflowClient:
    """What a person sees, past the proxy."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"http://127.0.0.1:{server}")


class Study:
    """Two values of λ, each with one fine-tuned model and evaluations of both, as `study run` would leave them, and with numbers
    that JSON and databases have no name for."""

    def __init__(self, folder: Path, make_config: ConfigMaker, name: str) -> None:
        self.folder, self.name = folder / name, name
        self.folder.mkdir()
        corpus = folder / "data" / "tiny-0123"
        corpus.mkdir(parents=True, exist_ok=True)
        (corpus / "manifest.json").write_text(json.dumps({"sha256": "ef" * 32, "train_tokens": 9}))
        self.cells: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, RunFolder] = {}
        task = {"name": "arithmetic", "train_examples": 10}
        for weight_decay in (0.0, 0.5):
            shared = make_config(
                optimizer={"learning_rate": 3e-4, "weight_decay": weight_decay},
                data={"folder": str(corpus)},
                batch={"global_batch_size": 4, "micro_batch_size": 2},
            )
            label = f"wd{weight_decay:g}"
            point: dict[str, Any] = {"optimizer.weight_decay": weight_decay, "data.seed": 7}
            base = self._add(f"pretrain-{label}", shared, {"corpus": "ef" * 32}, weight_decay=weight_decay, point=point)
            tuning = {"task": task, "max_length": 64, **shared.model_dump(include={"optimizer", "batch"})}
            config = FinetuneConfig.model_validate({"name": f"{label}-arithmetic", "base": str(base.path), **tuning})
            tuned = self._add(
                f"finetune-{label}-arithmetic",
                config,
                {"base": f"{base.hash}@2"},
                weight_decay=weight_decay,
                point=point,
                task="arithmetic",
                parent=f"pretrain-{label}",
                variant={"optimizer.learning_rate": 3e-5},
                step=2,
            )
            asked = EvaluateConfig.model_validate({"name": f"{label}-arithmetic", "run": str(tuned.path), "tasks": [task]})
            self._add(
                f"evaluate-{label}-arithmetic",
                asked,
                {"model": tuned.hash},
                weight_decay=weight_decay,
                point=point,
                task="arithmetic",
                parent=f"finetune-{label}-arithmetic",
            )
        description = {"name": name, "description": "Does λ help?", "config": {"axes": {}}, "cells": [*self.cells.values()][::-1]}
        corpus_entry = {"folder": str(corpus), "manifest": {"sha256": "ef" * 32, "train_tokens": 9}}
        (self.folder / "study.json").write_text(json.dumps({**description, "corpus": corpus_entry}))

    def _add(self, name: str, config: Any, inputs: dict[str, str], **cell: Any) -> RunFolder:
        kind, _, rest = name.partition("-")
        run = RunFolder.create(self.folder, kind, rest, config, inputs)
        self.runs[name] = run
        self.cells[name] = {"id": name, "kind": kind, "folder": run.path.name, "adamw_timescale": None, **cell}
        return run

    def finish(self) -> None:
        for name, run in self.runs.items():
            with run.running():
                if run.kind == "evaluate":
                    row = dict.fromkeys(SCHEMA.names) | {"task": "arithmetic", "text": "2 + 2 = 4.", "reward": math.nan}
                    write_samples(run.path / "samples.parquet", [row | {"question": str(i)} for i in range(3)])
                    metrics = {"greedy": {"value": 0.4 + 0.1 * ("0.5" in name), "low": 0.3, "high": 0.5}}
                    run.mark_done({"tasks": {"arithmetic": {"metrics": metrics}}})
                else:
                    log_rows(run, range(1, 8))
                    run.mark_done({"train_loss": 3.5, "steps": 7, "checkpoint": "checkpoints/step-7"})


def log_rows(run: RunFolder, steps: range, start_step: int = 0) -> None:
    with MetricLog(run.metrics_path, start_step) as log, MetricLog(run.path / "system.jsonl", start_step) as system:
        for step in steps:
            log.write(step, {"train/loss": 5 / step, "train/gradient_norm": math.inf if step == 2 else 1.0})
            if step % 2 == 0:
                log.write(step, {"held_out/loss": math.nan if step == 4 else 6 / step})
                system.write(step, {"system/cpu_utilization_percentage": 50.0 + step})


@pytest.fixture
def study(tmp_path: Path, make_config: ConfigMaker, request: pytest.FixtureRequest) -> Study:
    """A study on disk whose experiment no other test shares."""
    return Study(tmp_path, make_config, re.sub(r"\W+", "-", request.node.name) + f"-{time.time_ns()}")


def runs_of(client: MlflowClient, experiment: str) -> dict[str, Run]:
    """Name → run. None is there twice."""
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = client.search_runs([found.experiment_id])
    names = [run.info.run_name or "" for run in runs]
    assert len(set(names)) == len(names), f"runs that are there twice: {sorted(names)}"
    return {name: client.get_run(run.info.run_id) for name, run in zip(names, runs, strict=True)}  # a search leaves models out


def truth(run: RunFolder) -> dict[str, list[tuple[int, int, str]]]:
    """Metric → step, time in milliseconds and value, as the files of a run folder have them and MLflow should."""
    points: dict[str, list[tuple[int, int, str]]] = {}
    rows = [row for path in (run.metrics_path, *run.path.glob("system*.jsonl")) for row in read_metrics(path)]
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "time"):
                point = (row["step"], round(row["time"] * 1000), repr(stored(float(value))))
                points.setdefault(allowed_name(name), []).append(point)
    last = max((row["step"] for row in rows), default=0)
    finished = round((run.state.finished or 0) * 1000)
    for name, value in flat_numbers(run.results).items():
        points[name] = [(last, finished, repr(stored(value)))]
    return {name: sorted(history) for name, history in points.items()}


def stored(value: float) -> float:
    return math.copysign(GREATEST, value) if math.isinf(value) else value


def mirrored(client: MlflowClient, run: Run) -> dict[str, list[tuple[int, int, str]]]:
    """As `truth`, from the server."""
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {
        name: sorted((metric.step, metric.timestamp, repr(float(metric.value))) for metric in history)
        for name, history in histories.items()
    }


def assert_complete(client: MlflowClient, study: Study) -> dict[str, Run]:
    """Every run once, with every point of every metric once, the models that it read and made, and its table."""
    runs = runs_of(client, study.name)
    assert set(runs) == {study.name, *study.runs}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    names = {run.info.run_id: name for name, run in runs.items()}
    for name, folder in study.runs.items():
        assert mirrored(client, runs[name]) == truth(folder), name
        parent = study.cells[name].get("parent", study.name)
        assert names[runs[name].data.tags["mlflow.parentRunId"]] == parent
    models = client.search_logged_models([runs[study.name].info.experiment_id])
    made = [f"finetune-{label}-arithmetic" for label in ("wd0", "wd0.5")] + ["pretrain-wd0", "pretrain-wd0.5"]
    earlier = [f"{study.runs[name].hash}@2" for name in made[2:]]
    assert sorted(model.tags["identity"] for model in models) == sorted([study.runs[name].hash for name in made] + earlier)
    by_identity = {model.tags["identity"]: model for model in models}
    for label in ("wd0", "wd0.5"):
        base, tuned = study.runs[f"pretrain-{label}"], study.runs[f"finetune-{label}-arithmetic"]
        run = runs[f"finetune-{label}-arithmetic"]
        assert run.inputs is not None
        assert run.outputs is not None
        (read,), (written,) = run.inputs.model_inputs, run.outputs.model_outputs
        assert read.model_id == by_identity[f"{base.hash}@2"].model_id, "the checkpoint that the fine-tuning began from"
        assert written.model_id == by_identity[tuned.hash].model_id
        assert by_identity[tuned.hash].source_run_id == run.info.run_id
        asked = runs[f"evaluate-{label}-arithmetic"]
        assert asked.inputs is not None
        assert [each.model_id for each in asked.inputs.model_inputs] == [written.model_id]
        assert [each.dataset.name for each in asked.inputs.dataset_inputs] == ["arithmetic"]
        table = json.loads(Path(client.download_artifacts(asked.info.run_id, "samples.json")).read_text())
        assert [row[table["columns"].index("text")] for row in table["data"]] == ["2 + 2 = 4."] * 3
        assert {row[table["columns"].index("reward")] for row in table["data"]} == {None}
    return runs


class TestGoodDays:
    def test_everything_arrives(self, proxy: Proxy, client: MlflowClient, study: Study, run: RunCommand) -> None:
        study.finish()
        code, out, err = run("mlflow", "sync", study.folder)
        assert (code, err) == (0, "")
        assert f"is in MLflow at {proxy.uri}" in out
        runs = assert_complete(client, study)
        experiment = client.get_experiment(runs[study.name].info.experiment_id)
        assert experiment.artifact_location.startswith("mlflow-artifacts:"), "through the server"
        assert experiment.tags["mlflow.note.content"] == "Does λ help?"
        assert runs[study.name].data.tags["progress"] == "6 of 6 runs done"
        scores = {
            model.name: {metric.key: metric.value for metric in model.metrics or []}
            for model in client.search_logged_models([experiment.experiment_id], filter_string="tags.kind = 'finetune'")
        }
        assert scores["finetune-wd0_5-arithmetic"] == {"results/tasks/arithmetic/metrics/greedy": 0.5, "results/train_loss": 3.5}

        proxy.requests.clear()
        mirror = MlflowMirror(study.folder, study.name)
        mirror.sync(study.folder)
        assert not [r for r in proxy.requests if r.method != "GET" and not r.path.endswith("/search")], "nothing is sent twice"
        proxy.requests.clear()
        mirror.sync(study.folder)
        assert proxy.requests == [], "what has not changed is not even asked for"

    def test_every_documented_filter_finds_runs(self, proxy: Proxy, client: MlflowClient, study: Study) -> None:
        study.finish()
        with study.runs["evaluate-wd0-arithmetic"].lock():
            study.runs["evaluate-wd0-arithmetic"].revoke("out of memory")
        MlflowMirror(study.folder, study.name).sync(study.folder)
        runs = runs_of(client, study.name)
        experiment = runs[study.name].info.experiment_id
        base = runs["pretrain-wd0.5"].data.tags
        ours = {"HASH": base["hash"], "'0.5B'": f"'{base['size']}'", "'20'": f"'{base['tokens_per_parameter']}'"}
        for text, count in documented_filters():
            for documented, here in ours.items():
                text = text.replace(documented, here)
            assert len(client.search_runs([experiment], text)) == count, text


def documented_filters() -> list[tuple[str, int]]:
    """The filters of the document, and how many of the seven runs here each finds."""
    block = re.search(r"```text filters\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    assert block is not None
    expected = {
        "every pretraining": 2,
        "everything about one λ": 3,
        "the scores": 1,
        "one family": 6,
        "one size": 6,
        "one seed": 6,
        "how long": 6,
        "a way of fine-tuning": 2,
        "an axis": 6,
        "from an earlier checkpoint": 2,
        "what was made from": 1,
        "what failed": 1,
        "better than": 1,
        "a setting": 2,
        "the run of a folder": 1,
    }
    filters = []
    for line in block.group(1).splitlines():
        text, _, remark = line.partition("   # ")
        count = [number for words, number in expected.items() if remark.strip().startswith(words)]
        assert len(count) == 1, f"the test does not know what this documented filter finds: {line}"
        filters.append((text.strip(), count[0]))
    assert len(filters) == len(expected)
    return filters


def kind_of(request: Request) -> tuple[str, str]:
    """Requests that differ in nothing but ids are of one kind."""
    return request.method, re.sub(r"(m-)?[0-9a-f]{32}|/\d+(?=/)", "ID", request.path)


class TestLostAnswers:
    @pytest.mark.parametrize("fault", ["drop", "500"])
    def test_an_answer_that_is_lost_makes_no_duplicate(
        self, proxy: Proxy, client: MlflowClient, study: Study, monkeypatch: pytest.MonkeyPatch, fault: Fault
    ) -> None:
        """Every kind of request arrives and its answer is lost, twice, before its third attempt is heard."""
        monkeypatch.setattr(mlflow_metrics, "METRICS_PER_BATCH", 7)
        study.finish()
        lost: dict[tuple[str, str], int] = {}

        def twice_of_each_kind(request: Request) -> Fault | None:
            lost[kind_of(request)] = lost.get(kind_of(request), 0) + 1
            return fault if lost[kind_of(request)] <= 2 else None

        proxy.fault = twice_of_each_kind
        errors: list[str] = []
        mirror = MlflowMirror(study.folder, study.name)
        while len(errors) < 60:
            try:
                mirror.sync(study.folder)
                break
            except UserError as error:
                errors.append(str(error))
            if len(errors) % 3 == 0:  # another process goes on
                mirror = MlflowMirror(study.folder, study.name)
        assert all("MLflow" in error for error in errors)
        kinds = {path.rpartition("/mlflow/")[2] for _, path in lost}
        assert {"runs/create", "runs/log-batch", "runs/log-inputs", "runs/outputs", "logged-models", "runs/update"} <= kinds
        assert any("mlflow-artifacts" in path for _, path in lost)
        assert_complete(client, study)

    def test_a_late_server_makes_no_twin(
        self, proxy: Proxy, client: MlflowClient, study: Study, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Requests are held back until we have given up and done their work by others."""
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        seen: set[str] = set()
        late = {"runs/create", "runs/log-batch"}

        def first_of_each(request: Request) -> Fault | None:
            name = request.path.rpartition("/mlflow/")[2]
            is_first = name in late and name not in seen
            seen.add(name)
            return "late" if is_first else None

        run = study.runs["pretrain-wd0.5"]
        log_rows(run, range(1, 8))
        proxy.fault = first_of_each
        mirror = MlflowMirror(study.folder, study.name)
        sync_patiently(mirror, run.path, pause=0.01)
        proxy.wait_for_late_requests()
        assert len(proxy.faults) == 2
        with run.running():
            run.mark_done({"steps": 7})
        MlflowMirror(study.folder, study.name).sync(run.path)
        runs = runs_of(client, study.name)
        assert set(runs) == {"pretrain-wd0.5"}
        assert mirrored(client, runs["pretrain-wd0.5"]) == truth(run)

    def test_mlflow_sync_does_not_give_up_at_once(self, proxy: Proxy, client: MlflowClient, study: Study) -> None:
        run = study.runs["pretrain-wd0"]
        log_rows(run, range(1, 3))
        answers = iter(["500", "500", "500"])
        proxy.fault = lambda request: next(answers, None)  # type: ignore[return-value]
        sync_patiently(MlflowMirror(study.folder, study.name), run.path, attempts=4, pause=0.01)
        assert set(runs_of(client, study.name)) == {"pretrain-wd0"}
        proxy.down()
        with pytest.raises(UserError, match="MLflow at http"):
            sync_patiently(MlflowMirror(study.folder, study.name), run.path, attempts=2, pause=0.01)


def test_a_resume_with_other_steps_between_rows_leaves_none_out(proxy: Proxy, client: MlflowClient, study: Study) -> None:
    run = study.runs["pretrain-wd0"]
    mirror = MlflowMirror(study.folder, study.name)
    log_rows(run, range(2, 9, 2))
    mirror.sync(run.path)
    log_rows(run, range(5, 10), start_step=4)
    with run.running():
        run.mark_done({"steps": 9})
    mirror.sync(run.path)
    history = mirrored(client, runs_of(client, study.name)["pretrain-wd0"])["train/loss"]
    assert [step for step, _, _ in history] == [2, 4, 5, 6, 7, 8, 9]


class Watch:
    """Progress of a training run that calls `at_step(step)`."""

    def __init__(self, at_step: Callable[[int], None]) -> None:
        self.at_step = at_step

    def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
        if unit == "steps":
            self.at_step(int(done))


VARYING = ("time", "train/tokens_per_second")


def numbers(run: RunFolder) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in VARYING} for row in read_metrics(run.metrics_path)]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    """What the run without MLflow gave; made by the first test that wants to know."""
    return {}


class TestOutagesDuringTraining:
    """Real training runs, compared with one that knows of no MLflow."""

    @pytest.mark.parametrize("outage", ["start", "middle", "end", "hang"])
    def test_training_is_the_same_and_sync_completes_it(
        self,
        proxy: Proxy,
        client: MlflowClient,
        pretrain_config: Callable[..., PretrainConfig],
        undisturbed: dict[str, Any],
        tmp_path: Path,
        run: RunCommand,
        outage: str,
    ) -> None:
        from megatron_plasticity.training.pretrain import pretrain, pretrain_folder

        name = f"outage-{outage}-{time.time_ns()}"
        changes = {"steps": 8, "evaluate_every_steps": 4, "capture": None, "logging": {"system_every_seconds": 0.001}}
        if not undisturbed:
            folder = pretrain(pretrain_config({**changes, "output": str(tmp_path / "quiet")}), Watch(lambda step: None))
            undisturbed |= {"rows": numbers(folder), "results": folder.results}
        config = pretrain_config({**changes, "output": str(tmp_path / name)})
        folder = pretrain_folder(config)
        gone: list[float] = []

        def at_step(step: int) -> None:
            if (outage, step) in (("middle", 2), ("hang", 2), ("end", 7)):
                wait_until(lambda: any(request.path.endswith("log-batch") for request in proxy.requests))
                proxy.down() if outage != "hang" else setattr(proxy, "fault", lambda request: "hang")
            if (outage, step) == ("middle", 6):
                proxy.up()
            if step == 8:
                gone.append(time.monotonic())

        if outage == "start":
            proxy.down()
        warnings: list[str] = []
        mirror = MlflowMirror(config.output, name)
        with mirror_in_background(mirror, folder.path, interval=0.02, warn=warnings.append):
            pretrain(config, Watch(at_step))
        assert time.monotonic() - gone[0] < 20, "the end of the run waited for MLflow"
        assert numbers(folder) == undisturbed["rows"]
        assert folder.results == undisturbed["results"]
        assert len(warnings) == (0 if not proxy_failed(outage, warnings) else 1)

        proxy.fault = lambda request: None
        proxy.release.set()
        proxy.up()
        code, _, err = run("mlflow", "sync", folder.path)
        assert (code, err) == (0, "")
        runs = runs_of(client, name)
        assert set(runs) == {folder.path.name.rpartition("-")[0]}
        (found,) = runs.values()
        assert found.info.status == "FINISHED"
        assert mirrored(client, found) == truth(folder)
        assert "system/cpu_utilization_percentage" in found.data.metrics

    def test_a_run_that_is_killed_and_goes_on_has_every_step_once(
        self, proxy: Proxy, client: MlflowClient, pretrain_config: Callable[..., PretrainConfig], tmp_path: Path
    ) -> None:
        from megatron_plasticity.training.pretrain import pretrain, pretrain_folder

        name = f"killed-{time.time_ns()}"
        config = pretrain_config({"steps": 8, "capture": None, "checkpoint": {"every_steps": 3}, "output": str(tmp_path / name)})
        folder = pretrain_folder(config)

        def die(step: int) -> None:
            if step == 5:
                MlflowMirror(config.output, name).sync(folder.path)  # what was measured after the checkpoint is there already
                raise Interrupted("as by a power cut", 9)

        with pytest.raises(Interrupted):
            pretrain(config, Watch(die))
        pretrain(config, Watch(lambda step: None))
        MlflowMirror(config.output, name).sync(folder.path)
        (found,) = runs_of(client, name).values()
        have, want = mirrored(client, found), truth(folder)
        steps = {metric: [point[0] for point in history] for metric, history in have.items()}
        assert steps == {metric: [point[0] for point in history] for metric, history in want.items()}
        assert [point[2] for point in have["train/loss"]] == [point[2] for point in want["train/loss"]]


def proxy_failed(outage: str, warnings: list[str]) -> bool:
    """An outage in the middle may fall between two syncs; the others are always noticed."""
    return outage != "middle" or bool(warnings)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class TestOutagesDuringAStudy:
    @pytest.mark.parametrize("outage", ["start", "middle", "end"])
    def test_sync_completes_it(self, proxy: Proxy, client: MlflowClient, study: Study, run: RunCommand, outage: str) -> None:
        if outage == "start":
            proxy.down()
        warnings: list[str] = []
        with mirror_in_background(MlflowMirror(study.folder, study.name), study.folder, interval=0.02, warn=warnings.append):
            if outage == "middle":
                log_rows(study.runs["pretrain-wd0"], range(1, 4))
                study.runs["pretrain-wd0"].mark_running()
                wait_until(lambda: any(request.path.endswith("log-batch") for request in proxy.requests))
                proxy.down()
            if outage == "end":
                wait_until(lambda: any(request.path.endswith("runs/create") for request in proxy.requests))
                proxy.down()
            if outage != "start":
                wait_until(lambda: bool(warnings))
            study.finish()
            if outage == "middle":
                proxy.up()
        assert len(warnings) == 1
        assert f"`megatron-plasticity mlflow sync {study.folder}` completes it" in warnings[0]
        proxy.up()
        code, _, err = run("mlflow", "sync", study.folder)
        assert (code, err) == (0, "")
        assert_complete(client, study)


class TestSecrets:
    @pytest.mark.parametrize(("way", "status"), [("password", 401), ("token", 403), ("uri", 401), ("file", 403)])
    def test_a_refused_login_tells_no_secret(
        self,
        proxy: Proxy,
        client: MlflowClient,
        study: Study,
        run: RunCommand,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        way: str,
        status: int,
    ) -> None:
        """The server repeats the secret in its answer; nothing of ours may."""
        password = "h4rd-to/guess"  # pragma: allowlist secret
        basic = base64.b64encode(f"ada:{password}".encode()).decode()
        home = tmp_path / "home"
        (home / ".mlflow").mkdir(parents=True)
        monkeypatch.setenv("HOME", str(home))
        if way == "password":
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        elif way == "token":
            monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", password)
        elif way == "uri":
            monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri.replace("//", "//ada:h4rd-to%2Fguess@"))
        else:
            login = f"[mlflow]\nmlflow_tracking_username = ada\nmlflow_tracking_password = {password}\n"
            (home / ".mlflow" / "credentials").write_text(login)
        monkeypatch.setenv("WANDB_API_KEY", "another-planted-one")  # pragma: allowlist secret
        sent = f"Bearer {password}" if way == "token" else f"Basic {basic}"
        let_in: list[bool] = []
        proxy.refuses = lambda request: None if let_in and request.authorization == sent else status
        secrets = (password, sent, sent.split()[1], "h4rd-to%2Fguess", "another-planted-one")

        caplog.set_level(logging.DEBUG, logger="megatron_plasticity")
        failing = study.runs["pretrain-wd0"]
        with pytest.raises(RuntimeError), failing.running():
            raise RuntimeError(f"GET https://ada:{password}@hub/model refused; key another-planted-one, {sent}")
        warnings: list[str] = []
        with mirror_in_background(MlflowMirror(study.folder, study.name), study.folder, interval=0.02, warn=warnings.append):
            wait_until(lambda: bool(warnings))
        assert {request.authorization for request in proxy.requests} == {sent}, "it did try to log in"
        assert str(status) in warnings[0]
        with pytest.raises(UserError, match=re.escape(f"MLflow at {proxy.uri}: ")) as caught:
            sync_patiently(MlflowMirror(study.folder, study.name), study.folder, attempts=1)
        assert_hidden(secrets, "\n".join([*warnings, caplog.text, *traceback.format_exception(caught.value)]))

        let_in.append(True)
        code, out, err = run("mlflow", "sync", study.folder)
        assert code == 0
        assert_hidden(secrets, out + err)
        for found in runs_of(client, study.name).values():
            assert_hidden(secrets, json.dumps([found.data.tags, found.data.params], ensure_ascii=False))
        for path in study.folder.rglob("mlflow.json"):
            assert_hidden(secrets, path.read_text())


def assert_hidden(secrets: tuple[str, ...], text: str) -> None:
    for secret in secrets:
        assert secret not in text


class TestRanks:
    @pytest.mark.parametrize("rank", [0, 1])
    def test_only_the_first_rank_talks(self, proxy: Proxy, study: Study, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        before = threading.active_count()
        with verbs._mirrored(lambda: study.runs["pretrain-wd0"], True):
            assert (threading.active_count() > before) == (rank == 0)
        assert bool(proxy.requests) == (rank == 0)

    def test_not_at_all_if_it_is_switched_off(self, proxy: Proxy, study: Study) -> None:
        with verbs._mirrored(lambda: study.runs["pretrain-wd0"], False):
            pass
        assert proxy.requests == []
        assert "RANK" not in os.environ
