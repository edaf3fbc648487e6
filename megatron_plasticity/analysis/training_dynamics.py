"""How large a training run's steps were for its weights: from its log, without the model.

The loss of a network with norms hardly depends on the scale of its weight matrices, so what a step does is told by its size
relative to them: the effective learning rate η/‖W‖ (after van Laarhoven, 1706.05350) and the relative update ‖ΔW‖/‖W‖. AdamW's
update has a size of its own, whatever the gradient's; it makes weights grow, decay makes them shrink, and where the two balance
the relative update depends neither on the loss nor on the layer, but on the hyperparameters alone (Kosson, Messmer and Jaggi,
"Rotational equilibrium", 2305.17212, whose model is a random walk: gradients of different steps are uncorrelated):

    ‖ΔW‖/‖W‖ = √(2·η·λ · (1 − β₁)/(1 + β₁))

With β₁ = 0 that is √(2ηλ). The factor is the momentum's: it averages gradients, so that single updates are smaller, while their
sum over time is the same. docs/features.md derives it and says where it does not hold.

The weights come near that balance within about 1/(η·λ) steps. As a share of the run that is the AdamW timescale (Wang and
Aitchison, 2405.13698): a run whose timescale is above 1 ends before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from megatron_plasticity.config.training import FinetuneConfig, TrainingRecipe, adamw_timescale
from megatron_plasticity.models.sizes import parameter_class
from megatron_plasticity.optim.decay import decay_groups
from megatron_plasticity.optim.schedule import learning_rate_at

TIMESCALE_OF_BEST_LOSS = (0.25, 0.84)
"""Least and greatest AdamW timescale at the λ of best validation loss, over four models of Han et al. (2602.11137): our
arithmetic on the λ that they found and on their recipes."""


def training_dynamics(
    recipe: TrainingRecipe, total_steps: int, rows: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Sizes of the steps of a run, class by class, against what its hyperparameters predict.

    `{"timescale": {"of_run", "position"}, "gradient_norm", "steps": [n], "learning_rate": [n], "classes": {class: {"weight_norm",
    "update_norm", "effective_learning_rate", "relative_update", "equilibrium": [n] each}}, "summary": {class: {"relative_update",
    "effective_learning_rate", "over_equilibrium"}}}`.

    The n steps are those whose norms were logged. `equilibrium` is null for a class of which not all decays, and so is
    `over_equilibrium`: the relative update over the equilibrium's, median over the logged steps whose learning rate is at least
    half of its peak, since weights cannot follow the ends of a schedule. The other numbers of the summary are those of the last
    logged step. `gradient_norm` is the mean global norm over the last tenth of the
    steps, before clipping; null where none was logged. Without decay `of_run` is null.

    Args:
        recipe: the run's config.
        total_steps: steps for which its schedule was made.
        rows: its log, in the order of the steps.
        shapes: whole shapes of the model's parameters by name.
    """
    weight_decay = recipe.optimizer.resolved_weight_decay(total_steps)
    logged = [row for row in rows if any(name.startswith("weight_norm/") for name in row)]
    steps = [int(row["step"]) for row in logged]
    rates = [learning_rate_at(step - 1, total_steps, recipe.optimizer.learning_rate, recipe.schedule) for step in steps]
    decays = [recipe.optimizer.decay_per_step(weight_decay, rate) for rate in rates]
    beta = recipe.optimizer.betas[0]
    decaying = _decaying_classes(recipe, weight_decay, shapes)
    classes: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(map(parameter_class, shapes)):
        weights, updates = ([_number(row.get(f"{what}_norm/{kind}")) for row in logged] for what in ("weight", "update"))
        classes[kind] = {
            "weight_norm": weights,
            "update_norm": updates,
            "effective_learning_rate": _ratios(rates, weights),
            "relative_update": _ratios(updates, weights),
            "equilibrium": [equilibrium(decay, beta) for decay in decays] if kind in decaying else None,
        }
    high = [rate >= recipe.optimizer.learning_rate / 2 for rate in rates]
    timescale = adamw_timescale(
        recipe.optimizer.decay_per_step(weight_decay, recipe.optimizer.learning_rate), total_steps
    )  # at the peak learning rate
    return {
        "timescale": {"of_run": timescale, "position": timescale_position(timescale)},
        "gradient_norm": _mean_over_last_tenth(rows, "train/gradient_norm"),
        "steps": steps,
        "learning_rate": rates,
        "classes": classes,
        "summary": {kind: _summary(found, high) for kind, found in classes.items()} if steps else {},
    }


def equilibrium(decay_per_step: float, beta: float) -> float:
    """√(2·decay·(1 − β₁)/(1 + β₁)), the relative update ‖ΔW‖/‖W‖ of AdamW in rotational equilibrium.

    Source: Kosson et al. (2305.17212), for a random walk; `decay_per_step` is η·λ. Our own derivation is in docs/features.md.
    """
    return math.sqrt(2 * decay_per_step * (1 - beta) / (1 + beta))


def timescale_position(timescale: float | None) -> str:
    """`below`, `within` or `above` the range that it has at the paper's best validation losses; `infinite` without decay."""
    if timescale is None:
        return "infinite"
    low, high = TIMESCALE_OF_BEST_LOSS
    # Those ends are known to two digits.
    rounded = float(f"{timescale:.2g}")
    return "below" if rounded < low else "above" if rounded > high else "within"


def _decaying_classes(recipe: TrainingRecipe, weight_decay: float, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Classes all of whose parameters decay. With adapters none does: what decays are their factors, not the weights."""
    if weight_decay == 0 or (isinstance(recipe, FinetuneConfig) and recipe.lora is not None):
        return set()
    groups = decay_groups(shapes, recipe.optimizer, weight_decay)
    return {parameter_class(name) for name in groups.decayed} - {parameter_class(name) for name in groups.not_decayed}


def _summary(found: Mapping[str, Any], high: Sequence[bool]) -> dict[str, float | None]:
    return {
        "relative_update": found["relative_update"][-1],
        "effective_learning_rate": found["effective_learning_rate"][-1],
        "over_equilibrium": _over_equilibrium(found["relative_update"], found["equilibrium"], high),
    }


def _over_equilibrium(
    updates: Sequence[float | None], predicted: Sequence[float] | None, counted: Sequence[bool]
) -> float | None:
    if predicted is None:
        return None
    steps = zip(updates, predicted, counted, strict=True)
    ratios = [update / expected for update, expected, counts in steps if counts and update is not None and expected > 0]
    return median(ratios) if ratios else None


def _ratios(above: Sequence[float | None], below: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or not b else a / b for a, b in zip(above, below, strict=True)]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _mean_over_last_tenth(rows: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    found = {int(row["step"]): value for row in rows if (value := _number(row.get(metric))) is not None}
    last = max(found, default=0)
    return fmean(value for step, value in found.items() if step > 0.9 * last) if last else None
