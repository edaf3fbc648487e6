"""What a run folder looks like in MLflow: tags, params, datasets, results and status, as plain values within MLflow's limits."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.tracking.process import host_name
from megatron_plasticity.tracking.run_folder import RunFolder, RunState

KEY_CHARACTERS = 250
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000
DIGEST_CHARACTERS = 36

_MODEL_KINDS = ("pretrain", "import", "finetune")

STATUS = {"running": "RUNNING", "done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "pending": "SCHEDULED"}
"""Our states → those of MLflow."""


@dataclass(frozen=True)
class DatasetRecord:
    """The few words that MLflow keeps of a dataset: it points at data, it holds none."""

    name: str
    digest: str
    source: str
    context: str
    profile: dict[str, Any]


@dataclass(frozen=True)
class RunContent:
    """One MLflow run as it ought to be. Times are Unix seconds."""

    folder: Path
    name: str
    status: str
    started: float | None
    finished: float | None
    tags: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    datasets: tuple[DatasetRecord, ...] = ()
    results: dict[str, float] = field(default_factory=dict)
    """Scalars of `results.json`, as metrics."""
    model_made: str | None = None
    """Identity of the model that the run has made (`TrainedModel.identity`)."""
    model_read: str | None = None
    """Identity of the model that the run reads."""
    samples: Path | None = None
    """Table of the responses of an evaluation."""


def study_content(study: Mapping[str, Any], folder: Path, states: list[RunState], over: bool) -> RunContent:
    """The run at the root of a study; `states` are those of its cells, and `over` tells that nobody works on it any more."""
    tags = {"kind": "study", "study": study["name"], **_place(folder)}
    if study.get("description"):
        tags["mlflow.note.content"] = study["description"]
    starts = [state.started for state in states if state.started is not None]
    ends = [state.finished for state in states if state.finished is not None]
    status = _study_status({state.status for state in states}, over)
    return RunContent(
        folder=folder,
        name=study["name"],
        status=status,
        started=min(starts, default=None),
        finished=None if status == "RUNNING" else max(ends, default=None),
        tags=_cut(tags),
        params=flat_params(study.get("config") or {}),
        datasets=tuple(_corpus_of_study(study)),
    )


def run_content(folder: Path, study: Mapping[str, Any] | None = None, cell: Mapping[str, Any] | None = None) -> RunContent:
    """The run of a run folder; `study` and `cell` are its places in `study.json`, if it is part of a study."""
    run = RunFolder(folder)
    state, config, cell = run.state, _read_config(folder), cell or {}
    if state.status not in STATUS:
        raise UserError(f"{folder / 'state.json'}: unknown status {state.status!r}; expected one of {', '.join(STATUS)}")
    kind, inputs, samples = cell.get("kind") or run.kind, _inputs(folder), folder / "samples.parquet"
    weight_decay = cell["weight_decay"] if "weight_decay" in cell else _weight_decay(run, config)
    task = cell.get("task") or (config.get("task") or {}).get("name")
    tags = {
        "kind": kind,
        "study": study["name"] if study else None,
        "cell": cell.get("id"),
        "task": task,
        "weight_decay": weight_decay,
        "adamw_timescale": cell.get("adamw_timescale"),
        "pretraining_step": cell.get("step"),
        **{allowed_name(f"finetune.{path}"): value for path, value in (cell.get("variant") or {}).items()},
        "hash": folder.resolve().name.rpartition("-")[2],
        "error": state.error,
        **_place(folder),
    }
    return RunContent(
        folder=folder,
        name=cell.get("id") or folder.resolve().name.rpartition("-")[0],
        status=STATUS[state.status],
        started=state.started,
        finished=state.finished,
        tags=_cut({key: str(value) for key, value in tags.items() if value is not None}),
        params=flat_params(config),
        datasets=tuple(_datasets_of_run(kind, config, inputs)),
        results=flat_numbers(run.results) if state.status == "done" else {},
        model_made=tags["hash"] if state.status == "done" and kind in _MODEL_KINDS else None,
        model_read=inputs.get("model") or inputs.get("base"),
        samples=samples if state.status == "done" and samples.is_file() else None,
    )


def flat_params(config: Mapping[str, Any]) -> dict[str, str]:
    """Nested config → `optimizer.weight_decay: "0.5"`; lists become JSON, and what is too long for MLflow is cut with a `…`."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                yield from walk(item, f"{path}.{key}" if path else str(key))
        else:
            yield path, value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)

    return {allowed_name(path): _shortened(text, PARAM_CHARACTERS) for path, text in walk(config, "")}


def flat_numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Nested results → `results/tasks/arithmetic/metrics/greedy: 0.4`. The `value` of an interval takes the name of the interval.

    Lists (per question, per head, per layer) stay in `results.json`: they are data for the report rather than scalars.
    """

    def walk(value: Any, path: str) -> Iterator[tuple[str, float]]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from walk(item, path if key == "value" else f"{path}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path, float(value)

    return {allowed_name(path): number for path, number in walk(results, "results")}


def _weight_decay(run: RunFolder, config: Mapping[str, Any]) -> float | None:
    """λ of a training run, also where the config states it as a timescale."""
    stated = (config.get("optimizer") or {}).get("weight_decay")
    if stated is not None or run.kind != "pretrain":
        return stated
    try:
        checked = run.config
    except UserError:
        return None  # of an earlier release
    return checked.weight_decay if isinstance(checked, PretrainConfig) else None


def _study_status(statuses: set[str], over: bool) -> str:
    if statuses <= {"done"}:
        return "FINISHED" if statuses or over else "RUNNING"
    if not over or "running" in statuses:
        return "RUNNING"
    return "FAILED" if "failed" in statuses else "KILLED"


def _place(folder: Path) -> dict[str, str]:
    return {"folder": str(folder.resolve()), "host": host_name()}


def allowed_name(path: str) -> str:
    """`path` in the characters that MLflow takes for names, and without the empty or dotted steps that it takes for a trick."""
    steps = [step for step in re.sub(r"[^\w\-. :/]", "_", path, flags=re.ASCII).split("/") if step.strip(".")]
    return "/".join(steps)[:KEY_CHARACTERS]


def _shortened(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _cut(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: _shortened(value, TAG_CHARACTERS) for key, value in tags.items()}


def _corpus_of_study(study: Mapping[str, Any]) -> Iterator[DatasetRecord]:
    if corpus := study.get("corpus"):
        yield _corpus(Path(corpus["folder"]), corpus.get("manifest") or {})


def _datasets_of_run(kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Iterator[DatasetRecord]:
    if kind == "pretrain" and (config.get("data") or {}).get("folder"):
        folder = Path(config["data"]["folder"])
        yield _corpus(folder, _read_manifest(folder) or {"sha256": inputs.get("corpus")})
    for task in (*config.get("tasks", ()), *([config["task"]] if config.get("task") else ())):
        text = json.dumps(task, sort_keys=True)
        yield DatasetRecord(
            name=task["name"],
            digest=hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARACTERS],
            source=f"megatron_plasticity task {task['name']}",
            context="evaluation" if kind == "evaluate" else "training",
            profile={key: value for key, value in task.items() if key != "name"},
        )


def _corpus(folder: Path, manifest: Mapping[str, Any]) -> DatasetRecord:
    digest = manifest.get("sha256") or hashlib.sha256(str(folder).encode()).hexdigest()
    scalars = {key: value for key, value in manifest.items() if isinstance(value, int | float | str)}
    return DatasetRecord(folder.name, digest[:DIGEST_CHARACTERS], str(folder), "training", scalars)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # the corpus may be on another machine by now; the hash that the run noted is enough


def _inputs(folder: Path) -> dict[str, str]:
    return RunFolder(folder).inputs if (folder / "inputs.json").is_file() else {}


def _read_config(folder: Path) -> dict[str, Any]:
    """The resolved config as it stands, without checking: a run of an earlier release is mirrored as well."""
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'config.yaml'}: cannot be read: {error}") from None
    return tree if isinstance(tree, dict) else {}
