"""What an evaluation depends on beside its settings and the model: what enters the hash of its run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from megatron_plasticity.config.evaluation import EvaluateRecipe
from megatron_plasticity.config.files import sha256_files
from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.evaluation.math_pool import math_verify_installed
from megatron_plasticity.evaluation.tasks.registry import get_task, task_inputs


def evaluation_inputs(recipe: EvaluateRecipe, tasks: Sequence[TaskConfig]) -> dict[str, str]:
    """Hashes by name: the prepared tasks, the library that grades where one decides, the files of a local reward model.

    Raises UserError if a task is unknown or not prepared.
    """
    return {**grading_inputs(recipe, tasks), **reward_inputs(recipe)}


def grading_inputs(recipe: EvaluateRecipe, tasks: Sequence[TaskConfig]) -> dict[str, str]:
    """The part that differs by task. Raises UserError if one is unknown or not prepared."""
    inputs = task_inputs(tasks)
    by_library = {"maths", "number"} if recipe.paper_compat else {"maths"}
    if any(by_library & get_task(config).answer_kinds for config in tasks):
        inputs["grader"] = f"math-verify {metadata.version('math-verify')}" if math_verify_installed() else "exact-number"
    return inputs


def reward_inputs(recipe: EvaluateRecipe) -> dict[str, str]:
    """The part that reads the whole of a local reward model, which takes a minute for a large one."""
    if recipe.reward.model is None or not (folder := Path(recipe.reward.model)).is_dir():
        return {}
    return {"reward": sha256_files((path.relative_to(folder), path) for path in sorted(folder.rglob("*")) if path.is_file())}
