"""A pretraining run and a fine-tuning run: both are one loop over one engine, so they share every section but their data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from megatron_plasticity.config.analysis import CaptureConfig
from megatron_plasticity.config.base import Section, added_later, neutral
from megatron_plasticity.config.data import DataConfig
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.parallel import ParallelConfig
from megatron_plasticity.config.support import unsupported
from megatron_plasticity.config.tasks import TaskConfig

DecayScope = Literal["all", "no_token_embedding", "matrices", "patterns"]
Batching = Literal["as_drawn", "by_length", "packed"]
AttentionBackend = Literal[
    "auto",
    "flash-attention-4",
    "flash-attention-3",
    "flash-attention-2",
    "sdpa",
    "sdpa-cudnn",
    "sdpa-flash",
    "sdpa-efficient",
    "sdpa-math",
    "eager",
]
Projection = Literal["q_proj", "k_proj", "v_proj", "out_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


class DecayPattern(Section):
    pattern: str
    """Glob over full parameter names, such as `layers.*.mlp.*`."""
    decay: bool
    """Whether the parameters that match decay."""


class DecayConfig(Section):
    scope: DecayScope = "all"
    """Which tensors decay: `all` (the paper's Llama runs), `no_token_embedding` (the paper's OLMo runs), `matrices` (no
    embeddings, no norm gains), or `patterns`."""
    patterns: tuple[DecayPattern, ...] = ()
    """For scope `patterns`: an ordered list, first match wins; a pattern or a parameter without a match is an error."""
    coupling: Literal["lr", "independent"] = "lr"
    """`lr`: θ ← θ − lr·λ·θ as in torch AdamW. `independent`: θ ← θ − (lr/lr_peak)·λ·θ, so λ does not scale with the peak."""

    @model_validator(mode="after")
    def _patterns_go_with_their_scope(self) -> DecayConfig:
        if (self.scope == "patterns") != bool(self.patterns):
            raise ValueError('`patterns` must be given with scope "patterns", and only with it')
        return self


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    weight_decay: float | None = Field(default=None, ge=0)
    """λ. State this or `adamw_timescale`."""
    adamw_timescale: float | None = Field(default=None, gt=0)
    """Instead of λ: fraction of the run that the weights remember, 1/(learning_rate·λ·steps) (2405.13698); `.inf` is λ = 0."""
    decay: DecayConfig = DecayConfig()
    """Which tensors decay and how λ couples to the learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's ε."""
    implementation: Literal["torch", "apex", "deepspeed"] = "torch"
    """`torch` is fused on CUDA. `apex` is NVIDIA apex's FusedAdam, looked for at run time; CUDA and ZeRO 0 to 2 only. `deepspeed`
    is its FusedAdam on CUDA and its CPUAdam on a CPU, which are compiled on first use (docs/install.md)."""
    gradient_clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""

    @model_validator(mode="after")
    def _one_statement_of_decay(self) -> OptimizerConfig:
        if (self.weight_decay is None) == (self.adamw_timescale is None):
            raise ValueError("state exactly one of `weight_decay` and `adamw_timescale`")
        if self.adamw_timescale is not None and self.decay.coupling != "lr":
            raise ValueError('`adamw_timescale` is defined for coupling "lr"; state `weight_decay` instead')
        return self

    @field_validator("betas")
    @classmethod
    def _betas_are_rates(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("each beta must lie in [0, 1)")
        return value

    def decay_per_step(self, weight_decay: float, learning_rate: float) -> float:
        """Share of a weight that a step at `learning_rate` takes off: lr·λ, or (lr/lr_peak)·λ under coupling `independent`."""
        return weight_decay * learning_rate / (self.learning_rate if self.decay.coupling == "independent" else 1.0)

    def resolved_weight_decay(self, steps: int) -> float:
        """λ of a run of `steps` optimizer steps, whichever way it was stated."""
        if self.weight_decay is not None:
            return self.weight_decay
        assert self.adamw_timescale is not None  # the validator above
        return 0.0 if math.isinf(self.adamw_timescale) else 1.0 / (self.learning_rate * self.adamw_timescale * steps)


def adamw_timescale(decay_per_step: float, steps: int) -> float | None:
    """Fraction of a run of `steps` that the weights remember, 1/(decay per step · steps) (2405.13698); None without decay."""
    return 1.0 / (decay_per_step * steps) if decay_per_step > 0 else None


class ScheduleConfig(Section):
    """Learning rate over the run: linear warm-up, then one of the shapes below."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """`cosine` and `linear` fall from the peak to the final rate; `wsd` stays at the peak and falls linearly at the end."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps spent warming up from zero."""
    decay_fraction: float = Field(default=0.1, ge=0, le=1)
    """For `wsd`: share of the steps spent decaying at the end."""
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a share of the peak."""

    @model_validator(mode="after")
    def _phases_fit(self) -> ScheduleConfig:
        if self.kind == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction + decay_fraction must not exceed 1")
        return self


class BatchConfig(Section):
    global_batch_size: PositiveInt
    """Sequences per optimizer step over all ranks; gradient accumulation is derived from it."""
    micro_batch_size: PositiveInt = neutral()
    """Sequences per data-parallel rank and forward pass."""

    @model_validator(mode="after")
    def _micro_divides_global(self) -> BatchConfig:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size={self.micro_batch_size} must divide global_batch_size={self.global_batch_size}")
        return self


class EngineConfig(Section):
    """How DeepSpeed runs the model."""

    zero_stage: Literal[0, 1, 2, 3] = neutral(1)
    """ZeRO stage. Stage 0 with bf16 or with a pipeline runs as stage 1: DeepSpeed's own computes something else there."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """`bf16` keeps fp32 master weights and accumulates gradients in fp32."""
    activation_checkpointing: bool = neutral(False)
    """Recompute each block in the backward pass instead of keeping its activations."""
    compile: bool = neutral(False)
    """Compile each block (`torch.compile`): norms, rotary embedding, SwiGLU and residual sums become few kernels. It costs some
    ten seconds to a minute when the run starts, and changes rounding only."""
    attention: AttentionBackend = neutral("auto")
    """Kernels of attention: `auto` takes the fastest that fits GPU, precision and head dimension, and says which. The others are
    for comparison: a FlashAttention package that is installed; PyTorch's `sdpa`, with its own choice of kernel or the one named;
    `eager`, matrix products. They differ in rounding only; one that does not fit ends in an error before the run starts."""
    non_finite: Literal["stop", "skip"] = neutral("stop")
    """What becomes of a step whose gradient is not finite, on any process: the run stops, or the step is left out, with its
    learning-rate step and its decay, and counted in the results. Either way no weight has changed, and its samples are named."""
    deepspeed: dict[str, Any] = {}
    """Raw DeepSpeed settings to add; one that our own fields decide is an error."""


class CheckpointConfig(Section):
    every_steps: PositiveInt | None = neutral(None)
    """Write a checkpoint every so many steps; the last step always writes one."""
    resume_from: Path | None = None
    """Start from this checkpoint folder of another run instead of from step 0; it must agree with the config."""

    def count(self, steps: int) -> int:
        """How many a run of so many steps writes; all are kept."""
        return 1 if self.every_steps is None else -(-steps // self.every_steps)


class LoggingConfig(Section):
    """What is measured along the way. Nothing here changes the weights."""

    every_steps: PositiveInt = neutral(10)
    """Steps between rows of training metrics."""
    norms_every_steps: NonNegativeInt = neutral(50)
    """Steps between weight and update norms per parameter class (full fp32 tensors are gathered for them); 0 turns them off."""
    spike_deviations: float = neutral(6.0, ge=0)
    """A logged loss that lies so many standard deviations above the losses before it, and at least 0.1 nats, is reported as a
    spike; 0 turns this off."""
    system_every_seconds: float = neutral(10.0, ge=0)
    """Seconds between rows of system metrics in `system.jsonl`: CPU, memory, disk, network and GPUs of each host; 0 turns them
    off."""
    mlflow: bool = neutral(True)
    """Mirror metrics to MLflow (`MLFLOW_TRACKING_URI`, else `mlflow.db` in the output folder)."""


class TrainingRecipe(Section):
    """What pretraining and fine-tuning share."""

    optimizer: OptimizerConfig
    """AdamW and its weight decay."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule."""
    batch: BatchConfig
    """Batch sizes in sequences."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed engine."""
    parallel: ParallelConfig = neutral(ParallelConfig())
    """Split of the model over processes; the processes that remain are data-parallel."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save and where to start from."""
    logging: LoggingConfig = LoggingConfig()
    """Metrics."""
    seed: int = 42
    """Seed of the initial weights and of every other random draw."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; `auto` takes CUDA if there is one."""

    @model_validator(mode="after")
    def _settings_go_together(self) -> TrainingRecipe:
        problems = list(unsupported(self, getattr(self, "model", None)))
        if problems:
            raise ValueError("\n".join(problems))
        return self


class PretrainConfig(TrainingRecipe):
    """A pretraining run (`megatron-plasticity pretrain`)."""

    name: str = neutral(pattern=r"^[A-Za-z0-9._-]+$")
    """Readable name; part of the run folder's name."""
    output: Path = neutral(Path("runs"))
    """Folder under which the run folder is made."""
    model: ModelConfig
    """Architecture."""
    data: DataConfig
    """Token store and order."""
    steps: PositiveInt | None = None
    """Optimizer steps. State this or `tokens`."""
    tokens: PositiveInt | None = None
    """Training tokens; the number of steps is the nearest whole one."""
    evaluate_every_steps: NonNegativeInt = 0
    """Steps between evaluations of held-out and seen loss; 0 evaluates at the end only."""
    capture: CaptureConfig | None = None
    """Activations to dump during training."""

    @model_validator(mode="after")
    def _one_statement_of_duration(self) -> PretrainConfig:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("state exactly one of `steps` and `tokens`")
        return self

    @property
    def tokens_per_step(self) -> int:
        return self.batch.global_batch_size * self.model.context_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None  # the validator above
        return max(1, round(self.tokens / self.tokens_per_step))

    @property
    def weight_decay(self) -> float:
        """λ."""
        return self.optimizer.resolved_weight_decay(self.total_steps)

    @property
    def adamw_timescale(self) -> float | None:
        """Fraction of the run that the weights remember, at the peak learning rate; None for λ = 0: they forget nothing."""
        return adamw_timescale(self.optimizer.decay_per_step(self.weight_decay, self.optimizer.learning_rate), self.total_steps)


class LoraConfig(Section):
    """Low-rank adapters (2106.09685): W stays as it is, and W + (alpha/rank)·B·A is used, of which A and B are trained.

    There is no dropout: nothing in our training is random, which is what makes runs repeatable and layouts comparable."""

    rank: PositiveInt = 8
    """Rows of A and columns of B."""
    alpha: PositiveInt = 16
    """The product B·A counts alpha/rank times."""
    targets: tuple[Projection, ...] = PROJECTIONS
    """Projections that get adapters, in every layer."""

    @field_validator("targets")
    @classmethod
    def _targets_are_some_and_different(cls, value: tuple[Projection, ...]) -> tuple[Projection, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("name at least one projection, and each once")
        return value

    @property
    def scaling(self) -> float:
        """What B·A is multiplied by."""
        return self.alpha / self.rank


class FinetuneRecipe(TrainingRecipe):
    """How to fine-tune, whatever the base and the task."""

    epochs: PositiveInt = 3
    """Passes over the training examples."""
    max_length: PositiveInt
    """Longest example in tokens, prompt and response; longer ones are truncated at the end."""
    template: str = "Human: {prompt}\nAssistant:"
    """Text before the response; the response and an end-of-text token follow it."""
    batching: Batching = added_later("as_drawn")
    """How a global batch becomes micro-batches: `as_drawn` pads each to its longest example (the paper's), `by_length` brings
    examples of similar length together first, `packed` puts a micro-batch's examples end to end without any padding."""
    lora: LoraConfig | None = added_later(None)
    """Train low-rank adapters instead of the weights; checkpoints hold the weights with the adapters merged into them."""
    capture: CaptureConfig | None = added_later(None)
    """Activations to dump during training."""

    @field_validator("template")
    @classmethod
    def _template_has_the_prompt(cls, value: str) -> str:
        if value.count("{prompt}") != 1:
            raise ValueError("the template must contain {prompt} exactly once")
        return value


class FinetuneConfig(FinetuneRecipe):
    """A fine-tuning run (`megatron-plasticity finetune`)."""

    name: str = neutral(pattern=r"^[A-Za-z0-9._-]+$")
    """Readable name; part of the run folder's name."""
    output: Path = neutral(Path("runs"))
    """Folder under which the run folder is made."""
    base: Path = neutral()
    """Run folder of the base model, or one of its checkpoint folders (its hash enters this run's hash)."""
    task: TaskConfig
    """What to learn."""
