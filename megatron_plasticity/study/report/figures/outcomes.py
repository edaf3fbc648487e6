"""Figures of what a study is about: loss, scores, ranks and the train–validation gap against λ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import rankdata

from megatron_plasticity.study.report.figures.svg import ACCENT, GRID, INK, MUTED, SURFACE, Palette, panel
from megatron_plasticity.study.report.figures.weight_decay_axis import WeightDecayAxis
from megatron_plasticity.study.results import BaseModel
from megatron_plasticity.study.scores import Estimate

_GAP = "\u2002\u2002"  # en spaces: SVG folds ordinary ones


def loss_figure(models: Sequence[BaseModel], palette: Palette, axis: WeightDecayAxis) -> Figure:
    """Held-out loss against λ, with the AdamW timescale on top and the least loss ringed."""
    figure, axes = panel(460, 310, top=44)
    points = {model.weight_decay: loss for model in models if (loss := model.held_out_loss) is not None}
    axis.line(axes, list(points), list(points.values()), color=MUTED)
    for decay, loss in points.items():
        axes.plot([axis(decay)], [loss], "o", color=palette[decay], markersize=7, markeredgecolor=SURFACE)
    if points:
        best = min(points, key=points.__getitem__)
        axes.plot(
            [axis(best)], [points[best]], "o", markersize=14, markerfacecolor="none", markeredgecolor=ACCENT, markeredgewidth=1.6
        )
        low, high = min(points.values()), max(points.values())
        margin = (high - low or 0.1) * 0.12
        axes.set_ylim(low - 2.2 * margin, high + margin)
        axes.annotate(
            f"least loss: λ = {best:.3g}, {points[best]:.3f}",
            (axis(best), points[best]),
            xytext=(0, -13),
            textcoords="offset points",
            ha=_side(axis, best),
            va="top",
            color=ACCENT,
        )
    axes.set_ylabel("held-out loss (nats per token)")
    axis.draw(axes, {model.weight_decay: model.pretrain.adamw_timescale for model in models}, width=380)
    return figure


def _side(axis: WeightDecayAxis, weight_decay: float) -> str:
    """Alignment that keeps a label of the point inside the axes."""
    low, high = axis.limits
    share = (axis(weight_decay) - low) / (high - low)
    return "left" if share < 0.25 else "right" if share > 0.75 else "center"


def task_figure(
    task: str,
    base: Mapping[float, Estimate],
    tuned: Mapping[float, Estimate],
    questions: int,
    chance: float | None,
    palette: Palette,
    axis: WeightDecayAxis,
    variants: Sequence[Mapping[float, Estimate]] = (),
) -> Figure:
    """Score of one task in per cent against λ: base model dashed, fine-tuned solid, 95 % intervals, chance dotted.

    `variants` are scores by λ after each way of fine-tuning, drawn as thin lines behind their mean.
    """
    figure, axes = panel(320, 240, left=50, right=46)
    for scores in variants:
        axis.line(axes, list(scores), [100 * score.value for score in scores.values()], color=MUTED, linewidth=0.8, alpha=0.35)
    _estimates(axes, axis, base, palette, style="--", filled=False)
    _estimates(axes, axis, tuned, palette, style="-", filled=True)
    if chance:
        chance_line(axes, chance)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if axes.get_ylim()[0] < 8 else None)
    axes.set_title(f"{task}  ({questions} questions)")
    axes.set_ylabel("correct, greedy (%)")
    axis.draw(axes, width=255)
    return figure


def chance_line(axes: Axes, chance: float) -> None:
    """A dotted line at the score of guessing, named at its right end outside the axes. `chance` is a fraction."""
    axes.axhline(100 * chance, color=ACCENT, linestyle=":", linewidth=1.2)
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
    axes.annotate("chance", (1, 100 * chance), xytext=(3, 0), ha="left", va="center", color=ACCENT, fontsize=9, **place)


def _estimates(
    axes: Axes,
    axis: WeightDecayAxis,
    estimates: Mapping[float, Estimate],
    palette: Palette,
    *,
    style: str,
    filled: bool,
    scale: float = 100.0,
) -> None:
    decays = list(estimates)
    axis.line(
        axes, decays, [scale * estimates[d].value for d in decays], style=style, color=MUTED, linewidth=1.4 if filled else 1.1
    )
    for decay, estimate in estimates.items():
        if estimate.low is not None and estimate.high is not None:
            axes.plot(
                [axis(decay)] * 2,
                [scale * estimate.low, scale * estimate.high],
                color=palette[decay],
                linewidth=1.6 if filled else 1.0,
            )
        face = palette[decay] if filled else SURFACE
        axes.plot(
            [axis(decay)],
            [scale * estimate.value],
            "o",
            color=palette[decay],
            markerfacecolor=face,
            markersize=6 if filled else 5,
        )


def rank_figure(losses: Mapping[float, float], scores: Mapping[float, float], palette: Palette) -> Figure:
    """Slope chart: rank of each λ by held-out loss at the left and by mean fine-tuned score at the right.

    1 is best; equal λ share the average of their ranks.
    """
    decays = sorted(losses, key=losses.__getitem__)
    left, right = average_ranks(losses), average_ranks({decay: -score for decay, score in scores.items()})
    figure, axes = panel(440, 50 + 32 * len(decays), left=4, right=4, top=4, bottom=4)
    for decay in decays:
        axes.plot([0, 1], [left[decay], right[decay]], color=palette[decay], linewidth=2.6, solid_capstyle="round")
        axes.plot([0, 1], [left[decay], right[decay]], "o", color=palette[decay], markersize=8, markeredgecolor=SURFACE)
    look: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
    for rank, tied in _by_rank(left).items():
        text = f"{rank:g}{_GAP}{tied}{_GAP}{losses[_first(left, rank)]:.3f}"
        axes.annotate(text, (0, rank), xytext=(-10, 0), ha="right", **look)
    for rank, tied in _by_rank(right).items():
        text = f"{100 * scores[_first(right, rank)]:.1f} %{_GAP}{tied}{_GAP}{rank:g}"
        axes.annotate(text, (1, rank), xytext=(10, 0), ha="left", **look)
    axes.set_ylim(len(decays) + 0.6, 0.1)
    axes.set_xlim(-0.75, 1.75)
    axes.text(0, 0.38, "rank by held-out loss", ha="center", color=MUTED)
    axes.text(1, 0.38, "rank after fine-tuning", ha="center", color=MUTED)
    axes.axis("off")
    return figure


def average_ranks(values: Mapping[float, float]) -> dict[float, float]:
    """λ → rank of its value, the least being 1; equal values share the average of their ranks."""
    found = rankdata([round(value, 12) for value in values.values()], method="average")  # sums in another order are equal
    return {decay: float(rank) for decay, rank in zip(values, found, strict=True)}


def _by_rank(ranks: Mapping[float, float]) -> dict[float, str]:
    """Rank → the λ that have it, as a label."""
    tied = {rank: [decay for decay in sorted(ranks) if ranks[decay] == rank] for rank in ranks.values()}
    return {rank: "λ = " + ", ".join(f"{decay:.3g}" for decay in decays) for rank, decays in tied.items()}


def _first(ranks: Mapping[float, float], rank: float) -> float:
    return next(decay for decay, found in ranks.items() if found == rank)


def gap_figure(gaps: Mapping[float, Estimate], palette: Palette, axis: WeightDecayAxis) -> Figure:
    """Held-out minus seen loss against λ with 95 % intervals."""
    figure, axes = panel(380, 270)
    axes.axhline(0, color=INK, linewidth=0.9)
    _estimates(axes, axis, gaps, palette, style="-", filled=True, scale=1.0)
    axes.set_ylabel("held-out − seen loss (nats)")
    axes.set_title("Train–validation gap")
    axis.draw(axes, width=300)
    return figure


def decile_figure(deciles: Mapping[float, Sequence[Estimate | None]], palette: Palette, passes: float = 1.0) -> Figure:
    """The gap by the tenth of the run in which the sequences were seen, one line per λ.

    Of a run that went over its data more than once (`passes`), the tenths are those of its first pass, for in the later ones
    every sequence came again.
    """
    figure, axes = panel(380, 286, bottom=58)
    axes.axhline(0, color=INK, linewidth=0.9)
    count = max(len(values) for values in deciles.values())
    for index, (decay, values) in enumerate(deciles.items()):
        shift = 0.35 * (index / max(1, len(deciles) - 1) - 0.5)  # intervals side by side, not over each other
        known = [(place + 1 + shift, value) for place, value in enumerate(values) if value]
        axes.plot([x for x, _ in known], [value.value for _, value in known], "o-", color=palette[decay], markersize=3.5)
        for x, value in known:
            if value.low is not None and value.high is not None:
                axes.plot([x, x], [value.low, value.high], color=palette[decay], linewidth=0.9, alpha=0.6)
    axes.set_xticks(range(1, count + 1))
    again = f"tenth of the first pass\n(each sequence was seen about {_times(passes)} times)"
    axes.set_xlabel(again if passes > 1 else "tenth of the run in which the sequences were seen")
    axes.set_ylabel("held-out − seen loss (nats)")
    axes.set_title("Gap by when it was seen")
    axes.tick_params(axis="x", color=GRID)
    return figure


def _times(passes: float) -> str:
    return f"{passes:.0f}" if passes >= 3 else f"{passes:.1f}"
