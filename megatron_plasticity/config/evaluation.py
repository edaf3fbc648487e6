"""Sampling answers from a model and scoring them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from megatron_plasticity.config.base import Section, added_later, neutral
from megatron_plasticity.config.tasks import TaskConfig


class RewardConfig(Section):
    """Scores samples for best-of-n (RM@k) and the ORM score."""

    kind: Literal["none", "length", "sequence_classifier"] = "none"
    """`sequence_classifier` is any Hugging Face model with one label, such as the paper's Skywork reward model; `length` prefers
    short answers and exists for tests and the quickstart; `none` leaves the two metrics out."""
    model: str | None = None
    """For `sequence_classifier`: a local folder or a hub name."""
    revision: str | None = added_later(None)
    """For a hub name: commit, branch or tag; state a commit where results must not change with the hub."""
    max_length: PositiveInt | None = added_later(None)
    """For `sequence_classifier`: longest conversation in tokens, chat template included. Of a longer one the end is cut off, and
    the results say how many were. null takes the longest that the model can read."""
    batch_size: PositiveInt = added_later(16)
    """For `sequence_classifier`: conversations scored side by side."""


class EvaluateRecipe(Section):
    """How to evaluate, whatever the model and the task: one greedy pass and one sampled pass over every test question."""

    samples: PositiveInt = 16
    """Samples per question in the sampled pass, K of maj@K and pass@K."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the sampled pass."""
    top_p: float = added_later(1.0, gt=0, le=1)
    """Sampled pass: only the likeliest tokens whose probabilities add up to this (1904.09751); 1 takes all."""
    top_k: PositiveInt | None = added_later(None)
    """Sampled pass: only so many of the likeliest tokens; null takes all."""
    repetition_penalty: float = added_later(1.0, gt=0)
    """Both passes: logits of tokens that occurred are divided (if positive) or multiplied by this (1909.05858); 1 is off."""
    stop: tuple[str, ...] = added_later(())
    """Both passes: an answer ends before the token that begins one of these texts."""
    max_new_tokens: PositiveInt = 256
    """Longest answer in tokens."""
    long_prompts: Literal["refuse", "count_as_wrong"] = added_later("refuse")
    """What becomes of questions that leave no room for an answer: nothing is evaluated, or they count as wrong."""
    paper_compat: bool = added_later(False)
    """Evaluate as the paper's public code does: repetition penalty 1.1, stop texts "Human" and "Assistant", prompt and answer
    2048 tokens together, and its rules of reading and comparing answers. Scores by our own rules stand beside them."""
    backend: Literal["native", "vllm"] = added_later("native")
    """What generates: our own sampler, or vLLM on a Hugging Face export of the model (GPU only, and not every head size)."""
    batch_size: PositiveInt = 64
    """Sequences decoded side by side."""
    compile: bool = neutral(False)
    """Compile the decoding step of the native sampler with torch.compile; pays off on a GPU."""
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

    @model_validator(mode="after")
    def _settings_go_together(self) -> EvaluateRecipe:
        problems = []
        if self.paper_compat:
            problems += [
                f"`{name}` is decided by `paper_compat`; leave one of the two out"
                for name in ("top_p", "top_k", "repetition_penalty", "stop")
                if getattr(self, name) != type(self).model_fields[name].default
            ]
        if any(not text for text in self.stop):
            problems.append("`stop` holds an empty text, which every answer contains")
        if self.backend == "vllm" and self.compile:
            problems.append("`compile` is a setting of the native sampler; vLLM compiles by itself")
        if problems:
            raise ValueError("\n".join(problems))
        return self


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
