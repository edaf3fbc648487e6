"""The run that is to be launched, as far as it can be known before it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from megatron_plasticity.config.deepspeed import check_engine
from megatron_plasticity.config.evaluation import EvaluateConfig
from megatron_plasticity.config.hashing import canonical
from megatron_plasticity.config.load import load_config
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.errors import UserError, problems_of
from megatron_plasticity.launch.memory import largest_stage, memory
from megatron_plasticity.models.sizes import checkpoint_bytes
from megatron_plasticity.tracking.plain_types import section_to_yaml
from megatron_plasticity.tracking.run_folder import RunFolder

LaunchedVerb = Literal["pretrain", "finetune", "evaluate"]
LaunchedConfig = PretrainConfig | FinetuneConfig | EvaluateConfig

_CONFIGS: dict[str, type[LaunchedConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "evaluate": EvaluateConfig}


@dataclass(frozen=True)
class LaunchedJob:
    """A verb with its resolved config."""

    verb: LaunchedVerb
    config: LaunchedConfig

    @classmethod
    def load(cls, verb: LaunchedVerb, path: Path, overrides: Sequence[str]) -> LaunchedJob:
        """Raises ConfigError, with all problems."""
        return cls(verb, load_config(_CONFIGS[verb], path, overrides))

    @property
    def settings(self) -> str:
        """The resolved config as YAML. Ranks read it instead of the file and the command line, which may change while a job waits
        in a queue, and which DeepSpeed would not quote for the remote shells."""
        return section_to_yaml(self.config)

    @property
    def name(self) -> str:
        return f"{self.verb}-{self.config.name}"

    @property
    def output(self) -> Path:
        return self.config.output

    @property
    def inputs(self) -> list[Path]:
        """Files and folders that the run reads."""
        found: list[Path] = []
        config = self.config
        if isinstance(config, PretrainConfig):
            found += [config.data.folder, *(corpus.folder for corpus in config.data.blend)]
        elif isinstance(config, FinetuneConfig):
            found += [config.base, *_prepared(config.task)]
        else:
            found += [config.run, *(path for task in config.tasks for path in _prepared(task))]
        if not isinstance(config, EvaluateConfig) and config.checkpoint.resume_from is not None:
            found.append(config.checkpoint.resume_from)
        return list(dict.fromkeys(found))

    def problems(self, processes: int) -> list[str]:
        """Why the run cannot work on so many processes: the layout, the batch, inputs that are missing or do not fit."""
        checks: list[Callable[[], object]] = [self._check_inputs]
        if not isinstance(self.config, EvaluateConfig):
            checks.append(partial(check_engine, self.config, processes))
        return problems_of(checks)

    def _check_inputs(self) -> None:
        # Named here: they bring torch, which a wrong config need not wait for.
        from megatron_plasticity.data.stream import corpus_hash
        from megatron_plasticity.evaluation.inputs import evaluation_inputs
        from megatron_plasticity.evaluation.tasks.registry import get_task
        from megatron_plasticity.tracking.trained_model import TrainedModel
        from megatron_plasticity.training.activations import capture_inputs
        from megatron_plasticity.training.preflight import check_finetuning, check_pretraining

        config = self.config
        if isinstance(config, PretrainConfig):
            check_pretraining(config)
            corpus_hash(config.data)
            capture_inputs(config.capture)
        elif isinstance(config, FinetuneConfig):
            check_finetuning(config, TrainedModel.open(config.base).checkpoint.model)
            get_task(config.task)
            capture_inputs(config.capture)
        else:
            TrainedModel.open(config.run)
            evaluation_inputs(config, config.tasks)

    def folder(self) -> RunFolder:
        """The run folder, made if it is not there."""
        from megatron_plasticity.evaluation.job import evaluation_folder
        from megatron_plasticity.tracking.trained_model import TrainedModel
        from megatron_plasticity.training.finetune import finetune_folder
        from megatron_plasticity.training.pretrain import pretrain_folder

        config = self.config
        if isinstance(config, PretrainConfig):
            return pretrain_folder(config)
        if isinstance(config, FinetuneConfig):
            return finetune_folder(config, TrainedModel.open(config.base))
        return evaluation_folder(config)

    def gpu_bytes(self, processes: int) -> float | None:
        """The most that a process needs of its GPU by `launch/memory.py`; None for an evaluation, for which no plan is made."""
        model = self._model()
        if isinstance(self.config, EvaluateConfig) or model is None:
            return None
        data_size = self.config.parallel.data_parallel_size(processes)
        return largest_stage(memory(model, self.config, data_size)).peak.total

    def disk_bytes(self) -> int:
        """What the checkpoints that the run has still to write will need on disk, all together."""
        config, model = self.config, self._model()
        if isinstance(config, EvaluateConfig) or model is None:
            return 0
        adapters = isinstance(config, FinetuneConfig) and config.lora is not None
        count = config.checkpoint.count(self._steps())
        written = 0 if (earlier := self.earlier()) is None else len(earlier.checkpoints())
        return checkpoint_bytes(model, adapters) * max(0, count - written)

    def earlier(self) -> RunFolder | None:
        """The folder of a run with this config, if one is there. Its inputs may have been others: `folder` knows for sure, and
        makes the folder."""
        for path in self.output.glob(f"{self.name}-*"):
            with suppress(UserError):
                run = RunFolder.open(path)
                if canonical(run.config) == canonical(self.config):
                    return run
        return None

    def _steps(self) -> int:
        """Optimizer steps; of a fine-tuning whose number of examples is not known before they are read, 1."""
        from megatron_plasticity.training.duration import finetuning_steps

        config = self.config
        if isinstance(config, PretrainConfig):
            return config.total_steps
        assert isinstance(config, FinetuneConfig)
        examples = config.task.train_examples
        return 1 if examples is None else finetuning_steps(examples, config.epochs, config.batch)

    def _model(self) -> ModelConfig | None:
        from megatron_plasticity.tracking.trained_model import TrainedModel

        if isinstance(self.config, PretrainConfig):
            return self.config.model
        base = self.config.base if isinstance(self.config, FinetuneConfig) else self.config.run
        try:
            return TrainedModel.open(base).checkpoint.model
        except UserError:  # `problems` says it
            return None


def _prepared(task: TaskConfig) -> Iterator[Path]:
    """The folder of a prepared task."""
    folder = task.folder / task.name
    if folder.is_dir():
        yield folder
