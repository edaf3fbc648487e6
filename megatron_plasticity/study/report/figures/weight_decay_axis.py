"""The horizontal axis of λ: logarithmic, with λ = 0 set apart at the left behind a break."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from megatron_plasticity.study.report.figures.svg import MUTED

_LABEL_WIDTH = 6.5
"""Pixels that one digit of a tick label takes."""


class WeightDecayAxis:
    """Places λ on a logarithmic axis. λ = 0 has no logarithm: it stands left of the others, behind a break mark."""

    def __init__(self, weight_decays: Sequence[float]) -> None:
        positive = sorted({math.log10(decay) for decay in weight_decays if decay > 0})
        self._positions = {decay: math.log10(decay) for decay in weight_decays if decay > 0}
        self._break: float | None = None
        if 0.0 in weight_decays:
            first = positive[0] if positive else 0.0
            step = 0.18 * (positive[-1] - first) if len(positive) > 1 else 0.5
            self._positions[0.0] = first - max(step, 0.25)
            self._break = first - max(step, 0.25) / 2 if positive else None
        span = max(self._positions.values(), default=0.0) - min(self._positions.values(), default=0.0)
        pad = 0.06 * span or 0.5
        self.limits = (min(self._positions.values(), default=0.0) - pad, max(self._positions.values(), default=0.0) + pad)

    def __call__(self, weight_decay: float) -> float:
        """Horizontal position of λ."""
        return self._positions[weight_decay]

    def line(
        self,
        axes: Axes,
        weight_decays: Sequence[float],
        values: Sequence[float],
        *,
        style: str = "-",
        shift: float = 0.0,
        **look: Any,
    ) -> None:
        """A line over ascending λ; the piece from λ = 0 across the break is dotted, since the axis has no scale there.

        `shift` moves it to the right, in units of the axis, which are decades.
        """
        points = [(self(decay) + shift, value) for decay, value in zip(weight_decays, values, strict=True)]
        start = 1 if weight_decays and weight_decays[0] == 0.0 else 0
        axes.plot([x for x, _ in points[start:]], [y for _, y in points[start:]], style, **look)
        if start and len(points) > 1:
            axes.plot([x for x, _ in points[:2]], [y for _, y in points[:2]], ":", **{**look, "label": None, "linewidth": 1.0})

    def draw(self, axes: Axes, timescales: Mapping[float, float | None] | None = None, width: int = 300) -> None:
        """Ticks, label and break mark; with `timescales` (λ → AdamW timescale) a second axis on top. `width` is in pixels."""
        axes.set_xlim(*self.limits)
        axes.set_xlabel("weight decay λ")
        self._ticks(axes, {decay: f"{decay:.3g}" for decay in self._positions}, width)
        if self._break is not None:
            marker = {"marker": [(-1, -2), (1, 2)], "markersize": 9, "color": MUTED, "clip_on": False, "linestyle": "none"}
            for shift in (-0.006, 0.006):
                x = self._break + shift * (self.limits[1] - self.limits[0])
                axes.plot([x], [0], transform=axes.get_xaxis_transform(), zorder=5, **marker)
        if timescales:
            top = axes.twiny()
            top.set_xlim(*self.limits)
            top.set_xlabel("AdamW timescale (share of the run that the weights remember)")
            top.grid(False)
            self._ticks(top, {decay: timescale_text(timescales.get(decay), decay) for decay in self._positions}, width)

    def _ticks(self, axes: Axes, labels: Mapping[float, str], width: int) -> None:
        """A tick at every λ, labels where they do not overlap; the ends come first."""
        pixels = width / (self.limits[1] - self.limits[0])
        ordered = sorted(labels)
        shown: list[float] = []
        for decay in [*ordered[:1], *ordered[-1:], *ordered[1:-1]]:
            room = [
                abs(self(decay) - self(other)) * pixels - (len(labels[decay]) + len(labels[other]) + 1) / 2 * _LABEL_WIDTH
                for other in shown
                if other != decay
            ]
            if decay not in shown and all(gap >= 0 for gap in room):
                shown.append(decay)
        axes.set_xticks([self(decay) for decay in ordered], [labels[decay] if decay in shown else "" for decay in ordered])


def timescale_text(timescale: float | None, weight_decay: float) -> str:
    """An AdamW timescale in two significant digits; ∞ for λ = 0."""
    if timescale is None:
        return "∞" if weight_decay == 0 else "?"
    return f"{timescale:.2g}" if timescale < 100 else f"{timescale:.0f}"
