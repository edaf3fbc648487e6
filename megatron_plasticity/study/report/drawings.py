"""Which figures a group of base models gets: takes the results apart, draws each figure, and names it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from megatron_plasticity.analysis.head_statistics import PRODUCTS
from megatron_plasticity.study.report.comparability import readability
from megatron_plasticity.study.report.features import FeaturesView, features_view
from megatron_plasticity.study.report.figures import internals, training
from megatron_plasticity.study.report.figures import outcomes as outcome_figures
from megatron_plasticity.study.report.figures.svg import Palette, render
from megatron_plasticity.study.report.figures.weight_decay_axis import WeightDecayAxis
from megatron_plasticity.study.report.heads import loss_increases, statistics_of_heads
from megatron_plasticity.study.report.tables import stages_of
from megatron_plasticity.study.results import BaseModel, Group, Outcome
from megatron_plasticity.study.scores import Estimate, TaskScores, estimate, number

_MOST_LAYERS = 4
"""Layers whose spectra are drawn; of a deeper model the first, the last and some between."""
_MOST_HEADS = 3
_MOST_MAP_COLUMNS = 4
_CURVES = {
    "train/loss": ("Training loss", "nats per token"),
    "held_out/loss": ("Held-out loss", "nats per token"),
    "train/gradient_norm": ("Gradient norm (before clipping)", "L2 norm"),
    "train/learning_rate_times_weight_decay": ("Learning rate × λ", "share decayed per step"),
}

_CLASSES = {"mlp": "MLP", "norm": "norm gains", "head": "output head"}


@dataclass(frozen=True)
class Drawing:
    """One figure on the page. `svg` comes from our own renderer, which escapes what it draws."""

    svg: Markup
    caption: str = ""


class Draughtsman:
    """Draws the figures of one group of base models. `prefix` tells groups apart on the page."""

    def __init__(self, group: Group, palette: Palette, prefix: str) -> None:
        self.models = group.models
        self.palette = palette
        self.prefix = prefix
        self.axis = WeightDecayAxis([model.weight_decay for model in group.models])

    def _drawing(self, figure: Figure, name: str, description: str, caption: str = "") -> Drawing:
        return Drawing(Markup(render(figure, f"{self.prefix}-{name}", description, self.palette)), caption)

    def loss(self, caption: str) -> Drawing | None:
        """Held-out loss against λ; None without any loss."""
        if all(model.held_out_loss is None for model in self.models):
            return None
        figure = outcome_figures.loss_figure(self.models, self.palette, self.axis)
        return self._drawing(figure, "loss", "Held-out loss against weight decay", caption)

    def tasks(
        self, outcomes: Sequence[Outcome], curves: Mapping[str, Mapping[str, Any]], readable: Mapping[str, Sequence[float]]
    ) -> list[Drawing]:
        """One panel per task that has a score, of the mean over the ways of fine-tuning where there are several.

        `curves` are the statistics by task, `readable` is how often the base models gave a readable answer.
        """
        drawings = []
        for task in dict.fromkeys(outcome.task for outcome in outcomes):
            of_task = [outcome for outcome in outcomes if outcome.task == task]
            scores = [s for model in self.models for _, _, s in stages_of(model, of_task) if s is not None]
            if not scores:
                continue
            tuned = [self._greedy([model.finetuned_scores.get(outcome.name) for model in self.models]) for outcome in of_task]
            several = len(of_task) > 1
            figure = outcome_figures.task_figure(
                task,
                self._greedy([model.base_scores.get(task) for model in self.models]),
                _estimates(curves.get(task, {}), "score") if several else tuned[0],
                max(s.questions for s in scores),
                next((s.chance for s in scores if s.chance is not None), None),
                self.palette,
                self.axis,
                tuned if several else (),
            )
            lines = f"Thin lines are the {len(of_task)} ways of fine-tuning, dots their mean." if several else ""
            caption = " ".join(text for text in (lines, readability(task, readable)) if text)
            drawings.append(self._drawing(figure, f"task-{task}", f"Score of {task} against weight decay", caption))
        return drawings

    def _greedy(self, scores: Sequence[TaskScores | None]) -> dict[float, Estimate]:
        """λ → greedy score; `scores` are of the group's models."""
        known = zip(self.models, scores, strict=True)
        return {model.weight_decay: s.metrics["greedy"] for model, s in known if s is not None and "greedy" in s.metrics}

    def over_steps(self, over_steps: Mapping[int, Mapping[str, Any]]) -> list[Drawing]:
        """Mean score and gain after fine-tuning from each step of pretraining; empty if only the last was."""
        drawings = []
        for quantity, title, unit in (
            ("score", "Score after fine-tuning", "correct, greedy (%)"),
            ("gain", "Gain from fine-tuning", "percentage points"),
        ):
            lines: dict[float, dict[int, Estimate]] = {}
            for step, statistics in over_steps.items():
                for decay, found in _estimates(statistics.get("mean") or {}, quantity).items():
                    lines.setdefault(decay, {})[step] = found
            if lines:
                figure = training.plasticity_figure(title, unit, dict(sorted(lines.items())), self.palette)
                drawings.append(self._drawing(figure, f"steps-{quantity}", f"{title} against the step of pretraining"))
        return drawings

    def ranks(self, losses: Mapping[float, float], scores: Mapping[float, float], caption: str) -> Drawing | None:
        """Slope chart of the λ that have a loss and a mean fine-tuned score; None for fewer than two."""
        both = [decay for decay in losses if decay in scores]
        if len(both) < 2:
            return None
        figure = outcome_figures.rank_figure({d: losses[d] for d in both}, {d: scores[d] for d in both}, self.palette)
        return self._drawing(figure, "ranks", "Rank of each weight decay by held-out loss and by mean fine-tuned score", caption)

    def gaps(self) -> list[Drawing]:
        """Train–validation gap against λ, and by tenth of the run, or of its first pass if it went over the data again."""
        gaps = {d: found for d, results in self._results("overfitting") if (found := estimate(results.get("gap")))}
        deciles = {d: [estimate(v) for v in results.get("by_decile") or ()] for d, results in self._results("overfitting")}
        deciles = {d: values for d, values in deciles.items() if any(values)}
        drawings = []
        if gaps:
            drawings.append(
                self._drawing(
                    outcome_figures.gap_figure(gaps, self.palette, self.axis), "gap", "Train–validation gap against weight decay"
                )
            )
        if deciles:
            passes = max((m.passes for m in self.models if m.passes is not None and m.overfitting), default=1.0)
            figure = outcome_figures.decile_figure(deciles, self.palette, passes)
            drawings.append(self._drawing(figure, "deciles", "Gap by when the sequences were first seen"))
        return drawings

    def probes(self) -> dict[str, list[Drawing]]:
        """Variant (`standardised`, `raw`) → one panel per labelled text set."""
        gathered: dict[str, dict[str, dict[float, Mapping[str, Any]]]] = {}
        chances: dict[str, float] = {}
        texts: dict[str, float | None] = {}
        for decay, results in self._results("probes"):
            for dataset, entry in (results.get("datasets") or {}).items():
                chances[dataset] = number(entry.get("chance")) or 0.0
                texts[dataset] = number(entry.get("test_texts"))
                for variant, table in (entry.get("variants") or {}).items():
                    gathered.setdefault(variant, {}).setdefault(dataset, {})[decay] = table
        drawings: dict[str, list[Drawing]] = {}
        for variant, datasets in gathered.items():
            for dataset, tables in datasets.items():
                accuracies = {decay: table["accuracy"] for decay, table in tables.items()}
                points = next(iter(tables.values()))["points"]
                figure = internals.probe_figure(dataset, accuracies, points, chances[dataset], self.palette)
                description = f"Probe accuracy per layer on {dataset}"
                drawn = self._drawing(figure, f"probe-{variant}-{dataset}", description, _probe_precision(texts[dataset]))
                drawings.setdefault(variant, []).append(drawn)
        return drawings

    def pseudo_ranks(self) -> list[Drawing]:
        """Pseudo-rank at 95 % of the sum against λ, for both matrices on one scale."""
        drawings = []
        for matrix in PRODUCTS:
            ranks, highest = {}, 1.0
            for decay, results in self._results("attention"):
                per_layer = [_at(layer[matrix]["pseudo_rank"], 0.95) for layer in results.get("layers") or ()]
                if per_layer and all(per_layer):
                    ranks[decay] = [sum(heads) / len(heads) for heads in per_layer]
                    highest = float(results.get("head_dim") or max(ranks[decay]))
            if ranks:
                figure = internals.pseudo_rank_figure(matrix, ranks, highest, self.axis)
                drawings.append(
                    self._drawing(figure, f"rank-{matrix}", f"Pseudo-rank of {matrix} per layer against weight decay")
                )
        return drawings

    def spectra(self) -> list[list[Drawing]]:
        """Normalised singular values of both matrices (rows) for a few layers (columns)."""
        found = [
            (decay, results["mean_spectrum"]) for decay, results in self._results("attention") if results.get("mean_spectrum")
        ]
        rows = []
        for matrix in PRODUCTS:
            layers = spread(min((len(spectrum.get(matrix) or ()) for _, spectrum in found), default=0), _MOST_LAYERS)
            least = min((value for _, s in found for layer in layers for value in s[matrix][layer] if value > 0), default=1.0)
            row = []
            for layer in layers:
                values = {decay: spectrum[matrix][layer] for decay, spectrum in found}
                figure = internals.spectrum_figure(matrix, layer, values, least, self.palette)
                row.append(self._drawing(figure, f"spectrum-{matrix}-{layer}", f"Singular spectrum of {matrix} in layer {layer}"))
            rows.append(row)
        return [row for row in rows if row]

    def heads(self) -> list[list[Drawing]]:
        """Every head as a cell of layer × head: statistics (rows) for a few λ from the least to the greatest (columns)."""
        found = list(self._results("attention"))
        rows: dict[str, list[Drawing]] = {}
        for index in self._shown([decay for decay, _ in found]):
            decay, results = found[index]
            for title, values, highest in statistics_of_heads(results):
                figure = internals.head_map_figure(f"{title}, λ = {decay:.3g}", values, highest)
                drawn = self._drawing(figure, f"heads-{title}-{decay!r}", f"{title} of every head at weight decay {decay:.3g}")
                rows.setdefault(title, []).append(drawn)
        return list(rows.values())

    def truncations(self) -> list[Drawing]:
        """Loss against the rank that heads keep, for both products."""
        results = dict(self._results("truncation"))
        drawings = []
        for product, name in PRODUCTS.items():
            cut, control = (loss_increases(results, product, which) for which in ("truncated", "control"))
            if cut:
                figure = internals.truncation_figure(f"{name} of every head cut to rank k", cut, control, self.palette)
                drawings.append(self._drawing(figure, f"truncation-{product}", f"Loss increase against the rank kept of {name}"))
        return drawings

    def _shown(self, decays: Sequence[float]) -> list[int]:
        """A few indices of ascending λ where not all have room: the ends, the one with the least loss, others between."""
        losses = {model.weight_decay: loss for model in self.models if (loss := model.held_out_loss) is not None}
        known = [index for index, decay in enumerate(decays) if decay in losses]
        best = [min(known, key=lambda index: losses[decays[index]])] if known else []
        chosen = dict.fromkeys([*spread(len(decays), 2), *best, *spread(len(decays), _MOST_MAP_COLUMNS)])
        return sorted(list(chosen)[:_MOST_MAP_COLUMNS])

    def attention_maps(self) -> list[list[Drawing]]:
        """Maps of a few heads (rows) for a few λ from the least to the greatest (columns)."""
        found = [(decay, results["example_maps"]) for decay, results in self._results("attention") if results.get("example_maps")]
        found = [found[index] for index in self._shown([decay for decay, _ in found])]
        heads = across_layers(dict.fromkeys((example["layer"], example["head"]) for _, examples in found for example in examples))
        return [
            [
                self._drawing(
                    internals.attention_map_figure(f"λ = {decay:.3g}, layer {layer}, head {head}", example),
                    f"map-{decay!r}-{layer}-{head}",
                    f"Attention map of layer {layer}, head {head} at weight decay {decay:.3g}",
                )
                for decay, examples in found
                for example in examples
                if (example["layer"], example["head"]) == (layer, head)
            ]
            for layer, head in heads
        ]

    def features(self) -> FeaturesView | None:
        """Dormant units, ranks, norms and step sizes; None where they were not measured."""
        return features_view(self.models, self.palette, self.axis, self._drawing)

    def curves(self) -> list[Drawing]:
        """Training curves and weight norms, for every metric that some run logged."""
        logged = dict.fromkeys(name for model in self.models for name in model.pretrain.metrics)
        norms = {
            name: (f"{kind} norm: {_CLASSES.get(name.split('/', 1)[1], name.split('/', 1)[1].replace('_', ' '))}", "L2 norm")
            for prefix, kind in (("weight_norm/", "Weight"), ("update_norm/", "Update"))
            for name in logged
            if name.startswith(prefix)
        }
        drawings = []
        for name, (title, unit) in {**_CURVES, **norms}.items():
            curves = {m.weight_decay: m.pretrain.metrics[name] for m in self.models if name in m.pretrain.metrics}
            if curves:
                figure = training.curve_figure(title, unit, curves, self.palette)
                drawings.append(self._drawing(figure, f"curve-{name}", f"{title} over the steps"))
        return drawings

    def _results(self, kind: str) -> Iterator[tuple[float, Mapping[str, Any]]]:
        get: Callable[[BaseModel], Any] = {
            "probes": lambda m: m.probes, "attention": lambda m: m.attention, "overfitting": lambda m: m.overfitting,
            "truncation": lambda m: m.truncation,
        }[kind]  # fmt: skip
        for model in self.models:
            if (cell := get(model)) is not None:
                yield model.weight_decay, cell.results


def _estimates(curve: Mapping[str, Any], quantity: str) -> dict[float, Estimate]:
    """λ → `score` or `gain` of the statistics of a curve."""
    return {row["weight_decay"]: found for row in curve.get("scores", ()) if (found := estimate(row.get(quantity)))}


def _probe_precision(texts: float | None) -> str:
    """How far an accuracy on so many test texts can be off: 1.96 standard errors at one half, where they are largest."""
    if not texts:
        return ""
    return f"{texts:.0f} test texts: an accuracy is known to about ±{100 * 1.96 * (0.25 / texts) ** 0.5:.0f} points."


def across_layers(heads: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """A few (layer, head), ascending: the first head given of the first, a middle and the last layer, then further heads."""
    given = list(heads)
    layers = sorted({layer for layer, _ in given})
    wanted = [layers[index] for index in spread(len(layers), _MOST_HEADS)]
    first = [next(head for head in given if head[0] == layer) for layer in wanted]
    return sorted([*first, *(head for head in given if head not in first)][:_MOST_HEADS])


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0 … count − 1, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def _at(by_threshold: Mapping[str, Any], threshold: float) -> Any:
    """The entry for a threshold whose key may be written `0.9` or `0.90`; None if there is none."""
    return next((value for key, value in by_threshold.items() if abs(float(key) - threshold) < 1e-9), None)
