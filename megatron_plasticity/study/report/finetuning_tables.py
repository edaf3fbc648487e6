"""Tables of a study that fine-tunes in several ways, with several seeds, from several checkpoints, or has several test sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from megatron_plasticity.study.grid import value_text
from megatron_plasticity.study.report.findings import MEAN, Findings
from megatron_plasticity.study.report.plasticity_tables import TitledTable, at_each, best_entries, curve_tables, name_entry
from megatron_plasticity.study.report.tables import Entry, Table, decimals, estimate_entry, percent, stages_of, table
from megatron_plasticity.study.results import BaseModel, Outcome, StudyResults, short_path
from megatron_plasticity.study.scores import estimate

_RANK_CORRELATION = (
    "Rank correlation",
    "Spearman’s, of the mean scores of the λ after one way of fine-tuning with those after the first; 1 means that the order is "
    "the same",
)
_SPREAD = (
    "Spread over seeds",
    "standard deviation of the score over the seeds of fine-tuning; everywhere else the score is the mean over them",
)


def legend(results: StudyResults) -> list[tuple[str, str]]:
    """Further entries of the legend of plasticity."""
    return [*([_RANK_CORRELATION] if results.variants else []), *([_SPREAD] if len(results.finetune_seeds) > 1 else [])]


def finetuning_tables(
    found: Findings, variants: Mapping[str, Mapping[str, Any]], models: Sequence[BaseModel], outcomes: Sequence[Outcome]
) -> list[TitledTable]:
    """Best λ by variant with all outcomes one by one, and the spread over seeds; nothing for one variant and one seed."""
    tables = []
    if found.variants:
        tables.append(
            TitledTable(f"Best λ after each of {len(found.variants)} ways of fine-tuning", _by_variant(found, variants))
        )
        tables += curve_tables(found.outcome_curves, found.statistics["weight_decays"], of=": each way of fine-tuning")
    if any(len(scores.by_seed) > 1 for model in models for scores in model.finetuned_scores.values()):
        tables.append(TitledTable("Spread over seeds of fine-tuning, percentage points", _over_seeds(models, outcomes)))
    return tables


def _by_variant(found: Findings, variants: Mapping[str, Mapping[str, Any]]) -> Table:
    paths = list(dict.fromkeys(path for point in variants.values() for path in point))
    columns = {
        **{short_path(path, paths): True for path in paths},
        "best λ": True,
        "range of choices": True,
        "mean score there %": True,
        "rank correlation": True,
    }
    rows = []
    for variant, statistics in found.variants.items():
        correlation = statistics.get("rank_correlation")
        is_first = variant == next(iter(variants))
        rows.append(
            (
                *(value_text(variants[variant].get(path, "")) for path in paths),
                *best_entries(statistics["best"]),
                estimate_entry(estimate(statistics["score"])),
                "first" if is_first else decimals(correlation, 2),
            )
        )
    return table(columns, rows)


def _over_seeds(models: Sequence[BaseModel], outcomes: Sequence[Outcome]) -> Table:
    tasks = list(dict.fromkeys(outcome.task for outcome in outcomes))
    parts = {task: [outcome.name for outcome in outcomes if outcome.task == task] for task in tasks}
    if len(tasks) > 1:
        parts[MEAN] = [outcome.name for outcome in outcomes]
    columns = {"task": False, **{f"λ = {model.weight_decay:.3g}": True for model in models}}
    return table(columns, [(name_entry(task), *(_spread(model, names) for model in models)) for task, names in parts.items()])


def _spread(model: BaseModel, outcomes: Sequence[str]) -> Entry:
    means = _means_by_seed(model, outcomes)
    return Entry(percent(stdev(means.values())), f"{len(means)} seeds") if len(means) > 1 else Entry("–")


def _means_by_seed(model: BaseModel, outcomes: Sequence[str]) -> dict[str, float]:
    """Mean score over the outcomes by seed of fine-tuning, of the seeds that every outcome has; empty if one has no scores."""
    found = [model.finetuned_scores[name].by_seed for name in outcomes if name in model.finetuned_scores]
    seeds = [seed for seed in found[0] if all(seed in by_seed for by_seed in found)] if len(found) == len(outcomes) else []
    return {seed: fmean(by_seed[seed] for by_seed in found) for seed in seeds}


def seed_records(models: Sequence[BaseModel], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """For `report.json`: scores by seed of fine-tuning and their standard deviation, which is null for one seed; per outcome, and
    of the mean over all of them. Empty without an axis of seeds."""
    parts = {outcome.name: [outcome.name] for outcome in outcomes}
    if len(parts) > 1:
        parts[MEAN] = list(parts)
    return [
        {
            "outcome": name,
            "weight_decay": model.weight_decay,
            "scores": means,
            "standard_deviation": stdev(means.values()) if len(means) > 1 else None,
        }
        for name, outcomes_of_part in parts.items()
        for model in models
        if (means := _means_by_seed(model, outcomes_of_part))
    ]


def step_tables(found: Findings) -> list[TitledTable]:
    """Mean score and gain after fine-tuning from each step of pretraining; empty if only the last was."""
    decays = found.statistics["weight_decays"]
    means = {step: mean for step, statistics in found.over_steps.items() if (mean := statistics.get("mean"))}
    if not means:
        return []
    headings = {f"λ = {decay:.3g}": True for decay in decays}
    scores = [(f"{step:,}", *best_entries(mean["best"]), *at_each(mean, decays, "score")) for step, mean in means.items()]
    gains = [(f"{step:,}", *at_each(mean, decays, "gain")) for step, mean in means.items()]
    return [
        TitledTable(
            "Mean score after fine-tuning from each step, %",
            table({"step": True, "best λ": True, "range of choices": True, **headings}, scores),
        ),
        TitledTable("Gain over the base model of the same step, percentage points", table({"step": True, **headings}, gains)),
    ]


def scores_by_test_set(models: Sequence[BaseModel], outcomes: Sequence[Outcome]) -> Table | None:
    """Greedy scores of one task by test set, and by group of questions where a set has groups; None where there is one part."""
    stages = [(m, variant or stage, scores) for m in models for stage, variant, scores in stages_of(m, outcomes) if scores]
    columns: dict[tuple[str, str], int | None] = {}
    for _, _, scores in stages:
        for test_set in scores.test_sets:
            columns.setdefault((test_set.name, ""), test_set.questions)
            columns.update({(test_set.name, group): None for group in test_set.groups if (test_set.name, group) not in columns})
    if not columns:
        return None
    headings = {"λ": True, "model": False, **{_part(*key, questions): True for key, questions in columns.items()}}
    rows = []
    for model, stage, scores in stages:
        sets = {test_set.name: test_set for test_set in scores.test_sets}
        entries = [
            (Entry(percent(part.groups.get(group))) if group else estimate_entry(part.metrics.get("greedy")))
            if (part := sets.get(name)) is not None
            else Entry("–")
            for name, group in columns
        ]
        rows.append((f"{model.weight_decay:.3g}", stage, *entries))
    return table(headings, rows)


def _part(test_set: str, group: str, questions: int | None) -> str:
    return f"{test_set}, {group} %" if group else f"{test_set} ({questions} questions) %"
