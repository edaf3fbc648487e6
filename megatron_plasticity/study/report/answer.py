"""The answer on top of the page, in words: which λ to choose, and how sure one can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_plasticity.study.report.comparability import mixed_graders
from megatron_plasticity.study.report.findings import Findings
from megatron_plasticity.study.report.tables import decimals, percent
from megatron_plasticity.study.results import Group, Outcome
from megatron_plasticity.study.scores import Estimate


@dataclass(frozen=True)
class Card:
    """One number to remember."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Answer:
    """Plain text, to be escaped by the page."""

    cards: tuple[Card, ...]
    verdict: str
    notes: tuple[str, ...]
    loss_caption: str
    rank_caption: str


def answer(group: Group, found: Findings, outcomes: Sequence[Outcome]) -> Answer:
    """Put the findings on one group of base models into words."""
    notes = [
        found.problem,
        *mixed_graders(group.models, outcomes),
        _excluded(group, found),
        _unfinished(found, outcomes),
        _edge_of_scores(found),
        _choices_of_variants(found),
    ]
    loss_caption = found.loss_statement if found.losses else ""
    return Answer(
        _cards(found), _verdict(group, found), tuple(note for note in notes if note), loss_caption, _rank_caption(found)
    )


def _cards(found: Findings) -> tuple[Card, ...]:
    cards = []
    if found.best_by_loss is not None:
        note = f"{found.losses[found.best_by_loss]:.4f} nats per token. {_loss_share(found)}"
        cards.append(Card("λ* by held-out loss", f"{found.best_by_loss:.3g}", note))
    if found.best is not None:
        best = " = ".join(f"{decay:.3g}" for decay in _best_decays(found))
        cards.append(Card("λ* by score after fine-tuning", best, _score_note(found)))
    if found.best_by_loss is not None and found.best is not None and len(found.mean_scores) > 1:
        note = "the two choices coincide"
        if not found.agree:
            note = "the size of the difference is not known" if found.advantage is None else f"{_points(found.advantage)} apart"
        cards.append(Card("Do they differ?", "no" if found.agree else "yes", note))
    return tuple(cards)


def _loss_share(found: Findings) -> str:
    paired = found.paired_losses
    share = next(
        (
            row["share"]
            for row in (paired["lowest_held_out_loss"]["distribution"] if paired else ())
            if row["weight_decay"] == found.best_by_loss
        ),
        None,
    )
    if paired is None or share is None:
        return "No interval: it would take several seeds per λ."
    low, high = (paired["lowest_held_out_loss"][end] for end in ("low", "high"))
    return (
        f"Lowest in {100 * share:.0f}\u00a0% of the bootstrap resamples of {paired['held_out_sequences']} held-out sequences; "
        f"{_middle(low, high)}. Other training seeds are not counted in."
    )


def _middle(low: float, high: float) -> str:
    return (
        ("all of " if low == high else "") + f"the middle 95\u00a0% choose {low:.3g}" + (f" to {high:.3g}" if low < high else "")
    )


def _best_decays(found: Findings) -> list[float]:
    return [] if found.best is None else [found.best["weight_decay"], *found.best["ties"]]


def _score_note(found: Findings) -> str:
    assert found.best is not None
    low, high = found.best["low"], found.best["high"]
    share = next(row["share"] for row in found.best["distribution"] if row["weight_decay"] == found.best["weight_decay"])
    score = f"{percent(found.best['score'])}\u00a0% correct, mean of {_of_what(found)}."
    if len(found.mean_scores) < 2:
        return score
    return f"{score} Best in {100 * share:.0f}\u00a0% of the bootstrap resamples of the questions; {_middle(low, high)}."


def _verdict(group: Group, found: Findings) -> str:
    if group.models and all(model.pretrain.kind == "import" for model in group.models):
        return _verdict_on_scores(group, found)
    if found.best_by_loss is None:
        return "No base model has a held-out loss yet, so no λ can be recommended."
    if len(group.models) == 1:
        return f"The study has one λ, {group.models[0].weight_decay:.3g}, so there is nothing to choose between."
    by_loss = f"λ = {found.best_by_loss:.3g} has the least held-out loss"
    if found.best is None:
        return f"{by_loss}. No λ has fine-tuned scores on all tasks, so the study does not say which λ is best after fine-tuning."
    if len(found.mean_scores) == 1:
        only = next(iter(found.mean_scores))
        return (
            f"{by_loss}. Only λ = {only:.3g} has fine-tuned scores on all tasks, so the study does not say which λ is best "
            "after fine-tuning."
        )
    if found.agree:
        return (
            f"{by_loss} and the highest mean score after fine-tuning: here, choosing by loss and choosing by downstream score "
            "agree."
        )
    start = f"{by_loss}, but λ = {found.best['weight_decay']:.3g} scores highest after fine-tuning"
    gained = found.advantage
    if gained is None or gained.low is None:
        lacking = f"λ = {found.best_by_loss:.3g} lacks fine-tuned scores"
        return f"{start}. Whether that is more than noise is not known, since {lacking}."
    start += f", by {_points(gained)}. "
    if gained.low > 0:
        return start + (
            "That is more than the noise of drawing the questions. But the best λ was picked on these same questions, which "
            "flatters it, and with one run per λ an effect of λ cannot be told from an effect of the seed."
        )
    return (
        start + "The interval includes zero: the difference cannot be told from noise, and the study does not show that the two "
        "choices differ."
    )


def _verdict_on_scores(group: Group, found: Findings) -> str:
    """For models that were pretrained elsewhere, whose held-out losses are not known."""
    if len(group.models) == 1:
        return f"There is one λ, {group.models[0].weight_decay:.3g}, so there is nothing to choose between."
    if found.best is None or len(found.mean_scores) < 2:
        return "Fewer than two λ have fine-tuned scores on all tasks, so the study does not say which is best after fine-tuning."
    best = _best_decays(found)
    if len(best) > 1:
        return f"{listing(f'λ = {decay:.3g}' for decay in best)} share the highest mean score after fine-tuning."
    return (
        f"λ = {best[0]:.3g} scores highest after fine-tuning. The models were pretrained elsewhere, so their held-out losses, "
        "and what a choice by loss would have been, are not known here."
    )


def _points(gained: Estimate) -> str:
    value = f"{decimals(100 * gained.value, 1)} percentage points"
    if gained.low is None or gained.high is None:
        return value
    return f"{value} (95\u00a0% interval {decimals(100 * gained.low, 1)} to {decimals(100 * gained.high, 1)})"


def _edge_of_scores(found: Findings) -> str:
    if found.best is None or len(found.mean_scores) < 3 or found.best["weight_decay"] != max(found.mean_scores):
        return ""
    return (
        f"The best λ by score, {found.best['weight_decay']:.3g}, is the largest that was compared: the score may go on rising "
        "beyond it."
    )


def _excluded(group: Group, found: Findings) -> str:
    missing = [model.weight_decay for model in group.models if model.weight_decay not in found.mean_scores]
    if not found.mean_scores or not missing:
        return ""
    return (
        f"Left out of the mean score, since scores of some tasks are missing: {listing(f'λ = {decay:.3g}' for decay in missing)}."
    )


def _unfinished(found: Findings, outcomes: Sequence[Outcome]) -> str:
    missing = [outcome.name for outcome in outcomes if outcome.name not in found.statistics["tasks"]]
    if not missing or not found.outcome_count:
        return ""
    if any(outcome.variant for outcome in outcomes):
        return (
            f"No λ has fine-tuned scores on {len(missing)} of the {len(outcomes)} pairs of task and way of fine-tuning, so the "
            "mean is over the others."
        )
    return f"No λ has fine-tuned scores on {listing(missing)}, so the mean is over the other {_count(found.task_count, 'task')}."


def _choices_of_variants(found: Findings) -> str:
    if len(found.variants) < 2:
        return ""
    chosen = Counter(variant["best"]["weight_decay"] for variant in found.variants.values())
    times = listing(f"λ = {decay:.3g} after {count}" for decay, count in chosen.most_common())
    return f"Of the {len(found.variants)} ways of fine-tuning, each with its own mean over tasks, the best is {times}."


def _of_what(found: Findings) -> str:
    """What the mean score is over."""
    ways = f" in {len(found.variants)} ways of fine-tuning" if found.variants else ""
    return _count(found.task_count, "task") + ways


def _rank_caption(found: Findings) -> str:
    if found.discordant is None:
        return ""
    discordant, pairs = found.discordant
    return (
        f"Lines that cross are pairs of λ that loss and score put in opposite order: {discordant} of {_count(pairs, 'pair')}. "
        f"Score: mean over tasks{' and ways of fine-tuning' if found.variants else ''}, greedy. "
        "Ranks hide how close the numbers are; see the intervals below."
    )


def _count(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def listing(words: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
