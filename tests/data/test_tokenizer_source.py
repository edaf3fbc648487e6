"""Existing tokenizers: found, and refused when they are not what was meant."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_plasticity.config.data import TokenizerConfig
from megatron_plasticity.data.tokenizer import END_OF_TEXT, Tokenizer, train_byte_bpe
from megatron_plasticity.data.tokenizer_source import load_tokenizer
from megatron_plasticity.errors import UserError

TEXT = "The quick brown fox jumps over 13 lazy dogs, and def run(self):\n    return  x\n"


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_byte_bpe([TEXT] * 3, 300)


@pytest.fixture
def folder(trained: Tokenizer, tmp_path: Path) -> Path:
    trained.save(tmp_path / "tokenizer.json")
    return tmp_path


def load(path: Path | str, vocab_size: int = 300, **changes: Any) -> Tokenizer:
    return load_tokenizer(TokenizerConfig(load=str(path), vocab_size=vocab_size, **changes))


def test_a_file_or_its_folder(folder: Path, trained: Tokenizer) -> None:
    known: Any = {"The fox": trained.encode("The fox")}
    for path in (folder, folder / "tokenizer.json"):
        assert load(path, known_encodings=known).sha256 == trained.sha256


def test_another_tokenizer_than_the_one_that_is_meant(folder: Path) -> None:
    with pytest.raises(UserError, match=r"has 300 ids, but tokenizer\.vocab_size says 32,000.*set tokenizer\.vocab_size=300"):
        load(folder, 32_000)
    with pytest.raises(UserError, match=r"encodes 'The fox' as \[.*known_encodings says \[1, 2\]"):
        load(folder, known_encodings={"The fox": [1, 2]})


def test_an_empty_vocabulary_is_found_though_its_size_is_as_stated(tmp_path: Path, trained: Tokenizer) -> None:
    """The letters are gone, and every text encodes to nothing: a corpus of end-of-text ids would come out."""
    content = json.loads(trained._json_text)
    content["model"]["vocab"] = {END_OF_TEXT: 299}
    content["model"]["merges"] = []
    content["added_tokens"][0]["id"] = 299
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="empty, damaged, or changes the text"):
        load(tmp_path)


def test_transformers_writes_an_empty_gpt2_tokenizer_without_a_word(tmp_path: Path) -> None:
    """Its argument names changed with version 5, and the old ones are ignored. What it writes must not get through."""
    transformers: Any = pytest.importorskip("transformers")
    (tmp_path / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate("abcdefgh")}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    empty = transformers.GPT2TokenizerFast(vocab_file=str(tmp_path / "vocab.json"), merges_file=str(tmp_path / "merges.txt"))
    empty.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size says 50,257"):
        load(tmp_path / "saved", 50_257)


def test_a_tokenizer_that_changes_the_text(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="changes the text"):
        load(folder)


def test_places_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place, message in (
        (tmp_path / "empty", "neither tokenizer.json nor tokenizer.model"),
        (tmp_path / "nothing.json", "no such file"),
        ("some/nothing.model", "no such file"),
        ("owner/nothing-there", r"neither a local file nor a tokenizer on the hub.*hf auth login"),
    ):
        with pytest.raises(UserError, match=message):
            load(place)


# --- SentencePiece ---


def sentencepiece_model(path: Path, **changes: Any) -> Path:
    """A byte-pair model of Llama's kind, trained on a few lines."""
    sentencepiece = pytest.importorskip("sentencepiece")
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
    }
    model = io.BytesIO()
    texts = [TEXT.strip(), "two  spaces   three", "        deep indent", "the lazy dogs run over the quick brown fox"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, minloglevel=2, **{"vocab_size": 340, **settings, **changes}
    )
    path.write_bytes(model.getvalue())
    return path


def test_a_sentencepiece_model_encodes_as_the_library_does(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = sentencepiece_model(tmp_path / "tokenizer.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load(tmp_path, 340)
    assert tokenizer.end_of_text == reference.eos_id()
    own_source = Path(__file__).read_text(encoding="utf-8")
    for text in (own_source, *own_source.splitlines(), "  leading", "double  space", "\tindent\n\n", "▁", "</s>", "漢字 🙂", ""):
        assert tokenizer.encode(text) == reference.encode(text), text
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode(own_source) == reference.encode(own_source), "as runs load it"


def test_transformers_reads_a_bare_model_otherwise_than_sentencepiece(tmp_path: Path) -> None:
    """Why the conversion is our own. If this fails one day, transformers has been repaired, and ours can be reconsidered."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    from transformers import LlamaTokenizer

    path = sentencepiece_model(tmp_path / "tokenizer.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    theirs = LlamaTokenizer.from_pretrained(tmp_path)
    texts = ["  two leading", "a  double space", "    return  x"]
    assert any(theirs.encode(text, add_special_tokens=False) != reference.encode(text) for text in texts)
    tokenizer = load(path, 340)
    assert [tokenizer.encode(text) for text in texts] == [reference.encode(text) for text in texts]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "a tokenizer.json made of this SentencePiece model encodes"),
        ({"remove_extra_whitespaces": True}, "a tokenizer.json made of this SentencePiece model encodes"),
        ({"model_type": "unigram", "vocab_size": 300}, "SentencePiece model encodes|byte fallback"),
        ({"byte_fallback": False, "vocab_size": 120}, "no byte pieces"),
    ],
)
def test_models_that_cannot_be_followed_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    pytest.importorskip("sentencepiece")
    path = sentencepiece_model(tmp_path / "m.model", **changes)
    with pytest.raises(UserError, match=message):
        load(path, 340)


def test_files_that_are_no_model_and_a_library_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"not a model")
    if "sentencepiece" in sys.modules:
        with pytest.raises(UserError, match="not a SentencePiece model"):
            load(path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"needs the package sentencepiece: pip install 'megatron-plasticity\[data\]'"):
        load(path)
