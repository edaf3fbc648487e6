"""What a corpus is made of, and how a training run reads it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt

from megatron_plasticity.config.base import Section, neutral


class PythonTextConfig(Section):
    """Real English and code text found in the Python installation itself: nothing is downloaded."""

    megabytes: float = Field(default=6.0, gt=0)
    """How much text to take, after deduplication, in megabytes of UTF-8."""
    code_fraction: float = Field(default=0.4, ge=0, le=1)
    """Share of the text that is source code; the rest is docstrings and documentation."""


class ReasoningTextConfig(Section):
    """Procedural documents that state facts and work small problems step by step."""

    documents: NonNegativeInt = 20_000
    """Number of documents. Problems whose hash falls into the test split are never written."""


class TokenizerConfig(Section):
    """A byte-level BPE trained on the corpus itself."""

    vocab_size: int = Field(default=2048, ge=257)
    """Number of ids, the 256 bytes and the end-of-text id included."""


class CorpusConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the corpus; part of its folder's name."""
    output: Path = neutral(Path("data"))
    """Folder under which `<name>-<hash>/` is written."""
    python_text: PythonTextConfig = PythonTextConfig()
    """Text from the Python installation."""
    reasoning_text: ReasoningTextConfig = ReasoningTextConfig()
    """Procedural reasoning text."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Tokenizer to train."""
    held_out_fraction: float = Field(default=0.03, gt=0, lt=1)
    """Share of the documents that is held out for validation, chosen by the hash of the document."""
    seed: int = 42
    """Seed of the sampling of documents and of the procedural text."""


class DataConfig(Section):
    """The token store that a run reads."""

    folder: Path = neutral()
    """Prepared corpus: `train.bin/.idx`, `held_out.bin/.idx`, `tokenizer.json`, `manifest.json` (whose hash enters the run's)."""
    seed: int = 42
    """Seed of the order of the samples."""
    held_out_sequences: PositiveInt = 512
    """Number of held-out sequences, the first ones of the held-out store, over which validation loss is a mean."""
