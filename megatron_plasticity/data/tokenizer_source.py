"""Finding an existing tokenizer, and making sure that it is the one that was meant before a hundred gigabytes depend on it."""

from __future__ import annotations

from pathlib import Path

from megatron_plasticity.config.data import TokenizerConfig
from megatron_plasticity.data.manifest import TOKENIZER_FILE
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError

_SENTENCEPIECE_SUFFIX = ".model"
_SENTENCE = "The quick brown fox jumps over 13 lazy dogs."


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config.load` names, checked: it has `vocab_size` ids, a sentence comes back from its encoding, and the
    known encodings are right.

    An empty vocabulary, which some libraries write without a word when they are called in a way of an earlier version, fails all
    three. Raises UserError, also when the tokenizer cannot be found or read.
    """
    assert config.load is not None, "the config sees to it"
    tokenizer = _read(_find(config.load, config.revision))
    name = f"tokenizer.load={config.load}"
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{name}: has {tokenizer.vocab_size:,} ids, but tokenizer.vocab_size says {config.vocab_size:,}. If this is the "
            f"tokenizer that you mean, set tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    ids = tokenizer.encode(_SENTENCE)
    if not ids or tokenizer.decode(ids).strip() != _SENTENCE:
        raise UserError(
            f"{name}: the sentence {_SENTENCE!r} comes back from its ids as {tokenizer.decode(ids)!r}: the tokenizer is empty, "
            "damaged, or changes the text. Get its tokenizer.json again from where the model comes from"
        )
    for text, expected in config.known_encodings.items():
        if (found := tokenizer.encode(text)) != list(expected):
            raise UserError(
                f"{name}: encodes {text!r} as {found}, but tokenizer.known_encodings says {list(expected)}: another tokenizer "
                "than the one that is meant, or a damaged file"
            )
    return tokenizer


def _read(path: Path) -> Tokenizer:
    if path.suffix != _SENTENCEPIECE_SUFFIX:
        return Tokenizer.load(path)
    from megatron_plasticity.data.sentencepiece_model import tokenizer_json_of_sentencepiece

    return Tokenizer(tokenizer_json_of_sentencepiece(path), name=str(path))


def _find(load: str, revision: str | None) -> Path:
    path = Path(load).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        candidates = (path / TOKENIZER_FILE, path / "tokenizer.model")
        if found := next((candidate for candidate in candidates if candidate.is_file()), None):
            return found
        raise UserError(f"tokenizer.load={load}: this folder has neither {TOKENIZER_FILE} nor tokenizer.model")
    if path.suffix in (".json", _SENTENCEPIECE_SUFFIX) or load.count("/") > 1 or path.is_absolute():
        raise UserError(f"tokenizer.load={load}: no such file")
    return _download(load, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, TOKENIZER_FILE, revision=revision))
    except Exception as error:  # of the hub, of the network, of the cache
        raise UserError(
            f"tokenizer.load={name}: neither a local file nor a tokenizer on the hub: {type(error).__name__}: {error}. "
            "A gated one needs `hf auth login`; otherwise give the path of its tokenizer.json or tokenizer.model"
        ) from error
