"""A copy of run folders in MLflow. `metrics.jsonl` and `results.json` are the truth; what MLflow misses, a later sync brings.

A study is one run at the root, with its pretraining runs under it, their fine-tuned children under these, and evaluations and
analyses under the model they look at. Every run has the tags `kind`, `study`, `task`, `weight_decay`, `hash`, `folder`, so
that a filter such as `tags.kind = 'evaluate' and tags.task = 'arithmetic'` finds what the collapsed tree hides.

Syncing is incremental and idempotent: nothing is sent twice, also after a resume that replays steps (MLflow then keeps the
first measurement of a replayed step, `metrics.jsonl` the last), a lost cursor, an answer that never came, or a kill between
sending and noting it down. Where it is in doubt what arrived, the store is asked.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_plasticity.errors import UserError
from megatron_plasticity.tracking.mlflow_background import mirror_in_background
from megatron_plasticity.tracking.mlflow_content import NOTE, DatasetRecord, RunContent, run_content, study_content
from megatron_plasticity.tracking.mlflow_cursor import Cursor
from megatron_plasticity.tracking.mlflow_experiment import describe, experiment_id
from megatron_plasticity.tracking.mlflow_metrics import last_step, parts, send_metrics, send_results
from megatron_plasticity.tracking.mlflow_models import send_models, send_table
from megatron_plasticity.tracking.mlflow_store import (
    StoreError,
    alone_with,
    connect,
    sqlite_folder,
    tracking_uri,
    without_credentials,
)
from megatron_plasticity.tracking.run_folder import RunFolder, RunState
from megatron_plasticity.tracking.system_metrics import FILES

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput as MlflowDatasetInput
    from mlflow.entities import Run

__all__ = ["MlflowMirror", "mirror_in_background", "tracking_uri"]

TAGS_AND_PARAMS_PER_BATCH = 100
"""MLflow's limit of one request."""

PARENT_TAG = "mlflow.parentRunId"
_ENDED = ("FINISHED", "FAILED", "KILLED")
_WATCHED_FILES = ("config.yaml", "inputs.json", "state.json", "metrics.jsonl", "results.json", "samples.parquet")

Signature = tuple[Any, ...]
"""What a run folder looks like from outside: as long as it stays the same there is nothing new to send."""


@dataclass
class _Mirrored:
    """What the store is known to hold of one folder."""

    run_id: str
    status: str
    tags: dict[str, str]
    params: set[str]
    has_datasets: bool
    models: tuple[str | None, str | None]
    """Identities of the models made and read that were sent by this process."""
    model_id: str | None
    """MLflow's id of the model that the results say something about."""
    has_samples: bool
    cursor: Cursor


class MlflowMirror:
    """Mirrors run folders into one experiment of one store; connects when it is first used. Not for several threads at once."""

    def __init__(self, folder: Path, experiment: str, uri: str | None = None) -> None:
        """`folder` is the study's folder, or the output folder of a single run: the default store is `mlflow.db` in it."""
        self.uri = uri or tracking_uri(folder)
        self.experiment = experiment
        self.answers = 0
        """Grows with what the server has answered."""
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._mirrored: dict[Path, _Mirrored] = {}
        self._sent: dict[Path, tuple[Signature, str]] = {}
        """Folder → how it looked when it was last sent, and the id of its run."""

    def sync(self, folder: Path, over: bool = True) -> None:
        """Bring MLflow up to date with a study folder or a run folder.

        `over` tells that no process works on the study any more, so that one with cells left to do is not "running".
        Raises StoreError if the store cannot be reached (without credentials in the message); a later call goes on from there.
        """
        if (folder / "study.json").is_file():
            self.sync_study(_read_study(folder), folder, over)
        else:
            self.sync_run(RunFolder.open(folder).path)

    def sync_run(self, folder: Path) -> None:
        """Bring one stand-alone run folder up to date. Raises UserError."""
        with self._explained_errors():
            self._send(run_content(folder), parent=None)

    def sync_study(self, study: Mapping[str, Any], folder: Path, over: bool = False) -> None:
        """Bring a study up to date; `study` is what its `study.json` says. Cells that have not begun are left out.

        A cell that cannot be read, or that the server refuses, does not hold up the others; UserError names them at the end.
        """
        cells: dict[str, Mapping[str, Any]] = {cell["id"]: cell for cell in study["cells"]}
        problems: list[str] = []
        states: dict[str, RunState] = {}
        for name, cell in cells.items():
            try:
                states[name] = _state_of(folder / cell["folder"])
            except UserError as error:
                problems.append(f"{name}: {error}")
        with self._explained_errors():
            if self._client is None:
                describe(self._connected(), self._experiment_id, study.get("description"))
            root = self._send(study_content(study, folder, list(states.values()), over), parent=None)
            run_ids: dict[str | None, str] = {}
            for name in _parents_first(cells):
                if name not in states or states[name].status == "pending":
                    continue
                try:
                    run_ids[name] = self._send_cell(
                        folder / cells[name]["folder"],
                        study,
                        cells[name],
                        states[name],
                        parent=run_ids.get(cells[name].get("parent"), root),
                    )
                except Exception as error:
                    if not isinstance(error, UserError) and not _is_refusal(error):
                        raise  # the store cannot be reached: the other cells would fail as well
                    problems.append(f"{name}: {without_credentials(str(error))}")
        if problems:
            raise UserError("some cells could not be mirrored to MLflow:\n" + "\n".join(f"  {p}" for p in problems))

    def _send_cell(self, folder: Path, study: Mapping[str, Any], cell: Mapping[str, Any], state: RunState, parent: str) -> str:
        """Send a cell of a study, unless it looks as it did when it was sent: most cells of a large study are done, or wait."""
        looks = (_looks(folder), state.status, json.dumps(cell, sort_keys=True), parent)
        if (sent := self._sent.pop(folder, None)) and sent[0] == looks:
            run_id = sent[1]
        else:
            run_id = self._send(run_content(folder, study, cell), parent)
        self._sent[folder] = looks, run_id
        return run_id

    def _send(self, content: RunContent, parent: str | None) -> str:
        """Make the MLflow run what `content` says, sending only what is new; returns its id."""
        folder = content.folder.resolve()
        client = self._connected()
        tags = content.tags if parent is None else {**content.tags, PARENT_TAG: parent}
        # Out of the books while sending: after an error, what the store holds must be asked for again.
        mirrored = self._mirrored.pop(folder, None) or self._attach(client, content, tags)
        self._answered()
        _send_tags_and_params(client, mirrored, tags, content.params)
        if content.datasets and not mirrored.has_datasets:
            client.log_inputs(mirrored.run_id, datasets=_dataset_inputs(content.datasets))
            mirrored.has_datasets = True
        mirrored.cursor = send_metrics(client, mirrored.cursor, content, self._answered)
        if (models := (content.model_made, content.model_read)) != mirrored.models:
            mirrored.model_id = send_models(
                client, client.get_run(mirrored.run_id), *models, step=last_step(mirrored.cursor, content)
            )
            mirrored.models = models
        send_results(client, mirrored.cursor, content, mirrored.model_id, self._answered)
        if content.status != mirrored.status:
            if content.status in _ENDED:
                client.set_terminated(mirrored.run_id, content.status, _milliseconds(content.finished))
            else:
                client.update_run(mirrored.run_id, status=content.status)
            mirrored.status = content.status
        if content.samples is not None and not mirrored.has_samples:  # last: the store of artifacts may be another service
            send_table(client, client.get_run(mirrored.run_id), content.samples)
            mirrored.has_samples = True
        if mirrored.cursor.doubtful and content.status in _ENDED:
            self._remove_twins(client, content, mirrored)
        self._mirrored[folder] = mirrored
        return mirrored.run_id

    def _answered(self) -> None:
        self.answers += 1

    def _attach(self, client: MlflowClient, content: RunContent, tags: Mapping[str, str]) -> _Mirrored:
        """The run that mirrors this folder: the one of the cursor, else the one with its tags, else a new one."""
        with alone_with(content.folder):  # `mlflow sync` while the run is going on must not make another
            cursor = Cursor.read(content.folder)
            run = _active_run(client, cursor.run_id) if cursor and cursor.run_id else None
            run = run or next(iter(self._runs_of(client, content)), None)
            doubtful = cursor is not None and cursor.doubtful
            if run is None:
                Cursor("", doubtful=True).write(content.folder)
                run = client.create_run(
                    self._experiment_id,
                    start_time=_milliseconds(content.started),
                    tags={**tags, **_made_by(content)},
                    run_name=content.name,
                )
                cursor = Cursor(run.info.run_id, doubtful=doubtful)
            elif cursor is None or cursor.run_id != run.info.run_id:
                cursor = Cursor(run.info.run_id, sending=True, doubtful=doubtful)  # what it holds must be asked for
            cursor.write(content.folder)
        return _Mirrored(
            run_id=run.info.run_id,
            status=run.info.status,
            tags=dict(run.data.tags),
            params=set(run.data.params),
            has_datasets=bool(run.inputs and run.inputs.dataset_inputs),
            models=(None, None),
            model_id=None,
            has_samples=False,
            cursor=cursor,
        )

    def _runs_of(self, client: MlflowClient, content: RunContent) -> list[Run]:
        """The runs that were made for this folder, by their tags: more than one if an answer was lost. Fullest first."""
        key = "hash" if "hash" in content.tags else "study"
        runs = client.search_runs([self._experiment_id], f"tags.{key} = '{content.tags[key]}'")
        identity = ("kind", "host", "folder")
        found = [run for run in runs if all(run.data.tags.get(k) == content.tags[k] for k in identity)]
        return sorted(found, key=lambda run: (-len(run.data.metrics), run.info.run_id))

    def _remove_twins(self, client: MlflowClient, content: RunContent, mirrored: _Mirrored) -> None:
        """Delete what the server made after we had given up waiting for it and asked again. MLflow can restore it."""
        for run in self._runs_of(client, content):
            if run.info.run_id != mirrored.run_id and not run.data.metrics:
                client.delete_run(run.info.run_id)
        mirrored.cursor.doubtful = False
        mirrored.cursor.write(content.folder)

    def _connected(self) -> MlflowClient:
        if self._client is None:
            client = connect(self.uri)
            self._experiment_id = experiment_id(client, self.experiment, sqlite_folder(self.uri))
            self._client = client
        return self._client

    @contextmanager
    def _explained_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if not _is_of_the_store(error):
                raise
            where, what = without_credentials(self.uri), without_credentials(str(error)).strip()
            raise StoreError(f"MLflow at {where}: {what}") from None  # the cause may hold credentials


def _send_tags_and_params(client: MlflowClient, mirrored: _Mirrored, tags: Mapping[str, str], params: Mapping[str, str]) -> None:
    from mlflow.entities import Param, RunTag

    # A param cannot change once it is there: where a resumed run has another neutral field, the first value stays.
    new_params = [Param(key, value) for key, value in params.items() if key not in mirrored.params]
    new_tags = [
        RunTag(key, value)
        for key, value in tags.items()
        if mirrored.tags.get(key) != value and not (key == NOTE and key in mirrored.tags)
    ]
    for part in parts(new_params, TAGS_AND_PARAMS_PER_BATCH):
        client.log_batch(mirrored.run_id, params=part, synchronous=True)
    for part in parts(new_tags, TAGS_AND_PARAMS_PER_BATCH):
        client.log_batch(mirrored.run_id, tags=part, synchronous=True)
    if "error" in mirrored.tags and "error" not in tags:  # of an earlier attempt
        client.delete_tag(mirrored.run_id, "error")
        del mirrored.tags["error"]
    mirrored.params |= set(params)
    mirrored.tags |= tags


def _dataset_inputs(datasets: Sequence[DatasetRecord]) -> list[MlflowDatasetInput]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return [
        DatasetInput(
            Dataset(
                name=record.name,
                digest=record.digest,
                source_type="local",
                source=json.dumps({"uri": record.source}),
                profile=json.dumps(record.profile),
            ),
            tags=[InputTag("mlflow.data.context", record.context)],
        )
        for record in datasets
    ]


def _active_run(client: MlflowClient, run_id: str) -> Run | None:
    """The run with this id; None if this store has none, or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _made_by(content: RunContent) -> dict[str, str]:
    """Tags that MLflow's page shows in columns of their own."""
    tags = {"mlflow.source.name": f"{content.tags['kind']} (megatron-plasticity)", "mlflow.source.type": "LOCAL"}
    with suppress(OSError, KeyError, ImportError):  # a user without a name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def _looks(folder: Path) -> Signature:
    files = sorted({*(folder / name for name in _WATCHED_FILES), *folder.glob(FILES)})
    return tuple((file.name, *_size_and_time(file)) for file in files)


def _size_and_time(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _is_of_the_store(error: Exception) -> bool:
    """Whether an error comes from MLflow and what it stands on, rather than from a defect of ours."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in (
        "mlflow",
        "sqlalchemy",
        "requests",
        "urllib3",
    )


def _is_refusal(error: Exception) -> bool:
    """Whether the store was reached and did not want this run."""
    return getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST")


def _read_study(folder: Path) -> dict[str, Any]:
    path = folder / "study.json"
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        return {**study, "name": study["name"], "cells": study["cells"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not the description of a study: {error!r}. `study run` writes it anew.") from None


def _state_of(folder: Path) -> RunState:
    """State of a cell; pending as well where there is no folder yet."""
    return RunFolder(folder).state if (folder / "state.json").is_file() else RunState()


def _parents_first(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The ids of `cells` in an order in which each comes after its parent."""

    def depth(name: str) -> int:
        parent = cells[name].get("parent")
        return 1 + depth(parent) if parent is not None and parent in cells else 0

    return sorted(cells, key=depth)


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
