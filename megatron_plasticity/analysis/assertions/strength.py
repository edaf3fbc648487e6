"""A8: what too little and far too much λ do."""

from __future__ import annotations

import math

from megatron_plasticity.analysis.assertions.curves import Curve, Difference, difference, flatness, widest
from megatron_plasticity.analysis.assertions.losses import wrong_length
from megatron_plasticity.analysis.assertions.translation import SHORT, Setting
from megatron_plasticity.analysis.assertions.verdict import (
    CANNOT_BE_SAID,
    Assertion,
    assertion,
    decay_text,
    decays_text,
    fixed,
    verdict_on_all,
)

FLAT_BELOW, COLLAPSE_AT = 0.1, 10.0
"""The λ that A8 names."""
FLAT_LOSS = 0.02
"""Nats per token within which losses are flat: somewhat more than the 0.012 that the paper's OLMo-1B at 140 tokens per parameter
changes from λ = 0.1 to 0.3 (2.6088 and 2.6208, from one reading), and a fifth of what it changes up to λ = 1."""
FLAT_SCORE = 0.02
"""Share of questions within which scores are flat, two percentage points. Our own choice: what the paper's scores change from one
λ to another is known from figures only."""
COLLAPSED_LOSS = 0.5
"""Nats per token above the lowest loss from which a model has collapsed: five times the largest rise that is known of the paper,
0.098 (OLMo-1B at 140 tokens per parameter, λ = 0.1 to 1). Our own choice."""
COLLAPSED_SCORE = 0.5
"""Share of the best score, both less what guessing scores, below which a model has collapsed. Our own choice."""


def flat_below_and_collapse_above(losses: Curve | None, scores: Curve | None, setting: Setting, chance: float = 0.0) -> Assertion:
    """A8: the effect of λ is flat below 0.1, and models collapse at 10; both on the paper's scale (see `translation.py`).

    The paper's λ from 1e-4 to 10 were run at 20 tokens per parameter; the statement is tested on runs of about that length. Of
    held-out loss and of the mean score after fine-tuning; `chance` is what guessing scores. It holds only if all four parts are
    known: each of the two flat and collapsed. *Flat*:
    all differences between λ of at most 0.1 lie, with their intervals, within 0.02 nats and within two percentage points.
    *Collapse*: at the smallest λ of at least 10 the loss is 0.5 nats above the lowest, and the score, less chance, below half of
    the best. One part that is refuted by more than noise refutes the statement.
    """
    known = {
        name: found for name, found in (("loss", losses), ("score", scores)) if found is not None and found.resampled is not None
    }
    if not known:
        return assertion("A8", CANNOT_BE_SAID, "Neither losses on the same sequences nor scores are known of several λ.")
    decays = sorted({decay for found in known.values() for decay in found.weight_decays})
    small = setting.that_are(decays, "at_most", FLAT_BELOW)
    large = setting.that_are(decays, "at_least", COLLAPSE_AT)[:1]
    lacking = []
    if len(small) < 2:
        lacking.append(
            f"the grid has {len(small) or 'no'} λ that is surely at most the paper's {FLAT_BELOW:g}, and flatness takes two"
        )
    if not large:
        lacking.append(f"the grid has no λ that is surely as large as the paper's {COLLAPSE_AT:g}")
    parts: list[bool | None] = [None] * len(lacking)
    seen, unknown = [], []
    for name in ("loss", "score"):
        found = known.get(name)
        has = [] if found is None else found.weight_decays
        below = [decay for decay in small if decay in has]
        if found is not None and len(below) > 1:
            parts.append(flatness(found, below, FLAT_LOSS if name == "loss" else FLAT_SCORE))
            seen.append(f"the {name} differs by {_text(name, widest(found, below))} over {decays_text(below)}")
        elif len(small) > 1:
            parts.append(None)
            unknown.append(f"the {name} is not known at {decays_text(decay for decay in small if decay not in has)}")
        for decay in large:
            if found is not None and decay in has:
                parts.append(collapsed_by_loss(found, decay) if name == "loss" else collapsed_by_score(found, decay, chance))
                seen.append(f"at {decay_text(decay)} the {name} is {_text(name, _from_best(name, found, decay))} from the best")
            else:
                parts.append(None)
                unknown.append(f"the {name} is not known at {decay_text(decay)}")
    lack = "; ".join(lacking)
    saw = "; ".join(seen)
    missing = f"Missing: {'; '.join(unknown)}." if unknown else ""
    if not setting.is_about(SHORT):
        return assertion("A8", CANNOT_BE_SAID, wrong_length(setting, SHORT), f"Here {saw}." if saw else "", missing)
    return assertion(
        "A8",
        verdict_on_all(parts),
        f"{saw[0].upper()}{saw[1:]}." if saw else "",
        f"{lack[0].upper()}{lack[1:]}: add it." if lack else "",
        missing,
    )


def collapsed_by_loss(losses: Curve, weight_decay: float) -> bool | None:
    """Whether the loss at λ is `COLLAPSED_LOSS` above the lowest, or None where its interval leaves that open."""
    lowest = min(losses.weight_decays, key=losses.at)
    if lowest == weight_decay:
        return False
    return _beyond(difference(losses, lowest, weight_decay), COLLAPSED_LOSS)


def collapsed_by_score(scores: Curve, weight_decay: float, chance: float) -> bool | None:
    """Whether the score at λ, less chance, is below half of the best, or None where its interval leaves that open."""
    best = max(scores.weight_decays, key=scores.at)
    if best == weight_decay:
        return False
    above = difference(scores, best, weight_decay, scale=COLLAPSED_SCORE)
    left = _beyond(above, chance * (1 - COLLAPSED_SCORE))
    return None if left is None else not left


def _beyond(found: Difference, bound: float) -> bool | None:
    return True if found.low >= bound else False if found.high < bound else None


def _from_best(name: str, found: Curve, weight_decay: float) -> float:
    return abs(found.at(weight_decay) - (min if name == "loss" else max)(found.at(decay) for decay in found.weight_decays))


def _text(name: str, value: float) -> str:
    assert math.isfinite(value)
    return f"{fixed(value, 4)} nats" if name == "loss" else f"{fixed(100 * value, 1)} points"
