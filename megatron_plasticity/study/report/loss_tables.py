"""The tables of loss: one row per base model, and what is known of neighbouring λ on the same sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_plasticity.study.report.figures.weight_decay_axis import timescale_text
from megatron_plasticity.study.report.tables import Entry, Table, decimals, estimate_entry, table
from megatron_plasticity.study.results import BaseModel
from megatron_plasticity.study.scores import estimate, number


def model_table(models: Sequence[BaseModel], paired: Mapping[str, Any] | None = None) -> Table:
    """Losses of each base model, those of one row all from one measurement: the overfitting run's where there is one.

    `paired` (see `analysis/paired_losses.py`) adds in how many resamples of the sequences a λ has the lowest held-out loss.
    """
    shares = {row["weight_decay"]: row["share"] for row in paired["lowest_held_out_loss"]["distribution"]} if paired else {}
    columns = {
        "λ": True,
        "timescale": True,
        "held-out loss": True,
        **({"lowest %": True} if shares else {}),
        "seen loss": True,
        "gap": True,
        "losses of": False,
        "steps": True,
        "tokens": True,
        "state": False,
    }
    rows = []
    for model in models:
        results = model.pretrain.results
        source, name = (model.overfitting.results, "overfitting") if model.overfitting else (results, "pretraining")
        losses = [number(source.get(key)) for key in ("held_out_loss", "seen_loss")]
        share = shares.get(model.weight_decay)
        rows.append(
            (
                f"{model.weight_decay:.3g}",
                timescale_text(model.pretrain.adamw_timescale, model.weight_decay),
                decimals(losses[0], 4),
                *(["–" if share is None else f"{100 * share:.0f}"] if shares else []),
                decimals(losses[1], 4),
                estimate_entry(estimate(source.get("gap")), share=False, digits=4),
                name if any(loss is not None for loss in losses) else "–",
                _count(results.get("steps")),
                _count(results.get("tokens")),
                Entry(model.pretrain.status, look=model.pretrain.status),
            )
        )
    return table(columns, rows)


def paired_loss_table(paired: Mapping[str, Any] | None) -> Table | None:
    """Differences of neighbouring λ in gap and held-out loss with paired intervals; None where there is no comparison."""
    if not paired:
        return None
    columns = {"from λ": True, "to λ": True, "change of the gap": True, "change of held-out loss": True}
    rows = [
        (
            *(f"{decay:.3g}" for decay in pair["weight_decays"]),
            estimate_entry(estimate(pair["gap"]), share=False, digits=4),
            estimate_entry(estimate(pair["held_out_loss"]), share=False, digits=4),
        )
        for pair in paired["neighbours"]
    ]
    return table(columns, rows)


def paired_loss_caption(paired: Mapping[str, Any] | None) -> str:
    """What the table of differences is, in words."""
    if not paired:
        return ""
    left_out = ", ".join(f"{decay:.3g}" for decay in paired["left_out"])
    return (
        f"Change from one λ to the next in nats per token, on the same {paired['sequences']} seen and "
        f"{paired['held_out_sequences']} held-out sequences, which are resampled together: how hard the texts are cancels, so "
        "these intervals are mostly narrower than those of the single λ. They say nothing of other training seeds."
        + (f" Left out, since measured on other sequences: λ = {left_out}." if left_out else "")
    )


def _count(value: Any) -> str:
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else "–"
