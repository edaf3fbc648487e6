"""Figures that compare groups of base models: one line and one marker per group, over λ or over the AdamW timescale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_plasticity.study.report.figures.outcomes import chance_line
from megatron_plasticity.study.report.figures.svg import GRID, MUTED, SURFACE, Palette, panel, printable
from megatron_plasticity.study.report.figures.timescale_axis import TimescaleAxis
from megatron_plasticity.study.report.figures.weight_decay_axis import WeightDecayAxis
from megatron_plasticity.study.scores import Estimate

Scale = Literal["weight decay", "timescale"]

_LIGHT = ("#0064a8", "#c24a00", "#00806a", "#a8408f", "#7a6500", "#5b4bb5", "#3f4a55", "#8a2b2b")
_DARK = ("#6cb8f2", "#ff9d5c", "#4fd0b0", "#e79ad3", "#d8c256", "#b3a6ff", "#b9c2cc", "#f09a93")
"""Hues of Okabe and Ito's palette for colour-blind readers, darkened until each has a contrast of 4.5 against a white page, and
lightened as much against a dark one. Markers tell the groups apart as well."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_SHIFT = 5.0
"""Pixels between the points of two groups at one λ, so that intervals stand side by side."""
SYMMETRIC = 0.01
"""Nats below which a rise of loss is drawn to scale, where the axis is logarithmic above."""
_STEEP = 6.0
"""Ratio of the largest rise to the median one from which on the axis of loss is logarithmic."""
_LONGEST_LABEL = 30


class GroupPalette(Palette):
    """One colour per group, by its place; after eight groups colours come again with another marker."""

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(range(min(count, len(_LIGHT))))
        self.light, self.dark = list(_LIGHT[: len(self.light)]), list(_DARK[: len(self.light)])

    def __getitem__(self, weight_decay: float) -> str:
        return super().__getitem__(int(weight_decay) % len(_LIGHT))

    def variable(self, weight_decay: float) -> str:
        return super().variable(int(weight_decay) % len(_LIGHT))

    def marker(self, group: int) -> str:
        return _MARKERS[(group + group // len(_LIGHT)) % len(_MARKERS)]


@dataclass(frozen=True)
class Line:
    """What is drawn of one group."""

    group: int
    """Its place in the palette."""
    values: Mapping[float, Estimate]
    """λ, ascending → value."""
    ringed: float | None = None
    """λ whose point is ringed."""
    chosen_by_loss: float | None = None
    """λ whose point is marked as the choice by loss."""


class Scales:
    """The two horizontal axes of a comparison, the same in each of its figures."""

    def __init__(self, timescales: Sequence[Mapping[float, float | None]]) -> None:
        """`timescales` are those of each group, λ → timescale."""
        self._timescales = timescales
        self._decays = WeightDecayAxis([decay for of_group in timescales for decay in of_group])
        known = [
            found for g in range(len(timescales)) for decay in timescales[g] if (found := self.timescale(g, decay)) is not None
        ]
        self._of_timescale = TimescaleAxis(known) if any(math.isfinite(value) for value in known) else None

    @property
    def known(self) -> tuple[Scale, ...]:
        """The timescale only where one is known."""
        return ("weight decay",) if self._of_timescale is None else ("weight decay", "timescale")

    def timescale(self, group: int, weight_decay: float) -> float | None:
        """Infinite for λ = 0, None where it is not known."""
        return math.inf if weight_decay == 0 else self._timescales[group].get(weight_decay)

    def axis(self, scale: Scale) -> WeightDecayAxis | TimescaleAxis:
        if scale == "timescale":
            assert self._of_timescale is not None
            return self._of_timescale
        return self._decays

    def place(self, scale: Scale, group: int, weight_decay: float) -> float | None:
        """What stands for λ of a group on an axis: λ, or its timescale; None where that is not known."""
        return weight_decay if scale == "weight decay" else self.timescale(group, weight_decay)


def key_mark(group: int, palette: GroupPalette) -> Figure:
    """A short piece of a group's line, for the key."""
    figure, axes = panel(34, 14, left=1, right=1, top=1, bottom=1)
    axes.plot([0, 1], [0, 0], color=palette[group], linewidth=1.8)
    axes.plot([0.5], [0], palette.marker(group), color=palette[group], markersize=6)
    axes.axis("off")
    return figure


def lines_figure(
    lines: Sequence[Line],
    scale: Scale,
    scales: Scales,
    palette: GroupPalette,
    *,
    label: str,
    title: str = "",
    factor: float = 1.0,
    limits: tuple[float, float] | None = None,
    chance: float | None = None,
    zero: bool = False,
    small: bool = False,
    logarithmic: bool = False,
) -> Figure:
    """Values with their intervals over λ or over the timescale, one line per group.

    `factor` multiplies the values (100 for per cent), `limits` are those of the vertical axis in drawn units, `chance` is a
    fraction, `zero` draws the line of zero.
    """
    width, height = (320, 240) if small else (470, 320)
    left, right = (54, 46 if chance else 12) if small else (66, 52 if chance else 14)
    figure, axes = panel(width, height, left=left, right=right, top=28 if title else 12)
    if chance:
        chance_line(axes, chance)
    if zero:
        axes.axhline(0, color=MUTED, linewidth=0.9)
    axis = scales.axis(scale)
    drawn = width - left - right
    decades_per_pixel = (axis.limits[1] - axis.limits[0]) / drawn
    if logarithmic:
        axes.set_yscale("symlog", linthresh=SYMMETRIC, linscale=0.6)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for index, line in enumerate(lines):
        # Timescales of two groups hardly ever coincide.
        beside = 0.0 if scale == "timescale" else 0.6 if small else 1.0
        shift = (index - (len(lines) - 1) / 2) * _SHIFT * decades_per_pixel * beside
        _line(axes, line, scale, scales, palette, shift, factor, small)
    if limits is not None:
        axes.set_ylim(*limits)
    axes.set_ylabel(label)
    if title:
        axes.set_title(title)
    axis.draw(axes, width=drawn)
    return figure


def _line(
    axes: Axes, line: Line, scale: Scale, scales: Scales, palette: GroupPalette, shift: float, factor: float, small: bool
) -> None:
    axis, colour = scales.axis(scale), palette[line.group]
    known = {
        decay: (place, found)
        for decay, found in line.values.items()
        if (place := scales.place(scale, line.group, decay)) is not None
    }
    if not known:
        return
    places, found = [place for place, _ in known.values()], [value for _, value in known.values()]
    axis.line(axes, places, [factor * value.value for value in found], shift=shift, color=colour, linewidth=1.3 if small else 1.7)
    for decay, (place, value) in known.items():
        x, y = axis(place) + shift, factor * value.value
        if value.low is not None and value.high is not None:
            axes.plot([x, x], [factor * value.low, factor * value.high], color=colour, linewidth=1.2, alpha=0.75)
        axes.plot(
            [x],
            [y],
            palette.marker(line.group),
            color=colour,
            markersize=5 if small else 7,
            markeredgecolor=SURFACE,
            markeredgewidth=0.6,
        )
        if decay == line.ringed:
            axes.plot([x], [y], "o", markersize=13, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.5)
        if decay == line.chosen_by_loss:
            look: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "top", "color": colour, "fontsize": 9}
            axes.annotate("▲", (x, y), xytext=(0, -10), **look)


def steep(lines: Sequence[Line]) -> bool:
    """Whether rises of loss span so much that a linear axis would hide the small ones."""
    rises = sorted(value.value for line in lines for value in line.values.values() if value.value > 0)
    return len(rises) > 2 and rises[-1] > max(_STEEP * rises[len(rises) // 2], 10 * SYMMETRIC)


def common_limits(lines: Sequence[Line], factor: float, bottom: float | None = None) -> tuple[float, float]:
    """Limits of the vertical axis that hold every interval of all lines, in drawn units."""
    ends = [
        factor * end
        for line in lines
        for value in line.values.values()
        for end in (value.value, value.low, value.high)
        if end is not None
    ]
    low, high = min(ends), max(ends)
    margin = 0.07 * (high - low) or 0.5
    return (low - 1.6 * margin if bottom is None else bottom, high + margin)


@dataclass(frozen=True)
class Range:
    """The best λ of one group by one judge, on a scale: λ or timescales."""

    best: float
    candidates: tuple[float, ...] | None
    """None where the noise is not known."""
    neighbours: tuple[float | None, float | None]
    """Of the candidates in the grid, the one with less decay first; None where the grid ends."""


def ranges_figure(
    rows: Sequence[tuple[int, str, Range | None, Range | None]], scale: Scale, scales: Scales, palette: GroupPalette
) -> Figure:
    """The best λ of each group by loss (hollow) and by score (full), one row per group.

    Bars run over the candidates, thin lines to their neighbours in the grid. `rows` are place in the palette, label, range by
    loss and range by score.
    """
    left = 20 + round(6.3 * max(len(_short(label)) for _, label, _, _ in rows))
    width = 330 + left
    figure, axes = panel(width, 66 + 46 * len(rows), left=left, right=16, top=8, bottom=44)
    axis = scales.axis(scale)
    for index, (group, _, by_loss, by_score) in enumerate(rows):
        if index:
            axes.axhline(index - 0.5, color=GRID, linewidth=0.8)
        for found, y, full in ((by_loss, index - 0.17, False), (by_score, index + 0.17, True)):
            if found is not None:
                _range(axes, axis, found, y, palette[group], "o" if full else "s", full)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [_short(label) for _, label, _, _ in rows])
    axes.tick_params(axis="y", labelcolor=MUTED, length=0)
    axes.grid(False)
    axis.draw(axes, width=width - left - 16)
    return figure


def _range(
    axes: Axes, axis: WeightDecayAxis | TimescaleAxis, found: Range, y: float, colour: str, marker: str, full: bool
) -> None:
    if found.candidates is not None:
        weaker, stronger = found.neighbours
        left = axis.limits[0] if weaker is None else axis(weaker)
        right = axis.limits[1] if stronger is None else axis(stronger)
        axes.plot([left, right], [y, y], color=colour, linewidth=1.0)
        places = [axis(candidate) for candidate in found.candidates]
        axes.plot([min(places), max(places)], [y, y], color=colour, linewidth=5.0, alpha=0.35, solid_capstyle="round")
        axes.plot(places, [y] * len(places), ".", color=colour, markersize=5)
    face = colour if full else SURFACE
    axes.plot([axis(found.best)], [y], marker, color=colour, markersize=8, markerfacecolor=face, markeredgewidth=1.6)


def _short(label: str) -> str:
    shown = printable(label)
    return shown if len(shown) <= _LONGEST_LABEL else shown[: _LONGEST_LABEL - 1] + "…"
