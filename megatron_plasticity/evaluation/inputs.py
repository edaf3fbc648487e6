"""What an evaluation depends on beside its settings and the model: what enters the hash of its run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from megatron_plasticity.config.evaluation import EvaluateRecipe
from megatron_plasticity.config.files import sha256_file
from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.evaluation.math_pool import math_verify_installed
from megatron_plasticity.evaluation.tasks.registry import get_task, task_inputs


def evaluation_inputs(recipe: EvaluateRecipe, tasks: Sequence[TaskConfig]) -> dict[str, str]:
    """Hashes by name: the prepared tasks, the library that grades where one decides, the files of a local reward model.

    Raises UserError if a task is unknown or not prepared.
    """
    inputs = task_inputs(tasks)
    by_library = {"maths", "number"} if recipe.paper_compat else {"maths"}
    if any(by_library & get_task(config).answer_kinds for config in tasks):
        inputs["grader"] = f"math-verify {metadata.version('math-verify')}" if math_verify_installed() else "exact-number"
    if recipe.reward.model is not None and (folder := Path(recipe.reward.model)).is_dir():
        lines = [f"{file.relative_to(folder)}:{sha256_file(file)}\n" for file in sorted(folder.rglob("*")) if file.is_file()]
        inputs["reward"] = hashlib.sha256("".join(lines).encode()).hexdigest()
    return inputs
