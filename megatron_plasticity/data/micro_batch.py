"""What one forward pass of training reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Rows of tokens, and what is to be predicted after each."""

    inputs: Tensor
    """[B, S] int64."""
    targets: Tensor
    """[B, S] int64; IGNORE where nothing is learned."""
    segments: tuple[int, ...] | None = None
    """Lengths of the texts that each row consists of, one after the other, S in all: none of them sees another. None where a row
    is one text."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`."""
        return MicroBatch(to_device(self.inputs, device), to_device(self.targets, device), self.segments)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on `device`. On its way to a GPU from pinned memory, since otherwise the process would wait for all work that the
    GPU still has to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
