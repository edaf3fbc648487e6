"""A study: a grid of pretraining runs, and what happens to each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt, field_validator, model_validator

from megatron_plasticity.config.analysis import AnalysesConfig
from megatron_plasticity.config.base import Section, added_later, neutral
from megatron_plasticity.config.data import CorpusConfig
from megatron_plasticity.config.evaluation import EvaluateRecipe
from megatron_plasticity.config.interchange import ImportedBase
from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.config.training import FinetuneRecipe


class SlurmConfig(Section):
    """What Slurm is asked for. Nothing here can change a result."""

    partition: str | None = neutral(None)
    """`--partition`; left out, Slurm takes its default."""
    account: str | None = neutral(None)
    """`--account`."""
    time: str = neutral("24:00:00", pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")
    """`--time` of one job. A run that needs longer saves before the limit, is requeued, and goes on."""
    gpus_per_node: PositiveInt | None = neutral(None)
    """GPUs of a node, and ranks of a run on it (`--gpus-per-node`); needed where runs use GPUs."""
    cpus_per_process: PositiveInt = neutral(4)
    """CPU cores of each rank (`--cpus-per-task`)."""
    memory: str | None = neutral(None, pattern=r"^\d+[KMGT]?$")
    """Memory of a node (`--mem`), such as `200G`; left out, Slurm takes its default."""
    seconds_before_limit: PositiveInt = neutral(300)
    """So long before the limit a run is told to save (`--signal`): long enough for a step and a checkpoint."""
    options: tuple[str, ...] = neutral(())
    """Further options of `sbatch`, such as `--qos=long`; each begins with `--`."""
    setup: tuple[str, ...] = neutral(())
    """Lines of shell before a run starts, such as `module load cuda`."""

    @field_validator("time", mode="before")
    @classmethod
    def _time_is_text(cls, value: Any) -> Any:
        # YAML reads 24:00:00 as 86400, and 30:00 as 1800: nobody can tell whether minutes or seconds were meant.
        if isinstance(value, int):
            raise ValueError('YAML takes a time without quotes for a number; write it in quotes, such as "24:00:00"')
        return value

    @model_validator(mode="after")
    def _there_is_time_before_the_signal(self) -> SlurmConfig:
        seconds = _slurm_seconds(self.time)
        if self.seconds_before_limit >= seconds:
            raise ValueError(
                f"`seconds_before_limit`={self.seconds_before_limit} leaves nothing of `time`={self.time}, which is {seconds} s; "
                "lower the first or raise the second"
            )
        return self

    @field_validator("options")
    @classmethod
    def _options_are_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            if not option.startswith("--") or "\n" in option:
                raise ValueError(f"{option!r} is no option of sbatch, which begins with `--` and is one line")
            if option.split("=")[0] in SLURM_OWN_OPTIONS:
                raise ValueError(
                    f"{option.split('=')[0]} is stated by the runner itself or by a setting of `resources`; leave it out"
                )
        return value


def _slurm_seconds(time: str) -> int:
    """Seconds of a time as sbatch(1) reads it: minutes, minutes:seconds, hours:minutes:seconds, or days-hours with either after
    it."""
    days, dash, rest = time.rpartition("-")
    numbers = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(numbers) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(unit * number for unit, number in zip(units, numbers, strict=False))


SLURM_OWN_OPTIONS = (
    "--array",
    "--job-name",
    "--output",
    "--error",
    "--open-mode",
    "--requeue",
    "--no-requeue",
    "--signal",
    "--nodes",
    "--ntasks-per-node",
    "--cpus-per-task",
    "--gpus-per-node",
    "--time",
    "--partition",
    "--account",
    "--mem",
)
"""Options of sbatch that are decided here, so that two statements of one thing cannot differ."""


class ResourcesConfig(Section):
    """Where and how the study's runs are carried out. Nothing here can change a result beyond what `threads` says."""

    backend: Literal["local", "hostfile", "slurm"] = neutral("local")
    """`local`: this machine. `hostfile`: the machines that `hostfile` lists, over ssh. `slurm`: array jobs."""
    hostfile: Path | None = neutral(None)
    """For `hostfile`: a file with lines such as `node1 slots=8`, one for each machine with the number of its GPUs."""
    slurm: SlurmConfig = neutral(SlurmConfig())
    """For `slurm`: what to ask it for."""
    slots: PositiveInt | None = neutral(None)
    """Runs side by side. Default: `local` one per GPU, or one per core without a GPU; `hostfile` as many as the machines hold;
    `slurm` as many as it lets run."""
    threads: PositiveInt = neutral(1)
    """CPU threads of each run. Results are bit-equal for equal thread counts only: sums are split over threads."""
    processes_per_run: PositiveInt = neutral(1)
    """Ranks of each training run and each evaluation; more than one goes through the deepspeed launcher, or Slurm's srun."""
    retries: NonNegativeInt = neutral(2)
    """Further attempts of a run that was killed, lost its machine, ran out of memory or lost a connection. A run that got further
    than a checkpoint since its last failure has all of them again; an error in a config is never tried again."""
    retry_seconds: float = neutral(30.0, gt=0)
    """Pause before the first further attempt; it doubles with each, up to an hour."""
    silent_minutes: float | None = neutral(60.0, gt=0)
    """A run that gives no sign of life for so long counts as hung: it is ended and tried again. Null waits for ever."""

    @model_validator(mode="after")
    def _backend_has_what_it_needs(self) -> ResourcesConfig:
        if (self.backend == "hostfile") != (self.hostfile is not None):
            raise ValueError('`hostfile` must be given with backend "hostfile", and only with it')
        gpus = self.slurm.gpus_per_node
        if self.backend == "slurm" and gpus and self.processes_per_run > gpus and self.processes_per_run % gpus:
            raise ValueError(
                f"processes_per_run={self.processes_per_run} fills no whole number of nodes of slurm.gpus_per_node={gpus}; "
                f"take at most {gpus}, or a multiple of it"
            )
        return self


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
    """Where and how the runs are carried out."""
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
