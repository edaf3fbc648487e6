"""Which figures a comparison gets: curves of each quantity over λ and over the AdamW timescale, side by side on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.figure import Figure

from megatron_plasticity.study.report.comparability import readability
from megatron_plasticity.study.report.comparison.common import Common, SharedOutcome
from megatron_plasticity.study.report.comparison.findings import Choice, GroupFindings, format_rates, points_of
from megatron_plasticity.study.report.comparison.internals import Quantity
from megatron_plasticity.study.report.drawings import Drawing
from megatron_plasticity.study.report.figures.comparison import (
    SYMMETRIC,
    GroupPalette,
    Line,
    Range,
    Scale,
    Scales,
    common_limits,
    key_mark,
    lines_figure,
    ranges_figure,
    steep,
)
from megatron_plasticity.study.report.figures.svg import render
from megatron_plasticity.study.scores import Estimate

_OVER = {"weight decay": "λ", "timescale": "the AdamW timescale"}


@dataclass(frozen=True)
class KeyEntry:
    """One group in the key of colours and markers."""

    mark: Markup
    label: str


@dataclass(frozen=True)
class RawLosses:
    """Losses as they were measured, of groups that were measured on the same held-out sequences."""

    drawings: list[Drawing]
    groups: str


class ComparisonDraughtsman:
    """Draws the figures of a comparison; lines keep their colour and marker in all of them."""

    def __init__(self, found: Sequence[GroupFindings]) -> None:
        self.found = found
        self.palette = GroupPalette(len(found))
        self.scales = Scales([each.group.timescales for each in found])

    def key(self, section: str) -> list[KeyEntry]:
        """What the lines mean, for one section of the page: each has its own, since ids are unique on a page."""
        return [
            KeyEntry(
                Markup(render(key_mark(index, self.palette), f"key-{section}-{index}", each.group.label, self.palette)),
                each.group.label,
            )
            for index, each in enumerate(self.found)
        ]

    def ranges(self) -> list[Drawing]:
        """The best λ of each group with its candidates, on both scales."""
        if all(each.by_loss is None and each.by_score is None for each in self.found):
            return []
        return [self._ranges(scale) for scale in self.scales.known]

    def _ranges(self, scale: Scale) -> Drawing:
        rows = [
            (index, each.group.label, self._range(scale, index, each.by_loss), self._range(scale, index, each.by_score))
            for index, each in enumerate(self.found)
        ]
        figure = ranges_figure(rows, scale, self.scales, self.palette)
        return self._drawing(figure, f"best-{scale}", f"Best weight decay of each group on the scale of {_OVER[scale]}")

    def _range(self, scale: Scale, group: int, choice: Choice | None) -> Range | None:
        if choice is None:
            return None

        def place(decay: float | None) -> float | None:
            return None if decay is None else self.scales.place(scale, group, decay)

        best = place(choice.best)
        if best is None:
            return None
        candidates = None if choice.candidates is None else [place(decay) for decay in choice.candidates]
        known = candidates is not None and None not in candidates
        weaker, stronger = choice.neighbours
        return Range(
            best, tuple(c for c in candidates or () if c is not None) if known else None, (place(weaker), place(stronger))
        )

    def mean_scores(self) -> list[Drawing]:
        """Mean score after fine-tuning; the best is ringed, and what loss would choose has a triangle under it."""
        lines = [
            Line(index, each.scores, each.by_score.best if each.by_score else None, each.by_loss.best if each.by_loss else None)
            for index, each in enumerate(self.found)
            if each.scores
        ]
        return self._pair(lines, "score", "mean score after fine-tuning (%)", factor=100.0)

    def mean_gains(self) -> list[Drawing]:
        """Mean gain from fine-tuning."""
        lines = [Line(index, each.gains) for index, each in enumerate(self.found) if each.gains]
        return self._pair(lines, "gain", "mean gain (percentage points)", factor=100.0, zero=True)

    def loss_rises(self) -> list[Drawing]:
        """Held-out loss above the lowest of its own group."""
        lines = [
            Line(index, each.loss_rises, each.by_loss.best if each.by_loss else None)
            for index, each in enumerate(self.found)
            if len(each.loss_rises) > 1
        ]
        return self._pair(lines, "loss", "loss above the group's lowest (nats)", zero=True, logarithmic=steep(lines))

    def raw_losses(self) -> list[RawLosses]:
        """One pair of figures for each set of groups whose losses are of the same sequences."""
        alike: dict[str, list[int]] = {}
        for index, each in enumerate(self.found):
            if each.losses and each.group.facts.held_out is not None:
                alike.setdefault(f"{each.group.facts.held_out} {each.losses_of}", []).append(index)
        found = []
        for number, groups in enumerate(indexes for indexes in alike.values() if len(indexes) > 1):
            lines = [Line(i, {d: Estimate(loss) for d, loss in self.found[i].losses.items()}) for i in groups]
            drawings = self._pair(lines, f"raw-{number}", "held-out loss (nats per token)")
            found.append(RawLosses(drawings, ", ".join(self.found[i].group.label for i in groups)))
        return found

    def tasks(self, common: Common, quantity: str) -> dict[Scale, list[Drawing]]:
        """`score` or `gain` of each task that two groups share: scale → one panel per task."""
        drawings: dict[Scale, list[Drawing]] = {}
        for outcome in common.all_outcomes:
            lines = []
            for index, each in enumerate(self.found):
                if index in outcome.runs and (values := points_of(each.outcome(outcome.name), quantity)):
                    lines.append(Line(index, values))
            if not lines:
                continue
            for scale in self.scales.known:
                drawings.setdefault(scale, []).append(self._task(outcome, lines, scale, quantity))
        return drawings

    def _task(self, outcome: SharedOutcome, lines: Sequence[Line], scale: Scale, quantity: str) -> Drawing:
        scores = outcome.evaluated.scores
        is_score = quantity == "score"
        figure = lines_figure(
            lines,
            scale,
            self.scales,
            self.palette,
            label="correct, greedy (%)" if is_score else "gain (points)",
            title=f"{outcome.name}  ({scores.questions} questions)",
            factor=100.0,
            chance=scores.chance if is_score else None,
            zero=not is_score,
            small=True,
        )
        told = "" if is_score else self._readable(outcome, [line.group for line in lines])
        what = "Score" if is_score else "Gain"
        return self._drawing(figure, f"{quantity}-{outcome.name}-{scale}", f"{what} on {outcome.name} over {_OVER[scale]}", told)

    def _readable(self, outcome: SharedOutcome, groups: Sequence[int]) -> str:
        """What to say where base models give few readable answers: once if all groups do, else of those that do."""
        rates = {group: format_rates(outcome, group, self.found[group].group) for group in groups}
        told = {group: readability(outcome.task, {outcome.task: found}) for group, found in rates.items()}
        if all(told.values()):
            return readability(outcome.task, {outcome.task: [rate for found in rates.values() for rate in found]})
        return " ".join(f"{self.found[group].group.label}: {text}" for group, text in told.items() if text)

    def quantities(self, quantities: Sequence[Quantity]) -> list[Drawing]:
        """What was measured inside the models, each over both scales."""
        drawings = []
        for quantity in quantities:
            lines = [Line(index, values) for index, values in quantity.values.items()]
            drawings += self._pair(
                lines,
                quantity.name,
                quantity.unit,
                factor=quantity.factor,
                title=quantity.title,
                chance=quantity.chance,
                zero=quantity.zero,
                limits=quantity.limits,
            )
        return drawings

    def _pair(
        self,
        lines: Sequence[Line],
        name: str,
        label: str,
        *,
        factor: float = 1.0,
        title: str = "",
        chance: float | None = None,
        zero: bool = False,
        logarithmic: bool = False,
        limits: tuple[float, float] | None = None,
    ) -> list[Drawing]:
        if not lines:
            return []
        if limits is None and not logarithmic:
            limits = common_limits(lines, factor)
        return [
            self._drawing(
                lines_figure(
                    lines,
                    scale,
                    self.scales,
                    self.palette,
                    label=label,
                    title=title,
                    factor=factor,
                    limits=limits,
                    chance=chance,
                    zero=zero,
                    logarithmic=logarithmic,
                ),
                f"{name}-{scale}",
                f"{title or label} over {_OVER[scale]}",
                f"The vertical axis is logarithmic above {SYMMETRIC:g} nats." if logarithmic else "",
            )
            for scale in self.scales.known
        ]

    def _drawing(self, figure: Figure, name: str, description: str, caption: str = "") -> Drawing:
        return Drawing(Markup(render(figure, f"comparison-{name}", description, self.palette)), caption)
