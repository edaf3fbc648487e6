"""What a grid over λ says about plasticity: where loss and fine-tuned scores are best, and how far they disagree.

Everything here takes plain records and arrays, and returns JSON-ready values in which what is not known is absent, never 0 or
NaN. A *score* is the mean over a task's test questions of a number per question (1 or 0, or the share of samples or of seeds that
are correct); of a task with several test sets it is the plain mean of their means. An *outcome* is a task on which models were
fine-tuned in one way (a *variant*). All λ answer the same questions, whatever the variant, so every bootstrap resamples the
questions of a task once for all of them: differences between two λ, or between two variants, are paired.

The intervals are over questions alone. They say nothing of other seeds of pretraining or fine-tuning.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from scipy import stats

from megatron_plasticity.analysis.bootstrap import choices, interval, mean_over_strata, resampled_means_over_strata
from megatron_plasticity.analysis.paired_losses import SequenceLosses, paired_losses
from megatron_plasticity.errors import UserError

# Scores that differ by rounding of a mean are equal.
_EQUAL = 1e-12


@dataclass(frozen=True)
class TaskOutcome:
    """Answers to the test questions of one task, in an order that all λ share."""

    correct: Sequence[float]
    """Per question, after fine-tuning."""
    base_correct: Sequence[float] | None = None
    """Per question, of the base model before fine-tuning; None if it was not evaluated."""
    questions_sha256: str | None = None
    """Hash of the questions' text; None where the evaluation did not keep it."""
    base_questions_sha256: str | None = None
    strata: Sequence[int] = ()
    """Numbers of questions of the task's test sets, in the order of the answers; empty for one test set."""
    task: str = ""
    """Task whose questions these are; empty where it is the name of the outcome."""
    variant: str = ""
    """How the model was fine-tuned, where that was done in several ways."""


@dataclass(frozen=True)
class GridPoint:
    """One λ of the grid, with whatever of it is there."""

    weight_decay: float
    held_out_loss: float | None
    """Nats per token; None (or not finite) for a run that is missing or diverged."""
    tasks: Mapping[str, TaskOutcome | None]
    """Outcomes by name, which is that of the task where there is one variant; one that is absent or None was not finished."""
    sequences: SequenceLosses | None = None
    """Losses on the sequences of the overfitting run; None if there was none, or if it kept none."""


@dataclass(frozen=True)
class ScoreCurve:
    """Scores over the λ that have them, ascending, with bootstrap resamples that are paired across λ."""

    weight_decays: tuple[float, ...]
    scores: np.ndarray
    """[λ]"""
    resampled: np.ndarray
    """[resamples, λ]"""
    base_scores: np.ndarray
    """[λ], NaN where there is none."""
    resampled_base: np.ndarray
    """[resamples, λ]"""
    correct: np.ndarray | None = None
    """[questions, λ]; None for a mean over tasks, variants or test sets."""


def plasticity(
    points: Sequence[GridPoint], resamples: int = 1000, seed: int = 42, curves: Mapping[str, ScoreCurve] | None = None
) -> dict[str, Any]:
    """All statistics of one grid over λ: `{"weight_decays", "loss_curve", "paired_losses", "tasks": {name: statistics}, "mean":
    statistics}`.

    See `loss_curve_shape`, `paired_losses` (absent without losses of single sequences) and `curve_statistics`. `tasks` are the
    outcomes. `mean` is over them, at the λ at which every one was finished; it is absent when there is no such λ. With several
    variants there are also `task_means` (`{task: statistics}`, means over the variants) and `variants` (see
    `variant_statistics`). `points` may come in any order. `curves` are their `score_curves`, if those are at hand.

    Raises:
        UserError: λ of different runs had different test questions of a task.
    """
    points = sorted(points, key=lambda point: point.weight_decay)
    weight_decays = [point.weight_decay for point in points]
    if len(set(weight_decays)) != len(points):
        raise ValueError(f"each λ may occur once, got {weight_decays}; split the runs by the other axes of the grid first")
    losses = {point.weight_decay: loss for point in points if (loss := _finite(point.held_out_loss)) is not None}
    curves = score_curves(points, resamples, seed) if curves is None else curves
    result: dict[str, Any] = {
        "weight_decays": weight_decays,
        "loss_curve": loss_curve_shape(weight_decays, [losses.get(decay) for decay in weight_decays]),
        "tasks": {name: curve_statistics(curve, weight_decays, losses) for name, curve in curves.items()},
    }
    sequences = {point.weight_decay: point.sequences for point in points if point.sequences is not None}
    if (paired := paired_losses(sequences, resamples, seed)) is not None:
        result["paired_losses"] = paired
    mean = mean_curve(list(curves.values()))
    if mean is not None:
        result["mean"] = curve_statistics(mean, weight_decays, losses)
    by_task, by_variant = _grouped(points, curves)
    if len(by_variant) > 1:
        means = {task: found for task, found_curves in by_task.items() if (found := mean_curve(found_curves)) is not None}
        result["task_means"] = {task: curve_statistics(found, weight_decays, losses) for task, found in means.items()}
        result["variants"] = variant_statistics(by_variant)
    return result


def score_curves(points: Sequence[GridPoint], resamples: int = 1000, seed: int = 42) -> dict[str, ScoreCurve]:
    """Scores of every outcome that some λ has finished, by its name; see `task_curve`. Raises UserError like `plasticity`."""
    points = sorted(points, key=lambda point: point.weight_decay)
    names = dict.fromkeys(name for point in points for name, outcome in point.tasks.items() if outcome is not None)
    return {name: task_curve(points, name, resamples, seed) for name in names}


def _grouped(
    points: Sequence[GridPoint], curves: Mapping[str, ScoreCurve]
) -> tuple[dict[str, list[ScoreCurve]], dict[str, list[ScoreCurve]]]:
    """The outcomes' curves by task, and by variant."""
    by_task: dict[str, list[ScoreCurve]] = {}
    by_variant: dict[str, list[ScoreCurve]] = {}
    for name, curve in curves.items():
        outcome = next(found for point in points if (found := point.tasks.get(name)) is not None)
        by_task.setdefault(outcome.task or name, []).append(curve)
        by_variant.setdefault(outcome.variant, []).append(curve)
    return by_task, by_variant


def variant_statistics(curves: Mapping[str, Sequence[ScoreCurve]]) -> dict[str, Any]:
    """Whether the ordering of λ survives another way to fine-tune; `curves` are those of each variant's tasks.

    Per variant, with scores that are means over its tasks: `best` (see `best_weight_decay`), `score` there with its interval, and
    `rank_correlation`: Spearman's of the scores with the first variant's, over the λ that both have. It needs three λ, and is
    absent for the first variant. A variant without a λ at which all of its tasks were finished is absent.

    Source: the question is of Han et al. (2602.11137), who fine-tune with other learning rates, batches and weight decays.
    """
    means = {variant: mean for variant, found in curves.items() if (mean := mean_curve(found)) is not None}
    first = means.get(next(iter(curves)))
    result: dict[str, Any] = {}
    for variant, mean in means.items():
        best = best_weight_decay(mean)
        index = mean.weight_decays.index(best["weight_decay"])
        result[variant] = {"best": best, "score": interval(mean.scores[index], mean.resampled[:, index])}
        if first is not None and mean is not first:
            shared = [decay for decay in first.weight_decays if decay in mean.weight_decays]
            # Means that differ by rounding share a rank.
            one, other = (np.round([m.scores[m.weight_decays.index(d)] for d in shared], 12) for m in (first, mean))
            if (correlation := _correlation(stats.spearmanr, one, other)) is not None:
                result[variant]["rank_correlation"] = correlation
    return result


def task_curve(points: Sequence[GridPoint], task: str, resamples: int, seed: int) -> ScoreCurve:
    """Scores of one outcome over ascending λ.

    A resample's questions are the same at every λ and after every variant: they depend on the seed, the task and the sizes of its
    test sets alone.
    """
    present = [
        (point.weight_decay, outcome)
        for point in sorted(points, key=lambda point: point.weight_decay)
        if (outcome := point.tasks.get(task)) is not None
    ]
    questions = len(present[0][1].correct)
    for decay, outcome in present:
        for answers in (outcome.correct, outcome.base_correct):
            if answers is not None and len(answers) != questions:
                raise UserError(
                    f"task {task!r}: λ={decay:.3g} answered {len(answers)} test questions and λ={present[0][0]:.3g} {questions}; "
                    "scores can only be compared on the same questions, so evaluate all of them with one task config"
                )
    _check_same_questions(task, present)
    if not questions:
        raise ValueError(f"task {task!r} has no test questions")
    strata = tuple(present[0][1].strata) or (questions,)
    unknown = np.full(questions, np.nan)
    correct = np.column_stack([np.asarray(outcome.correct, dtype=float) for _, outcome in present])
    base = np.column_stack(
        [unknown if outcome.base_correct is None else np.asarray(outcome.base_correct, dtype=float) for _, outcome in present]
    )
    generator = np.random.default_rng([abs(seed), zlib.crc32((present[0][1].task or task).encode())])
    resampled = resampled_means_over_strata(np.hstack([correct, base]), strata, resamples, generator)
    count = len(present)
    return ScoreCurve(
        tuple(decay for decay, _ in present),
        mean_over_strata(correct, strata),
        resampled[:, :count],
        mean_over_strata(base, strata),
        resampled[:, count:],
        correct if len(strata) == 1 else None,
    )


def _check_same_questions(task: str, present: Sequence[tuple[float, TaskOutcome]]) -> None:
    """Raise UserError where hashes that are known, or sizes of test sets, show that different questions were asked."""
    for decay, outcome in present[1:]:
        if tuple(outcome.strata) != tuple(present[0][1].strata):
            raise UserError(
                f"task {task!r}: the test sets at λ={present[0][0]:.3g} and at λ={decay:.3g} are different ones; scores can "
                "only be compared on the same questions, so evaluate all of them with one task config"
            )
    known: dict[str, float] = {}
    for decay, outcome in present:
        for digest in (outcome.questions_sha256, outcome.base_questions_sha256):
            if digest is not None:
                known.setdefault(digest, decay)
    if len(known) > 1:
        one, other, *_ = known.values()
        where = f"at λ={one:.3g} and λ={other:.3g}" if one != other else f"before and after fine-tuning at λ={one:.3g}"
        raise UserError(
            f"task {task!r}: the test questions {where} are different ones; scores can only be compared on the same questions, "
            "so evaluate all of them with one task config"
        )


def mean_curve(curves: Sequence[ScoreCurve]) -> ScoreCurve | None:
    """Plain mean over curves at the λ that every one has; None if there is none. Questions of different tasks are resampled
    separately, those of one task together."""
    shared = sorted(set.intersection(*(set(curve.weight_decays) for curve in curves))) if curves else []
    if not shared:
        return None

    def mean(values: Sequence[np.ndarray]) -> np.ndarray:
        columns = [[curve.weight_decays.index(decay) for decay in shared] for curve in curves]
        return np.mean([value[..., column] for value, column in zip(values, columns, strict=True)], axis=0)

    return ScoreCurve(
        tuple(shared),
        mean([curve.scores for curve in curves]),
        mean([curve.resampled for curve in curves]),
        mean([curve.base_scores for curve in curves]),
        mean([curve.resampled_base for curve in curves]),
    )


def curve_statistics(curve: ScoreCurve, weight_decays: Sequence[float], losses: Mapping[float, float]) -> dict[str, Any]:
    """Statistics of one curve of scores.

    `scores`: per λ `{"weight_decay", "score": interval, "base_score", "gain": interval}`, the gain being score minus the base
    model's on the same questions; `missing`: λ without a score; `area` (see `area_under_curve`) of `score` and of `gain`; `best`
    (see `best_weight_decay`); `advantage`: what choosing λ by score would bring over choosing it by loss (see `advantage`);
    `discordant` (see `discordant_pairs`); `correlation` of loss and score (see `correlations`). What cannot be known is absent.
    """
    result: dict[str, Any] = {
        "scores": _scores(curve),
        "missing": [decay for decay in weight_decays if decay not in curve.weight_decays],
        "area": _areas(curve),
        "best": best_weight_decay(curve),
        "discordant": discordant_pairs(curve, losses),
    }
    both = [(losses[decay], score) for decay, score in zip(curve.weight_decays, curve.scores, strict=True) if decay in losses]
    result["correlation"] = correlations([loss for loss, _ in both], [score for _, score in both])
    if (gained := advantage(curve, losses)) is not None:
        result["advantage"] = gained
    return result


def log_positions(weight_decays: Sequence[float]) -> list[float]:
    """Positions of ascending λ on a log10 axis.

    λ = 0 has no logarithm. It stands one typical step (the mean of the others') left of the smallest positive λ, or one decade if
    there is only one: what matters about it is that it is the next weaker decay of the grid.
    """
    positive = [math.log10(decay) for decay in weight_decays if decay > 0]
    step = (positive[-1] - positive[0]) / (len(positive) - 1) if len(positive) > 1 else 1.0
    zero = positive[0] - step if positive else 0.0
    return [math.log10(decay) if decay > 0 else zero for decay in weight_decays]


def area_under_curve(weight_decays: Sequence[float], values: Sequence[float]) -> float | None:
    """Area under values over log10 λ by the trapezoid rule, divided by the width: the curve's mean height, in the values' unit.

    λ ascending; λ = 0 as in `log_positions`. None for fewer than two λ. Areas over different sets of λ are not comparable.

    Source: our own summary, not one of the paper's.
    """
    if len(weight_decays) < 2:
        return None
    return float(_area(np.asarray(weight_decays), np.asarray(values)))


def best_weight_decay(curve: ScoreCurve) -> dict[str, Any]:
    """λ with the highest score, and how sure that is.

    `{"weight_decay", "score", "ties": other λ with the same score, "low", "high", "distribution": [{"weight_decay", "share"}]}`.
    Of equal λ the smallest is named. The distribution is that of the best λ over bootstrap resamples of the questions, equal λ
    sharing a resample; `low` to `high` are the λ between which its middle 95 % lie.
    """
    best = _is_best(curve.scores)
    first, *others = np.flatnonzero(best)
    return {
        "weight_decay": curve.weight_decays[first],
        "score": float(curve.scores[first]),
        "ties": [curve.weight_decays[index] for index in others],
        **choices(curve.weight_decays, _is_best(curve.resampled)),
    }


def advantage(curve: ScoreCurve, losses: Mapping[float, float]) -> dict[str, Any] | None:
    """Score at the λ with the best score minus score at the λ with the lowest loss, with a paired bootstrap interval.

    `{"by_loss", "by_score", "value", "low", "high"}`. Both λ are held fixed while questions are resampled; the first was chosen
    because it scored best on these very questions, so the value leans upwards. None unless the λ with the lowest loss has a
    score.
    """
    known = {decay: loss for decay, loss in losses.items() if decay in curve.weight_decays}
    if not losses or min(losses, key=lambda decay: losses[decay]) not in known:
        return None
    by_loss = curve.weight_decays.index(min(known, key=lambda decay: known[decay]))
    by_score = int(np.flatnonzero(_is_best(curve.scores))[0])
    difference = interval(
        float(curve.scores[by_score] - curve.scores[by_loss]), curve.resampled[:, by_score] - curve.resampled[:, by_loss]
    )
    return {"by_loss": curve.weight_decays[by_loss], "by_score": curve.weight_decays[by_score], **difference}


def discordant_pairs(curve: ScoreCurve, losses: Mapping[float, float]) -> dict[str, Any]:
    """Pairs of λ of which the one with the worse loss has the better score (the paper's central observation, 2602.11137).

    `{"pairs": number compared, "discordant": [{"better_loss", "better_score", "loss_difference", "score_difference": interval,
    "bootstrap_p", "sign_p"}]}`, the largest score difference first. `bootstrap_p` is two-sided, twice the share of paired
    resamples in which the difference is not positive (one resample added, so never 0). `sign_p` is the exact two-sided sign test
    over the questions on which the two differ (McNemar, Psychometrika 12, 1947); absent for a mean over tasks, variants or test
    sets. The p-values are not corrected for the number of pairs.
    """
    known = [(index, losses[decay]) for index, decay in enumerate(curve.weight_decays) if decay in losses]
    pairs = list(combinations(known, 2))
    found = []
    for one, other in pairs:
        (better, better_loss), (worse, worse_loss) = sorted((one, other), key=lambda item: item[1])
        difference = float(curve.scores[worse] - curve.scores[better])
        if worse_loss == better_loss or difference <= _EQUAL:
            continue
        resampled = curve.resampled[:, worse] - curve.resampled[:, better]
        not_positive = int((resampled <= _EQUAL).sum())
        pair = {
            "better_loss": curve.weight_decays[better],
            "better_score": curve.weight_decays[worse],
            "loss_difference": worse_loss - better_loss,
            "score_difference": interval(difference, resampled),
            "bootstrap_p": min(1.0, 2 * (not_positive + 1) / (len(resampled) + 1)),
        }
        if curve.correct is not None:
            pair["sign_p"] = sign_test(curve.correct[:, worse] - curve.correct[:, better])
        found.append(pair)
    return {"pairs": len(pairs), "discordant": sorted(found, key=lambda pair: -pair["score_difference"]["value"])}


def sign_test(differences: np.ndarray) -> float:
    """Two-sided p-value of as many positive and negative `differences`, zeros left out (exact binomial); 1 when all are zero."""
    positive, negative = int((differences > _EQUAL).sum()), int((differences < -_EQUAL).sum())
    if positive + negative == 0:
        return 1.0
    return float(stats.binomtest(positive, positive + negative).pvalue)


def correlations(losses: Sequence[float], scores: Sequence[float]) -> dict[str, Any]:
    """Pearson's and Spearman's correlation of loss and score over λ, and their range when any one λ is left out.

    `{"points": n, "pearson": {"value", "low", "high"}, "spearman": …}`. A lower loss with a higher score is a correlation near
    −1. A value needs three λ, its leave-one-out range (`low`, `high`; not a confidence interval) four; where losses or scores are
    all equal none is defined, and it is absent.

    Source: the question, and that the correlation is unstable, is from Han et al. (2602.11137).
    """
    result: dict[str, Any] = {"points": len(losses)}
    x, y = np.asarray(losses, dtype=float), np.asarray(scores, dtype=float)
    for name, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        value = _correlation(function, x, y)
        if value is None:
            continue
        result[name] = {"value": value}
        without_one = [_correlation(function, np.delete(x, index), np.delete(y, index)) for index in range(len(x))]
        defined = [left for left in without_one if left is not None]
        if defined:
            result[name] |= {"low": min(defined), "high": max(defined)}
    return result


def loss_curve_shape(weight_decays: Sequence[float], losses: Sequence[float | None]) -> dict[str, Any]:
    """Whether the curve of held-out loss over λ has its minimum inside the grid; ascending λ, None for a loss that is missing.

    `{"inside", "statement", "missing": λ without a loss}` and, if there is any loss, `"minimum_at"`, `"minimum_loss"`,
    `"rise_below"` and `"rise_above"` (loss at the smallest and at the largest λ minus the minimum) and `"one_valley"` (falls up
    to the minimum and rises from it, without a further dip). `inside` means that both a smaller and a larger λ of the grid have a
    higher loss. `statement` says it in a sentence.
    """
    if list(weight_decays) != sorted(weight_decays) or len(weight_decays) != len(losses):
        raise ValueError("expected ascending λ and one loss (or None) for each")
    known = [(decay, loss) for decay, value in zip(weight_decays, losses, strict=True) if (loss := _finite(value)) is not None]
    missing = [decay for decay in weight_decays if decay not in {known_decay for known_decay, _ in known}]
    absent = f" No loss is known at λ = {', '.join(f'{decay:.3g}' for decay in missing)}." if missing else ""
    if not known:
        return {"inside": False, "missing": missing, "statement": "No held-out loss is known, so there is no curve."}
    values = [loss for _, loss in known]
    lowest = min(values)
    first = values.index(lowest)
    inside = values[0] > lowest < values[-1]
    decay = known[first][0]
    if len(known) < 3:
        statement = f"Held-out loss is known at {len(known)} λ only: too few to say whether there is a minimum inside."
    elif inside:
        statement = f"Held-out loss is lowest at λ = {decay:.3g}, inside the grid ({known[0][0]:.3g} to {known[-1][0]:.3g})."
    elif values[0] == lowest and values[-1] == lowest:
        statement = "Held-out loss is equally low at both ends of the grid: it has no minimum inside."
    else:
        end, direction = ("smallest", "smaller") if values[0] == lowest else ("largest", "larger")
        further = "" if end == "smallest" and known[0][0] == 0 else f"; the best λ may be {direction} than the grid reaches"
        end_decay = known[0 if end == "smallest" else -1][0]
        statement = f"Held-out loss is lowest at λ = {end_decay:.3g}, the {end} of the grid: it has no minimum inside{further}."
    falls = all(a >= b for a, b in pairwise(values[: first + 1]))
    rises = all(a <= b for a, b in pairwise(values[first:]))
    return {
        "inside": inside,
        "statement": statement + absent,
        "missing": missing,
        "minimum_at": decay,
        "minimum_loss": lowest,
        "rise_below": values[0] - lowest,
        "rise_above": values[-1] - lowest,
        "one_valley": falls and rises,
    }


def _scores(curve: ScoreCurve) -> list[dict[str, Any]]:
    rows = []
    for index, decay in enumerate(curve.weight_decays):
        row: dict[str, Any] = {"weight_decay": decay, "score": interval(curve.scores[index], curve.resampled[:, index])}
        base = float(curve.base_scores[index])
        if math.isfinite(base):
            row["base_score"] = base
            row["gain"] = interval(curve.scores[index] - base, curve.resampled[:, index] - curve.resampled_base[:, index])
        rows.append(row)
    return rows


def _areas(curve: ScoreCurve) -> dict[str, Any]:
    """Areas under the score and, where all λ have a base score, under the gain, with bootstrap intervals; absent below two λ."""
    if len(curve.weight_decays) < 2:
        return {}
    decays = np.asarray(curve.weight_decays)
    areas = {"score": interval(_area(decays, curve.scores), _area(decays, curve.resampled))}
    if np.isfinite(curve.base_scores).all():
        gains, resampled = curve.scores - curve.base_scores, curve.resampled - curve.resampled_base
        areas["gain"] = interval(_area(decays, gains), _area(decays, resampled))
    return areas


def _area(weight_decays: np.ndarray, values: np.ndarray) -> Any:
    """Normalised area under the last axis of `values`."""
    positions = np.asarray(log_positions(weight_decays.tolist()))
    return np.trapezoid(values, positions, axis=-1) / (positions[-1] - positions[0])


def _is_best(scores: np.ndarray) -> np.ndarray:
    return scores >= scores.max(axis=-1, keepdims=True) - _EQUAL


def _correlation(function: Any, x: np.ndarray, y: np.ndarray) -> float | None:
    if len(x) < 3 or np.ptp(x) <= _EQUAL or np.ptp(y) <= _EQUAL:
        return None
    return float(function(x, y).statistic)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
