"""How a model is split over processes: pipeline × data × tensor, and what that means in numbers."""

from __future__ import annotations

from pydantic import PositiveInt, model_validator

from megatron_plasticity.config.base import Section, neutral
from megatron_plasticity.errors import ConfigError


class ParallelConfig(Section):
    """How one model is split over processes. No layout changes the results beyond rounding, so none of this enters a run's hash:
    a run that was stopped may go on under another layout."""

    pipeline: PositiveInt = neutral(1)
    """Pipeline stages: each holds a contiguous part of the layers."""
    tensor: PositiveInt = neutral(1)
    """Tensor-parallel ranks: each holds a part of every matrix. Keep them within one node."""
    sequence: bool = neutral(False)
    """Also split norms and residuals along the sequence over the tensor-parallel ranks, which saves activation memory."""
    layers_per_stage: tuple[PositiveInt, ...] | None = neutral(None)
    """Layers of each stage, first to last. Left out, parameters are balanced, embedding and head included."""
    timeout_minutes: float = neutral(30.0, gt=0)
    """A run whose processes get on with nothing for so long has hung: it ends, with the place where each process is. Longer than
    any step, evaluation pass or checkpoint takes."""

    @model_validator(mode="after")
    def _stages_agree(self) -> ParallelConfig:
        if self.layers_per_stage is not None and len(self.layers_per_stage) != self.pipeline:
            raise ValueError(
                f"layers_per_stage={list(self.layers_per_stage)} has {len(self.layers_per_stage)} entries, "
                f"but pipeline={self.pipeline}; state one number per stage"
            )
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs tensor > 1: it splits the sequence over the tensor-parallel ranks")
        return self

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.pipeline * self.tensor

    def data_parallel_size(self, processes: int) -> int:
        """Copies of the model on `processes` processes. Raises ConfigError if they cannot be divided so."""
        if processes % self.model_parallel_size:
            raise ConfigError(
                f"parallel: pipeline={self.pipeline} × tensor={self.tensor} needs a multiple of {self.model_parallel_size} "
                f"processes, and there are {processes}; change `parallel`, or the number of processes that the launcher starts"
            )
        return processes // self.model_parallel_size
