"""What stands between a score and its plain reading: unlike graders, and base models that hardly answer in a readable form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_plasticity.study.results import BaseModel, Outcome
from megatron_plasticity.study.scores import TaskScores

_READABLE = 0.5
"""Share of readable samples of the base models below which the page says so under the figure."""


def mixed_graders(models: Sequence[BaseModel], outcomes: Sequence[Outcome]) -> list[str]:
    """A sentence for each task whose answers were not all judged by one grader."""
    sentences = []
    for task in dict.fromkeys(outcome.task for outcome in outcomes):
        names = [outcome.name for outcome in outcomes if outcome.task == task]
        decays: dict[str, dict[float, None]] = {}
        for model in models:
            for scores in (model.base_scores.get(task), *(model.finetuned_scores.get(name) for name in names)):
                if scores is not None and scores.grader:
                    decays.setdefault(scores.grader, {})[model.weight_decay] = None
        if len(decays) > 1:
            used = "; ".join(f"{grader} at λ = {', '.join(f'{d:.3g}' for d in found)}" for grader, found in decays.items())
            sentences.append(
                f"The answers of {task} were judged by different graders ({used}), so its scores at these λ cannot be compared. "
                "Evaluate them again where one grader is installed for all."
            )
    return sentences


def base_format_rates(models: Sequence[BaseModel], tasks: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Task → share of samples with a readable answer of each base model that has one, as fractions."""
    rates = {task: tuple(_format_rates([model.base_scores.get(task) for model in models])) for task in tasks}
    return {task: found for task, found in rates.items() if found}


def readability(task: str, rates: Mapping[str, Sequence[float]]) -> str:
    """What to say under the figure of a task when base models give few readable answers; empty when they give enough."""
    found = rates.get(task)
    if not found or (mean := sum(found) / len(found)) >= _READABLE:
        return ""
    share = f"{100 * mean:.0f}" if 100 * mean >= 1 or mean == 0 else "less than 1"
    return f"Base models give a readable answer in {share}\u00a0% of samples, so the gain also measures learning the form."


def _format_rates(scores: Sequence[TaskScores | None]) -> list[float]:
    return [found.metrics["format_rate"].value for found in scores if found is not None and "format_rate" in found.metrics]
