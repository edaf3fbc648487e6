"""The tokenizer: lossless, deterministic, and deaf to control tokens in the text."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.data.tokenizer import END_OF_TEXT, Tokenizer, check_tokenizer_fits, train_byte_bpe
from megatron_plasticity.errors import UserError

WORDS = ["weight", "decay", "learns", "the", "rank", "of", "a", "matrix", "def run(self):", "\n    return x", "naïve", "12"]


def texts() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=30)) for _ in range(200)] + [f"the letters {END_OF_TEXT} are text"] * 200


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_byte_bpe(texts(), 320)


def test_size_and_special_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 320
    assert 0 <= tokenizer.end_of_text < 320
    assert tokenizer.decode([tokenizer.end_of_text]) == END_OF_TEXT


@pytest.mark.parametrize(
    "text",
    ["", " ", "the weight decay", "  two  spaces\n\n\tand tabs\r\n", "漢字 🙂 naïve", "\x00\x7f", "x = 1234", END_OF_TEXT * 3],
)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, "a", text]) == [tokenizer.encode(text), tokenizer.encode("a"), tokenizer.encode(text)]


@pytest.mark.parametrize("text", [END_OF_TEXT, f"a{END_OF_TEXT}b", f" {END_OF_TEXT}\n{END_OF_TEXT}", "<|endof" + "text|>"])
def test_text_cannot_end_a_document(tokenizer: Tokenizer, text: str, tmp_path: Path) -> None:
    # The corpus above is full of the literal, so that a merge of its letters would have been learned if it could be.
    tokenizer.save(tmp_path / "tokenizer.json")
    for either in (tokenizer, Tokenizer.load(tmp_path / "tokenizer.json")):
        assert either.end_of_text not in either.encode(text)
        assert either.end_of_text not in either.encode_batch([text])[0]


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([token]) for token in tokenizer.encode("121212")] == list("121212")


def test_saving_and_loading(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.sha256 == tokenizer.sha256
    assert (loaded.vocab_size, loaded.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert loaded.encode("the rank of a matrix") == tokenizer.encode("the rank of a matrix")


def test_training_does_not_depend_on_order_threads_or_hash_seeds(tokenizer: Tokenizer) -> None:
    assert train_byte_bpe(reversed(texts()), 320).sha256 == tokenizer.sha256
    program = (
        "import json, sys; from megatron_plasticity.data.tokenizer import train_byte_bpe;"
        "print(train_byte_bpe(json.load(sys.stdin), 320).sha256)"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "7"}
    output = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(texts()),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert output.stdout.strip() == tokenizer.sha256


def test_a_small_corpus_yields_fewer_ids() -> None:
    assert 257 <= train_byte_bpe(["ab ab ab"], 1000).vocab_size < 265
    with pytest.raises(ValueError, match="257"):
        train_byte_bpe(["ab"], 256)


def test_padding_truncation_and_special_prefixes_of_a_file_are_ignored(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [0], "tokens": [END_OF_TEXT]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "the weight decay learns the rank"
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode(text) == tokenizer.encode(text)


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot read"):
        Tokenizer.load(path)
    path.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.load(path)
    path.write_text(train_byte_bpe(["a b"], 257)._json_text.replace(END_OF_TEXT, "[END]"))
    with pytest.raises(UserError, match="no end-of-text token"):
        Tokenizer.load(path)


def test_a_tokenizer_larger_than_the_model(tokenizer: Tokenizer) -> None:
    def model(vocab_size: int) -> ModelConfig:
        shape = {"layers": 1, "hidden_size": 8, "mlp_hidden_size": 8, "query_heads": 1, "kv_heads": 1, "head_dim": 8}
        return ModelConfig.model_validate({"family": "llama2", "vocab_size": vocab_size, "context_length": 8, **shape})

    check_tokenizer_fits(tokenizer, model(320))
    with pytest.raises(UserError, match=r"vocab_size=319 .* 320 ids"):
        check_tokenizer_fits(tokenizer, model(319))
