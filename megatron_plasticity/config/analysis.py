"""Looking inside: activations to dump and analyses to run on a trained model."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from megatron_plasticity.config.base import Section, added_later, neutral
from megatron_plasticity.config.load import apply_override, check_config, read_yaml
from megatron_plasticity.config.probe_sets import PROCEDURAL, PUBLISHED, ProbeSet
from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.errors import ConfigError


class ActivationsRecipe(Section):
    """Which activations are kept, and on which sequences (docs/capture.md)."""

    points: tuple[str, ...] = ("embed", "layers.*.resid_post")
    """Globs over hook-point names; one that matches nothing is an error. `logits`, the largest logits of each position with their
    token ids, is taken by its name alone."""
    sequences: PositiveInt = 32
    """Number of sequences that are run through the model."""
    texts: Path | None = neutral(None)
    """File of texts, each a sequence: one a line (.txt), or in the column `text` (.jsonl, .parquet). Its content enters the run's
    hash. Default: held-out sequences of the corpus, and for a fine-tuned model the questions of its own task."""
    task: TaskConfig | None = added_later(None)
    """Take the questions of this task, prompt and response, instead."""
    sample_seed: int | None = added_later(None)
    """Seed of a random draw of the sequences; null takes the first ones."""
    max_tokens: PositiveInt | None = added_later(None)
    """Longest sequence in tokens; longer ones keep their beginning. null is the model's context."""
    positions: Literal["all", "last", "answer"] = "last"
    """Keep every token position, the last one of each sequence, or those of a task's response."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format on disk."""
    top_k: PositiveInt = added_later(10)
    """For the point `logits`: how many logits of each position."""
    keep: Literal["states", "statistics", "both"] = added_later("states")
    """Dump the states themselves, or only count, mean, covariance and norms over all kept positions, in fp64; or both."""
    covariance: bool = added_later(True)
    """For statistics: whole covariance matrices. Without, the variances only, which is what fits for wide points."""
    memory_mib: PositiveInt = neutral(512)
    """Most memory in MiB for states that are not on disk yet (training waits when it is full), and for covariances."""

    @model_validator(mode="after")
    def _sequences_have_one_origin(self) -> ActivationsRecipe:
        if self.texts is not None and self.task is not None:
            raise ValueError("state at most one of `texts` and `task`")
        if self.texts is not None and self.positions == "answer":
            raise ValueError('positions "answer" are those of a task\'s response, and `texts` have none; state `task` instead')
        return self


class CaptureConfig(ActivationsRecipe):
    """Which activations to dump during training, and when. Hook points are named in docs/capture.md (`layers.3.resid_post`)."""

    steps: tuple[NonNegativeInt, ...] = ()
    """Steps at which to dump during training; 0 is before the first."""
    every_steps: NonNegativeInt = added_later(0)
    """Dump every so many steps as well; 0 does not."""
    log_spaced: NonNegativeInt = added_later(0)
    """Dump at this many steps at most from the first to the last as well, whose logarithms are equally far apart; fewer where two
    of them round to one step; 0 does not."""
    at_end: bool = True
    """Dump after the last step as well."""

    @field_validator("log_spaced")
    @classmethod
    def _a_spacing_has_two_ends(cls, value: int) -> int:
        if value == 1:
            raise ValueError("the first and the last step are two: state 0, or 2 or more")
        return value

    def schedule(self, total_steps: int) -> frozenset[int]:
        """All steps at which a run of `total_steps` dumps. Raises ConfigError for a step after the last."""
        late = [step for step in self.steps if step > total_steps]
        if late:
            raise ConfigError(f"capture.steps: {late} lie after the last step, {total_steps}")
        regular = range(self.every_steps, total_steps + 1, self.every_steps) if self.every_steps else ()
        spaced = (round(total_steps ** (i / (self.log_spaced - 1))) for i in range(self.log_spaced))
        return frozenset([*self.steps, *regular, *spaced, *([total_steps] if self.at_end else [])])


class _AnalysisOf(Section):
    name: str = neutral(pattern=r"^[A-Za-z0-9._-]+$")
    """Readable name; part of the run folder's name."""
    output: Path = neutral(Path("runs"))
    """Folder under which the run folder is made."""
    run: Path = neutral()
    """Run folder of the model, or one of its checkpoint folders."""


class ModelCaptureConfig(ActivationsRecipe, _AnalysisOf):
    """Activations of a finished model, or of one of its checkpoints (`megatron-plasticity capture`)."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the forward pass."""
    batch_size: PositiveInt = neutral(16)
    """Sequences per forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""


def model_capture_config(source: Path, overrides: Sequence[str] = (), step: int | None = None) -> ModelCaptureConfig:
    """The config in the YAML file `source`, or the default one for the run or checkpoint folder `source`; overrides on top.

    With `step` it is of that checkpoint of the run. Raises ConfigError, with all problems in one message.
    """
    tree = {"name": source.resolve().name, "run": str(source)} if source.is_dir() else read_yaml(source)
    for override in overrides:
        apply_override(tree, override)
    config = check_config(ModelCaptureConfig, tree, str(source))
    if step is None:
        return config
    checkpoints = config.run / "checkpoints"
    if not (checkpoints / f"step-{step}").is_dir():
        steps = sorted(int(path.name[5:]) for path in checkpoints.glob("step-*") if path.name[5:].isdecimal())
        raise ConfigError(f"{config.run}: has no checkpoint of step {step}; there are {', '.join(map(str, steps)) or 'none'}")
    return config.model_copy(update={"run": checkpoints / f"step-{step}"})


class ProbesRecipe(Section):
    """Linear probes: one multinomial logistic regression per layer on the frozen last-token state."""

    datasets: tuple[str, ...] = ("topic", "polarity")
    """Labelled text sets, by name: the procedural `topic` and `polarity`, `sst2` and `ag_news` from the Hugging Face hub, and
    those of `own_datasets`."""
    own_datasets: tuple[ProbeSet, ...] = added_later(())
    """Further sets, from files or from the hub."""
    train_texts: PositiveInt = 1000
    """Training texts, before an inner 10 % is held out to choose C."""
    test_texts: PositiveInt = 500
    """Test texts."""
    max_tokens: PositiveInt = 256
    """Longest text in tokens; longer ones keep their beginning."""
    standardise: tuple[bool, ...] = (True, False)
    """Variants: with train-set standardisation of each feature, and without (λ shrinks the scale of activations)."""
    regularisation: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    """Grid of C, the inverse L2 strength, as in scikit-learn."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the subsample of training texts."""

    @model_validator(mode="after")
    def _datasets_are_known(self) -> ProbesRecipe:
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        own = [dataset.name for dataset in self.own_datasets]
        known = dict.fromkeys((*PROCEDURAL, *PUBLISHED, *own))
        for name in self.datasets:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                others = f"there are {', '.join(known)}; describe others in `own_datasets`"
                hint = f"did you mean {near[0]!r}?" if near else others
                yield f"datasets: no data set {name!r}; {hint}"
        for name in dict.fromkeys(own):
            if own.count(name) > 1:
                yield f"own_datasets: {name!r} is described twice"
            if name in PROCEDURAL:
                yield f"own_datasets: {name!r} is the name of a procedural set; give yours another"
            if name not in self.datasets:
                yield f"own_datasets: {name!r} is not used; name it in `datasets` as well"
        if any(c <= 0 for c in self.regularisation):
            yield "regularisation: C is an inverse strength and has to be greater than zero"
        for key in ("datasets", "standardise", "regularisation", "seeds"):
            values = getattr(self, key)
            if not values:
                yield f"{key}: expected at least one value"
            if len(set(values)) != len(values):
                yield f"{key}: names a value twice"


class ProbesConfig(ProbesRecipe, _AnalysisOf):
    """Linear probes of one model (`megatron-plasticity analyze probes`)."""


class AttentionRecipe(Section):
    """Spectra of the attention matrices W_QK and W_VP, and attention maps."""

    thresholds: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(default=(0.90, 0.95, 0.99), min_length=1)
    """Pseudo-rank: least k whose top-k singular values hold this share of their sum (and of the sum of squares)."""
    fold_qk_norm: bool | Literal["both"] = False
    """OLMo-2 only: fold the gains of the QK-norm into W_Q and W_K; `both` measures W_QK without them and with them."""
    map_sequences: NonNegativeInt = 4
    """Held-out sequences over which attention entropy, sink mass and previous-token mass are averaged; 0 leaves maps out."""
    map_length: int = Field(default=64, ge=2)
    """Tokens of each such sequence."""


class AttentionConfig(AttentionRecipe, _AnalysisOf):
    """Attention matrices of one model (`megatron-plasticity analyze attention`)."""


AttentionProduct = Literal["qk", "vp"]


class TruncationRecipe(Section):
    """Loss of a model after each head's W_QK or W_VP is cut to rank k."""

    targets: tuple[AttentionProduct, ...] = Field(default=("qk", "vp"), min_length=1)
    """Which products to truncate, one at a time: `qk` W_Kᵀ·W_Q, `vp` W_P·W_V."""
    ranks: tuple[NonNegativeInt, ...] = ()
    """Ranks k to keep of every head, at most the head dimension; empty: 0 and the powers of two below the head dimension."""
    control_seeds: tuple[NonNegativeInt, ...] = (0,)
    """Controls, which keep k random directions of the same subspace: one for each seed, averaged; empty leaves them out."""
    sequences: PositiveInt = 64
    """Held-out sequences on which the loss is measured, drawn uniformly."""
    text: Path | None = neutral(None)
    """Text file (UTF-8) to measure the loss on instead of held-out sequences of pretraining; its content enters the hash. Models
    that were pretrained elsewhere need it."""
    batch_size: PositiveInt = neutral(16)
    """Sequences per forward pass."""
    bootstrap_resamples: PositiveInt = 1000
    """Resamples for the confidence intervals."""
    seed: NonNegativeInt = 42
    """Seed of the draw and of the resampling."""


class TruncationConfig(TruncationRecipe, _AnalysisOf):
    """Loss of one model after each head's W_QK or W_VP is cut to rank k (`megatron-plasticity analyze truncation`)."""

    write: bool = False
    """Keep the truncated model as a checkpoint, which can be fine-tuned and evaluated; for one target and one rank."""

    @model_validator(mode="after")
    def _check_write(self) -> TruncationConfig:
        if self.write and (len(self.targets), len(self.ranks)) != (1, 1):
            raise ValueError(
                f"write keeps one model: expected one target and one rank, got targets={list(self.targets)} and "
                f"ranks={list(self.ranks)}; start one run for each, such as targets=[qk] ranks=[4] write=true"
            )
        return self


class OverfittingRecipe(Section):
    """Held-out loss minus loss on sequences that the run did consume, at the final checkpoint."""

    sequences: PositiveInt = 512
    """Sequences drawn uniformly from each side."""
    bootstrap_resamples: PositiveInt = 1000
    """Resamples for the confidence interval of the gap."""
    batch_size: PositiveInt = 16
    """Sequences per forward pass."""
    seed: NonNegativeInt = 42
    """Seed of the draw."""


class OverfittingConfig(OverfittingRecipe, _AnalysisOf):
    """Train–validation gap of one pretraining run (`megatron-plasticity analyze overfitting`)."""


class FeaturesRecipe(Section):
    """Plasticity in the wider sense: dormant units, effective rank of features, norms, effective learning rate."""

    dormant_thresholds: tuple[Annotated[float, Field(ge=0)], ...] = Field(default=(0.0, 0.025, 0.1), min_length=1)
    """τ: a unit is dormant if its mean magnitude is at most τ times the mean of its layer's units."""
    srank_delta: float = Field(default=0.01, gt=0, lt=1)
    """δ of srank: the least number of singular values that hold 1 − δ of their sum."""
    sequences: PositiveInt = 64
    """Held-out sequences that are run through the model, drawn uniformly. Their tokens should be several times as many as the
    features, since a rank is at most the number of positions."""
    text: Path | None = neutral(None)
    """Text file (UTF-8) to take the sequences from instead; its content enters the hash. Models that were pretrained elsewhere
    need it."""
    seed: NonNegativeInt = 42
    """Seed of the draw."""
    batch_size: PositiveInt = neutral(16)
    """Sequences per forward pass."""
    memory_mib: PositiveInt = neutral(4096)
    """Most memory in MiB for matrices of second moments, one for each layer; where they do not fit at once the sequences are
    run through the model several times."""

    @field_validator("dormant_thresholds")
    @classmethod
    def _thresholds_are_different(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a threshold is named twice")
        return value


class FeaturesConfig(FeaturesRecipe, _AnalysisOf):
    """Dormant units, ranks and norms of one model (`megatron-plasticity analyze features`)."""


class AnalysesConfig(Section):
    """Which analyses a study runs on each of its base models."""

    probes: ProbesRecipe | None = None
    """Linear probes."""
    attention: AttentionRecipe | None = None
    """Attention matrices and maps."""
    overfitting: OverfittingRecipe | None = None
    """Train–validation gap."""
    features: FeaturesRecipe | None = added_later(None)
    """Dormant units, effective ranks, norms and effective learning rate."""
    truncation: TruncationRecipe | None = added_later(None)
    """Loss after heads are cut to a lower rank."""

    def on_held_out_sequences(self) -> Iterator[tuple[str, FeaturesRecipe | TruncationRecipe]]:
        """Those that read held-out sequences of pretraining or a text of one's own, by kind."""
        for kind, recipe in (("features", self.features), ("truncation", self.truncation)):
            if recipe is not None:
                yield kind, recipe
