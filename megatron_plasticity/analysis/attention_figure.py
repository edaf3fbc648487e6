"""One picture of all heads of a model: a heat map of layer × head for each statistic of an `attention` run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_plasticity.analysis.drawing import drawing, save_svg
from megatron_plasticity.analysis.head_statistics import greatest_entropy, summary_label

_COLUMNS = 3
_PRODUCTS = {"qk": "W_QK", "qk_folded": "W_QK with gains", "vp": "W_VP"}


class Panel(NamedTuple):
    """What one heat map shows."""

    title: str
    values: np.ndarray
    """[layers, heads]."""
    highest: float
    """End of the scale, which begins at 0: the most that a head can have, so that models of a shape compare by eye."""


def write_attention_figure(results: Mapping[str, Any], path: Path) -> None:
    """Draw the results of an `attention` run as an SVG file."""
    with drawing():
        save_svg(attention_figure(results), path)


def attention_figure(results: Mapping[str, Any]) -> Figure:
    """The heat maps of `panels`, three a row; layers go down, heads across."""
    shown = panels(results)
    rows = -(-len(shown) // _COLUMNS)
    layers, heads = shown[0].values.shape
    cell = min(0.3, 2.6 / heads, 4.2 / layers)
    width, height = max(1.6, cell * heads), max(1.2, cell * layers)
    figure = Figure(figsize=(_COLUMNS * (width + 1.5), rows * (height + 1.1)), layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axes, panel in zip(grid.flat, shown, strict=False):
        _heat_map(axes, panel)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    return figure


def panels(results: Mapping[str, Any]) -> list[Panel]:
    """Pseudo-ranks of each product and, where there are maps, entropy, sink mass and previous-token mass.

    The pseudo-rank is that at 0.95 of Σσ, or at the nearest threshold that was asked for.
    """
    layers = results["layers"]
    threshold = summary_label(layers[0]["vp"]["pseudo_rank"])
    found = [
        Panel(
            f"{name}: pseudo-rank ({threshold})",
            np.array([layer[product]["pseudo_rank"][threshold] for layer in layers], dtype=float),
            results["head_dim"],
        )
        for product, name in _PRODUCTS.items()
        if product in layers[0]
    ]
    if "maps" not in layers[0]:
        return found
    most_entropy = greatest_entropy(results["map_tokens"])
    for key, title, highest in (
        ("entropy", "Entropy of the map (nats)", most_entropy),
        ("sink", "Mass on the first token", 1.0),
        ("previous_token", "Mass on the previous token", 1.0),
    ):
        found.append(Panel(title, np.array([layer["maps"][key] for layer in layers]), highest))
    return found


def _heat_map(axes: Axes, panel: Panel) -> None:
    image = axes.imshow(panel.values, aspect="auto", cmap="viridis", vmin=0, vmax=panel.highest)
    axes.set_title(panel.title)
    axes.set_xlabel(f"head (mean over all: {panel.values.mean():.3g})")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, shrink=0.9).outline.set_visible(False)  # type: ignore[operator]
