"""The MLflow experiment that a study, or an output folder of single runs, is copied into."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_plasticity.errors import UserError
from megatron_plasticity.tracking.mlflow_content import NOTE
from megatron_plasticity.tracking.mlflow_store import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's page otherwise takes an experiment for one of agents and prompts, and shows neither runs nor models.
_TAGS = {"mlflow.experimentKind": "custom_model_development"}


def experiment_id(client: MlflowClient, name: str, folder: Path | None) -> str:
    """The id of the experiment called `name`, which is made if it is not there; `folder` is that of a local store.

    Raises UserError for one that was deleted.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # Left alone, MLflow would name a folder in whatever the working directory is.
        artifacts = str(folder.resolve() / "mlartifacts") if folder else None
        try:
            return client.create_experiment(name, artifact_location=artifacts, tags=_TAGS)
        except MlflowException as error:
            experiment = client.get_experiment_by_name(name)  # another process may just have made it
            if experiment is None:
                raise error
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"MLflow experiment {name!r} was deleted; restore it (`mlflow experiments restore`) or choose another name"
        )
    for key, value in _TAGS.items():
        if key not in experiment.tags:
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return experiment.experiment_id


def describe(client: MlflowClient, experiment: str, description: str | None) -> None:
    """Put a study's description on the experiment with this id, unless there is one."""
    if description and NOTE not in client.get_experiment(experiment).tags:
        client.set_experiment_tag(experiment, NOTE, without_credentials(description))
