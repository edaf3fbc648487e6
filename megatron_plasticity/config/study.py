"""A study: a grid of pretraining runs, and what happens to each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import PositiveInt, field_validator, model_validator

from megatron_plasticity.config.analysis import AnalysesConfig
from megatron_plasticity.config.base import Section, added_later, neutral
from megatron_plasticity.config.data import CorpusConfig
from megatron_plasticity.config.evaluation import EvaluateRecipe
from megatron_plasticity.config.interchange import ImportedBase
from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.config.training import FinetuneRecipe


class ResourcesConfig(Section):
    """How the study uses this machine."""

    slots: PositiveInt | None = neutral(None)
    """Runs side by side. Default: one per GPU, or one per core without a GPU."""
    threads: PositiveInt = neutral(1)
    """CPU threads of each run. Results are bit-equal for equal thread counts only: sums are split over threads."""
    processes_per_run: PositiveInt = neutral(1)
    """Ranks of each training run and each evaluation; more than one goes through the deepspeed launcher."""


class StudyConfig(Section):
    name: str = neutral(pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the study and of its folder."""
    description: str = neutral("")
    """What the study asks; printed on top of the report."""
    output: Path = neutral(Path("runs"))
    """Folder under which the study's folder is made."""
    corpus: CorpusConfig | None = None
    """Corpus to prepare first; without it the base run's `data.folder` must be there already."""
    base: dict[str, Any] = {}
    """`pretrain` config that every cell starts from (name, output and, with `corpus`, data.folder are filled in)."""
    axes: dict[str, tuple[Any, ...]] = {}
    """Grid: config path of the base run → values, such as `optimizer.weight_decay: [0, 0.1, 1]`."""
    bases: tuple[ImportedBase, ...] = added_later(())
    """Instead of `base` and `axes`: base models that were pretrained elsewhere. Nothing is pretrained."""
    tasks: tuple[TaskConfig, ...] = ()
    """Tasks on which each base model is fine-tuned."""
    finetune: FinetuneRecipe | None = None
    """How to fine-tune; needed when there are tasks."""
    finetune_axes: dict[str, tuple[Any, ...]] = added_later({})
    """Ways to fine-tune each base model on each task: config path of `finetune` → values, such as
    `optimizer.learning_rate: [1.0e-5, 3.0e-5]`. Runs that differ in `seed` alone are repeats of one way, and are averaged."""
    finetune_steps: tuple[PositiveInt, ...] = added_later(())
    """Pretraining steps besides the last one from whose checkpoints to fine-tune and to evaluate as well; `base` must write
    checkpoints at them (`checkpoint.every_steps`)."""
    evaluate: EvaluateRecipe | None = None
    """How to evaluate base models and fine-tuned models; needed when there are tasks."""
    analyses: AnalysesConfig = AnalysesConfig()
    """What to look at inside each base model."""
    resources: ResourcesConfig = ResourcesConfig()
    """Slots and threads."""
    mlflow: bool = neutral(True)
    """Mirror every run to MLflow (`MLFLOW_TRACKING_URI`, else `mlflow.db` in the study's folder)."""

    @field_validator("axes", "finetune_axes")
    @classmethod
    def _axes_have_values(cls, value: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for path, values in value.items():
            if not values:
                raise ValueError(f"axis {path!r} has no values")
            if len({repr(v) for v in values}) != len(values):
                raise ValueError(f"axis {path!r} repeats a value")
        return value

    @field_validator("finetune_steps")
    @classmethod
    def _steps_are_different(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a step is named twice")
        return value

    @model_validator(mode="after")
    def _one_origin_of_base_models(self) -> StudyConfig:
        problems = []
        if self.bases:
            problems += [
                f"`{name}` is about pretraining, and with `bases` nothing is pretrained; leave one of the two out"
                for name in ("base", "axes", "corpus")
                if getattr(self, name)
            ]
            if self.finetune_steps:
                problems.append(
                    "`finetune_steps`: a model that was pretrained elsewhere has one checkpoint, its last; leave it out"
                )
        elif not (self.base and self.axes):
            problems.append("state `base` and `axes` (a grid of pretraining runs), or `bases` (models pretrained elsewhere)")
        if not self.tasks:
            problems += [
                f"`{name}` is about fine-tuning, and without `tasks` nothing is fine-tuned; leave it out"
                for name in ("finetune_axes", "finetune_steps")
                if getattr(self, name)
            ]
        if problems:
            raise ValueError("\n".join(problems))
        return self
