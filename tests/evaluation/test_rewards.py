from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_plasticity.config.evaluation import RewardConfig
from megatron_plasticity.data.tokenizer import train_byte_bpe
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation import responses as responses_module
from megatron_plasticity.evaluation.responses import Question
from megatron_plasticity.evaluation.rewards import LengthScorer, SequenceClassifierScorer, make_scorer
from megatron_plasticity.evaluation.tasks.task import Example, Reference

CHAT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>{% endfor %}"
PROMPTS = ["one and two?", "a", "what is 17 + 4, please?", "b"]
RESPONSES = ["three", "", "the answer is 21, of course it is", "no"]


def _save_reward_model(folder: Path, labels: int = 1, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A tiny random Llama classifier whose padding token is end-of-text, with which every conversation ends."""
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    train_byte_bpe(["the answer is one"], 257).save(folder / "bare.json")
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "bare.json"),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
    )
    (folder / "bare.json").unlink()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    config.num_labels = labels
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save_reward_model(tmp_path_factory.mktemp("reward"))


def _last_token_score(folder: Path, prompt: str, response: str) -> float:
    """The score by hand: the linear head on the last hidden state of the conversation."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    text = f"<|user|>{prompt}<|endoftext|><|assistant|>{response}<|endoftext|>"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        return model.score(model.model(ids).last_hidden_state[0, -1]).item()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_the_heads_value_at_the_last_token(reward_model: Path, batch_size: int) -> None:
    scorer = make_scorer(RewardConfig(kind="sequence_classifier", model=str(reward_model), batch_size=batch_size))
    assert scorer is not None
    expected = [_last_token_score(reward_model, prompt, response) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    assert len(set(expected)) == len(expected)
    assert scorer.score(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-5)
    assert scorer.score([], []) == []
    assert scorer.cut == 0


def test_a_batch_that_uses_every_id_is_scored_one_by_one(reward_model: Path) -> None:
    scorer = SequenceClassifierScorer(str(reward_model))
    together = scorer.score(PROMPTS, RESPONSES)
    scorer._model.config.vocab_size = 0  # no id is left for padding
    assert scorer.score(PROMPTS, RESPONSES) == pytest.approx(together, abs=1e-5)


def test_length_prefers_short_answers() -> None:
    assert LengthScorer().score(["q", "q"], ["abc", ""]) == [-3, 0]
    assert isinstance(make_scorer(RewardConfig(kind="length")), LengthScorer)
    assert make_scorer(RewardConfig()) is None


def test_reward_models_that_cannot_be_used_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs reward\.model"):
        make_scorer(RewardConfig(kind="sequence_classifier"))
    with pytest.raises(UserError, match="no sequence classifier"):
        SequenceClassifierScorer(str(tmp_path))
    (tmp_path / "two").mkdir()
    with pytest.raises(UserError, match="has 2 labels"):
        SequenceClassifierScorer(str(_save_reward_model(tmp_path / "two", labels=2)))
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no chat template"):
        SequenceClassifierScorer(str(_save_reward_model(tmp_path / "bare", chat_template=None)))


@pytest.mark.parametrize(("max_length", "kept"), [(None, 128), (40, 40), (500, 128)])
def test_longer_conversations_lose_their_end_and_are_counted(reward_model: Path, max_length: int | None, kept: int) -> None:
    scorer = SequenceClassifierScorer(str(reward_model), max_length=max_length)
    # Byte-level tokens: <|user|> is 8 of them, the prompt 1, <|endoftext|> 1, <|assistant|> 13; x is one each.
    fitting = "x" * (kept - 24)
    assert scorer.score(["q"], [fitting]) == pytest.approx([_last_token_score(reward_model, "q", fitting)], abs=1e-5)
    assert scorer.cut == 0
    scores = scorer.score(["q"] * 3, [fitting, fitting + "x", "x" * 200])
    assert scorer.cut == 2
    assert scores[1] == pytest.approx(scores[2], abs=1e-5)  # what is left of them is the same
    assert abs(scores[0] - scores[1]) > 1e-4


def test_length_cuts_nothing() -> None:
    scorer = LengthScorer()
    scorer.score(["q"], ["x" * 10**6])
    assert scorer.cut == 0


def test_long_scoring_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study's runner takes a run that is silent for an hour for dead."""
    monkeypatch.setattr(responses_module, "_REWARDED_AT_ONCE", 4)
    questions = [
        Question(Example(str(number), "?" * number, "", Reference("number", "1")), (1,), fits=True) for number in range(5)
    ]
    texts = [["a" * number, "b" * 2 * number] for number in range(5)]
    signs: list[float] = []

    class Signs:
        def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
            signs.append(done)

    whole = responses_module._rewards(LengthScorer(), questions, texts, Signs())
    assert len(signs) == 3
    prompts = [question.example.prompt for question in questions for _ in range(2)]
    expected = LengthScorer().score(prompts, [text for row in texts for text in row])
    assert [score for row in whole for score in row] == expected
