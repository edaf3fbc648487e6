"""The answer on top of the page, in words: whether the best λ moves with length, family and size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_plasticity.study.report.answer import Card, listing
from megatron_plasticity.study.report.comparison.common import Common
from megatron_plasticity.study.report.comparison.findings import GroupFindings
from megatron_plasticity.study.report.comparison.groups import Study
from megatron_plasticity.study.report.comparison.movement import Judge, Pair, Question, Scale
from megatron_plasticity.study.report.comparison.tables import movement_entry, movement_text

QUESTIONS: dict[Question, str] = {
    "tokens": "With more tokens per parameter",
    "family": "With another family",
    "size": "With larger models",
    "seed": "With another seed alone",
}
_SCALES: tuple[tuple[Scale, str], ...] = (("weight decay", "Best λ"), ("timescale", "Best timescale"))
_JUDGES: tuple[tuple[Judge, str], ...] = (("score", "after fine-tuning"), ("loss", "by loss"))
_TAKES: dict[Question, str] = {
    "tokens": "It takes two groups of one family and size at unlike numbers of tokens per parameter.",
    "family": "It takes groups of two families, alike in size (within a factor of 2) and in tokens per parameter.",
    "size": "It takes two groups of one family and of unlike size at the same number of tokens per parameter.",
}


def cards(pairs: Sequence[Pair]) -> list[Card]:
    """One card per question; that of the seed only where groups answer it."""
    found = []
    for question, label in QUESTIONS.items():
        of_question = [pair for pair in pairs if pair.question == question]
        if of_question:
            found.append(Card(label, _told(of_question, "score", "weight decay"), _note(of_question)))
        elif question in _TAKES:
            found.append(Card(label, "cannot be said", _TAKES[question]))
    return found


def _told(pairs: Sequence[Pair], judge: Judge, scale: Scale) -> str:
    """The verdicts of all pairs together."""
    counts = Counter(movement_text(pair.movement(judge, scale), scale) for pair in pairs)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{verdict} in {count}" for verdict, count in counts.most_common()) + f" of {len(pairs)} pairs"


def _note(pairs: Sequence[Pair]) -> str:
    """Both judges on both scales; with one pair the λ and timescales themselves as well."""
    where = (
        f"{pairs[0].first.group.label} → {pairs[0].second.group.label}" if len(pairs) == 1 else f"{len(pairs)} pairs of groups"
    )
    parts = []
    for scale, what in _SCALES:
        for judge, by in _JUDGES:
            ends = movement_entry(pairs[0], judge, scale).interval if len(pairs) == 1 else ""
            parts.append(f"{what} {by}{f' {ends}' if ends else ''}: {_told(pairs, judge, scale)}.")
    return f"{where}. {' '.join(parts)}"


def notes(studies: Sequence[Study], found: Sequence[GroupFindings], common: Common) -> list[str]:
    """What to know before reading on, most important first."""
    sentences = []
    compared = {study for index in common.groups for study in found[index].group.studies}
    if not common.groups:
        sentences.append(
            "No two groups were fine-tuned alike and asked the same questions of any task, so scores are not compared: only "
            "losses, and what was measured inside the models. What is left out, and why, is listed below."
        )
    else:
        lacking = [study.name for study in studies if study.name not in compared]
        if lacking:
            verb = "has" if len(lacking) == 1 else "have"
            sentences.append(
                f"{listing(lacking)} {verb} no group whose scores can be compared with the others'; the reasons are listed below."
            )
    for study in studies:
        cells = study.results.cells
        undone = Counter(cell.status for cell in cells if cell.status != "done")
        if undone:
            states = ", ".join(f"{count} {status}" for status, count in undone.most_common())
            verb = "has" if sum(undone.values()) == 1 else "have"
            sentences.append(
                f"{study.name}: {sum(undone.values())} of {len(cells)} runs {verb} no results ({states}). What follows rests on "
                "the others."
            )
    for index, each in enumerate(found):
        partly = index in common.groups and each.mean is not None and len(each.mean.weight_decays) < len(each.group.members)
        if partly and each.mean is not None:
            missing = [m.weight_decay for m in each.group.members if m.weight_decay not in each.mean.weight_decays]
            sentences.append(
                f"{each.group.label}: no mean score at {listing(f'λ = {decay:.3g}' for decay in missing)}, since scores of some "
                "tasks are missing there. The best λ is that of the others."
            )
        if each.by_loss is not None and each.by_loss.candidates is None and len(each.losses) > 1:
            sentences.append(
                f"{each.group.label}: the noise of its losses is not known, since they are not known at every λ on the same "
                "sequences, so it cannot be said whether its best λ by loss is another one. `overfitting: {}` among the "
                "`analyses` of the study measures that."
            )
        for name, choice in (("held-out loss", each.by_loss), ("mean score", each.by_score)):
            if (
                choice is not None
                and len(choice.grid) > 2
                and choice.best in (choice.grid[0], choice.grid[-1])
                and choice.best > 0
            ):
                end = "smallest" if choice.best == choice.grid[0] else "largest"
                sentences.append(
                    f"{each.group.label}: the best λ by {name}, {choice.best:.3g}, is the {end} that was compared: the best may "
                    "lie beyond."
                )
    return sentences


def limits(found: Sequence[GroupFindings], pairs: Sequence[Pair], common: Common) -> list[str]:
    """What a comparison cannot say, most important first."""
    seeds = any(pair.question == "seed" for pair in pairs)
    corpora = {each.group.facts.corpus_sha256 for each in found}
    tokenizers = {each.group.facts.tokenizer_sha256 for each in found}
    sentences = [
        "Causes. Groups seldom differ in one thing alone. A card names the question that a pair of groups comes closest to; what "
        "else differs stands beside the pair, and may be the cause.",
        "Seeds. Each λ is one training run unless a group says otherwise. Intervals and candidates are over questions and "
        "sequences: they do not say how the best λ would change with another run"
        + ("; the pairs that differ in the seed alone give a sight of that." if seeds else "."),
        "Grids. The best λ is the best of those that were tried. A best λ counts as moved only if it cannot lie between the same "
        "two values of both grids, which takes it that a curve has one peak. “By a grid step”: other values of the grid are "
        "best, but neighbouring ones, so that an optimum between them may be the same.",
        "Timescale. 1/(learning rate · λ · steps) at the peak learning rate leaves out the shape of the schedule, the batch size "
        "and which tensors decay. That it is what carries over from one run to another is a conjecture.",
        "Many looks. Each verdict on a pair may be wrong in at most 10 % of studies by the noise of questions and sequences; "
        f"with {len(pairs)} {'pair' if len(pairs) == 1 else 'pairs'}, two judges and two scales, some may be.",
    ]
    if len(corpora) > 1 or None in corpora:
        sentences.append(
            "Losses. Groups were held to different texts, or it is not known to which: losses are shown as rises above each "
            "group's own lowest. A nat of one text is not a nat of another, so compare where the curves turn and not how steep "
            "they are."
        )
    if len(tokenizers) > 1:
        sentences.append(
            "Tokenizers. They differ: nats per token are not of the same tokens, and one answer takes unlike numbers of tokens "
            "out of the same longest length. Scores are of the same questions all the same."
        )
    if any(each.group.timescales_of_recipe for each in found):
        labels = listing(each.group.label for each in found if each.group.timescales_of_recipe)
        sentences.append(
            f"Imported models. Learning rate and steps of {labels} are not known from the models; their timescales are those of "
            "the paper's recipe for this size and length."
        )
    if common.outcomes and len({outcome.evaluated.scores.chance for outcome in common.outcomes}) > 1:
        sentences.append(
            "Chance. The tasks have unlike chance levels, and the mean score is a plain mean over them: its height says little, "
            "its differences between λ and between groups are of the same questions."
        )
    return sentences
