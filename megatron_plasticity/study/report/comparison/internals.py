"""What was measured inside the base models of at least two groups, in a form in which models of unlike size can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from megatron_plasticity.analysis.assertions.curves import Curve
from megatron_plasticity.analysis.bootstrap import interval
from megatron_plasticity.analysis.head_statistics import PRODUCTS
from megatron_plasticity.config.hashing import canonical
from megatron_plasticity.errors import UserError
from megatron_plasticity.study.report.assertions import probe_accuracies, pseudo_ranks
from megatron_plasticity.study.report.comparison.findings import GroupFindings
from megatron_plasticity.study.report.comparison.groups import ComparedGroup, LeftOut
from megatron_plasticity.study.report.comparison.terms import Terms, differences, leaves
from megatron_plasticity.study.results import BaseModel
from megatron_plasticity.study.scores import Estimate, estimate, number
from megatron_plasticity.tracking.run_folder import RunFolder

_NOT_OF_PROBES = ("datasets", "name")


@dataclass(frozen=True)
class Quantity:
    """One quantity over λ, of the groups that have it."""

    name: str
    title: str
    unit: str
    values: Mapping[int, Mapping[float, Estimate]]
    """Group → λ, ascending → value."""
    factor: float = 1.0
    """What values are multiplied by for `unit`."""
    chance: float | None = None
    zero: bool = False
    """Whether zero means something."""
    limits: tuple[float, float] | None = None
    """Of the vertical axis, in `unit`; None takes those of the values."""


def shared_quantities(found: Sequence[GroupFindings], settings: tuple[int, int]) -> tuple[list[Quantity], list[LeftOut]]:
    """Pseudo-ranks, probe accuracies and train–validation gaps; and what cannot be compared."""
    groups = [each.group for each in found]
    probes, left_out = _probes(groups)
    quantities = [*_pseudo_ranks(groups, settings), *probes, _gaps(groups)]
    return [quantity for quantity in quantities if len(quantity.values) > 1], left_out


def _pseudo_ranks(groups: Sequence[ComparedGroup], settings: tuple[int, int]) -> list[Quantity]:
    quantities = []
    for product, name in PRODUCTS.items():
        values = {}
        for index, group in enumerate(groups):
            ranks = pseudo_ranks(group.models, product, settings)
            width = _head_width(group.models)
            if isinstance(ranks, Curve) and width:
                values[index] = _estimates(ranks, 1 / width)
        title = f"{name}: pseudo-rank"
        unit = "share of a head's width (%)"
        quantities.append(Quantity(f"rank-{product}", title, unit, values, factor=100.0, limits=(0.0, 105.0)))
    return quantities


def _head_width(models: Sequence[BaseModel]) -> float | None:
    found = (number(model.attention.results.get("head_dim")) for model in models if model.attention)
    return next((width for width in found if width), None)


def _estimates(found: Curve, scale: float) -> dict[float, Estimate]:
    values = {}
    for index, decay in enumerate(found.weight_decays):
        value = float(found.values[index]) * scale
        if found.resampled is None:
            values[decay] = Estimate(value)
        else:
            values[decay] = Estimate(**interval(value, np.asarray(found.resampled[:, index]) * scale))
    return values


def _probes(groups: Sequence[ComparedGroup]) -> tuple[list[Quantity], list[LeftOut]]:
    """Mean accuracy over layers, of the sets whose probes were fitted alike in all groups that have them."""
    terms: dict[int, Terms] = {}
    accuracies: dict[str, dict[int, dict[float, Estimate]]] = {}
    chances: dict[str, float | None] = {}
    left_out: list[LeftOut] = []
    for index, group in enumerate(groups):
        layers = probe_accuracies(group.models)
        if isinstance(layers, str):
            continue
        own = _probe_terms(group.models)
        if own is None:
            left_out.append(LeftOut("probes", group.label, "how they were fitted cannot be read, or is not the same for all λ"))
            continue
        reference = next(iter(terms.items()), None)
        if reference is not None and (differing := differences(own, reference[1])):
            why = f"not fitted as in {groups[reference[0]].label}: {'; '.join(differing)}"
            left_out.append(LeftOut("probes", group.label, why))
            continue
        terms[index] = own
        for dataset, curves in layers.items():
            decays = sorted(set.intersection(*(set(found.weight_decays) for found in curves.values())))
            values = {decay: Estimate(fmean(found.at(decay) for found in curves.values())) for decay in decays}
            if values:
                accuracies.setdefault(dataset, {})[index] = values
                chances[dataset] = _chance(group.models, dataset)
    quantities = [
        Quantity(f"probe-{dataset}", f"Probes: {dataset}", "accuracy, mean over layers (%)", values, 100.0, chances[dataset])
        for dataset, values in accuracies.items()
    ]
    return quantities, left_out


def _probe_terms(models: Sequence[BaseModel]) -> Terms | None:
    """Settings and texts of the probes of a group, if they are known and the same for every λ."""
    found: list[Terms] = []
    for model in models:
        if model.probes is None:
            continue
        run = RunFolder(model.probes.folder)
        try:
            texts = {f"texts {name}": digest[:12] for name, digest in run.inputs.items() if name != "model"}
            settings = dict(leaves(canonical(run.config)))
        except UserError:
            return None
        found.append({**{path: value for path, value in settings.items() if path not in _NOT_OF_PROBES}, **texts})
    return found[0] if found and all(each == found[0] for each in found) else None


def _chance(models: Sequence[BaseModel], dataset: str) -> float | None:
    found = (number(((m.probes.results.get("datasets") or {}).get(dataset) or {}).get("chance")) for m in models if m.probes)
    return next((chance for chance in found if chance is not None), None)


def _gaps(groups: Sequence[ComparedGroup]) -> Quantity:
    values = {}
    for index, group in enumerate(groups):
        found = {
            model.weight_decay: gap
            for model in group.models
            if model.overfitting is not None and (gap := estimate(model.overfitting.results.get("gap"))) is not None
        }
        if found:
            values[index] = found
    return Quantity("gap", "Train–validation gap", "held-out − seen loss (nats)", values, zero=True)
