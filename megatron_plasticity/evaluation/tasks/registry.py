"""From the name of a task to its examples."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence

from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.tasks.catalogue import shipped_tasks
from megatron_plasticity.evaluation.tasks.prepared import PreparedTask
from megatron_plasticity.evaluation.tasks.procedural import PROCEDURAL_TASKS
from megatron_plasticity.evaluation.tasks.task import Task


def get_task(config: TaskConfig) -> Task:
    """The task that `config` names: a procedural one, or the one that is prepared in `config.folder`.

    Raises UserError that says how to prepare a task that is known, and names the nearest of one that is not.
    """
    if config.name in PROCEDURAL_TASKS:
        return PROCEDURAL_TASKS[config.name]
    folder = config.folder / config.name
    if folder.is_dir():
        task = PreparedTask(folder)
        task.manifest  # noqa: B018 - damage shows here, not in the middle of the work
        return task
    if config.name in shipped_tasks():
        output = "" if config.folder == TaskConfig.model_fields["folder"].default else f" --output {config.folder}"
        raise UserError(
            f"task {config.name!r} is not prepared in {config.folder}: run "
            f"`megatron-plasticity tasks prepare {config.name}{output}`"
        )
    prepared = [path.name for path in sorted(config.folder.glob("*/")) if path.is_symlink()]
    known = list(dict.fromkeys([*PROCEDURAL_TASKS, *prepared, *shipped_tasks()]))
    near = difflib.get_close_matches(config.name, known, n=2)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise UserError(f"unknown task {config.name!r}: {hint}the tasks are {', '.join(known)}")


def task_inputs(tasks: Sequence[TaskConfig]) -> dict[str, str]:
    """What of prepared tasks enters the hash of an evaluation; nothing if all are procedural.

    Raises UserError if a task is unknown or not prepared."""
    identities = {config.name: identity for config in tasks if (identity := get_task(config).identity) is not None}
    if not identities:
        return {}
    return {"tasks": hashlib.sha256(json.dumps(identities, sort_keys=True).encode()).hexdigest()}
