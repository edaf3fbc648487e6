"""Models and samples in MLflow: which model a run made, which one it read, and a table of what a model answered.

A model is known by its identity, the hash of the run that made it, with `@step` for a checkpoint before the last. MLflow holds
its name, not its weights: those stay in the run folder.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_plasticity.errors import UserError
from megatron_plasticity.tracking.mlflow_store import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

TABLE_FILE = "samples.json"
_TABLES_TAG = "mlflow.loggedArtifacts"
"""Where MLflow's page looks for the tables of a run."""
_TAGS_OF_MODEL = ("kind", "study", "weight_decay", "adamw_timescale", "family", "size", "seed", "task", "folder", "host")
_HEADLINE = re.compile(r"results/(\w*loss|tasks/[^/]+/metrics/[^/]+)")
_FIRST_COLUMNS = ("prompt", "text", "extracted", "answer", "correct", "pass")
"""What a person wants to see without scrolling to the right."""
TABLE_ROWS = 200
"""MLflow's page loads a table whole, so it has a sample of the samples; all of them are in the run folder."""


def is_headline(metric: str) -> bool:
    """Whether a number of a run's results belongs into MLflow's table of models: losses, and the scores of each task."""
    return _HEADLINE.fullmatch(metric) is not None


def send_models(client: MlflowClient, run: Run, made: str | None, read: str | None, step: int) -> str | None:
    """Note in MLflow that `run` made the model `made` at its step `step`, and read the model `read`, each an identity, unless it
    says so already.

    Returns MLflow's id of the model that the run's results are about: the one that it made, else the one that it read.
    """
    from mlflow.entities import LoggedModelInput, LoggedModelOutput

    experiment_id, run_id = run.info.experiment_id, run.info.run_id
    made_id = read_id = None
    if made is not None:
        made_id = _model_id(client, experiment_id, made)
        if not (run.outputs and run.outputs.model_outputs):
            client.log_outputs(run_id, models=[LoggedModelOutput(made_id, step=step)])
    if read is not None:
        read_id = _model_id(client, experiment_id, read)
        if not (run.inputs and run.inputs.model_inputs):
            client.log_inputs(run_id, models=[LoggedModelInput(read_id)])
    return made_id or read_id


def send_table(client: MlflowClient, run: Run, samples: Path) -> None:
    """Put all answers to some questions, spread evenly over `samples.parquet`, beside the run, once.

    Raises UserError if the store does not take them.
    """
    import pyarrow.parquet

    tables = json.loads(run.data.tags.get(_TABLES_TAG, "[]"))
    entry = {"path": TABLE_FILE, "type": "table"}
    if entry in tables:
        return
    try:
        rows = _some_questions(pyarrow.parquet.read_table(samples).to_pylist())
        if not rows:
            return
        names = [*(name for name in _FIRST_COLUMNS if name in rows[0]), *(name for name in rows[0] if name not in _FIRST_COLUMNS)]
        # Not by `log_table`, which appends to a table that is there: of an attempt, say, whose answer was lost.
        table = {"columns": names, "data": [[_plain(row[name]) for name in names] for row in rows]}
        client.log_text(run.info.run_id, json.dumps(table, ensure_ascii=False, default=str), TABLE_FILE)
        client.set_tag(run.info.run_id, _TABLES_TAG, json.dumps([*tables, entry]))
    except Exception as error:  # of the artifact store, which may be a service of its own
        raise UserError(f"{samples}: could not be put beside the MLflow run: {without_credentials(str(error))}") from None


def _plain(value: Any) -> Any:
    """JSON has no NaN, and a page that meets one shows no table."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _some_questions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    questions: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        questions.setdefault((row["task"], row["test_set"], row["question"]), []).append(row)
    answers = max(map(len, questions.values()), default=1)
    count = min(len(questions), max(1, TABLE_ROWS // answers))
    names = list(questions)
    return [row for place in range(count) for row in questions[names[place * len(names) // count]]][:TABLE_ROWS]


def _model_id(client: MlflowClient, experiment_id: str, identity: str) -> str:
    """The model of this identity, which is made if it is not there."""
    found = client.search_logged_models([experiment_id], filter_string=f"tags.identity = '{identity}'")
    if found:
        model = min(found, key=lambda each: (each.creation_timestamp, each.model_id))  # twins after a lost answer: one for all
    else:
        model = _new_model(client, experiment_id, identity)
    if str(model.status) != "READY":
        client.finalize_logged_model(model.model_id, "READY")
    return model.model_id


def _new_model(client: MlflowClient, experiment_id: str, identity: str) -> LoggedModel:
    run_hash, _, step = identity.partition("@")
    runs = client.search_runs([experiment_id], f"tags.hash = '{run_hash}'", max_results=1)
    maker = runs[0] if runs else None
    tags = {"identity": identity, **({"step": step} if step else {})}
    name, params = run_hash, {}
    if maker is not None:
        tags |= {key: value for key, value in maker.data.tags.items() if key in _TAGS_OF_MODEL}
        params = {key: value for key, value in maker.data.params.items() if key.startswith("pretraining.")}
        name = maker.info.run_name or run_hash
    return client.create_logged_model(
        experiment_id,
        name=re.sub(r"[/:.%\"']", "_", name + (f"-step-{step}" if step else "")),
        source_run_id=maker.info.run_id if maker is not None else None,
        tags=tags,
        params=params,
        model_type="checkpoint",
    )
