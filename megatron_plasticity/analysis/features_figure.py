"""The picture of a `features` run: dormant units, ranks and norms layer by layer, and the sizes of the training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_plasticity.analysis.drawing import INK, MUTED, drawing, save_svg

_COLOURS = ("#b0301f", "#3f78c9", "#2f8f5b", "#8a5fb5", "#c28a1e")
_RANKS = {"entropy_rank": "entropy rank", "srank": "srank", "stable_rank": "stable rank"}
_CLASSES = {"token_embedding": "token embedding", "mlp": "MLP", "norm": "norm gains", "head": "output head"}


def write_features_figure(results: Mapping[str, Any], path: Path) -> None:
    """Draw the results of a `features` run as an SVG file."""
    with drawing():
        save_svg(features_figure(results), path)


def features_figure(results: Mapping[str, Any]) -> Figure:
    """Panels over layers and, where the model's training was logged, one over steps."""
    training = results["training"]
    panels = 4 if training and training["steps"] else 3
    figure = Figure(figsize=(4.6 * 2, 3.8 * -(-panels // 2)), layout="constrained")
    grid = list(figure.subplots(-(-panels // 2), 2).flat)
    _dormant(grid[0], results["layers"])
    _ranks(grid[1], results["layers"], results["hidden_size"])
    _norms(grid[2], results["layers"])
    if panels == 4:
        _updates(grid[3], training)
    else:
        grid[3].set_visible(False)
    return figure


def _dormant(axes: Axes, layers: Sequence[Mapping[str, Any]]) -> None:
    for colour, threshold in zip(_cycle(len(layers[0]["dormant_units"])), layers[0]["dormant_units"], strict=True):
        for kind, style in (("dormant_units", "-o"), ("dormant_heads", ":o")):
            shares = [100 * layer[kind][threshold] for layer in layers]
            name = "units" if kind == "dormant_units" else "heads"
            axes.plot(shares, style, color=colour, markersize=3.5, label=f"{name}, τ = {threshold}")
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    axes.set_title("Dormant units of the MLP, and heads")
    axes.set_ylabel("share of the layer (%)")
    _legend(axes)
    _over_layers(axes)


def _ranks(axes: Axes, layers: Sequence[Mapping[str, Any]], most: int) -> None:
    for colour, (key, name) in zip(_COLOURS, _RANKS.items(), strict=False):
        for kind, style in (("uncentred", "-o"), ("centred", ":o")):
            ranks = [layer[kind][key] for layer in layers]
            axes.plot(ranks, style, color=colour, markersize=3.5, label=name + (", centred" if kind == "centred" else ""))
    axes.set_ylim(0, 1.05 * most)
    axes.set_title(f"Ranks of the {most:,} features after each layer")
    axes.set_ylabel("rank")
    _legend(axes)
    _over_layers(axes)


def _norms(axes: Axes, layers: Sequence[Mapping[str, Any]]) -> None:
    mean, deviation = (np.array([layer["norm"][key] for layer in layers]) for key in ("mean", "deviation"))
    places = np.arange(len(layers))
    axes.fill_between(places, mean - deviation, mean + deviation, color=_COLOURS[1], alpha=0.25, linewidth=0)
    axes.plot(places, mean, "-o", color=_COLOURS[1], markersize=3.5)
    axes.set_ylim(bottom=0)
    axes.set_title("L2 norm of the features (± one deviation)")
    _over_layers(axes)


def _updates(axes: Axes, training: Mapping[str, Any]) -> None:
    predicted = None
    for colour, (kind, found) in zip(_cycle(len(training["classes"])), training["classes"].items(), strict=True):
        axes.plot(training["steps"], _gaps(found["relative_update"]), color=colour, label=_CLASSES.get(kind, kind))
        predicted = found["equilibrium"] or predicted
    if predicted:
        axes.plot(training["steps"], _gaps(predicted), "--", color=INK, label="rotational equilibrium")
    axes.set_yscale("log")
    axes.set_title("Relative update ‖ΔW‖/‖W‖")
    axes.set_xlabel("step")
    _legend(axes)
    axes.grid(axis="y")
    axes.tick_params(colors=INK, length=0)


def _over_layers(axes: Axes) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    axes.tick_params(colors=INK, length=0)
    axes.spines[:].set_color(MUTED)


def _legend(axes: Axes) -> None:
    """Below the axes, where it covers no line."""
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)


def _gaps(values: Sequence[float | None]) -> list[float]:
    """Numbers for a logarithmic scale: NaN, which is not drawn, where there is none."""
    return [value or float("nan") for value in values]


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]
