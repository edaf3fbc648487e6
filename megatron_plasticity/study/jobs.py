"""Kind of run → the function that carries it out, and its config. The command line and the study runner share this table."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_plasticity.tracking.progress import Progress
from megatron_plasticity.tracking.run_folder import RunFolder

# Named, not imported: torch, DeepSpeed and scikit-learn load only when a run of that kind starts.
_JOBS = {
    "import": ("megatron_plasticity.interchange.importing", "import_model"),
    "pretrain": ("megatron_plasticity.training.pretrain", "pretrain"),
    "finetune": ("megatron_plasticity.training.finetune", "finetune"),
    "evaluate": ("megatron_plasticity.evaluation.job", "evaluate"),
    "harness": ("megatron_plasticity.evaluation.job", "harness"),
    "capture": ("megatron_plasticity.evaluation.capture_job", "capture"),
    "probes": ("megatron_plasticity.analysis.jobs", "probes"),
    "attention": ("megatron_plasticity.analysis.jobs", "attention"),
    "truncation": ("megatron_plasticity.analysis.jobs", "truncation"),
    "overfitting": ("megatron_plasticity.analysis.jobs", "overfitting"),
    "features": ("megatron_plasticity.analysis.jobs", "features"),
}
JOB_MODULES = sorted({module for module, _ in _JOBS.values()})
# Runs of these kinds may be spread over several processes.
LAUNCHED_KINDS = ("pretrain", "finetune", "evaluate")

Job = Callable[[Any, Progress], RunFolder]


def job_for(kind: str) -> Job:
    """The function (config, progress) → run folder of a kind of run."""
    module, function = _JOBS[kind]
    return getattr(import_module(module), function)


def prepare_corpus(config: Any, progress: Progress) -> Path:
    """Prepare a corpus (or do nothing if it is there); returns its folder."""
    from megatron_plasticity.data.prepare import prepare

    return prepare(config, progress)
