"""Recording activations with forward hooks that only look.

A hook copies what its module returns and returns nothing itself, so neither the outputs nor the graph of gradients can change.
Hooks are attached while recording and at no other time: a training step in between runs exactly as without a recorder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_plasticity.capture.points import HEAD, LOGIT_IDS, LOGIT_VALUES, LOGITS, match_points, point_sharding, sequence_axis
from megatron_plasticity.models.transformer import Transformer

Positions = Literal["all", "last"]


class Recorder:
    """Copies the activations of chosen hook points to memory of the CPU.

    Either `recorder.record(tokens)` for one forward pass without gradients, or, around forward passes of one's own::

        with recorder:
            loss = model(tokens).sum()
        recorder.captured["layers.0.resid_post"]

    Args:
        model: a model with hook points.
        points: globs over their names; one without a match is a UserError. A pipeline stage records those that lie on it; under
            tensor parallelism all its ranks must record together, and each gets whole activations.
        positions: keep every token position, or the last one of each sequence.
        dtype: number format of the copies; token ids of `logits` stay int64.
        top_k: for the point `logits`, how many of each position; all if the vocabulary has fewer.
    """

    def __init__(
        self,
        model: Transformer,
        points: Iterable[str],
        positions: Positions = "all",
        dtype: torch.dtype = torch.float32,
        top_k: int = 10,
    ) -> None:
        self.model = model
        self.points = match_points(model.config, points)
        self.positions: Positions = positions
        self.dtype = dtype
        self.top_k = min(top_k, model.config.vocab_size)
        self.captured: dict[str, Tensor] = {}
        self._kept: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._as_written = ExitStack()

    @property
    def names(self) -> list[str]:
        """Names of what is recorded, in forward order: `points`, with the two tensors of `logits` in its place."""
        return [name for point in self.points for name in ((LOGIT_VALUES, LOGIT_IDS) if point == LOGITS else (point,))]

    def __enter__(self) -> Recorder:
        if self._handles:
            raise RuntimeError("this recorder is attached already")
        self.captured = {}
        self._as_written.enter_context(self.model.as_written())
        modules = dict(self.model.named_modules())
        for name in self.points:
            module = modules.get(HEAD if name == LOGITS else name)
            if module is not None:  # other pipeline stages have the others
                self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._as_written.close()

    @contextmanager
    def keeping(self, kept: Tensor | None) -> Iterator[Recorder]:
        """As `with recorder`, for forward passes of which only the positions `kept` [B, K] (int64) of each row are recorded.

        The axis of positions has then length K, and where `kept` is negative there are zeros; with positions "last" K is 1, and
        the axis is gone.
        """
        self._kept = kept
        try:
            with self:
                yield self
        finally:
            self._kept = None

    def record(self, tokens: Tensor, lengths: Tensor | None = None, kept: Tensor | None = None) -> dict[str, Tensor]:
        """Run `tokens` [B, S] through the model in evaluation mode and return {name: activations} in forward order.

        With positions "all" a tensor has the module's own shape ([B, S, width], or [B, heads, S, head_dim] for q, k, v); with
        "last" the axis of positions is gone. Sequences of different length are padded on the right, which causal attention
        cannot see, and `lengths` [B] says where each ends; without it the last position is S - 1. Instead, `kept` may state the
        positions (see `keeping`).
        """
        if lengths is not None:
            if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
                raise ValueError(f"lengths must lie between 1 and {tokens.shape[1]}")
            kept = lengths[:, None] - 1
        was_training = self.model.training
        self.model.eval()
        try:
            with self.keeping(kept), torch.no_grad():
                self._forward(tokens)
        finally:
            self.model.train(was_training)
        return {name: self.captured[name] for name in self.names if name in self.captured}

    def _forward(self, tokens: Tensor) -> None:
        # Logits of every position are the largest tensor of all; leave them out unless a recorded point needs them.
        after_the_layers = not {"final_norm", HEAD, LOGITS}.isdisjoint(self.points)
        common_last = self.positions == "last" and self._kept is None
        if self.model.ranks.sequence:  # the last position lies on one rank
            after_the_layers, common_last = True, False
        self.model(tokens, positions="all" if after_the_layers and not common_last else "last")

    def _hook(self, point: str) -> Callable[[nn.Module, Any, Any], None]:
        def copy(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if point == LOGITS:
                values, ids = self._largest(self._selected(output.detach(), 1))
                self.captured[LOGIT_VALUES] = self._copy(values, self.dtype)
                if self._kept is not None:  # zeros where no position is kept, as everywhere
                    present = (self._kept >= 0).to(ids.device)
                    ids = ids * (present[..., None] if self.positions == "all" else present)
                self.captured[LOGIT_IDS] = self._copy(ids, torch.int64)
            else:
                self.captured[point] = self._copy(self._whole(point, output.detach()), self.dtype)

        return copy

    @staticmethod
    def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        # copy=True: a later in-place operation on the model's own tensor must not reach what was recorded.
        return tensor.to(device="cpu", dtype=dtype, copy=True)

    def _whole(self, point: str, output: Tensor) -> Tensor:
        """Whole activations of the positions that are kept, from this rank's part."""
        ranks, axis = self.model.ranks, sequence_axis(point)
        if ranks.size == 1:
            return self._selected(output, axis)
        sharding = point_sharding(point, self.model.config, ranks)
        if sharding.axis == axis:  # the kept positions may lie on other ranks
            return self._selected(sharding.join(ranks.all_gather(output)), axis)
        return sharding.join(ranks.all_gather(self._selected(output, axis)))

    def _selected(self, activations: Tensor, axis: int) -> Tensor:
        if self._kept is None:
            return activations if self.positions == "all" else activations.select(axis, -1)
        kept = self._kept.to(activations.device)
        rows = torch.arange(len(kept), device=kept.device)[:, None]
        by_position = activations.movedim(axis, 1)
        chosen = by_position[rows, kept.clamp(min=0)]
        present = (kept >= 0).view(*kept.shape, *[1] * (chosen.dim() - 2))
        chosen = chosen.where(present, torch.zeros((), dtype=chosen.dtype, device=chosen.device)).movedim(1, axis)
        return chosen if self.positions == "all" else chosen.squeeze(axis)

    def _largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest of `logits` [..., this rank's part of the vocabulary] over the whole vocabulary: values and token ids."""
        ranks = self.model.ranks
        values, ids = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1)
        if ranks.size > 1:  # the largest of all are among the largest of each part
            ids = ids + ranks.rank * logits.shape[-1]
            candidates = torch.cat(ranks.all_gather(values), dim=-1)
            values, order = candidates.topk(self.top_k, dim=-1)
            ids = torch.cat(ranks.all_gather(ids), dim=-1).gather(-1, order)
        return values, ids
