"""The tables of the section on plasticity, from the statistics of `analysis/plasticity.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_plasticity.study.report.findings import MEAN, Findings
from megatron_plasticity.study.report.tables import Entry, Table, decimals, estimate_entry, percent, table
from megatron_plasticity.study.scores import estimate

LEGEND = (
    ("Gain", "score after fine-tuning minus score of the base model on the same questions, in percentage points"),
    (
        "Base has an answer",
        "share of the base models' samples from which an answer can be read, mean over λ, and in brackets the least and the "
        "greatest; where it is small, the gain also measures learning the form",
    ),
    (
        "Best λ",
        "the λ with the highest score after fine-tuning; the range holds the middle 95 % of the choices that bootstrap "
        "resamples of the questions make",
    ),
    (
        "Over loss’s choice",
        "score at the best λ minus score at the λ with the least held-out loss, with a paired interval. Since the best λ was "
        "picked on the same questions, it leans upwards",
    ),
    ("Area", "mean height of the curve over log λ by the trapezoid rule; λ = 0 counts as one step below the smallest positive λ"),
    (
        "Discordant pair",
        "two λ of which the one with the worse loss scores better after fine-tuning; p-values are not corrected for the "
        "number of pairs",
    ),
    (
        "Correlation",
        "of held-out loss and score over λ, with its range when any one λ is left out; −1 would mean that loss alone orders "
        "the scores",
    ),
)


@dataclass(frozen=True)
class TitledTable:
    """A table with its heading; `folded` ones are opened by a click."""

    title: str
    table: Table
    folded: bool = False


def plasticity_tables(found: Findings, readable: Mapping[str, Sequence[float]]) -> list[TitledTable]:
    """Best λ, gains, loss against score, and discordant pairs; empty without any score.

    `readable` holds for each task how often each base model gave a readable answer.
    """
    curves = found.curves
    if not curves:
        return []
    return curve_tables(curves, found.statistics["weight_decays"], readable)


def curve_tables(
    curves: Mapping[str, Mapping[str, Any]],
    weight_decays: Sequence[float],
    readable: Mapping[str, Sequence[float]] | None = None,
    of: str = "",
) -> list[TitledTable]:
    """The tables of some curves; with `of`, the end of their titles, all of them folded."""
    folded = bool(of)
    tables = [
        TitledTable(f"Best λ{of}", _best(curves), folded),
        TitledTable(
            f"Gain from fine-tuning at each λ, percentage points{of}", _gains(curves, weight_decays, readable or {}), folded
        ),
        TitledTable(f"Loss against score{of}", _agreement(curves), folded),
    ]
    pairs = _discordant_pairs(curves)
    if pairs.rows:
        tables.append(TitledTable(f"All {len(pairs.rows)} discordant pairs{of}", pairs, folded=True))
    return tables


def name_entry(task: str) -> Entry:
    """The first field of a row."""
    return Entry(task, look="strong" if task == MEAN else "")


def best_entries(best: Mapping[str, Any]) -> tuple[str, str]:
    """Best λ with its ties, and the range of choices."""
    tied = "".join(f" = {decay:.3g}" for decay in best["ties"])
    low, high = f"{best['low']:.3g}", f"{best['high']:.3g}"
    return f"{best['weight_decay']:.3g}" + tied, low if best["low"] == best["high"] else f"{low} to {high}"


def at_each(curve: Mapping[str, Any], weight_decays: Sequence[float], quantity: str) -> list[Entry]:
    """`gain` or `score` at each λ."""
    return [estimate_entry(_at(curve, decay, quantity)) for decay in weight_decays]


def _best(curves: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = {
        "task": False,
        "best λ": True,
        "range of choices": True,
        "score there %": True,
        "over loss’s choice, points": True,
        "area, score %": True,
        "area, gain": True,
    }
    rows = []
    for task, curve in curves.items():
        best = curve["best"]
        rows.append(
            (
                name_entry(task),
                *best_entries(best),
                estimate_entry(_at(curve, best["weight_decay"], "score")),
                estimate_entry(estimate(curve.get("advantage"))),
                estimate_entry(estimate(curve["area"].get("score"))),
                estimate_entry(estimate(curve["area"].get("gain"))),
            )
        )
    return table(columns, rows)


def _at(curve: Mapping[str, Any], weight_decay: float, quantity: str) -> Any:
    return next((estimate(row.get(quantity)) for row in curve["scores"] if row["weight_decay"] == weight_decay), None)


def _gains(
    curves: Mapping[str, Mapping[str, Any]], weight_decays: Sequence[float], readable: Mapping[str, Sequence[float]]
) -> Table:
    columns = {
        "task": False,
        **{f"λ = {decay:.3g}": True for decay in weight_decays},
        **({"base has an answer %": True} if readable else {}),
    }
    return table(
        columns,
        [
            (
                name_entry(task),
                *at_each(curve, weight_decays, "gain"),
                *([_readable_entry(task, readable)] if readable else []),
            )
            for task, curve in curves.items()
        ],
    )


def _readable_entry(task: str, readable: Mapping[str, Sequence[float]]) -> Entry:
    """Mean of the rates over λ, with the least and the greatest; for the mean of tasks the mean alone."""
    if task == MEAN:
        return Entry(percent(sum(sum(rates) / len(rates) for rates in readable.values()) / len(readable)))
    rates = readable.get(task, ())
    if not rates:
        return Entry("–")
    return Entry(percent(sum(rates) / len(rates)), f"{percent(min(rates))} to {percent(max(rates))}" if len(rates) > 1 else "")


def _agreement(curves: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = {
        "task": False,
        "discordant pairs": True,
        "Pearson": True,
        "leaving one λ out": True,
        "Spearman": True,
        "leaving one λ out ": True,
    }
    rows = []
    for task, curve in curves.items():
        discordant = curve["discordant"]
        fields = [name_entry(task), f"{len(discordant['discordant'])} of {discordant['pairs']}"]
        for name in ("pearson", "spearman"):
            correlation = curve["correlation"].get(name) or {}
            fields.append(decimals(correlation.get("value"), 2))
            fields.append(
                f"{decimals(correlation['low'], 2)} to {decimals(correlation['high'], 2)}" if "low" in correlation else "–"
            )
        rows.append(fields)
    return table(columns, rows)


def _discordant_pairs(curves: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = {
        "task": False,
        "λ with the better loss": True,
        "λ with the better score": True,
        "loss difference": True,
        "score difference, points": True,
        "p (bootstrap)": True,
        "p (sign test)": True,
    }
    rows = [
        (
            name_entry(task),
            f"{pair['better_loss']:.3g}",
            f"{pair['better_score']:.3g}",
            decimals(pair["loss_difference"], 4),
            estimate_entry(estimate(pair["score_difference"])),
            _p_value(pair.get("bootstrap_p")),
            _p_value(pair.get("sign_p")),
        )
        for task, curve in reversed(list(curves.items()))
        for pair in curve["discordant"]["discordant"]
    ]
    return table(columns, rows)


def _p_value(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
