"""The picture of a `truncation` run: loss against the rank that every head keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_plasticity.analysis.drawing import INK, MUTED, drawing, save_svg
from megatron_plasticity.analysis.head_statistics import PRODUCTS

_COLOURS = {"truncated": "#b0301f", "control": "#3f78c9"}
_LABELS = {"truncated": "the strongest directions", "control": "random directions"}


def write_truncation_figure(results: Mapping[str, Any], path: Path) -> None:
    """Draw the results of a `truncation` run as an SVG file."""
    with drawing():
        save_svg(truncation_figure(results), path)


def truncation_figure(results: Mapping[str, Any]) -> Figure:
    """One panel for each target, on one scale; bars are the 95 % intervals of the increase over the untouched loss."""
    targets = results["targets"]
    figure = Figure(figsize=(0.6 + 3.9 * len(targets), 3.4), layout="constrained")
    for axes, (target, ranks) in zip(
        figure.subplots(1, len(targets), sharey=True, squeeze=False).flat, targets.items(), strict=True
    ):
        _panel(axes, results["loss"], ranks)
        axes.set_title(f"{PRODUCTS[target]} of every head truncated")
        axes.set_xlabel(f"rank k that is kept (of {results['head_dim']})")
    figure.axes[0].set_ylabel("held-out loss (nats per token)")
    figure.axes[0].legend()
    return figure


def _panel(axes: Axes, untouched: float, ranks: Mapping[str, Mapping[str, Any]]) -> None:
    # Ranks double from one to the next, and 0 has no logarithm: they stand side by side at equal distances.
    places = range(len(ranks))
    axes.set_xticks(places, list(ranks))
    axes.axhline(untouched, color=MUTED, linewidth=1, linestyle="--", label="untouched")
    axes.grid(axis="y")
    for name, colour in _COLOURS.items():
        outcomes = [entry[name] for entry in ranks.values() if name in entry]
        if not outcomes:
            continue
        axes.plot(places, [outcome["loss"] for outcome in outcomes], "o-", color=colour, markersize=4, label=_LABELS[name])
        for place, increase in zip(places, (outcome["increase"] for outcome in outcomes), strict=True):
            if "low" in increase:
                ends = [untouched + increase["low"], untouched + increase["high"]]
                axes.plot([place, place], ends, color=colour, linewidth=2.5, alpha=0.4, solid_capstyle="butt")
    axes.tick_params(colors=INK, length=0)
