"""What a corpus is made of, and how a training run reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from megatron_plasticity.config.base import Section, added_later, neutral


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


class SourceConfig(Section):
    """Documents of one origin: a data set on the Hugging Face hub, or files of this machine. Exactly one of `hub` and `files`."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the source; the manifest counts documents by it."""
    hub: str | None = None
    """Data set on the hub, such as `HuggingFaceFW/fineweb-edu`, or a local folder that is laid out like one."""
    config: str | None = None
    """Configuration of the hub's data set, such as `sample-10BT`. Default: its default one."""
    revision: str | None = None
    """Commit, tag or branch on the hub. The commit that it stands for is written into the manifest."""
    split: str = "train"
    """Split of the hub's data set."""
    files: tuple[str, ...] = ()
    """Patterns of local files, such as `texts/**/*.jsonl.zst`, relative to the working directory."""
    format: Literal["parquet", "json", "text"] | None = None
    """Format of the files; `json` means one object a line. Default: by their endings (.parquet, .jsonl, .json, .txt, each but the
    first also compressed as .gz or .zst)."""
    text: str = "text"
    """Column that holds the text. No other is read, so sources may differ in all the rest."""
    text_documents: Literal["file", "paragraph", "line"] = "file"
    """What one document is in a text file: all of it, a paragraph (ended by an empty line), or a line."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the training tokens, relative to the weights of the other sources. Default: all there is of the source."""
    licence: str = neutral("not stated")
    """Licence of the text, for the manifest."""

    @model_validator(mode="after")
    def _has_one_origin(self) -> SourceConfig:
        if (self.hub is None) == (not self.files):
            raise ValueError(f"source {self.name!r} takes exactly one of `hub` and `files`")
        if self.files and (self.config is not None or self.revision is not None):
            raise ValueError(f"source {self.name!r}: `config` and `revision` belong to a data set on the hub, not to `files`")
        return self


class TokenizerConfig(Section):
    """A byte-level BPE trained on the corpus itself, or an existing tokenizer."""

    vocab_size: int = Field(default=2048, ge=257)
    """Number of ids, special ones included; with `load`, the number that the tokenizer must turn out to have."""
    load: str | None = added_later(None)
    """Existing tokenizer: a `tokenizer.json`, a SentencePiece `.model`, a folder with either, or a name on the hub."""
    revision: str | None = added_later(None)
    """Commit, tag or branch of a tokenizer on the hub."""
    known_encodings: dict[str, tuple[NonNegativeInt, ...]] = added_later({})
    """Text → ids that the loaded tokenizer must give it, so that a wrong or damaged file is found before any work."""


class CorpusConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the corpus; part of its folder's name."""
    output: Path = neutral(Path("data"))
    """Folder under which `<name>-<hash>/` is written."""
    sources: tuple[SourceConfig, ...] = added_later(())
    """Text to take. Default: the text of the Python installation and procedural text, which need no download."""
    python_text: PythonTextConfig = PythonTextConfig()
    """Text from the Python installation, if there are no sources."""
    reasoning_text: ReasoningTextConfig = ReasoningTextConfig()
    """Procedural reasoning text, if there are no sources."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Tokenizer to train, or to load if there are sources."""
    train_tokens: PositiveInt | None = added_later(None)
    """Training tokens to take of the sources, to within a document each; several sources then need weights. Default: all."""
    drop_duplicates: bool = added_later(False)
    """Keep only the first of documents with the same text. (Without sources this is always so.)"""
    held_out_fraction: float = Field(default=0.03, gt=0, lt=1)
    """Share of the documents that is held out for validation, chosen by the hash of the document."""
    seed: int = 42
    """Seed of the sampling of documents, of the order of the sources' files, and of the procedural text."""
    workers: PositiveInt | None = neutral(None)
    """Processes that tokenize sources. Default: one per core."""
    shard_megabytes: float = neutral(64.0, gt=0)
    """Small files are taken together up to this size. One such group, or one larger file, is what a worker does at a time, and
    what is not done again after a restart."""

    @model_validator(mode="after")
    def _sources_fit_together(self) -> CorpusConfig:
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        if not self.sources:
            for key in ("train_tokens", "drop_duplicates"):
                if getattr(self, key):
                    yield f"{key}: needs `sources`"
            if self.tokenizer.load is not None:
                yield "tokenizer.load: needs `sources`; the text of this installation trains its own tokenizer"
            return
        for key in ("python_text", "reasoning_text"):
            if getattr(self, key) != type(self).model_fields[key].default:
                yield f"{key}: has no effect beside `sources`; remove one of the two"
        if self.tokenizer.load is None:
            yield "tokenizer.load: needed beside `sources`; name a tokenizer.json, a SentencePiece .model or one on the hub"
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            yield f"sources: every source needs a name of its own, found {', '.join(names)}"
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            yield "sources: give every source a weight, or none"
        if self.train_tokens is not None and len(names) > 1 and not all(weighted):
            yield "train_tokens: with several sources each needs a weight, to say how much is taken of each"


class BlendedCorpusConfig(Section):
    """A prepared corpus that is mixed into another."""

    folder: Path = neutral()
    """Prepared corpus, made with the same tokenizer. Its hash enters the run's."""
    weight: float = Field(gt=0, lt=1)
    """Share of the run's samples."""


class DataConfig(Section):
    """The token store that a run reads."""

    folder: Path = neutral()
    """Prepared corpus: `train.bin/.idx`, `held_out.bin/.idx`, `tokenizer.json`, `manifest.json` (whose hash enters the run's)."""
    seed: int = 42
    """Seed of the order of the samples."""
    held_out_sequences: PositiveInt = 512
    """Number of held-out sequences, the first ones of the held-out store, over which validation loss is a mean."""
    blend: tuple[BlendedCorpusConfig, ...] = added_later(())
    """Further corpora to mix in. Of any number of samples from the first on, each corpus gives its share to within a few;
    `folder` gives the rest, and the held-out sequences. A corpus that has given all its blocks begins again in a new order."""

    @model_validator(mode="after")
    def _leaves_something_to_the_folder(self) -> DataConfig:
        if (total := sum(corpus.weight for corpus in self.blend)) >= 1:
            raise ValueError(f"the weights of `blend` sum to {total:g}; they must leave a share of the samples to `folder`")
        return self
