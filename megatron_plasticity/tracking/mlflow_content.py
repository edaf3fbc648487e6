"""What a run folder looks like in MLflow: tags, params, datasets, results and status, as plain values within MLflow's limits."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_plasticity.errors import UserError
from megatron_plasticity.tracking.mlflow_origin import Origin, origin_of, read_config, short_count
from megatron_plasticity.tracking.mlflow_store import redactor
from megatron_plasticity.tracking.process import host_name
from megatron_plasticity.tracking.run_folder import RunFolder, RunState

KEY_CHARACTERS = 250
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000
DIGEST_CHARACTERS = 36

NOTE = "mlflow.note.content"
"""The description of a run: written once, since a person may write another on MLflow's page."""

_OWN_TAGS = ("optimizer.weight_decay", "optimizer.adamw_timescale", "seed")
_WORK = {
    "pretrain": "Pretraining of",
    "import": "Import of",
    "finetune": "Fine-tuning of",
    "evaluate": "Evaluation of",
    "harness": "Evaluation by lm-evaluation-harness of",
    "capture": "Activations of",
    "probes": "Linear probes on",
    "attention": "Attention matrices of",
    "truncation": "Truncated attention heads of",
    "overfitting": "Train–validation gap of",
    "features": "Features of",
}
"""Kind of a run → the first words of its description; the model follows."""

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
    counts = Counter(state.status for state in states)
    progress = f"{counts['done']} of {len(states)} runs done" + (f", {counts['failed']} failed" if counts["failed"] else "")
    tags = {"kind": "study", "study": study["name"], "progress": progress, **_place(folder)}
    tags[NOTE] = study.get("description") or f"Study {study['name']}"
    starts = [state.started for state in states if state.started is not None]
    ends = [state.finished for state in states if state.finished is not None]
    status = _study_status(set(counts), over)
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
    state, config, cell = run.state, read_config(folder), cell or {}
    if not config:
        raise UserError(f"{folder / 'config.yaml'}: cannot be read, or is empty")
    if state.status not in STATUS:
        raise UserError(f"{folder / 'state.json'}: unknown status {state.status!r}; expected one of {', '.join(STATUS)}")
    kind, inputs, samples = cell.get("kind") or run.kind, _inputs(folder), folder / "samples.parquet"
    origin = origin_of(folder, config)
    weight_decay = cell.get("weight_decay", origin.weight_decay)
    results = run.results if state.status == "done" else {}
    task = cell.get("task") or (config.get("task") or {}).get("name")
    read = inputs.get("model") or inputs.get("base")
    step = cell.get("step") or (int(read.partition("@")[2]) if read and "@" in read else None)
    tags = {
        "kind": kind,
        "study": study["name"] if study else None,
        "cell": cell.get("id"),
        "task": task,
        "weight_decay": _short(weight_decay),
        "adamw_timescale": _short(cell.get("adamw_timescale")),
        "family": origin.family,
        "size": origin.size,
        "seed": origin.seed,
        "tokens_per_parameter": _short(origin.tokens_per_parameter, digits=3),
        "pretraining_step": step,
        "attention_kernel": results.get("attention_kernel"),
        "model": read,
        **{allowed_name(f"pretraining.{path}"): v for path, v in (cell.get("point") or {}).items() if path not in _OWN_TAGS},
        **{allowed_name(f"finetune.{path}"): value for path, value in (cell.get("variant") or {}).items()},
        "hash": folder.resolve().name.rpartition("-")[2],
        "error": state.error,
        NOTE: _description(kind, config, origin, weight_decay, step),
        **_place(folder),
    }
    return RunContent(
        folder=folder,
        name=cell.get("id") or folder.resolve().name.rpartition("-")[0],
        status=STATUS[state.status],
        started=state.started,
        finished=state.finished,
        tags=_cut({key: str(value) for key, value in tags.items() if value is not None}),
        params=flat_params(config) | _params_of_pretraining(origin, weight_decay),
        datasets=tuple(_datasets_of_run(kind, config, inputs)),
        results=flat_numbers(results),
        model_made=tags["hash"] if results.get("checkpoint") else None,
        model_read=read,
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

    clean = redactor()
    return {allowed_name(path): _shortened(clean(text), PARAM_CHARACTERS) for path, text in walk(config, "")}


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


def _params_of_pretraining(origin: Origin, weight_decay: float | None) -> dict[str, str]:
    """In full precision and on every run that descends from a pretraining, so that they can be an axis of MLflow's charts."""
    values = {
        "weight_decay": weight_decay,
        "parameters": origin.parameters,
        "tokens": origin.tokens,
        "steps": origin.steps,
        "seed": origin.seed,
    }
    return {f"pretraining.{name}": str(value) for name, value in values.items() if value is not None}


def _description(kind: str, config: Mapping[str, Any], origin: Origin, weight_decay: float | None, step: int | None) -> str:
    """One sentence, and the folder that is read, for a person who sees the run among hundreds."""
    text = f"{_WORK.get(kind, kind.capitalize() + ' of')} a {' '.join(filter(None, (origin.size, origin.family or 'model')))}"
    if kind != "pretrain" and (weight_decay is not None or origin.tokens is not None):
        text += " pretrained"
    if weight_decay is not None:
        text += f" with λ = {_short(weight_decay)}"
    if origin.tokens is not None:
        ratio = _short(origin.tokens_per_parameter, digits=3)
        text += f" on {short_count(origin.tokens)} tokens" + (f" ({ratio} per parameter)" if ratio else "")
    if step is not None:
        text += f", taken at step {step}"
    tasks = [config["task"]] if config.get("task") else list(config.get("tasks") or ())
    if names := [task["name"] if isinstance(task, Mapping) else str(task) for task in tasks]:
        text += f"; {'task' if len(names) == 1 else 'tasks'}: {', '.join(names)}"
    base = config.get("base") or config.get("run")
    return f"{text}\n\nReads `{base}`" if base else text


def _short(value: float | None, digits: int = 6) -> str | None:
    """`0.1`, `1`, `0.333333`: as a person would type it into a filter."""
    return None if value is None else f"{value:.{digits}g}"


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
    clean = redactor()
    return {key: _shortened(clean(value), TAG_CHARACTERS) for key, value in tags.items()}


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
