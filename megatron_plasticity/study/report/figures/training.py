"""Figures over the steps of pretraining, one line per λ: how the base models were trained, and how plastic they were."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from megatron_plasticity.study.report.figures.svg import Palette, panel
from megatron_plasticity.study.results import Series
from megatron_plasticity.study.scores import Estimate

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


def plasticity_figure(title: str, unit: str, lines: Mapping[float, Mapping[int, Estimate]], palette: Palette) -> Figure:
    """Scores or gains in per cent after fine-tuning from some steps of pretraining, with 95 % intervals; λ → step → estimate."""
    figure, axes = panel(420, 290)
    for decay, estimates in lines.items():
        axes.plot(list(estimates), [100 * found.value for found in estimates.values()], "o-", color=palette[decay], markersize=5)
        for step, found in estimates.items():
            if found.low is not None and found.high is not None:
                axes.plot([step, step], [100 * found.low, 100 * found.high], color=palette[decay], linewidth=0.9, alpha=0.7)
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_xlabel("pretraining step")
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=6)
    return figure


def thin(values: Sequence[float]) -> list[float]:
    """Every n-th value and the last one, at most about `_MOST_POINTS`; nothing is averaged."""
    every = -(-len(values) // _MOST_POINTS)
    kept = list(values[:: max(1, every)])
    return kept if not values or (len(values) - 1) % max(1, every) == 0 else [*kept, values[-1]]
