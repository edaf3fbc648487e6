"""The next token of each sequence from its logits: repetition penalty, temperature, top-k, top-p, and the draw itself.

Filters and their order are those of transformers. A draw is by inverse transform in the order of the vocabulary: the token is
the first whose cumulative probability exceeds a uniform number. So the last bits of the logits, which matrix multiplication
rounds differently for another batch shape, next to never decide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.sampling import SamplingParameters

_LIKELIEST = 512
"""A nucleus is looked for among so many tokens before all are sorted: for 32,000 of them that takes a tenth of the time."""


def choose(logits: Tensor, parameters: SamplingParameters, uniforms: Tensor, seen: Tensor | None = None) -> Tensor:
    """Next tokens [B] (int64) from logits [B, vocab_size] and numbers `uniforms` [B] (fp64) from [0, 1).

    `seen` [B, vocab_size] (bool) says which tokens each prompt and response holds; only a repetition penalty needs it. Raises
    UserError for logits that are not numbers.
    """
    logits = logits.float()
    if seen is not None:
        logits = penalised(logits, seen, parameters.repetition_penalty)
    best = logits.max(dim=-1)
    if not bool(best.values.isfinite().all()):
        raise UserError("the model's logits are not finite numbers: its weights are damaged or its training has diverged")
    if parameters.temperature == 0:
        return best.indices
    return draw(filtered(logits / parameters.temperature, parameters.top_k, parameters.top_p), uniforms)


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits in which tokens that were seen are less likely (for a penalty above 1)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filtered(scores: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Scores with -inf for tokens outside the `top_k` likeliest, and then for those outside the nucleus of `top_p`."""
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        scores = scores.masked_fill(scores < _least_of_nucleus(scores, top_p), float("-inf"))
    return scores


def draw(scores: Tensor, uniforms: Tensor) -> Tensor:
    """A token [B] of each row from its softmax."""
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]


def _least_of_nucleus(scores: Tensor, top_p: float) -> Tensor:
    """The score [B, 1] of the nucleus's least likely token: the likelier ones do not sum to `top_p` yet."""
    log_partition = scores.logsumexp(dim=-1, keepdim=True)
    for count in (_LIKELIEST, scores.shape[-1]):
        likeliest = scores.topk(min(count, scores.shape[-1])).values
        probabilities = (likeliest - log_partition).exp().double()
        inside = probabilities.cumsum(dim=-1) - probabilities < top_p
        if not bool(inside[:, -1].any()):
            break
    return likeliest.gather(-1, inside.sum(dim=-1, keepdim=True) - 1)
