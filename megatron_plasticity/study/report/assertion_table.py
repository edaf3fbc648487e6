"""The paper's statements with their verdicts: as tables of the page, and as lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_plasticity.analysis.assertions.verdict import STATEMENTS, Assertion, Verdict
from megatron_plasticity.study.report.assertions import StudyAssertions
from megatron_plasticity.study.report.tables import Entry, Table, table
from megatron_plasticity.study.results import Group

_LOOKS: Mapping[Verdict, str] = {"holds": "holds", "does not hold": "refuted", "cannot be said": ""}


@dataclass(frozen=True)
class LabelledTable:
    """The statements of one group, or those that compare groups; the label is empty for a study with one group."""

    label: str
    table: Table


def assertion_tables(found: StudyAssertions, groups: Sequence[Group]) -> list[LabelledTable]:
    """One table for a study with one group; else one per group, and one of the statements that compare groups."""
    if len(groups) == 1:
        return [LabelledTable("", _table(found.as_one))]
    tables = [LabelledTable(group.label, _table(each)) for group, each in zip(groups, found.groups, strict=True)]
    return [*tables, LabelledTable("Across the groups", _table(found.across))] if tables else []


def _table(found: Sequence[Assertion]) -> Table:
    columns = {
        "": False,
        "statement": False,
        "verdict": False,
        "evidence": False,
        "how sure we are that the paper says so": False,
    }
    return table(
        columns,
        [
            (
                Entry(item.key, look="strong"),
                Entry(item.statement, look="prose"),
                Entry(item.verdict, look=f"verdict-word {_LOOKS[item.verdict]}".strip()),
                Entry(item.evidence, look="prose"),
                Entry(item.certainty, look="aside"),
            )
            for item in found
        ],
    )


def terminal_lines(report: Mapping[str, Any]) -> list[str]:
    """The verdicts in a few lines, from what `report.json` holds: one line per statement that could be tested, and one per group
    that names the others."""
    groups = report["groups"]
    if not groups:
        return []
    if len(groups) == 1:
        places = list(STATEMENTS)
        found = sorted([*groups[0]["assertions"], *report["assertions"]], key=lambda item: places.index(item["key"]))
        parts = [("", found)]
    else:
        parts = [(group["label"], group["assertions"]) for group in groups] + [("across the groups", report["assertions"])]
    lines = ["the paper's statements on this study:"]
    for label, found in parts:
        lines += [f"{label}:"] if label else []
        told = [item for item in found if item["verdict"] != "cannot be said"]
        lines += [f"  {item['key']:4} {item['verdict']:14} {item['statement']}" for item in told]
        untold = [item["key"] for item in found if item not in told]
        lines += [f"  cannot be said (the report says why): {', '.join(untold)}"] if untold else []
    return lines
