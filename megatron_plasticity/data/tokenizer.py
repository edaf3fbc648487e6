"""Text to ids and back: byte-level BPE trained on a corpus, or any `tokenizer.json`.

Text is never given a control meaning: a document that contains the letters `<|endoftext|>` is encoded as those letters, so only a
caller can end a document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_plasticity.config.files import write_text_atomic
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# How the tokenizers that we meet spell the end of a document: GPT-2, OLMo and ours; Llama-2; Llama-3.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>")


class Tokenizer:
    """A Hugging Face `tokenizers` pipeline without its control over the text: nothing is added, padded, or cut."""

    def __init__(self, json_text: str, name: str = "tokenizer") -> None:
        """From the content of a `tokenizer.json`. Raises UserError when it is not one or has no end-of-text token."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{name}: not a tokenizer.json that tokenizers {tokenizers.__version__} can read: {error}") from error
        self._json_text = json_text
        self._tokenizer.encode_special_tokens = True  # literal special tokens in a text are ordinary text
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        ends = [vocabulary[text] for text in _END_OF_TEXT_NAMES if text in vocabulary]
        if not ends:
            raise UserError(f"{name}: has no end-of-text token; expected one of {', '.join(_END_OF_TEXT_NAMES)}")
        self.end_of_text: int = ends[0]
        # Ids may have gaps (added tokens), so the highest id counts, not their number.
        self.vocab_size: int = max(vocabulary.values()) + 1

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a `tokenizer.json`. Raises UserError when it is missing or unusable."""
        try:
            return cls(path.read_text(encoding="utf-8"), name=str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot read the tokenizer: {error}") from error

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`, byte for byte what the hash covers."""
        write_text_atomic(path, self._json_text)

    @property
    def sha256(self) -> str:
        """Hash of the `tokenizer.json`."""
        return hashlib.sha256(self._json_text.encode("utf-8")).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no end-of-text is added, and none can come out of the text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on as many threads as `RAYON_NUM_THREADS` allows."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids. Special tokens are spelled out, ids that the tokenizer lacks are left out, broken UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 1508.07909, on bytes as in GPT-2) with one special token, `<|endoftext|>`.

    Every digit is a token of its own, as in Llama-2's tokenizer, so that small models can learn arithmetic. The result depends
    on the texts alone, not on threads or on their order. A small corpus may yield fewer ids, never more.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}), got {vocab_size}")
    pipeline = tokenizers.Tokenizer(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pipeline.train_from_iterator(texts, trainer)
    return Tokenizer(pipeline.to_str(pretty=True) + "\n")


def check_tokenizer_fits(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raise UserError when the tokenizer has ids that the model has no rows for."""
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is too small: the tokenizer has {tokenizer.vocab_size} ids; "
            f"set model.vocab_size to at least {tokenizer.vocab_size}"
        )
