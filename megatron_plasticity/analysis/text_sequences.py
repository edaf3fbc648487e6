"""A text of the user's own as sequences to measure a loss on, for models whose pretraining data is not known here."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.token_store import TokenStore, TokenStoreWriter
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError


@contextmanager
def text_sequences(path: Path, tokenizer: Tokenizer, model: ModelConfig) -> Iterator[BlockReader]:
    """Reader of the text's tokens in blocks of the model's context, as a corpus is cut; its files are gone after the block.

    Raises UserError if the text is not UTF-8 or too short for one block.
    """
    try:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a text file in UTF-8, which cannot be read: {error}") from None
    if len(ids) <= model.context_length:
        raise UserError(
            f"{path}: holds {len(ids):,} tokens, and one sequence of this model takes {model.context_length + 1:,}; "
            "give a longer text"
        )
    with tempfile.TemporaryDirectory() as place:
        with TokenStoreWriter(Path(place) / "text", model.vocab_size) as writer:
            writer.add_document(np.array(ids))
        yield BlockReader(TokenStore(Path(place) / "text"), model.context_length)
