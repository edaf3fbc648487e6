"""The horizontal axis of the AdamW timescale: logarithmic, short timescales (much decay) at the right, as on the axis of λ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from megatron_plasticity.study.report.figures.weight_decay_axis import WeightDecayAxis

_MOST_TICKS = 7


class TimescaleAxis:
    """Places timescales. That of λ = 0 is infinite: it stands left of the others, behind a break mark."""

    def __init__(self, timescales: Sequence[float]) -> None:
        self._known = sorted({timescale for timescale in timescales if math.isfinite(timescale)})
        self._strengths = WeightDecayAxis([1 / timescale for timescale in timescales])
        self._infinite = any(math.isinf(timescale) for timescale in timescales)

    @property
    def limits(self) -> tuple[float, float]:
        """Ends of the axis, in decades."""
        return self._strengths.limits

    def __call__(self, timescale: float) -> float:
        """Horizontal position of a timescale."""
        return self._strengths(1 / timescale)

    def line(self, axes: Axes, timescales: Sequence[float], values: Sequence[float], **look: Any) -> None:
        """As `WeightDecayAxis.line`, over falling timescales."""
        self._strengths.line(axes, [1 / timescale for timescale in timescales], values, **look)

    def draw(self, axes: Axes, width: int = 300) -> None:
        """Round ticks, label and break mark. `width` is in pixels."""
        self._strengths.draw(axes, width=width)
        ticks = round_values(self._known[0], self._known[-1]) if self._known else []
        places = {-math.log10(tick): f"{tick:g}" for tick in ticks}
        if self._infinite:
            places[self(math.inf)] = "∞"
        axes.set_xticks(list(places), list(places.values()))
        axes.set_xlabel("AdamW timescale (share of the run); more decay →")


def round_values(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`, or every other one or fewer where these are too many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    slack = 1.02
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [digit * 10.0**decade for decade in decades for digit in digits]
        found = [value for value in found if low / slack <= value <= high * slack]
        if len(found) <= _MOST_TICKS:
            return found or [low]
    return found[:: -(-len(found) // _MOST_TICKS)]
