"""The page: figures, tables and sentences of a study in one HTML file, with CSV and JSON beside it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import yaml

from megatron_plasticity.config.files import write_json_atomic, write_text_atomic
from megatron_plasticity.study.report import tables
from megatron_plasticity.study.report.answer import Answer, answer
from megatron_plasticity.study.report.assertion_table import assertion_tables
from megatron_plasticity.study.report.assertions import StudyAssertions, assess, record
from megatron_plasticity.study.report.comparability import base_format_rates
from megatron_plasticity.study.report.drawings import Draughtsman, Drawing
from megatron_plasticity.study.report.features import FeaturesView
from megatron_plasticity.study.report.figures.svg import Palette, drawing
from megatron_plasticity.study.report.findings import Findings, find
from megatron_plasticity.study.report.finetuning_tables import (
    finetuning_tables,
    legend,
    scores_by_test_set,
    seed_records,
    step_tables,
)
from megatron_plasticity.study.report.html import render_template
from megatron_plasticity.study.report.limits import limits
from megatron_plasticity.study.report.loss_tables import model_table, paired_loss_caption, paired_loss_table
from megatron_plasticity.study.report.plasticity_tables import LEGEND, TitledTable, plasticity_tables
from megatron_plasticity.study.report.samples import LONGEST_ANSWER, SampleSet, sample_sets
from megatron_plasticity.study.report.tables import Table
from megatron_plasticity.study.results import BASE_KINDS, Group, StudyResults, collect
from megatron_plasticity.study.scores import number

_PACKAGES = ("megatron-plasticity", "torch", "deepspeed", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class GroupView:
    """What the page shows of one group of base models."""

    label: str
    answer: Answer
    loss: Drawing | None
    ranks: Drawing | None
    model_table: Table
    loss_differences: Table | None
    loss_differences_caption: str
    tasks: list[Drawing]
    score_tables: Mapping[str, Table]
    test_set_tables: Mapping[str, Table]
    plasticity_tables: list[TitledTable]
    over_steps: list[Drawing]
    step_tables: list[TitledTable]
    samples: list[SampleSet]
    probes: Mapping[str, list[Drawing]]
    pseudo_ranks: list[Drawing]
    spectra: list[list[Drawing]]
    heads: list[list[Drawing]]
    truncations: list[Drawing]
    attention_maps: list[list[Drawing]]
    gaps: list[Drawing]
    features: FeaturesView | None
    curves: list[Drawing]


def write_report(study_folder: Path) -> Path:
    """Write `report/index.html`, `cells.csv`, `scores.csv` and `report.json` into the study folder; return the page's path.

    Works on a study in any state: what is missing is named. Raises UserError if the folder is no study.
    """
    results = collect(study_folder)
    findings = [find(group, results.outcomes, results.config) for group in results.groups]
    folder = study_folder / "report"
    write_text_atomic(folder / "cells.csv", tables.csv_text(tables.cell_columns(results), tables.cell_records(results)))
    write_text_atomic(folder / "scores.csv", tables.csv_text(tables.score_columns(results), tables.score_records(results)))
    assertions = assess(results, findings)
    write_json_atomic(folder / "report.json", _report_json(results, findings, assertions))
    write_text_atomic(folder / "index.html", render_page(results, findings, assertions))
    return folder / "index.html"


def render_page(results: StudyResults, findings: list[Findings], assertions: StudyAssertions) -> str:
    """The page as one self-contained HTML text. Everything but our own SVG is escaped."""
    palette = Palette(results.weight_decays)
    with drawing():
        groups = [
            _group_view(results, group, found, Draughtsman(group, palette, f"group{index}"))
            for index, (group, found) in enumerate(zip(results.groups, findings, strict=True))
        ]
    return render_template("template.html.jinja", _context(results, groups, assertions, palette))


def _group_view(results: StudyResults, group: Group, found: Findings, draughtsman: Draughtsman) -> GroupView:
    readable = base_format_rates(group.models, results.tasks)
    said = answer(group, found, results.outcomes)
    by_task = {task: [outcome for outcome in results.outcomes if outcome.task == task] for task in results.tasks}
    by_test_set = {task: scores_by_test_set(group.models, outcomes) for task, outcomes in by_task.items()}
    return GroupView(
        label=group.label,
        answer=said,
        loss=draughtsman.loss(said.loss_caption),
        ranks=draughtsman.ranks(found.losses, found.mean_scores, said.rank_caption),
        model_table=model_table(group.models, found.paired_losses),
        loss_differences=paired_loss_table(found.paired_losses),
        loss_differences_caption=paired_loss_caption(found.paired_losses),
        tasks=draughtsman.tasks(results.outcomes, found.curves, readable),
        score_tables={task: tables.score_table(group.models, outcomes) for task, outcomes in by_task.items()},
        test_set_tables={task: parts for task, parts in by_test_set.items() if parts is not None},
        plasticity_tables=[
            *plasticity_tables(found, readable),
            *finetuning_tables(found, results.variants, group.models, results.outcomes),
        ],
        over_steps=draughtsman.over_steps(found.over_steps),
        step_tables=step_tables(found),
        samples=sample_sets(group.models, results.outcomes),
        probes=draughtsman.probes(),
        pseudo_ranks=draughtsman.pseudo_ranks(),
        spectra=draughtsman.spectra(),
        heads=draughtsman.heads(),
        truncations=draughtsman.truncations(),
        attention_maps=draughtsman.attention_maps(),
        gaps=draughtsman.gaps(),
        features=draughtsman.features(),
        curves=draughtsman.curves(),
    )


def _context(results: StudyResults, groups: list[GroupView], assertions: StudyAssertions, palette: Palette) -> dict[str, Any]:
    incomplete = [cell for cell in results.cells if cell.status != "done"]
    counts = Counter(cell.status for cell in results.cells)
    summary = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    sections = ("tasks", "test_set_tables", "over_steps", "samples", "probes", "gaps", "features", "curves")
    has = {name: any(getattr(group, name) for group in groups) for name in sections}
    has["attention"] = any(group.pseudo_ranks or group.spectra or group.attention_maps or group.truncations for group in groups)
    return {
        "study": results,
        "facts": _facts(results),
        "has": has,
        "groups": groups,
        "statements": assertion_tables(assertions, results.groups),
        "palette": palette,
        "weight_decays": results.weight_decays,
        "unfinished": _unfinished(len(incomplete), len(results.cells), summary),
        "metrics": list(tables.METRICS.values()),
        "plasticity_legend": [*LEGEND, *legend(results)],
        "longest_answer": LONGEST_ANSWER,
        "cell_summary": f"{len(results.cells)} runs: {summary}." if results.cells else "The study has no runs.",
        "incomplete_cells": tables.cell_table(incomplete) if incomplete else None,
        "all_cells": tables.cell_table(results.cells),
        "limits": limits(results),
        "config": _yaml(results.config),
        "corpus": _yaml(results.corpus) if results.corpus else "",
        "report_folder": shlex.quote(str(PurePath(str(results.config.get("output") or "runs")) / results.name)),
        "versions": versions(),
    }


def _unfinished(incomplete: int, total: int, summary: str) -> str:
    if not incomplete:
        return ""
    verb = "has" if incomplete == 1 else "have"
    return f"{incomplete} of {total} runs {verb} no results ({summary}). What follows rests on the others; see Runs below."


def _facts(results: StudyResults) -> str:
    """One line on the size of the study, of what is known."""
    done = [cell.results for cell in results.cells if cell.kind in BASE_KINDS and cell.results]
    facts = [f"{len(results.weight_decays)} values of λ", f"{len(results.tasks)} tasks", *_finetuning_facts(results)]
    facts.append(f"{len(results.cells)} runs")
    sizes = [size for r in done if (size := number((r.get("parameters") or {}).get("total")))]
    tokens = [count for r in done if (count := number(r.get("tokens")))]
    known = {"parameters": sizes, "training tokens": tokens}
    facts += [f"{_millions(values)} million {what}" for what, values in known.items() if values]
    model = (results.config.get("base") or {}).get("model") or {}
    if isinstance(model, Mapping) and model.get("family"):
        facts.insert(0, f"{model['family']}")
    return " · ".join(facts)


def _finetuning_facts(results: StudyResults) -> list[str]:
    counts = {
        "ways of fine-tuning": len(results.variants),
        "seeds of fine-tuning": len(results.finetune_seeds),
        "pretraining steps": len(results.earlier_steps) + 1,
    }
    return [f"{count} {what}" for what, count in counts.items() if count > 1]


def _millions(values: list[float]) -> str:
    low, high = (f"{value / 1e6:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True, width=110)


def _plain(value: Any) -> Any:
    """Mappings as dicts, so that YAML knows them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def versions() -> str:
    """The packages that decide results, as they are where the report is written."""
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _report_json(results: StudyResults, findings: list[Findings], assertions: StudyAssertions) -> dict[str, Any]:
    """The numbers of the page; missing ones are null."""
    return {
        "name": results.name,
        "description": results.description,
        "weight_decays": list(results.weight_decays),
        "tasks": list(results.tasks),
        **({"variants": results.variants} if results.variants else {}),
        "groups": [
            {
                "label": group.label,
                "models": [m.pretrain.id for m in group.models],
                **found.record(),
                **({"finetune_seeds": seed_records(group.models, results.outcomes)} if results.finetune_seeds else {}),
                "assertions": record(asserted),
            }
            for group, found, asserted in zip(results.groups, findings, assertions.groups, strict=True)
        ],
        "assertions": record(assertions.across),
        "scores": tables.score_records(results),
        "cells": tables.cell_records(results),
    }
