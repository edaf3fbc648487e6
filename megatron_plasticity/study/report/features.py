"""The section on features: dormant units, ranks, norms, and how large the training steps were for the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from megatron_plasticity.study.report.figures import features as figures
from megatron_plasticity.study.report.figures.svg import Palette
from megatron_plasticity.study.report.figures.weight_decay_axis import WeightDecayAxis, timescale_text
from megatron_plasticity.study.report.tables import Table, decimals, table
from megatron_plasticity.study.results import BaseModel
from megatron_plasticity.study.scores import number

if TYPE_CHECKING:
    from megatron_plasticity.study.report.drawings import Drawing

Draw = Callable[[Figure, str, str, str], "Drawing"]
"""Makes a drawing of a figure, its name on the page, its description for screen readers and its caption."""

_MATRICES = {"attention": "attention", "mlp": "MLP"}
"""Classes that are shown at once: the matrices inside the layers, which the model of equilibrium is about."""
_OTHERS = {"token_embedding": "token embedding", "head": "output head", "norm": "norm gains"}
_CLASSES = {**_MATRICES, **_OTHERS}


@dataclass(frozen=True)
class FeaturesView:
    """What the page shows of one group of base models."""

    layers: list[Drawing]
    """Drawings of dormant units, ranks and norms."""
    steps: list[Drawing]
    """Drawings of the sizes of the steps of attention and MLP."""
    other_steps: list[Drawing]
    """Those of the other classes of parameters."""
    balance: Table | None
    """λ against what the steps were, and what equilibrium predicts."""


def features_view(models: Sequence[BaseModel], palette: Palette, axis: WeightDecayAxis, draw: Draw) -> FeaturesView | None:
    """The section of a group; None where no features were measured."""
    found = {model.weight_decay: model.features.results for model in models if model.features is not None}
    found = {decay: results for decay, results in found.items() if results.get("layers")}
    if not found:
        return None
    trained = {decay: training for decay, results in found.items() if (training := results.get("training")) and training["steps"]}
    return FeaturesView(
        layers=_layers(found, palette, axis, draw),
        steps=[drawing for kind in _MATRICES for drawing in _steps(trained, kind, palette, draw)],
        other_steps=[drawing for kind in _OTHERS for drawing in _steps(trained, kind, palette, draw)],
        balance=_balance(models) if trained else None,
    )


def _layers(found: Mapping[float, Mapping[str, Any]], palette: Palette, axis: WeightDecayAxis, draw: Draw) -> list[Drawing]:
    layers = {decay: results["layers"] for decay, results in found.items()}
    thresholds = dict.fromkeys(threshold for rows in layers.values() for threshold in rows[0]["dormant_units"])
    shares = {
        threshold: {decay: [row["dormant_units"][threshold] for row in rows] for decay, rows in layers.items()}
        for threshold in thresholds
        if all(threshold in rows[0]["dormant_units"] for rows in layers.values())
    }
    drawings = [
        draw(
            figures.dormant_figure(shares, axis),
            "dormant",
            "Share of dormant units against weight decay",
            "Units whose mean |h| is at most τ times their layer's mean (Sokar et al., 2302.12902). Dots are means over layers, "
            "bars run from the least layer to the greatest.",
        )
    ]
    width = next(iter(found.values())).get("hidden_size")
    for key, title, caption in (
        (
            "entropy_rank",
            "Entropy effective rank of the features",
            f"exp(−Σ p·ln p), p = σ/Σσ, of {width} features (Roy and Vetterli, 2007).",
        ),
        (
            "srank",
            "srank of the features",
            "Least k with σ₁ + … + σₖ ≥ (1 − δ)·Σσ, where δ is 0.01 unless the config says otherwise (Kumar et al., 2010.14498).",
        ),
    ):
        values = {decay: [row["uncentred"][key] for row in rows] for decay, rows in layers.items()}
        figure = figures.layer_figure(title, "rank", values, palette)
        drawings.append(draw(figure, f"features-{key}", f"{title} after each layer", caption))
    centred = {decay: [row["centred"]["entropy_rank"] for row in rows] for decay, rows in layers.items()}
    figure = figures.layer_figure("Entropy effective rank, centred", "rank", centred, palette)
    caption = "Of the features without their mean: what varies from token to token."
    drawings.append(draw(figure, "features-centred", "Effective rank of centred features after each layer", caption))
    norms = {decay: [row["norm"]["mean"] for row in rows] for decay, rows in layers.items()}
    figure = figures.layer_figure("Norm of the features", "mean L2 norm", norms, palette, log=True)
    drawings.append(draw(figure, "features-norm", "Norm of the features after each layer", "Of the residual stream."))
    return drawings


def _steps(trained: Mapping[float, Mapping[str, Any]], kind: str, palette: Palette, draw: Draw) -> list[Drawing]:
    classes = {decay: training["classes"][kind] for decay, training in trained.items() if kind in training["classes"]}
    if not classes:
        return []
    steps = {decay: training["steps"] for decay, training in trained.items()}
    drawings = []
    for key, title, unit, caption in (
        (
            "relative_update",
            "Relative update",
            "‖ΔW‖ / ‖W‖",
            "Dashed: √(2ηλ·(1 − β₁)/(1 + β₁)), where it settles in rotational equilibrium (Kosson et al., 2305.17212).",
        ),
        ("effective_learning_rate", "Effective learning rate", "η / ‖W‖", "η over the Frobenius norm of the class."),
    ):
        predicted = {decay: found["equilibrium"] if key == "relative_update" else None for decay, found in classes.items()}
        sizes = {decay: found[key] for decay, found in classes.items()}
        figure = figures.step_size_figure(f"{title}: {_CLASSES[kind]}", unit, steps, sizes, predicted, palette)
        drawings.append(draw(figure, f"steps-{key}-{kind}", f"{title} of {_CLASSES[kind]} over the steps", caption))
    return drawings


def _balance(models: Sequence[BaseModel]) -> Table:
    """One row per λ: its timescale beside that of the paper's best losses, and relative updates over those of equilibrium."""
    columns = {
        "λ": True,
        "timescale": True,
        "against 0.25 to 0.84": False,
        **{f"{name}: ‖ΔW‖/‖W‖ over equilibrium": True for name in _MATRICES.values()},
        "gradient norm": True,
    }
    rows = []
    for model in models:
        training = (model.features.results.get("training") or {}) if model.features else {}
        summary = training.get("summary") or {}
        rows.append(
            (
                f"{model.weight_decay:.3g}",
                timescale_text(model.pretrain.adamw_timescale, model.weight_decay),
                str((training.get("timescale") or {}).get("position") or "–"),
                *(decimals(number((summary.get(kind) or {}).get("over_equilibrium")), 2) for kind in _MATRICES),
                decimals(number(training.get("gradient_norm")), 3),
            )
        )
    return table(columns, rows)
