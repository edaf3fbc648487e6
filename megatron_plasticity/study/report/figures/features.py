"""Figures of dormant units, ranks of features and sizes of training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from megatron_plasticity.study.report.figures.svg import INK, MUTED, Palette, panel
from megatron_plasticity.study.report.figures.training import thin
from megatron_plasticity.study.report.figures.weight_decay_axis import WeightDecayAxis


def dormant_figure(shares: Mapping[str, Mapping[float, Sequence[float]]], axis: WeightDecayAxis) -> Figure:
    """Share of dormant units in per cent against λ: one line per threshold τ, the mean over layers, named at its right end.

    `shares` is τ → λ → [layer]; whiskers run from the least layer to the greatest.
    """
    figure, axes = panel(380, 270, right=74)
    ends: list[tuple[float, str]] = []
    for index, (threshold, by_decay) in enumerate(shares.items()):
        shade = 0.35 + 0.65 * (index + 1) / len(shares)
        means = {decay: 100 * sum(layers) / len(layers) for decay, layers in by_decay.items()}
        axis.line(axes, list(means), list(means.values()), color=INK, alpha=shade, marker="o", markersize=4)
        for decay, layers in by_decay.items():
            axes.plot([axis(decay)] * 2, [100 * min(layers), 100 * max(layers)], color=MUTED, linewidth=0.9, alpha=shade)
        ends.append((list(means.values())[-1], f"τ = {threshold}"))
    top = max(1.0, axes.get_ylim()[1])
    axes.set_ylim(0, top)
    last = -1.0
    for value, label in sorted(ends):  # lines that end close together must not write over one another
        last = max(value, last + 0.075 * top)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(label, (1, last), xytext=(4, 0), va="center", color=INK, fontsize=9, **place)
    axes.set_title("Dormant units of the MLP")
    axes.set_ylabel("share of the units (%)")
    axis.draw(axes, width=260)
    return figure


def layer_figure(
    title: str, unit: str, values: Mapping[float, Sequence[float]], palette: Palette, *, log: bool = False
) -> Figure:
    """A measure of the features after each layer, one line per λ; `values` is λ → [layer]. From zero unless logarithmic."""
    figure, axes = panel(320, 240, left=62)
    for decay, layers in values.items():
        axes.plot(range(len(layers)), layers, "o-", color=palette[decay], markersize=4)
    if log and min((value for layers in values.values() for value in layers), default=0.0) > 0:
        _log_scale(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_xlabel("layer")
    return figure


def step_size_figure(
    title: str,
    unit: str,
    steps: Mapping[float, Sequence[int]],
    sizes: Mapping[float, Sequence[float | None]],
    predicted: Mapping[float, Sequence[float] | None],
    palette: Palette,
) -> Figure:
    """A size of the steps over the run on a logarithmic scale, one line per λ, with its prediction dashed; all λ → [n]."""
    figure, axes = panel(380, 270, left=68)
    for decay, values in sizes.items():
        places = thin(steps[decay])
        axes.plot(places, thin([value or float("nan") for value in values]), color=palette[decay], linewidth=1.5)
        if expected := predicted.get(decay):
            axes.plot(places, thin([value or float("nan") for value in expected]), "--", color=palette[decay], linewidth=1.0)
    _log_scale(axes)
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", nbins=5)
    return figure


def _log_scale(axes: Axes) -> None:
    """A logarithmic vertical scale with 1 and 3 of each decade labelled: one that spans less than a decade has labels too."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=9))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
