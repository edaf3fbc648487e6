"""Recording activations with forward hooks that only look.

A hook copies what its module returns and returns nothing itself, so neither the outputs nor the graph of gradients can change.
Hooks are attached while recording and at no other time: a training step in between runs exactly as without a recorder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_plasticity.capture.points import match_points, point_sharding, sequence_axis
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
        dtype: number format of the copies.
    """

    def __init__(
        self,
        model: Transformer,
        points: Iterable[str],
        positions: Positions = "all",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.points = match_points(model.config, points)
        self.positions: Positions = positions
        self.dtype = dtype
        self.captured: dict[str, Tensor] = {}
        self._lengths: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Recorder:
        if self._handles:
            raise RuntimeError("this recorder is attached already")
        self.captured = {}
        modules = dict(self.model.named_modules())
        for name in self.points:
            if name in modules:  # other pipeline stages have the others
                self._handles.append(modules[name].register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._handles:
            self._handles.pop().remove()

    def record(self, tokens: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Run `tokens` [B, S] through the model in evaluation mode and return {point: activations} in forward order.

        With positions "all" a tensor has the module's own shape ([B, S, width], or [B, heads, S, head_dim] for q, k, v); with
        "last" the axis of positions is gone. Sequences of different length are padded on the right, which causal attention
        cannot see, and `lengths` [B] says where each ends; without it the last position is S - 1.
        """
        if lengths is not None and (lengths.min() < 1 or lengths.max() > tokens.shape[1]):
            raise ValueError(f"lengths must lie between 1 and {tokens.shape[1]}")
        was_training = self.model.training
        self.model.eval()
        self._lengths = lengths
        try:
            with self, torch.no_grad():
                self._forward(tokens)
        finally:
            self._lengths = None
            self.model.train(was_training)
        return {name: self.captured[name] for name in self.points if name in self.captured}

    def _forward(self, tokens: Tensor) -> None:
        # Logits of every position are the largest tensor of all; leave them out unless a recorded point needs them.
        after_the_layers = not {"final_norm", "head"}.isdisjoint(self.points)
        common_last = self.positions == "last" and self._lengths is None
        if self.model.ranks.sequence:  # the last position lies on one rank
            after_the_layers, common_last = True, False
        self.model(tokens, positions="all" if after_the_layers and not common_last else "last")

    def _whole(self, name: str, output: Tensor) -> Tensor:
        ranks = self.model.ranks
        if ranks.size == 1:
            return output
        return point_sharding(name, self.model.config, ranks).join(ranks.all_gather(output))

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        axis = sequence_axis(name)

        def copy(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            kept = self._whole(name, output.detach())
            if self.positions == "last":
                kept = _last_positions(kept, axis, self._lengths)
            # copy=True: a later in-place operation on the model's own tensor must not reach what was recorded.
            self.captured[name] = kept.to(device="cpu", dtype=self.dtype, copy=True)

        return copy


def _last_positions(activations: Tensor, axis: int, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return activations.select(axis, -1)
    rows = torch.arange(activations.shape[0], device=activations.device)
    last = lengths.to(activations.device) - 1
    return activations.movedim(axis, 1)[rows, last]
