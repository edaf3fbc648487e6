"""Statements on loss: the shape of its curve over λ (A1), where its optimum goes in longer runs (A2), and the gap (A7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from megatron_plasticity.analysis.assertions.curves import (
    LEAST_FOR_TREND,
    Curve,
    Trend,
    contenders,
    difference,
    trend,
)
from megatron_plasticity.analysis.assertions.translation import LONG, SHORT, Setting
from megatron_plasticity.analysis.assertions.verdict import (
    CANNOT_BE_SAID,
    Assertion,
    Verdict,
    assertion,
    combined,
    decay_text,
    decays_text,
    fixed,
    verdict_on_all,
)

PAPER_OPTIMUM = 0.1
"""The λ that A1 and A2 name."""
ABOUT = 2.0
"""Factor within which a λ is about 0.1: the next λ of the paper's grid at this length, 0.3, has to be outside."""
SEED_MARGIN = 0.01
"""Nats per token that two losses have to differ by, beyond their noise, to count in A1 and A4. The bootstrap knows sequences, not
training seeds: where the curve is flat, a seed alone puts humps of some thousandths of a nat into it. Our own choice."""
NO_LOSSES = (
    "There are no losses of several λ on the same sequences, so the noise of a difference is not known. Pretrain the models in "
    "the study, with `overfitting: {}` among its `analyses`."
)
MORE_DECAYS = "More values of λ would tell."


@dataclass(frozen=True)
class LossGroup:
    """Held-out loss of the base models of one group, in nats per token."""

    label: str
    losses: Curve | None
    setting: Setting


def loss_is_u_shaped(losses: Curve | None, setting: Setting) -> Assertion:
    """A1: at 20 tokens per parameter, validation loss is U-shaped in λ, with its optimum above 0.1.

    Two parts, in which a difference counts if its interval, corrected for all pairs, lies beyond 0.01 nats (`SEED_MARGIN`). *U*:
    some smaller and some larger λ have a higher loss than the lowest. A hump, a λ with a higher loss than one on either side,
    refutes it. *Above 0.1*: all λ that may have the lowest loss, those that no other beats, are above the paper's 0.1 (see
    `translation.py`); if all are at most 0.1, that refutes it.
    """
    if losses is None or losses.resampled is None:
        return assertion("A1", CANNOT_BE_SAID, no_losses(losses))
    is_u, shape = u_shape(losses)
    if not setting.is_about(SHORT):
        return assertion("A1", CANNOT_BE_SAID, wrong_length(setting, SHORT), f"Here {shape}")
    above = setting.that_are(losses.weight_decays, "above", PAPER_OPTIMUM)
    at_most = setting.that_are(losses.weight_decays, "at_most", PAPER_OPTIMUM)
    if not above or not at_most:
        lacking = "above" if not above else "at most"
        return assertion(
            "A1",
            CANNOT_BE_SAID,
            f"No λ of the grid is surely {lacking} the paper's 0.1; add one. Here {shape}",
            _translated(setting, losses),
        )
    best = set(contenders(losses, lowest=True, margin=SEED_MARGIN))
    is_above = True if best <= set(above) else False if best <= set(at_most) else None
    where = (
        f"It may be lowest at {decays_text(sorted(best))}, by the margin and noise; surely above the paper's 0.1 is "
        f"{decays_text(above)}."
    )
    return assertion("A1", verdict_on_all((is_u, is_above)), shape[0].upper() + shape[1:], where, _translated(setting, losses))


def u_shape(losses: Curve) -> tuple[bool | None, str]:
    """Whether the curve is a U, reliably so or not, or None; and a sentence, without its capital, that says what is seen."""
    decays = losses.weight_decays
    lowest = min(decays, key=losses.at)
    pairs = len(decays) * (len(decays) - 1) // 2
    for left, middle, right in combinations(decays, 3):
        if all(difference(losses, side, middle, pairs).beyond(SEED_MARGIN) > 0 for side in (left, right)):
            return False, (
                f"the loss has a hump: at {decay_text(middle)} it is higher than at both {decay_text(left)} and "
                f"{decay_text(right)}, by more than {SEED_MARGIN} nats and noise."
            )
    rises = {decay: difference(losses, lowest, decay, pairs) for decay in decays if decay != lowest}
    below = [decay for decay, rise in rises.items() if rise.beyond(SEED_MARGIN) > 0 and decay < lowest]
    above = [decay for decay, rise in rises.items() if rise.beyond(SEED_MARGIN) > 0 and decay > lowest]
    at = f"the loss is lowest at {decay_text(lowest)}"
    if below and above:
        ends = below[0], above[-1]
        higher = " and ".join(fixed(rises[decay].value, 4) for decay in ends)
        return True, (
            f"{at}, and higher by more than {SEED_MARGIN} nats and noise on both sides (by {higher} nats at {decays_text(ends)})."
        )
    open_sides = [name for name, found in (("smaller", below), ("larger", above)) if not found]
    beyond = " Extend the grid." if lowest in (decays[0], decays[-1]) and lowest > 0 else ""
    sides = " and no ".join(open_sides)
    return None, f"{at}, and no {sides} λ has a loss that is higher by more than {SEED_MARGIN} nats and noise.{beyond}"


def optimum_drops_in_longer_runs(groups: Sequence[LossGroup]) -> Assertion:
    """A2: at 140 tokens per parameter, the λ with the best validation loss drops to about 0.1.

    Compares groups of one model size at about 20 and about 140 tokens per parameter. *About 0.1*: the best λ of the long runs,
    translated by the paper's long recipe, lies within a factor of 2 of 0.1. *Drops*: it is below the best λ of the short runs,
    translated by theirs. Each has to be so of all λ that may be best, those that no other beats by more than noise, corrected for
    all pairs; what is so of none of them is refuted.
    """
    known = [group for group in groups if group.losses is not None and group.losses.resampled is not None]
    pairs = [
        (short, long)
        for short in known
        for long in known
        if short.setting.is_about(SHORT) and long.setting.is_about(LONG) and short.setting.same_model(long.setting)
    ]
    if not pairs:
        lengths = sorted({f"{tpp:.3g}" for group in groups if (tpp := group.setting.tokens_per_parameter) is not None}, key=float)
        seen = f"This study has {', '.join(lengths)} tokens per parameter. " if lengths else ""
        lacking = "" if any(group.losses is not None for group in groups) else " with `overfitting: {}` among the `analyses`"
        return assertion(
            "A2",
            CANNOT_BE_SAID,
            f"{seen}It takes one model at about {SHORT:.0f} and at about {LONG:.0f}, each over a grid of λ: put `tokens` on an "
            f"axis{lacking}.",
        )
    return combined([assertion("A2", *_drop(short, long)) for short, long in pairs])


def _drop(short: LossGroup, long: LossGroup) -> tuple[Verdict, str]:
    assert short.losses is not None
    assert long.losses is not None
    decays = long.losses.weight_decays
    bounds = (PAPER_OPTIMUM / ABOUT, PAPER_OPTIMUM * ABOUT)
    about = [
        d
        for d in decays
        if d in long.setting.that_are(decays, "at_least", bounds[0]) and d in long.setting.that_are(decays, "at_most", bounds[1])
    ]
    above = long.setting.that_are(decays, "above", bounds[1])
    if not about or not above:
        lacking = "about" if not about else "above"
        return CANNOT_BE_SAID, f"No λ at about {LONG:.0f} tokens per parameter is {lacking} the paper's 0.1; add one."
    of_long, of_short = (contenders(group, lowest=True) for group in (long.losses, short.losses))
    ranges = [(long.setting.in_the_paper(one), short.setting.in_the_paper(other)) for one in of_long for other in of_short]
    drops = all(one is not None and other is not None and one.high < other.low for one, other in ranges)
    stays = all(one is not None and other is not None and one.low >= other.high for one, other in ranges)
    best, best_short = (min(curve.weight_decays, key=curve.at) for curve in (long.losses, short.losses))
    evidence = (
        f"The best λ by loss is {_as_in_paper(short.setting, best_short)} at {short.setting.tokens_per_parameter:.3g} tokens per "
        f"parameter and {_as_in_paper(long.setting, best)} at {long.setting.tokens_per_parameter:.3g}. Within noise it may be "
        f"{decays_text(of_short)} in the short and {decays_text(of_long)} in the long runs; about the paper's 0.1 is "
        f"{decays_text(about)}."
    )
    parts = (
        True if set(of_long) <= set(about) else None if set(of_long) & set(about) else False,
        True if drops else False if stays else None,
    )
    return verdict_on_all(parts), evidence


def gap_falls(gaps: Curve | None) -> Assertion:
    """A7: the train–validation gap falls with λ.

    Spearman's rank correlation of gap and λ, tested twice: its bootstrap interval over sequences, which are the same ones for
    every λ, and the exact permutation of the λ at 0.025. It falls, or rises, only if both say so.
    """
    if gaps is None or gaps.resampled is None:
        return assertion("A7", CANNOT_BE_SAID, no_losses(gaps))
    if len(gaps.weight_decays) < LEAST_FOR_TREND:
        return assertion("A7", CANNOT_BE_SAID, too_few(len(gaps.weight_decays)))
    found = trend(gaps)
    if found is None:
        return assertion("A7", CANNOT_BE_SAID, "The gap is the same at every λ.")
    ends = gaps.weight_decays[0], gaps.weight_decays[-1]
    change = difference(gaps, *ends)
    evidence = (
        f"From {decay_text(ends[0])} to {decay_text(ends[1])} the gap changes by {fixed(change.value, 4)} nats "
        f"({fixed(change.low, 4)} to {fixed(change.high, 4)})."
        if change.low > float("-inf")
        else ""
    )
    verdict = verdict_on_all([{-1: True, 1: False, 0: None}[found.direction()]])
    return assertion("A7", verdict, trend_text(found, "gap"), evidence, MORE_DECAYS if verdict == CANNOT_BE_SAID else "")


def trend_text(found: Trend, what: str) -> str:
    """The trend and both of its tests in a sentence."""
    interval = "" if found.low is None or found.high is None else f" (95\u00a0% {fixed(found.low, 2)} to {fixed(found.high, 2)})"
    p = min(found.p_rise, found.p_fall)
    return (
        f"Spearman's correlation of {what} and λ is {fixed(found.correlation, 2)}{interval}, one-sided p = {p:.2g} over the "
        "orders of λ."
    )


def no_losses(found: Curve | None) -> str:
    """Why losses whose noise is not known are not tested."""
    if found is None:
        return NO_LOSSES
    if len(found.weight_decays) == 1:
        return "Losses are known at one λ only: it takes several, so add values of λ."
    return (
        "The losses of the λ are not known on the same sequences, so the noise of a difference is not known: measure them alike."
    )


def too_few(count: int, which: str = "") -> str:
    """Why a trend over so few λ (`which` ones) is not tested."""
    return (
        f"There are results of {count} λ{which}: a rank test needs {LEAST_FOR_TREND}, since of four even a perfect order comes "
        "about by chance once in 24 times. Add values of λ."
    )


def wrong_length(setting: Setting, wanted: float) -> str:
    """Why a statement about runs of one length is not tested on those of another."""
    known = setting.tokens_per_parameter
    if known is None:
        return (
            "How many tokens per parameter the models saw is not known, or not the same for all; the statement is about "
            f"{wanted:.0f}."
        )
    return (
        f"The models saw {known:.3g} tokens per parameter, and the statement is about {wanted:.0f}: set `tokens` to {wanted:.0f} "
        "times the parameters."
    )


def _translated(setting: Setting, losses: Curve) -> str:
    """What the λ of the lowest loss is in the paper's runs, unless it is the same number."""
    lowest = min(losses.weight_decays, key=losses.at)
    found = setting.in_the_paper(lowest)
    if found is None or found.low == found.high:
        return ""
    return f"By its AdamW timescale, {decay_text(lowest)} here is {found} in the paper's runs."


def _as_in_paper(setting: Setting, weight_decay: float) -> str:
    found = setting.in_the_paper(weight_decay)
    if found is None or found.low == found.high == weight_decay:
        return f"{weight_decay:.3g}"
    return f"{weight_decay:.3g} (in the paper's runs {found})"
