"""Figures of what is inside the base models: probes, attention matrices, attention maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_plasticity.analysis.head_statistics import PRODUCTS
from megatron_plasticity.study.report.figures.outcomes import chance_line
from megatron_plasticity.study.report.figures.svg import INK, MUTED, Palette, panel, printable
from megatron_plasticity.study.report.figures.weight_decay_axis import WeightDecayAxis
from megatron_plasticity.study.scores import Estimate

_MAP_COLOUR = "#3f78c9"
"""A blue of middling lightness: it is seen on white and on black."""
_MOST_NUMBERED_LAYERS, _MOST_NUMBERED_HEADS = 8, 8
_MOST_TOKEN_LABELS = 16
_LEAST_SINGULAR = 1e-6
"""What lies below it, relative to the largest singular value, is rounding."""


def probe_figure(
    title: str, accuracies: Mapping[float, Sequence[Sequence[float]]], points: Sequence[str], chance: float, palette: Palette
) -> Figure:
    """Probe accuracy in per cent per layer, one line per λ: the mean over seeds, thin whiskers from the least to the greatest.

    `accuracies` is λ → [layer point][seed].
    """
    figure, axes = panel(380, 280, left=50, right=46)
    if chance:
        chance_line(axes, chance)
    places = np.arange(len(points))
    for decay, table in accuracies.items():
        means = [100 * float(np.mean(seeds)) if len(seeds) else np.nan for seeds in table]
        axes.plot(places, means, "o-", color=palette[decay], markersize=4)
        for place, seeds in zip(places, table, strict=True):
            if len(seeds) > 1:
                axes.plot([place, place], [100 * min(seeds), 100 * max(seeds)], color=palette[decay], linewidth=0.8, alpha=0.7)
    every = -(-len(points) // 10)
    axes.set_xticks(places[::every], [_point_label(point) for point in points[::every]])
    axes.set_xlabel("layer whose output is probed")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(title)
    return figure


def _point_label(point: str) -> str:
    """`layers.3.resid_post` → `3`; `embed` → `emb.`"""
    parts = point.split(".")
    return parts[1] if parts[0] == "layers" and len(parts) > 1 else "emb." if point == "embed" else printable(point)


def pseudo_rank_figure(matrix: str, ranks: Mapping[float, Sequence[float]], highest: float, axis: WeightDecayAxis) -> Figure:
    """Pseudo-rank (mean over heads) against λ: one thin line per layer, the deeper the darker, the mean over layers bold.

    `ranks` is λ → [layer].
    """
    figure, axes = panel(380, 270)
    decays = list(ranks)
    layers = max((len(values) for values in ranks.values()), default=0)
    for layer in range(layers):
        axis.line(
            axes, decays, [ranks[d][layer] for d in decays], color=MUTED, linewidth=0.9, alpha=0.25 + 0.75 * (layer + 1) / layers
        )
    axis.line(axes, decays, [float(np.mean(ranks[d])) for d in decays], color=INK, linewidth=2.4, marker="o", markersize=5)
    axes.set_ylim(0, 1.05 * highest)
    axes.set_title(f"{PRODUCTS[matrix]}: pseudo-rank")
    axes.set_ylabel("singular values that hold 95 %")
    axis.draw(axes, width=290)
    return figure


def spectrum_figure(matrix: str, layer: int, spectra: Mapping[float, Sequence[float]], least: float, palette: Palette) -> Figure:
    """Singular values relative to the largest, mean over heads, one line per λ.

    Logarithmic down to `least`, which gives all layers one scale.
    """
    figure, axes = panel(260, 210, left=66)
    for decay, values in spectra.items():
        axes.plot(
            range(1, len(values) + 1), [value if value > 0 else np.nan for value in values], color=palette[decay], linewidth=1.5
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(least / 1.3, _LEAST_SINGULAR), top=1.3)
    decades = math.ceil(-math.log10(max(least / 1.3, _LEAST_SINGULAR)))
    ticks = [10.0**-power for power in range(decades + 1)] if decades > 1 else [1, 0.5, 0.2, 0.1]
    axes.set_yticks([tick for tick in ticks if tick >= axes.get_ylim()[0]], minor=False)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_title(f"{PRODUCTS[matrix]}, layer {layer}")
    axes.set_xlabel("k")
    axes.set_ylabel("σₖ / σ₁")
    return figure


def head_map_figure(title: str, values: Sequence[Sequence[float]], highest: float) -> Figure:
    """One statistic of every head, `values` [layer][head], shaded from 0 to `highest`; small models show the numbers as well."""
    heads = np.asarray(values, dtype=float)
    layers, columns = heads.shape
    figure, axes = panel(210, 70 + min(200, max(60, 26 * layers)), left=30, right=6, top=24, bottom=40)
    image = np.empty((layers, columns, 4))
    image[..., :3] = to_rgb(_MAP_COLOUR)
    image[..., 3] = np.clip(np.nan_to_num(heads) / (highest or 1.0), 0, 1)
    axes.imshow(image, aspect="auto", interpolation="none")
    axes.grid(False)
    if layers <= _MOST_NUMBERED_LAYERS and columns <= _MOST_NUMBERED_HEADS:
        for layer, head in np.ndindex(layers, columns):
            axes.text(head, layer, f"{heads[layer, head]:.2g}", ha="center", va="center", fontsize=9, color=INK)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(f"head (mean {heads.mean():.3g})", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    for ticks in (axes.xaxis, axes.yaxis):
        ticks.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.tick_params(length=0, pad=2)
    axes.spines[["top", "right"]].set_visible(True)
    return figure


def truncation_figure(
    title: str,
    cut: Mapping[float, Mapping[int, Estimate]],
    control: Mapping[float, Mapping[int, Estimate]],
    palette: Palette,
) -> Figure:
    """Increase of the loss against the rank that is kept, one line per λ: λ → rank → increase. Controls are dashed."""
    figure, axes = panel(400, 280, left=62)
    # Ranks double from one to the next, and 0 has no logarithm: they stand side by side at equal distances.
    places = {rank: place for place, rank in enumerate(sorted({rank for ranks in cut.values() for rank in ranks}))}
    for lines, style, width in ((control, "--", 1.0), (cut, "-", 1.8)):
        for decay, ranks in lines.items():
            at = [places[rank] for rank in ranks if rank in places]
            known = [increase for rank, increase in ranks.items() if rank in places]
            axes.plot(at, [increase.value for increase in known], style, color=palette[decay], linewidth=width)
            for place, increase in zip(at, known, strict=True):
                if style == "-" and increase.low is not None and increase.high is not None:
                    axes.plot([place, place], [increase.low, increase.high], color=palette[decay], linewidth=1.0)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set_xticks(list(places.values()), [str(rank) for rank in places])
    axes.set_title(title)
    axes.set_xlabel("rank k that every head keeps")
    axes.set_ylabel("loss increase (nats per token)")
    return figure


def attention_map_figure(title: str, example: Mapping[str, Any]) -> Figure:
    """One head's attention weights (query down, key across); the shade is the square root of the weight over its maximum."""
    weights = np.asarray(example["weights"], dtype=float)
    tokens = [printable(str(token)).replace(" ", "·") for token in example["tokens"]]
    figure, axes = panel(210, 226, left=46, right=4, top=22, bottom=46)
    image = np.empty((*weights.shape, 4))
    image[..., :3] = to_rgb(_MAP_COLOUR)
    image[..., 3] = np.sqrt(np.clip(np.nan_to_num(weights), 0, None) / (np.nanmax(weights) or 1.0))
    axes.imshow(image, aspect="equal", interpolation="none")
    axes.grid(False)
    axes.set_title(title, fontsize=10)
    axes.tick_params(length=0, pad=2)
    if len(tokens) <= _MOST_TOKEN_LABELS:
        labels = [token if len(token) <= 7 else token[:6] + "…" for token in tokens]
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7.5)
        axes.set_yticks(range(len(labels)), labels, fontsize=7.5)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(f"key ({len(tokens)} tokens)", fontsize=9)
        axes.set_ylabel("query", fontsize=9)
    axes.spines[["top", "right"]].set_visible(True)
    return figure
