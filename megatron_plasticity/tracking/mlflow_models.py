"""Models and samples in MLflow: which model a run made, which one it read, and a table of what a model answered.

A model is known by its identity, the hash of the run that made it, with `@step` for a checkpoint before the last. MLflow holds
its name, not its weights: those stay in the run folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet

from megatron_plasticity.errors import UserError
from megatron_plasticity.tracking.mlflow_store import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

TABLE_FILE = "samples.json"
_TAGS_OF_MODEL = ("kind", "study", "weight_decay", "task", "folder")
TABLE_ROWS = 200
"""MLflow's page loads a table whole, so it has a sample of the samples; all of them are in the run folder."""


def send_models(client: MlflowClient, run: Run, made: str | None, read: str | None) -> None:
    """Note in MLflow that `run` made the model `made` and read the model `read`, each an identity, unless it says so already."""
    from mlflow.entities import LoggedModelInput, LoggedModelOutput

    experiment_id, run_id = run.info.experiment_id, run.info.run_id
    if made is not None and not (run.outputs and run.outputs.model_outputs):
        client.log_outputs(run_id, models=[LoggedModelOutput(_model_id(client, experiment_id, made), step=0)])
    if read is not None and not (run.inputs and run.inputs.model_inputs):
        client.log_inputs(run_id, models=[LoggedModelInput(_model_id(client, experiment_id, read))])


def send_table(client: MlflowClient, run: Run, samples: Path) -> None:
    """Put all answers to some questions, spread evenly over `samples.parquet`, beside the run, once.

    Raises UserError if the store does not take them.
    """
    if TABLE_FILE in run.data.tags.get("mlflow.loggedArtifacts", ""):
        return
    try:
        rows = _some_questions(pyarrow.parquet.read_table(samples).to_pylist())
        client.log_table(run.info.run_id, {name: [row[name] for row in rows] for name in rows[0]}, TABLE_FILE)
    except Exception as error:  # of the artifact store, which may be a service of its own
        raise UserError(f"{samples}: could not be put beside the MLflow run: {without_credentials(str(error))}") from None


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
        return found[0].model_id
    run_hash, _, step = identity.partition("@")
    runs = client.search_runs([experiment_id], f"tags.hash = '{run_hash}'", max_results=1)
    maker = runs[0] if runs else None
    tags = {"identity": identity, **({"step": step} if step else {})}
    name = run_hash
    if maker is not None:
        tags |= {key: value for key, value in maker.data.tags.items() if key in _TAGS_OF_MODEL}
        name = maker.info.run_name or run_hash
    model = client.create_logged_model(
        experiment_id,
        name=re.sub(r"[/:.%\"']", "_", name + (f"-step-{step}" if step else "")),
        source_run_id=maker.info.run_id if maker is not None else None,
        tags=tags,
        model_type="checkpoint",
    )
    client.finalize_logged_model(model.model_id, "READY")
    return model.model_id
