"""vLLM as a generator, for exported models whose head size it has kernels for.

Untried: it is written after vLLM's documentation and tested against a stand-in, since no machine of ours has a vLLM.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.sampling import Continuation, SamplingParameters, StopStrings, check_prompts
from megatron_plasticity.evaluation.streams import stream_states

if TYPE_CHECKING:
    from megatron_plasticity.tracking.progress import Progress

_REQUESTS_AT_ONCE = 4096
"""Many times what it decodes side by side, so that little waits at the end of a portion; after each comes a sign of life."""
HEAD_SIZES = (32, 64, 96, 128, 160, 192, 224, 256)
"""What vLLM's FlashAttention backend takes (its `get_supported_head_sizes`)."""


def check_supported(model: ModelConfig) -> None:
    """Before an export for vLLM: raise UserError for a head size that it does not take, and if it cannot be imported."""
    _check_head_size(model.head_dim)
    _import_vllm()


class VllmGenerator:
    """A `sampling.Generator` of a model exported to Hugging Face's format, in vLLM's own number format and memory."""

    def __init__(self, folder: Path, **engine: Any) -> None:
        """`engine` goes to `vllm.LLM` (`dtype`, `gpu_memory_utilization`, …).

        Raises UserError, before anything is loaded, for a head size that vLLM does not take and if vLLM cannot be imported.
        """
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot read the model's config: {error}") from error
        _check_head_size(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
        self._vllm = _import_vllm()
        self._tokenizer = Tokenizer.load(folder / "tokenizer.json")
        self._context_length: int = config["max_position_embeddings"]
        self._engine = self._vllm.LLM(model=str(folder), **engine)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        samples: int,
        parameters: SamplingParameters,
        progress: Progress | None = None,
    ) -> list[list[Continuation]]:
        """As `sampling.Generator` has it. Every response is a request with a seed of its own; for equal seeds the random numbers
        are vLLM's, not those of our own sampler, and its batches may round logits differently."""
        check_prompts(prompts, self._context_length, max_total_tokens=parameters.max_total_tokens)
        requests, settings = [], []
        for prompt, key in zip(prompts, keys, strict=True):
            limit = parameters.response_limit(prompt, self._context_length)
            for stream in stream_states(parameters.seed, [key] * samples, range(samples)).tolist():
                requests.append({"prompt_token_ids": list(prompt)})
                settings.append(self._settings(parameters, limit, stream))
        stop_strings = StopStrings(parameters.stop, self._tokenizer)
        found: list[Continuation] = []
        for start in range(0, len(requests), _REQUESTS_AT_ONCE):
            part = slice(start, start + _REQUESTS_AT_ONCE)
            outputs = self._engine.generate(requests[part], settings[part], use_tqdm=False)
            found += [stop_strings.cut(self._continuation(output.outputs[0].token_ids)) for output in outputs]
            if progress is not None:
                progress.update(len(found), len(requests), "answers")
        return [found[start : start + samples] for start in range(0, len(found), samples)]

    def _settings(self, parameters: SamplingParameters, limit: int, stream: int) -> Any:
        return self._vllm.SamplingParams(
            max_tokens=limit,
            temperature=parameters.temperature,
            top_p=parameters.top_p,
            top_k=-1 if parameters.top_k is None else parameters.top_k,
            repetition_penalty=parameters.repetition_penalty,
            stop=list(parameters.stop),
            stop_token_ids=[self._tokenizer.end_of_text],
            skip_special_tokens=False,  # as our own tokenizer, so that stop strings are looked for in the same text
            seed=stream >> 1,  # fits a signed 64-bit number
        )

    def _continuation(self, tokens: Sequence[int]) -> Continuation:
        """Before stop strings are cut off. vLLM leaves the end of text where it is."""
        tokens = list(tokens)
        if tokens and tokens[-1] == self._tokenizer.end_of_text:
            return Continuation(tokens[:-1], "end_of_text")
        return Continuation(tokens, "length")


def _check_head_size(size: int) -> None:
    if size not in HEAD_SIZES:
        raise UserError(
            f"vLLM does not take heads of size {size}, only {', '.join(map(str, HEAD_SIZES))}; our own sampler takes every size"
        )


def _import_vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise UserError(
            f"vLLM cannot be imported ({error}); install it with `pip install vllm` on a machine with a GPU, in an "
            "environment of its own, since it brings its own torch; or use our own sampler"
        ) from None
