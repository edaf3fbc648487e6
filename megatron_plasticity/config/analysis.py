"""Looking inside: activations to dump and analyses to run on a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from megatron_plasticity.config.base import Section, neutral


class CaptureConfig(Section):
    """Which activations to dump, and when. Hook points are named in docs/architecture.md (`layers.3.resid_post`)."""

    points: tuple[str, ...] = ("embed", "layers.*.resid_post")
    """Globs over hook-point names; one that matches nothing is an error."""
    steps: tuple[NonNegativeInt, ...] = ()
    """Steps at which to dump during training."""
    at_end: bool = True
    """Dump after the last step as well."""
    sequences: PositiveInt = 32
    """Number of held-out sequences that are run through the model."""
    positions: Literal["all", "last"] = "last"
    """Keep every token position, or the last one of each sequence."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format on disk."""


class _AnalysisOf(Section):
    name: str = neutral(pattern=r"^[A-Za-z0-9._-]+$")
    """Readable name; part of the run folder's name."""
    output: Path = neutral(Path("runs"))
    """Folder under which the run folder is made."""
    run: Path = neutral()
    """Run folder of the model, or one of its checkpoint folders."""


class ProbesRecipe(Section):
    """Linear probes: one multinomial logistic regression per layer on the frozen last-token state."""

    datasets: tuple[str, ...] = ("topic", "polarity")
    """Labelled text sets, by name."""
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


class ProbesConfig(ProbesRecipe, _AnalysisOf):
    """Linear probes of one model (`megatron-plasticity analyze probes`)."""


class AttentionRecipe(Section):
    """Spectra of the attention matrices W_QK and W_VP, and attention maps."""

    thresholds: tuple[float, ...] = (0.90, 0.95, 0.99)
    """Pseudo-rank: least k whose top-k singular values hold this share of their sum (and of the sum of squares)."""
    fold_qk_norm: bool = False
    """OLMo-2 only: fold the gains of the QK-norm into W_Q and W_K."""
    map_sequences: NonNegativeInt = 4
    """Held-out sequences over which attention entropy, sink mass and previous-token mass are averaged; 0 leaves maps out."""
    map_length: PositiveInt = 64
    """Tokens of each such sequence."""


class AttentionConfig(AttentionRecipe, _AnalysisOf):
    """Attention matrices of one model (`megatron-plasticity analyze attention`)."""


class OverfittingRecipe(Section):
    """Held-out loss minus loss on sequences that the run did consume, at the final checkpoint."""

    sequences: PositiveInt = 512
    """Sequences drawn uniformly from each side."""
    bootstrap_resamples: PositiveInt = 1000
    """Resamples for the confidence interval of the gap."""
    batch_size: PositiveInt = 16
    """Sequences per forward pass."""
    seed: int = 42
    """Seed of the draw."""


class OverfittingConfig(OverfittingRecipe, _AnalysisOf):
    """Train–validation gap of one pretraining run (`megatron-plasticity analyze overfitting`)."""


class AnalysesConfig(Section):
    """Which analyses a study runs on each of its base models."""

    probes: ProbesRecipe | None = None
    """Linear probes."""
    attention: AttentionRecipe | None = None
    """Attention matrices and maps."""
    overfitting: OverfittingRecipe | None = None
    """Train–validation gap."""
