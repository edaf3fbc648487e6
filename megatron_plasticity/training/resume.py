"""What a training checkpoint knows beside tensors, and whether a config may go on from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import TrainingRecipe
from megatron_plasticity.errors import CheckpointError
from megatron_plasticity.models.checkpoint import CheckpointFolder
from megatron_plasticity.optim.decay import DecayGroups, check_same_groups

# Version of the folder's layout and of this record; an unknown one is refused rather than guessed at.
FORMAT = 1


@dataclass(frozen=True)
class TrainerState:
    """`trainer.json`. No random state is in it: nothing in a training step draws a random number, and the order of the data is a
    pure function of the seed and the step."""

    step: int
    """Steps done; the next one is number `step`, 0-based."""
    kind: str
    """`pretrain` or `finetune`."""
    run: str
    """Name of the run folder that wrote it."""
    decay_groups: dict[str, Any]
    """λ, its coupling, and the names of the parameters that decay and do not."""
    optimizer: dict[str, Any]
    """What else decides an AdamW step."""
    data: dict[str, Any]
    """What decides which samples step `step` reads."""
    skipped_steps: int = 0
    """How many of the steps changed nothing (`engine.non_finite`): Adam's own count of steps is smaller by so many."""
    format: int = FORMAT

    @classmethod
    def of(
        cls,
        step: int,
        total_steps: int,
        kind: str,
        run: str,
        groups: DecayGroups,
        recipe: TrainingRecipe,
        data: dict[str, Any],
        skipped_steps: int = 0,
    ) -> TrainerState:
        optimizer = {
            "learning_rate": recipe.optimizer.learning_rate,
            "betas": list(recipe.optimizer.betas),
            "eps": recipe.optimizer.eps,
            "gradient_clip": recipe.optimizer.gradient_clip,
            "schedule": recipe.schedule.model_dump(),
            "total_steps": total_steps,
        }
        data = {**data, "global_batch_size": recipe.batch.global_batch_size}
        return cls(step, kind, run, groups.to_json(), optimizer, data, skipped_steps)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_continues(checkpoint: CheckpointFolder, state: TrainerState, model: ModelConfig, groups: DecayGroups) -> None:
    """Raise CheckpointError, naming each difference, unless `checkpoint` is an earlier moment of the run `state` describes."""
    path, stored = checkpoint.path, checkpoint.trainer
    if stored.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {stored.get('format')!r} of another version of this software; this one reads format {FORMAT}"
        )
    differences = _differences("model", checkpoint.model.model_dump(), model.model_dump())
    if differences:
        raise CheckpointError(f"{path}: a checkpoint of another model\n" + "\n".join(differences))
    check_same_groups(stored["decay_groups"], groups, str(path))
    now = state.to_json()
    differences = [line for key in ("optimizer", "data") for line in _differences(key, stored[key], now[key])]
    if stored["kind"] != now["kind"]:
        differences.append(f"  kind: checkpoint {stored['kind']}, config {now['kind']}")
    if differences:
        raise CheckpointError(
            f"{path}: written under another config, so going on would not be a continuation\n" + "\n".join(differences)
        )


def _differences(title: str, stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    keys = sorted({*stored, *now})
    return [
        f"  {title}.{key}: checkpoint {stored.get(key)!r}, config {now.get(key)!r}"
        for key in keys
        if stored.get(key) != now.get(key)
    ]
