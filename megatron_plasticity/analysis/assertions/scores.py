"""Statements on scores after fine-tuning, alone and against loss: A3, A4, A9 and A10.

A score is the mean over tasks (and over the ways to fine-tune, where there are several), as in the answer of the report: one
number per λ, so that no task can be picked because it fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from megatron_plasticity.analysis.assertions.curves import SURE, Curve, contenders, difference, shared
from megatron_plasticity.analysis.assertions.losses import SEED_MARGIN, no_losses
from megatron_plasticity.analysis.assertions.translation import NOT_STRICT, Setting
from megatron_plasticity.analysis.assertions.verdict import (
    CANNOT_BE_SAID,
    DOES_NOT_HOLD,
    HOLDS,
    Assertion,
    assertion,
    decay_text,
    decays_text,
    fixed,
    percent_text,
    verdict_on_all,
)

SWEPT = {
    "optimizer.learning_rate": "learning rate",
    "batch.global_batch_size": "batch size",
    "optimizer.weight_decay": "weight decay",
}
"""Settings of fine-tuning that A9a names: config path → in words."""
UNSTABLE_RANGE = 0.5
"""Width of the leave-one-out range from which a correlation is unstable though its sign stays: one λ then decides between a weak
and a strong correlation. Our own choice."""
LEAST_FOR_LEAVE_ONE_OUT = 5
"""With four λ, leaving one out leaves three, whose correlation is unstable whatever they are."""
_EQUAL = 1e-12

NO_SCORES = "Fewer than two λ have scores on every task: fine-tune and evaluate them."


def downstream_optimum_is_larger(losses: Curve | None, scores: Curve | None, setting: Setting) -> Assertion:
    """A3: the best λ by score after fine-tuning is at least the best λ by validation loss, and larger in four of the paper's
    settings.

    Over the λ that have both. The best λ by loss and by score are sets: all λ that no other beats by more than noise, corrected
    for all pairs. It holds if every λ of the score's set is larger than every one of the loss's: each λ up to the choice by loss
    is then reliably worse than the best by score. It also holds if every one is larger or equal, unless the models are in one of
    the four settings, or the observed lowest loss is at an end of the grid: there the best λ by loss may lie beyond it, or
    nothing could have been smaller. Every one smaller, or in the four settings smaller or equal, refutes it.
    """
    if losses is None or losses.resampled is None:
        return assertion("A3", CANNOT_BE_SAID, no_losses(losses))
    if scores is None or len(scores.weight_decays) < 2:
        return assertion("A3", CANNOT_BE_SAID, NO_SCORES)
    losses, scores = shared(losses, scores)
    decays = losses.weight_decays
    if len(decays) < 2:
        return assertion("A3", CANNOT_BE_SAID, "Fewer than two λ have both a loss and scores on every task.")
    by_loss, by_score = contenders(losses, lowest=True), contenders(scores, lowest=False)
    lowest, highest = min(decays, key=losses.at), max(decays, key=scores.at)
    at_an_end = lowest in (decays[0], decays[-1])
    recipe = setting.recipe
    strict = recipe is not None and recipe.name != NOT_STRICT
    seen = (
        f"The loss is lowest at {decay_text(lowest)}, the score highest at {decay_text(highest)}. Within noise the best by loss "
        f"may be {decays_text(by_loss)}, and by score {decays_text(by_score)} (corrected for all pairs)."
    )
    if min(by_score) > max(by_loss):
        return assertion("A3", HOLDS, seen)
    if max(by_score) < min(by_loss):
        return assertion("A3", DOES_NOT_HOLD, seen)
    at_least, at_most = min(by_score) >= max(by_loss), max(by_score) <= min(by_loss)
    if at_an_end and (at_most if strict else at_least):
        return assertion(
            "A3", CANNOT_BE_SAID, seen, "The loss is lowest at an end of the grid, where equality says nothing: extend the grid."
        )
    if strict and at_most:
        return assertion("A3", DOES_NOT_HOLD, seen)
    if at_least and not strict:
        return assertion("A3", HOLDS, seen)
    return assertion("A3", CANNOT_BE_SAID, seen, "More test questions, or more tasks, would tell the λ apart.")


def worse_loss_better_score(losses: Curve | None, scores: Curve | None) -> Assertion:
    """A4: some pair of λ has worse validation loss and a better score after fine-tuning.

    It holds if a pair differs in both, in opposite directions, by more than noise, with the level 0.05 divided by the number of
    pairs (Bonferroni), and in loss by more than 0.01 nats (`SEED_MARGIN`) beyond it. To refute it, loss and score have to order
    *every* pair alike, as reliably.
    """
    if losses is None or losses.resampled is None:
        return assertion("A4", CANNOT_BE_SAID, no_losses(losses))
    if scores is None or len(scores.weight_decays) < 2:
        return assertion("A4", CANNOT_BE_SAID, NO_SCORES)
    losses, scores = shared(losses, scores)
    pairs = list(combinations(losses.weight_decays, 2))
    if not pairs:
        return assertion("A4", CANNOT_BE_SAID, "Fewer than two λ have both a loss and scores on every task.")
    found = [(difference(losses, *pair, len(pairs)), difference(scores, *pair, len(pairs)), pair) for pair in pairs]
    opposed = [item for item in found if item[0].value * item[1].value > 0]
    clear = [item for item in opposed if item[0].beyond(SEED_MARGIN) * item[1].sign > 0]
    if clear:
        loss, score, pair = max(clear, key=lambda item: abs(item[1].value))
        worse, better = pair[::-1] if loss.value > 0 else pair
        reach = score.high - score.value
        return assertion(
            "A4",
            HOLDS,
            f"{decay_text(worse)} has {fixed(abs(loss.value), 4)} nats more loss than {decay_text(better)} and scores "
            f"{fixed(100 * abs(score.value), 1)} points more (± {fixed(100 * reach, 1)}, corrected for {len(pairs)} pairs).",
            f"{len(clear)} of {len(pairs)} pairs are opposed by more than noise." if len(clear) > 1 else "",
        )
    concordant = [item for item in found if item[0].beyond(SEED_MARGIN) * item[1].sign < 0]
    if len(concordant) == len(pairs):
        return assertion("A4", DOES_NOT_HOLD, f"Loss and score order all {len(pairs)} pairs alike, by more than noise.")
    return assertion(
        "A4",
        CANNOT_BE_SAID,
        f"In {len(opposed)} of {len(pairs)} pairs the λ with the worse loss scores better, but in no pair by more than noise in "
        f"both, and {SEED_MARGIN} nats of loss, once corrected for the number of pairs. More test questions would tell.",
    )


def order_survives_finetuning(ways: Mapping[str, Curve], varied: Sequence[str]) -> Assertion:
    """A9a: the order of λ survives other learning rates, batch sizes and weight decays of fine-tuning.

    `ways` are the scores after each way of fine-tuning, `varied` the config paths in which they differ. See `_order`. As long as
    one of the three settings was not varied, an order that survives the others cannot confirm the statement, but one that does
    not refutes it.
    """
    if len(ways) < 2:
        return assertion(
            "A9a",
            CANNOT_BE_SAID,
            "The models were fine-tuned in one way only. State learning rates, batch sizes and weight decays in `finetune_axes`, "
            "as configs/studies/paper-finetune-sweep.yaml does.",
        )
    survives, evidence = _order(ways, "fine-tuning")
    lacking = [f"{words} (`{path}`)" for path, words in SWEPT.items() if path not in varied]
    if survives and lacking:
        return assertion(
            "A9a", CANNOT_BE_SAID, evidence, f"Not varied, so put them in `finetune_axes` too: {', '.join(lacking)}."
        )
    return assertion("A9a", verdict_on_all([survives]), evidence)


def order_survives_pretraining_rate(rates: Mapping[str, Curve]) -> Assertion:
    """A9b: the order of λ survives other learning rates of pretraining. `rates` are the scores of groups of base models that
    differ in it alone, at the same λ; see `_order`."""
    if len(rates) < 2:
        return assertion(
            "A9b",
            CANNOT_BE_SAID,
            "There are no groups of base models with scores that differ in the learning rate of pretraining alone: put "
            "`optimizer.learning_rate` on an axis beside λ, with λ stated as `optimizer.weight_decay`.",
        )
    survives, evidence = _order(rates, "pretraining")
    return assertion("A9b", verdict_on_all([survives]), evidence)


def _order(ways: Mapping[str, Curve], what: str) -> tuple[bool | None, str]:
    """Whether the scores of the λ have one order after every way of `what`; None if noise leaves that open. And the evidence.

    Every pair of λ is compared after every way, at 0.05 over the number of comparisons (Bonferroni). A pair that two ways order
    oppositely, both by more than noise, refutes it. It survives if at least half of the pairs are told apart by at least two ways
    each, and every pair that some way tells apart has the same sign, if not by more than noise, after every one.
    """
    decays = sorted(set.intersection(*(set(found.weight_decays) for found in ways.values())))
    pairs = list(combinations(decays, 2))
    if not pairs:
        return None, f"The {len(ways)} ways of {what} do not share two λ with scores on every task."
    comparisons = len(pairs) * len(ways)
    found = {pair: {way: difference(scores, *pair, comparisons) for way, scores in ways.items()} for pair in pairs}
    told, kept = 0, True
    for pair, differences in found.items():
        signs = {way: item.sign for way, item in differences.items()}
        if {1, -1} <= set(signs.values()):
            one, other = (next(way for way, sign in signs.items() if sign == wanted) for wanted in (-1, 1))
            return False, (
                f"{decay_text(pair[0])} scores better than {decay_text(pair[1])} with {one}, and worse with {other}, both by "
                f"more than noise (corrected for {comparisons} comparisons)."
            )
        certain = [sign for sign in signs.values() if sign]
        told += len(certain) >= 2
        kept = kept and not (certain and any(item.value * certain[0] <= 0 for item in differences.values()))
    seen = f"Over {len(ways)} ways of {what} no pair of λ changes its order by more than noise"
    if 2 * told < len(pairs):
        return None, (
            f"{seen}, but only {told} of {len(pairs)} pairs are told apart by two of them, and an order takes half. More test "
            "questions would tell."
        )
    if not kept:
        return None, f"{seen}, but a pair that one way tells apart has the opposite order, within noise, after another."
    return (
        True,
        f"{seen}; {told} of {len(pairs)} pairs are told apart by at least two ways, and keep their order after every one.",
    )


def _without_one(losses: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Pearson's correlation of losses [λ] with each row of scores [rows, λ] when one λ is left out: [rows, λ], NaN where it is
    not defined."""
    columns = []
    for index in range(len(losses)):
        x, y = np.delete(losses, index), np.delete(scores, index, axis=1)
        x, y = x - x.mean(), y - y.mean(axis=1, keepdims=True)
        norms = np.sqrt((x**2).sum() * (y**2).sum(axis=1))
        columns.append(np.divide(y @ x, norms, out=np.full(len(scores), np.nan), where=norms > _EQUAL))
    return np.column_stack(columns)


def correlation_is_unstable(losses: Curve | None, scores: Curve | None) -> Assertion:
    """A10: the correlation of validation loss and score after fine-tuning is unstable.

    Pearson's correlation over λ is unstable if its values when any one λ is left out differ in sign, or by 0.5 or more. The
    statement holds if that is so in at least 95 % of the resamples of the questions, and does not if it is in at most 5 %. Noise
    of the scores is one reason for instability; this does not tell it from others.
    """
    if losses is None:
        return assertion("A10", CANNOT_BE_SAID, "The held-out losses of the base models are not known.")
    if scores is None or scores.resampled is None:
        return assertion("A10", CANNOT_BE_SAID, NO_SCORES)
    losses, scores = shared(losses, scores)
    count = len(losses.weight_decays)
    if count < LEAST_FOR_LEAVE_ONE_OUT:
        return assertion(
            "A10",
            CANNOT_BE_SAID,
            f"{count} λ have a loss and scores on every task, and leaving one out takes {LEAST_FOR_LEAVE_ONE_OUT}: add some.",
        )
    assert scores.resampled is not None
    observed = _without_one(losses.values, scores.values[None])[0]
    if np.isnan(observed).any():
        return assertion("A10", CANNOT_BE_SAID, "Losses or scores are all equal, so they have no correlation.")
    left_out = _without_one(losses.values, scores.resampled)
    low, high = np.nanmin(left_out, axis=1), np.nanmax(left_out, axis=1)
    share = float(np.mean((low * high <= 0) | (high - low >= UNSTABLE_RANGE)))
    evidence = (
        f"Leaving out one λ moves Pearson's correlation between {fixed(float(observed.min()), 2)} and "
        f"{fixed(float(observed.max()), 2)}. That changes its sign, or spans {UNSTABLE_RANGE}, in "
        f"{percent_text(share)} of the resamples of the questions."
    )
    verdict = HOLDS if share >= SURE else DOES_NOT_HOLD if share <= 1 - SURE else CANNOT_BE_SAID
    return assertion("A10", verdict, evidence)
