"""Sampling answers from a model and scoring them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from megatron_plasticity.config.base import Section, neutral
from megatron_plasticity.config.training import TaskConfig


class RewardConfig(Section):
    """Scores samples for best-of-n (RM@k) and the ORM score."""

    kind: Literal["none", "length", "sequence_classifier"] = "none"
    """`sequence_classifier` is any Hugging Face model with one label, such as the paper's Skywork reward model; `length` prefers
    short answers and exists for tests and the quickstart; `none` leaves the two metrics out."""
    model: str | None = None
    """For `sequence_classifier`: a local folder or a hub name."""


class EvaluateRecipe(Section):
    """How to evaluate, whatever the model and the task: one greedy pass and one sampled pass over every test question."""

    samples: PositiveInt = 16
    """Samples per question in the sampled pass, K of maj@K and pass@K."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the sampled pass."""
    max_new_tokens: PositiveInt = 256
    """Longest answer in tokens."""
    batch_size: PositiveInt = 64
    """Sequences decoded side by side."""
    template: str = "Human: {prompt}\nAssistant:"
    """Prompt template; must be the one of fine-tuning."""
    reward: RewardConfig = RewardConfig()
    """Reward scorer."""
    bootstrap_resamples: NonNegativeInt = 1000
    """Resamples of questions for the confidence intervals."""
    seed: int = 42
    """Seed of the samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""


class EvaluateConfig(EvaluateRecipe):
    """An evaluation (`megatron-plasticity evaluate`)."""

    name: str = neutral(pattern=r"^[A-Za-z0-9._-]+$")
    """Readable name; part of the run folder's name."""
    output: Path = neutral(Path("runs"))
    """Folder under which the run folder is made."""
    run: Path = neutral()
    """Run folder of the model (pretraining or fine-tuning), or one of its checkpoint folders."""
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    """Tasks whose test sets are asked."""


class HarnessConfig(Section):
    """Tasks of EleutherAI's lm-evaluation-harness (`megatron-plasticity lm-eval`)."""

    name: str = neutral(pattern=r"^[A-Za-z0-9._-]+$")
    """Readable name; part of the run folder's name."""
    output: Path = neutral(Path("runs"))
    """Folder under which the run folder is made."""
    run: Path = neutral()
    """Run folder of the model (pretraining, import or fine-tuning), or one of its checkpoint folders."""
    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks or groups of the harness, such as `hellaswag`. It fetches their data from the Hugging Face hub."""
    task_folder: Path | None = None
    """Folder with tasks of your own, as YAML files of the harness. Its content enters the hash as well."""
    shots: NonNegativeInt | None = 0
    """Examples before each question; null takes each task's own number."""
    limit: PositiveInt | None = None
    """Ask the first questions of each task only."""
    batch_size: PositiveInt = 32
    """Sequences per forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
