"""The tables of a comparison: rows of text for the page, and the same numbers in full for the CSV files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from megatron_plasticity.study.report.comparison.common import Common, SharedOutcome, sampled_alike
from megatron_plasticity.study.report.comparison.facts import count_text, family_text, ratio_text
from megatron_plasticity.study.report.comparison.findings import Choice, GroupFindings, averaged
from megatron_plasticity.study.report.comparison.groups import LeftOut
from megatron_plasticity.study.report.comparison.internals import Quantity
from megatron_plasticity.study.report.comparison.movement import Judge, Movement, Pair, Question, Scale
from megatron_plasticity.study.report.comparison.terms import GRADER, RULES, TEST_SETS
from megatron_plasticity.study.report.figures.weight_decay_axis import timescale_text
from megatron_plasticity.study.report.tables import METRICS, Entry, Table, decimals, estimate_entry, percent, table
from megatron_plasticity.study.scores import Estimate, estimate

GROUP_COLUMNS = (
    "group", "studies", "name_in_study", "family", "parameters", "tokens", "tokens_per_parameter", "corpus", "corpus_sha256",
    "tokenizer_sha256", "weight_decays", "weight_decays_with_mean_score", "losses_of", "best_by_loss", "best_by_loss_candidates",
    "best_by_loss_timescale", "lowest_loss", "best_by_score", "best_by_score_candidates", "best_by_score_timescale",
    "score_at_best", "score_at_best_low", "score_at_best_high", "gap", "gap_low", "gap_high", "tasks", "seeds",
)  # fmt: skip
CURVE_COLUMNS = ("quantity", "task", "group", "weight_decay", "adamw_timescale", "value", "low", "high")
PAIR_COLUMNS = (
    "question", "first", "second", "loss_weight_decay", "loss_timescale", "score_weight_decay", "score_timescale", "also_differ",
)  # fmt: skip
LEFT_OUT_COLUMNS = ("what", "where", "why")
JUDGES: tuple[Judge, ...] = ("loss", "score")
SCALES: tuple[Scale, ...] = ("weight decay", "timescale")
_IN_TIMESCALES: dict[Movement, str] = {
    "larger": "longer",
    "smaller": "shorter",
    "larger by a grid step": "longer by a grid step",
    "smaller by a grid step": "shorter by a grid step",
}


def model_table(found: Sequence[GroupFindings]) -> Table:
    """What the groups are."""
    columns = {
        "group": False,
        "study": False,
        "base model": False,
        "parameters": True,
        "tokens": True,
        "per parameter": True,
        "corpus": False,
        "λ": True,
        "losses of": False,
    }
    rows = []
    for each in found:
        facts = each.group.facts
        done = len(each.mean.weight_decays) if each.mean is not None else 0
        decays = len(each.group.members)
        rows.append(
            (
                Entry(each.group.label, look="strong name"),
                Entry(" and ".join(each.group.studies), each.group.name, look="name"),
                Entry(family_text(facts.family), look="whole"),
                count_text(facts.parameters),
                count_text(facts.tokens),
                ratio_text(facts.tokens_per_parameter),
                Entry(facts.corpus or "?", (facts.corpus_sha256 or "")[:8], look="name"),
                Entry(str(decays), "" if done == decays else f"{done} scored"),
                each.losses_of or "–",
            )
        )
    return table(columns, rows)


def best_table(found: Sequence[GroupFindings], common: Common) -> Table:
    """The best λ of each group by loss and after fine-tuning, with what else may be the best, and what choosing by loss costs."""
    columns = {
        "group": False,
        "best λ by loss": True,
        "timescale": True,
        "after fine-tuning": True,
        "timescale ": True,
        "score there %": True,
        "gap, points": True,
        "tasks": True,
        "seeds": True,
    }
    rows = []
    for index, each in enumerate(found):
        compared = index in common.groups
        rows.append(
            (
                Entry(each.group.label, look="strong name"),
                choice_entry(each.by_loss),
                _timescale(each, each.by_loss),
                choice_entry(each.by_score),
                _timescale(each, each.by_score),
                estimate_entry(each.score_at_best),
                estimate_entry(each.gap),
                str(len(common.outcomes)) if compared else "–",
                _seeds(common, index) if compared else "–",
            )
        )
    return table(columns, rows)


def choice_entry(choice: Choice | None) -> Entry:
    """The best λ with its ties; in small print the λ that no other beats by more than noise."""
    if choice is None:
        return Entry("–")
    best = " = ".join(f"{decay:.3g}" for decay in (choice.best, *choice.ties))
    return Entry(best, candidates_text(choice))


def candidates_text(choice: Choice) -> str:
    """The set of candidates in words."""
    if choice.candidates is None:
        return "noise not known"
    if len(choice.candidates) == len(choice.grid):
        return f"any of {len(choice.grid)}" if len(choice.grid) > 1 else "the only one"
    return ", ".join(f"{decay:.3g}" for decay in choice.candidates)


def _timescale(each: GroupFindings, choice: Choice | None) -> str:
    return "–" if choice is None else timescale_text(each.group.timescales.get(choice.best), choice.best)


def _seeds(common: Common, group: int) -> str:
    """Seeds of fine-tuning that scores are averaged over: least and most over the tasks."""
    counts = sorted({len(outcome.shared_seeds) for outcome in common.outcomes})
    if counts == [0]:
        own = sorted({len(outcome.seeds[group]) for outcome in common.outcomes})
        return f"none; {'–'.join(map(str, own))} of its own"
    return "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))


def pair_table(pairs: Sequence[Pair], questions: Mapping[Question, str]) -> Table:
    """Where the best λ goes from one group to another, on both scales, and what else differs."""
    columns = {
        "": False,
        "from": False,
        "to": False,
        "by loss: λ": False,
        "timescale": False,
        "after fine-tuning: λ": False,
        "timescale ": False,
        "what else differs": False,
    }
    rows = [
        (
            Entry(questions.get(pair.question, ""), look="strong name"),
            Entry(pair.first.group.label, look="name"),
            Entry(pair.second.group.label, look="name"),
            *(movement_entry(pair, judge, scale) for judge in JUDGES for scale in SCALES),
            Entry("; ".join(pair.also) or "nothing that is known", look="aside name"),
        )
        for pair in pairs
    ]
    return table(columns, rows)


def movement_entry(pair: Pair, judge: Judge, scale: Scale) -> Entry:
    """The verdict, and in small print both best λ, or their timescales."""
    movement = pair.movement(judge, scale)
    ends = [(found, found.by_loss if judge == "loss" else found.by_score) for found in (pair.first, pair.second)]
    if any(choice is None for _, choice in ends):
        return Entry("–")
    texts = [
        f"{choice.best:.3g}" if scale == "weight decay" else _timescale(found, choice)
        for found, choice in ends
        if choice is not None
    ]
    return Entry(
        movement_text(movement, scale),
        "\u00a0→\u00a0".join(texts),
        look="" if movement in ("not told apart", "not known") else "strong",
    )


def movement_text(movement: Movement, scale: str) -> str:
    """A verdict in the words that suit the scale."""
    return _IN_TIMESCALES.get(movement, movement) if scale == "timescale" else movement


def task_choices_table(found: Sequence[GroupFindings], common: Common) -> Table:
    """The best λ on each shared task, group by group."""
    columns = {"task": False, **{each.group.label: True for each in found}}
    return table(
        columns,
        [(outcome.name, *(choice_entry(each.choice(outcome.name)) for each in found)) for outcome in common.all_outcomes],
    )


def compared_table(found: Sequence[GroupFindings], common: Common) -> Table:
    """What each compared task is: questions, how they are judged, which groups and seeds."""
    columns = {
        "task": False,
        "questions": True,
        "test sets": False,
        "chance %": True,
        "rules": False,
        "grader": False,
        "groups": False,
        "seeds in common": False,
        "in the mean": False,
    }
    rows = []
    for outcome in common.all_outcomes:
        scores, judged = outcome.evaluated.scores, outcome.evaluated.judged
        every = len(outcome.runs) == len(found)
        rows.append(
            (
                outcome.name,
                str(scores.questions),
                judged[TEST_SETS],
                percent(scores.chance),
                judged[RULES],
                judged[GRADER],
                "all" if every else ", ".join(found[index].group.label for index in outcome.runs),
                ", ".join(outcome.shared_seeds) or "none",
                "yes" if outcome in common.outcomes else "no",
            )
        )
    return table(columns, rows)


def left_out_table(left_out: Sequence[LeftOut]) -> Table:
    """What was not compared, and why."""
    columns = {"what": False, "where": False, "why not": False}
    return table(columns, [(item.what, item.where, Entry(item.why, look="prose")) for item in left_out])


def sampled_table(found: Sequence[GroupFindings], common: Common, settings: tuple[int, int]) -> Table | None:
    """Means over the compared tasks of the metrics of sampled answers; None where they were not drawn alike."""
    if not common.outcomes or sampled_alike(common.outcomes):
        return None
    rows: list[tuple[str, str, dict[str, float]]] = []
    for index in common.groups:
        for decay in found[index].scores:
            metrics = [metrics_of(outcome, index, decay, settings) for outcome in common.outcomes]
            shared = [name for name in ("greedy", "maj", "pass", "correct_ratio") if all(name in each for each in metrics)]
            means = {name: fmean(each[name].value for each in metrics) for name in shared}
            rows.append((found[index].group.label, f"{decay:.3g}", means))
    names = [name for name in METRICS if any(name in means for _, _, means in rows)]
    columns = {"group": False, "λ": True, **{f"{METRICS[name][0]} %": True for name in names}}
    return table(columns, [(label, decay, *(percent(means.get(name)) for name in names)) for label, decay, means in rows])


def metrics_of(outcome: SharedOutcome, group: int, weight_decay: float, settings: tuple[int, int]) -> dict[str, Estimate]:
    """Every metric of one model on one shared outcome, mean over the seeds."""
    return dict(averaged(outcome.runs[group][weight_decay], settings).metrics)


def group_records(found: Sequence[GroupFindings], common: Common) -> list[dict[str, Any]]:
    """One record per group, for `groups.csv` and `comparison.json`; shares are fractions of 1."""
    records = []
    for index, each in enumerate(found):
        facts, compared = each.group.facts, index in common.groups
        values = (
            each.group.label, list(each.group.studies), each.group.name, facts.family, facts.parameters, facts.tokens,
            facts.tokens_per_parameter, facts.corpus, facts.corpus_sha256, facts.tokenizer_sha256,
            [member.weight_decay for member in each.group.members], list(each.mean.weight_decays) if each.mean else [],
            each.losses_of or None, *_choice_values(each, each.by_loss), min(each.losses.values(), default=None),
            *_choice_values(each, each.by_score), *_ends(each.score_at_best), *_ends(each.gap),
            [outcome.name for outcome in common.outcomes] if compared else [],
            sorted({seed for outcome in common.outcomes for seed in outcome.shared_seeds}) if compared else [],
        )  # fmt: skip
        records.append(dict(zip(GROUP_COLUMNS, values, strict=True)))
    return records


def _choice_values(each: GroupFindings, choice: Choice | None) -> tuple[Any, Any, Any]:
    if choice is None:
        return None, None, None
    candidates = None if choice.candidates is None else list(choice.candidates)
    return choice.best, candidates, each.group.timescales.get(choice.best)


def _ends(found: Estimate | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if found is None else (found.value, found.low, found.high)


def pair_records(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """One record per pair of groups."""
    return [
        dict(
            zip(
                PAIR_COLUMNS,
                (
                    pair.question,
                    pair.first.group.label,
                    pair.second.group.label,
                    pair.movement("loss", "weight decay"),
                    movement_text(pair.movement("loss", "timescale"), "timescale"),
                    pair.movement("score", "weight decay"),
                    movement_text(pair.movement("score", "timescale"), "timescale"),
                    list(pair.also),
                ),
                strict=True,
            )
        )
        for pair in pairs
    ]


def curve_records(
    found: Sequence[GroupFindings], common: Common, quantities: Sequence[Quantity], settings: tuple[int, int]
) -> list[dict[str, Any]]:
    """Every point of every curve, for `curves.csv`; shares are fractions of 1, losses nats per token."""
    alike = not sampled_alike(common.all_outcomes)
    return [
        record for index in range(len(found)) for record in _of_group(index, found[index], common, quantities, settings, alike)
    ]


def _of_group(
    index: int,
    each: GroupFindings,
    common: Common,
    quantities: Sequence[Quantity],
    settings: tuple[int, int],
    alike: bool,
) -> Iterator[dict[str, Any]]:
    def record(quantity: str, task: str, decay: float, value: Estimate) -> dict[str, Any]:
        timescale = each.group.timescales.get(decay)
        fields = (quantity, task, each.group.label, decay, timescale, value.value, value.low, value.high)
        return dict(zip(CURVE_COLUMNS, fields, strict=True))

    for decay, loss in each.losses.items():
        yield record("held-out loss", "", decay, Estimate(loss))
    for decay, rise in each.loss_rises.items():
        yield record("loss above the group's lowest", "", decay, rise)
    for decay, score in each.scores.items():
        yield record("score", "mean of tasks", decay, score)
    for decay, gain in each.gains.items():
        yield record("gain", "mean of tasks", decay, gain)
    for outcome in common.all_outcomes:
        for row in each.outcome(outcome.name).get("scores", ()):
            decay = row["weight_decay"]
            for quantity in ("score", "gain"):
                if (value := estimate(row.get(quantity))) is not None:
                    yield record(quantity, outcome.name, decay, value)
            if alike:
                for name, value in metrics_of(outcome, index, decay, settings).items():
                    if name in METRICS and name != "greedy":
                        yield record(METRICS[name][0], outcome.name, decay, value)
    for quantity in quantities:
        for decay, value in quantity.values.get(index, {}).items():
            yield record(f"{quantity.title}, {quantity.unit}".replace(" (%)", ""), "", decay, value)


def flat(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For CSV: a list in one field, its items apart by semicolons."""
    return [
        {key: "; ".join(map(str, value)) if isinstance(value, list) else value for key, value in record.items()}
        for record in records
    ]


def terminal_lines(record: dict[str, Any]) -> list[str]:
    """The groups and the answers in a few lines, from what `comparison.json` holds."""
    lines = []
    for group in record["groups"]:
        gap = group["gap"]
        lost = "" if gap is None else f", {decimals(100 * gap, 1)} points lost by choosing by loss"
        by_loss, by_score = (_of_terminal(group, judge) for judge in ("loss", "score"))
        lines.append(f"{group['group']}: best λ by loss {by_loss}, after fine-tuning {by_score}{lost}")
    lines += [f"{card['label']}: {card['value']}. {card['note']}" for card in record["answers"]]
    if record["left_out"]:
        lines.append(f"left out, with reasons on the page: {len(record['left_out'])}")
    return lines


def _of_terminal(group: dict[str, Any], judge: str) -> str:
    best, candidates = group[f"best_by_{judge}"], group[f"best_by_{judge}_candidates"]
    if best is None:
        return "not known"
    among = "noise not known" if candidates is None else ", ".join(f"{decay:.3g}" for decay in candidates)
    return f"{best:.3g} (candidates: {among})" if candidates is None or len(candidates) > 1 else f"{best:.3g}"
