"""Reward scorers for best-of-n (RM@K) and the ORM score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_plasticity.config.evaluation import RewardConfig
from megatron_plasticity.errors import UserError


class RewardScorer(Protocol):
    """Says how good responses are; larger is better."""

    @property
    def cut(self) -> int:
        """How many conversations were too long so far and lost their end."""
        ...

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One finite number for each (prompt, response), in their order. Prompts are the bare problems, without a template."""
        ...


def make_scorer(config: RewardConfig, device: torch.device | str = "cpu") -> RewardScorer | None:
    """The scorer that the config asks for, or None for `none`. Raises UserError if its model cannot be used."""
    if config.kind == "none":
        return None
    if config.kind == "length":
        return LengthScorer()
    if config.model is None:
        raise UserError("reward.kind=sequence_classifier needs reward.model: a local folder or a hub name")
    return SequenceClassifierScorer(config.model, device, config.batch_size, config.max_length, config.revision)


class LengthScorer:
    """Prefers short answers: minus the number of characters. It exists for tests and the quickstart."""

    cut = 0

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [-float(len(response)) for _, response in zip(prompts, responses, strict=True)]


class SequenceClassifierScorer:
    """The scalar logit of a Hugging Face sequence classifier on chat(user = problem, assistant = response).

    The paper's is Skywork/Skywork-Reward-Llama-3.1-8B-v0.2 (2410.18451). bfloat16 on CUDA, float32 elsewhere. Code that comes
    with a model is never run. A conversation of more than `max_length` tokens, or of more than the model can read, loses its end.
    """

    def __init__(
        self,
        model: str,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        max_length: int | None = None,
        revision: str | None = None,
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._name = model
        self._device = torch.device(device)
        self._batch_size = batch_size
        self.cut = 0
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        source = str(Path(model).resolve()) if Path(model).is_dir() else model
        at: dict[str, Any] = {} if revision is None else {"revision": revision}
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **at)
            classifier: Any = AutoModelForSequenceClassification.from_pretrained(
                source, dtype=dtype, trust_remote_code=False, use_safetensors=True, **at
            )
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"reward.model={model!r}: no sequence classifier with a tokenizer could be loaded: {error}"
            ) from error
        self._model = classifier.to(self._device).eval()
        self._check()
        readable = getattr(self._model.config, "max_position_embeddings", None)
        self._max_length = min((limit for limit in (max_length, readable) if limit is not None), default=None)

    def _check(self) -> None:
        labels = self._model.config.num_labels
        if labels != 1:
            raise UserError(f"reward.model={self._name!r} has {labels} labels; a reward model has exactly one")
        if not self._tokenizer.chat_template:
            raise UserError(f"reward.model={self._name!r}: its tokenizer has no chat template to join problem and response")

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        conversations = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        if not conversations:
            return []
        ids: list[list[int]] = self._tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=False)
        if self._max_length is not None:
            self.cut += sum(len(row) > self._max_length for row in ids)
            ids = [row[: self._max_length] for row in ids]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # similar lengths side by side: little padding
        scores = [0.0] * len(ids)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            for i, score in zip(batch, self._score_batch([ids[i] for i in batch]), strict=True):
                scores[i] = score
        return scores

    @torch.inference_mode()
    def _score_batch(self, ids: list[list[int]]) -> list[float]:
        # The classifier reads its score at the last token that is not the padding id. Where that id may end a conversation
        # (models that pad with end-of-text) it would look too far left, so padding uses an id that occurs nowhere in the batch.
        used = set().union(*ids)
        padding = next((token for token in range(self._model.config.vocab_size) if token not in used), None)
        self._model.config.pad_token_id = padding
        if padding is None:  # every id occurs: one conversation at a time needs no padding
            return [self._forward([row], [len(row)])[0] for row in ids]
        longest = max(map(len, ids))
        return self._forward([row + [padding] * (longest - len(row)) for row in ids], [len(row) for row in ids])

    def _forward(self, rows: list[list[int]], lengths: list[int]) -> list[float]:
        tokens = torch.tensor(rows, device=self._device)
        mask = torch.arange(tokens.shape[1], device=self._device) < torch.tensor(lengths, device=self._device)[:, None]
        logits = self._model(input_ids=tokens, attention_mask=mask.long()).logits[:, 0].float()
        if not bool(torch.isfinite(logits).all()):
            raise UserError(f"reward.model={self._name!r} gives scores that are not finite numbers")
        return logits.tolist()
