"""Statements on loss: the shape of its curve over λ (A1), where its optimum goes in longer runs (A2), and the gap (A7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from megatron_plasticity.analysis.assertions.curves import (
    LEAST_FOR_TREND,
    SURE,
    Curve,
    Trend,
    difference,
    shares_of_choice,
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
    percent_text,
    verdict_on_all,
)

PAPER_OPTIMUM = 0.1
"""The λ that A1 and A2 name."""
ABOUT = 2.0
"""Factor within which a λ is about 0.1: the next λ of the paper's grid at this length, 0.3, has to be outside."""
HUMP = 0.01
"""Nats per token that a hump in the curve of loss has to rise on both sides. The bootstrap knows sequences, not training seeds:
where the curve is flat, a seed alone puts humps of some thousandths of a nat into it. Our own choice."""
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

    Two parts. *U*: some smaller and some larger λ have a loss that is higher than the lowest by more than noise. A hump, a λ that
    is 0.01 nats above one on either side by more than noise, refutes it. *Above 0.1*: the lowest loss is at λ above the paper's
    0.1 (see `translation.py`) in at least 95 % of the resamples of the sequences; at λ of at most 0.1 in as many refutes it.
    """
    if losses is None or losses.resampled is None:
        return assertion("A1", CANNOT_BE_SAID, NO_LOSSES)
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
    shares = shares_of_choice(losses, lowest=True)
    share_above, share_below = (sum(shares[decay] for decay in found) for found in (above, at_most))
    is_above = True if share_above >= SURE else False if share_below >= SURE else None
    where = (
        f"In {percent_text(share_above)} of the resamples the lowest loss is at a λ above the paper's 0.1 ({decays_text(above)})."
    )
    return assertion("A1", verdict_on_all((is_u, is_above)), shape[0].upper() + shape[1:], where, _translated(setting, losses))


def u_shape(losses: Curve) -> tuple[bool | None, str]:
    """Whether the curve is a U, reliably so or not, or None; and a sentence, without its capital, that says what is seen."""
    decays = losses.weight_decays
    lowest = min(decays, key=losses.at)
    triples = list(combinations(decays, 3))
    for left, middle, right in triples:
        if all(difference(losses, side, middle, 2 * len(triples)).low > HUMP for side in (left, right)):
            return False, (
                f"the loss has a hump: at {decay_text(middle)} it is higher than at both {decay_text(left)} and "
                f"{decay_text(right)}, by more than noise."
            )
    rises = {decay: difference(losses, lowest, decay, len(decays) - 1) for decay in decays if decay != lowest}
    below = [decay for decay, rise in rises.items() if rise.sign > 0 and decay < lowest]
    above = [decay for decay, rise in rises.items() if rise.sign > 0 and decay > lowest]
    at = f"the loss is lowest at {decay_text(lowest)}"
    if below and above:
        ends = below[0], above[-1]
        higher = " and ".join(fixed(rises[decay].value, 4) for decay in ends)
        return True, f"{at}, and higher by more than noise on both sides (by {higher} nats at {decays_text(ends)})."
    open_sides = [name for name, found in (("smaller", below), ("larger", above)) if not found]
    beyond = " Extend the grid." if lowest in (decays[0], decays[-1]) and lowest > 0 else ""
    return None, f"{at}, and no {' and no '.join(open_sides)} λ has a loss that is higher by more than noise.{beyond}"


def optimum_drops_in_longer_runs(groups: Sequence[LossGroup]) -> Assertion:
    """A2: at 140 tokens per parameter, the λ with the best validation loss drops to about 0.1.

    Compares groups of one model size at about 20 and about 140 tokens per parameter. *About 0.1*: the best λ of the long runs,
    translated by the paper's long recipe, lies within a factor of 2 of 0.1. *Drops*: it is below the best λ of the short runs,
    translated by theirs. Each is certain when at least 95 % of the resamples (of both groups, independently) say so.
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
        lacking = "" if known else " with `overfitting: {}` among the `analyses`"
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
    shares, short_shares = (shares_of_choice(group, lowest=True) for group in (long.losses, short.losses))
    is_about = sum(shares[decay] for decay in about)
    drops = stays = 0.0
    for decay, share in shares.items():
        for other, other_share in short_shares.items():
            one, two = long.setting.in_the_paper(decay), short.setting.in_the_paper(other)
            if one is not None and two is not None:
                drops += share * other_share * (one.high < two.low)
                stays += share * other_share * (one.low >= two.high)
    best, best_short = (min(curve.weight_decays, key=curve.at) for curve in (long.losses, short.losses))
    evidence = (
        f"The best λ by loss is {_as_in_paper(short.setting, best_short)} at {short.setting.tokens_per_parameter:.3g} tokens per "
        f"parameter and {_as_in_paper(long.setting, best)} at {long.setting.tokens_per_parameter:.3g}. It is about 0.1 there in "
        f"{percent_text(is_about)} of the resamples, and smaller than in the short runs in {percent_text(drops)}."
    )
    parts = (
        True if is_about >= SURE else False if is_about <= 1 - SURE else None,
        True if drops >= SURE else False if stays >= SURE else None,
    )
    return verdict_on_all(parts), evidence


def gap_falls(gaps: Curve | None) -> Assertion:
    """A7: the train–validation gap falls with λ.

    Spearman's rank correlation of gap and λ, tested twice: its bootstrap interval over sequences, which are the same ones for
    every λ, and the exact permutation of the λ at 0.025. It falls, or rises, only if both say so.
    """
    if gaps is None or gaps.resampled is None:
        return assertion("A7", CANNOT_BE_SAID, NO_LOSSES)
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


def too_few(count: int) -> str:
    """Why a trend over so few λ is not tested."""
    return (
        f"There are results of {count} λ: a rank test needs {LEAST_FOR_TREND}, since of four even a perfect order comes about by "
        "chance once in 24 times. Add values of λ."
    )


def wrong_length(setting: Setting, wanted: float) -> str:
    """Why a statement about runs of one length is not tested on those of another."""
    known = setting.tokens_per_parameter
    if known is None:
        return f"How many tokens per parameter the models saw is not known; the statement is about {wanted:.0f}."
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


def lowest_texts(shares: Mapping[float, float]) -> str:
    """`λ = 0.5 in 80 %, λ = 1 in 20 %` of the resamples, the most frequent first."""
    ordered = sorted(((share, -decay) for decay, share in shares.items() if share >= 0.005), reverse=True)
    return ", ".join(f"{decay_text(-decay)} in {percent_text(share)}" for share, decay in ordered)
