"""Figures of how the base models were trained: one line per λ over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from megatron_plasticity.study.report.figures.svg import Palette, panel
from megatron_plasticity.study.results import Series

_MOST_POINTS = 200
"""Points drawn per line; a longer series is thinned, so that the file stays small."""


def curve_figure(title: str, unit: str, curves: Mapping[float, Series], palette: Palette) -> Figure:
    """One metric over the steps, one line per λ; logarithmic where the values are positive and span more than a factor 20."""
    figure, axes = panel(320, 230)
    values = [value for series in curves.values() for value in series.values if math.isfinite(value)]
    for decay, series in curves.items():
        steps, thinned = thin(series.steps), thin(series.values)
        axes.plot(steps, thinned, color=palette[decay], linewidth=1.2)
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", nbins=5)
    return figure


def thin(values: Sequence[float]) -> list[float]:
    """Every n-th value and the last one, at most about `_MOST_POINTS`; nothing is averaged."""
    every = -(-len(values) // _MOST_POINTS)
    kept = list(values[:: max(1, every)])
    return kept if not values or (len(values) - 1) % max(1, every) == 0 else [*kept, values[-1]]
