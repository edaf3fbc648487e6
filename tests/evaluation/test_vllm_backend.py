"""Against a stand-in for vLLM: what it is asked, and what is made of its answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.data.tokenizer import Tokenizer, train_byte_bpe
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.sampling import Continuation, SamplingParameters
from megatron_plasticity.evaluation.vllm_backend import VllmGenerator, check_supported


class FakeEngine:
    """Answers every request with the tokens of `text`, ended or cut at `max_tokens`."""

    text = ""
    made: list[FakeEngine]

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.asked: list[tuple[dict[str, Any], dict[str, Any]]] = []
        FakeEngine.made.append(self)

    def generate(self, requests: list[dict[str, Any]], settings: list[dict[str, Any]], use_tqdm: bool) -> list[Any]:
        self.asked += zip(requests, settings, strict=True)
        answers = []
        for setting in settings:
            (end,) = setting["stop_token_ids"]
            tokens = [*self.tokenizer.encode(self.text), end][: setting["max_tokens"]]
            answers.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(tokens))]))
        return answers

    tokenizer: Tokenizer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    FakeEngine.made = []
    FakeEngine.tokenizer = train_byte_bpe([], 257)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeEngine, SamplingParams=dict))  # pyright: ignore
    FakeEngine.tokenizer.save(tmp_path / "tokenizer.json")
    _write_config(tmp_path, head_dim=64)
    return tmp_path


def _write_config(folder: Path, **values: int) -> None:
    shape = {"hidden_size": 96, "num_attention_heads": 2, "max_position_embeddings": 32}
    (folder / "config.json").write_text(json.dumps(shape | values))


@pytest.mark.parametrize(("values", "size"), [({}, 48), ({"head_dim": 24}, 24), ({"head_dim": 88}, 88)])
def test_a_head_size_without_kernels_is_refused_before_anything_is_loaded(folder: Path, monkeypatch, values, size: int) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it would fail
    _write_config(folder, **values)
    with pytest.raises(UserError, match=rf"heads of size {size}, only 32, 64, 96, .*; our own sampler"):
        VllmGenerator(folder)
    assert FakeEngine.made == []


def _model(head_dim: int) -> ModelConfig:
    sizes = {
        "layers": 1,
        "hidden_size": 2 * head_dim,
        "mlp_hidden_size": 8,
        "query_heads": 2,
        "kv_heads": 2,
        "head_dim": head_dim,
    }
    return ModelConfig.model_validate({"family": "llama2", "vocab_size": 9, "context_length": 8, **sizes})


def test_a_model_can_be_checked_before_it_is_exported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_supported(_model(64))
    with pytest.raises(UserError, match="heads of size 48"):
        check_supported(_model(48))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="heads of size 48"):
        check_supported(_model(48))
    with pytest.raises(UserError, match="pip install vllm"):
        check_supported(_model(64))
    assert FakeEngine.made == []


def test_a_missing_vllm_is_a_user_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="pip install vllm"):
        VllmGenerator(folder)


def test_a_folder_without_a_config_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: cannot read"):
        VllmGenerator(tmp_path)


def test_each_response_is_a_request_with_a_seed_of_its_own(folder: Path) -> None:
    generator = VllmGenerator(folder, dtype="bfloat16")
    parameters = SamplingParameters(30, 0.7, 0.9, 40, 1.1, ("\n\n",), max_total_tokens=31, seed=3)
    prompts = [[5, 6], [7] * 11]
    generator.generate(prompts, [100, 2**64 - 1], 3, parameters)
    (engine,) = FakeEngine.made
    assert engine.settings == {"model": str(folder), "dtype": "bfloat16"}
    assert [request["prompt_token_ids"] for request, _ in engine.asked] == [prompts[0]] * 3 + [prompts[1]] * 3
    settings = [setting for _, setting in engine.asked]
    assert [setting["max_tokens"] for setting in settings] == [29] * 3 + [20] * 3
    seeds = [setting["seed"] for setting in settings]
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    common = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "stop": ["\n\n"]}
    assert all(setting.items() >= common.items() for setting in settings)
    generator.generate(prompts[1:], [2**64 - 1], 2, parameters)
    assert [setting["seed"] for _, setting in engine.asked[6:]] == seeds[3:5]


@pytest.mark.parametrize(
    ("text", "stop", "kept", "finish"),
    [
        ("ab", (), "ab", "end_of_text"),
        ("abcdefgh", (), "abcdef", "length"),
        ("ab\n\nc", ("\n\n",), "ab", "stop"),
    ],
)
def test_answers_end_as_those_of_our_own_sampler(folder: Path, monkeypatch, text: str, stop, kept: str, finish) -> None:
    monkeypatch.setattr(FakeEngine, "text", text)
    updates = []

    class Seen:
        def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
            updates.append((done, total, unit))

    found = VllmGenerator(folder).generate([[1], [2]], [1, 2], 2, SamplingParameters(6, stop=stop), Seen())
    assert found == [[Continuation(FakeEngine.tokenizer.encode(kept), finish)] * 2] * 2
    assert updates == [(4, 4, "answers")]


def test_prompts_are_checked_and_none_are_fine(folder: Path) -> None:
    generator = VllmGenerator(folder)
    with pytest.raises(UserError, match="context_length is 32"):
        generator.generate([[1] * 32], [0], 1, SamplingParameters(4))
    assert generator.generate([], [], 2, SamplingParameters(4)) == []
