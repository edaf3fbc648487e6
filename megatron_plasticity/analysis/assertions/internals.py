"""Statements on what is inside the base models: probes (A5) and attention matrices (A6)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_plasticity.analysis.assertions.curves import LEAST_FOR_TREND, Curve, curve, flatness, trend, widest
from megatron_plasticity.analysis.assertions.losses import MORE_DECAYS, too_few, trend_text
from megatron_plasticity.analysis.assertions.verdict import (
    CANNOT_BE_SAID,
    DOES_NOT_HOLD,
    HOLDS,
    Assertion,
    assertion,
    fixed,
    verdict_on_all,
)

FLAT_RANK = 0.1
"""Share of the width of a head within which a pseudo-rank is nearly flat: the paper says that W_VP's stays near full. Our own
choice of what near is."""
_USEFUL = " of the useful range"


def probes_rise(accuracies: Mapping[str, Mapping[int, Curve]] | str) -> Assertion:
    """A5: the accuracy of linear probes rises with λ at each layer.

    `accuracies` is data set → layer → accuracy over λ, a mean over the seeds of the probe; or why there is none. Spearman's rank
    correlation with λ is tested by the exact permutation of the λ. It holds if *every* layer of every data set rises at 0.025,
    one-sided; since all have to, no correction is due. It does not hold if the mean over the layers of some data set falls at
    0.025 over the number of data sets, or a single layer at 0.025 over the number of layers.
    """
    if isinstance(accuracies, str):
        return assertion("A5", CANNOT_BE_SAID, accuracies)
    tables = [found for layers in accuracies.values() for found in layers.values()]
    fewest = min(len(found.weight_decays) for found in tables)
    if fewest < LEAST_FOR_TREND:
        return assertion("A5", CANNOT_BE_SAID, too_few(fewest, _USEFUL))
    directions = {
        (name, layer): 0 if (found := trend(table)) is None else found.direction()
        for name, layers in accuracies.items()
        for layer, table in layers.items()
    }
    rising = sum(direction > 0 for direction in directions.values())
    evidence = f"It rises reliably in {rising} of {len(tables)} pairs of data set and layer."
    fallen = _fallen(accuracies, len(tables))
    if rising == len(tables):
        return assertion("A5", HOLDS, evidence)
    if fallen:
        return assertion("A5", DOES_NOT_HOLD, evidence, f"It falls reliably with λ in {fallen}.")
    weakest = min(
        ((name, layer, found) for name, layers in accuracies.items() for layer, t in layers.items() if (found := trend(t))),
        key=lambda item: item[2].correlation,
        default=None,
    )
    where = "" if weakest is None else f"Weakest in layer {weakest[1]} of {weakest[0]}: {trend_text(weakest[2], 'accuracy')}"
    return assertion("A5", CANNOT_BE_SAID, evidence, where, MORE_DECAYS)


def _fallen(accuracies: Mapping[str, Mapping[int, Curve]], tables: int) -> str:
    """Where accuracy reliably falls, in words; empty if nowhere."""
    for name, layers in accuracies.items():
        decays = sorted(set.intersection(*(set(table.weight_decays) for table in layers.values())))
        mean = curve(decays, np.mean([table.only(decays).values for table in layers.values()], axis=0))
        found = trend(mean)
        if found is not None and found.direction(len(accuracies)) < 0:
            return f"the mean over the layers of {name}"
        for layer, table in layers.items():
            found = trend(table)
            if found is not None and found.direction(tables) < 0:
                return f"layer {layer} of {name}"
    return ""


def pseudo_rank_falls(qk: Curve | str, vp: Curve | str, head_dim: float | None) -> Assertion:
    """A6: the pseudo-rank of W_QK falls with λ, that of W_VP is nearly flat.

    Both are means over heads, with heads resampled; or why there is none. *Falls*: Spearman's rank correlation with λ is negative
    by its bootstrap interval and by the exact permutation of the λ at 0.025. *Nearly flat*: the intervals of all differences
    between λ lie within a tenth of `head_dim`, the largest possible rank; one beyond refutes it. Where the width is not known, it
    stays open.
    """
    if isinstance(qk, str) or isinstance(vp, str):
        return assertion("A6", CANNOT_BE_SAID, qk if isinstance(qk, str) else vp if isinstance(vp, str) else "")
    spread = f"W_VP's pseudo-rank differs by {fixed(widest(vp, vp.weight_decays), 1)} over λ"
    if head_dim:
        margin = FLAT_RANK * head_dim
        flat = flatness(vp, vp.weight_decays, margin)
        width = f"{spread}, of a head's {head_dim:.0f}; nearly flat is {fixed(margin, 1)}."
    else:
        flat = None
        width = f"{spread}, but the width of a head is not in the results of `attention`, so what is flat is not known."
    if len(qk.weight_decays) < LEAST_FOR_TREND:
        return assertion("A6", verdict_on_all((None, flat)), too_few(len(qk.weight_decays), _USEFUL), width)
    found = trend(qk)
    direction = 0 if found is None else found.direction()
    falls = True if direction < 0 else False if direction > 0 else None
    return assertion("A6", verdict_on_all((falls, flat)), "" if found is None else trend_text(found, "W_QK's pseudo-rank"), width)
