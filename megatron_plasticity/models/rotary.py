"""Rotary position embedding (RoFormer, 2104.09864), in the rotate-half layout of Llama-2, OLMo-2 and Hugging Face."""

from __future__ import annotations

import torch
from torch import Tensor


class RotaryTable:
    """cos and sin of every position's angles, in fp32, built on first use on each device and kept.

    Angle j belongs to both columns j and j + head_dim/2, and sin carries the minus sign of the first half, as `rotate` needs it.
    Not a buffer of the model on purpose: `model.bfloat16()` would round it and `to_empty()` would lose it.
    """

    def __init__(self, head_dim: int, theta: float, length: int) -> None:
        self.head_dim = head_dim
        self.theta = theta
        self.length = length
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def at(self, stop: int, device: torch.device, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0 … stop-1, [S, 1, head_dim]; the dimension of size 1 spreads over heads.

        With `positions` [B, S] (int64), all below `stop`, of these: [B, S, 1, head_dim].
        """
        if stop > self.length:
            self.length = max(stop, 2 * self.length)
            self._tables.clear()
        if device not in self._tables:
            self._tables[device] = self._build(device)
        cos, sin = self._tables[device]
        return (cos[:stop], sin[:stop]) if positions is None else (cos[positions], sin[positions])

    def restarting(self, segments: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of texts of lengths `segments` that follow one another, each from position 0: [Σ segments, 1, head_dim]."""
        cos, sin = self.at(max(segments), device)
        return torch.cat([cos[:length] for length in segments]), torch.cat([sin[:length] for length in segments])

    def _build(self, device: torch.device) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # a table built during evaluation must still serve training
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
            positions = torch.arange(self.length, dtype=torch.float32, device=device)
            angles = positions[:, None, None] * (1.0 / self.theta**exponents)
            cos, sin = angles.cos(), angles.sin()
            return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_j, x_{j + head_dim/2}) of x [B, S, heads, head_dim] by its angle, in fp32; returned in x's dtype."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * cos + swapped * sin).to(x.dtype)
