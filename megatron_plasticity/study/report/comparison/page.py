"""The page of a comparison: figures, tables and sentences in one HTML file, with CSV and JSON beside it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_plasticity.config.files import write_json_atomic, write_text_atomic
from megatron_plasticity.errors import UserError
from megatron_plasticity.study.report.comparability import mixed_graders
from megatron_plasticity.study.report.comparison import answer, tables
from megatron_plasticity.study.report.comparison.common import Common, find_common, sampled_alike
from megatron_plasticity.study.report.comparison.drawings import ComparisonDraughtsman
from megatron_plasticity.study.report.comparison.findings import GroupFindings, find_all, settings_of
from megatron_plasticity.study.report.comparison.groups import LeftOut, Study, compared_groups, read_studies
from megatron_plasticity.study.report.comparison.internals import Quantity, shared_quantities
from megatron_plasticity.study.report.comparison.movement import Pair, pairs_of
from megatron_plasticity.study.report.figures.svg import drawing
from megatron_plasticity.study.report.html import render_template
from megatron_plasticity.study.report.page import versions
from megatron_plasticity.study.report.tables import csv_text
from megatron_plasticity.study.results import BASE_KINDS
from megatron_plasticity.tracking.disk import explain_disk_errors

_RECORD = "comparison.json"
_MOST_NAMED = 3
"""Studies in the name of the default folder."""


@dataclass(frozen=True)
class Comparison:
    """Everything that the page and the files are made of."""

    folders: tuple[Path, ...]
    studies: tuple[Study, ...]
    found: list[GroupFindings]
    common: Common
    quantities: list[Quantity]
    pairs: list[Pair]
    left_out: list[LeftOut]
    settings: tuple[int, int]
    """Resamples and seed of the bootstrap."""
    any_finetuning: bool
    """Whether groups are compared that were not fine-tuned alike."""


def write_comparison(folders: Sequence[Path], output: Path | None = None, any_finetuning: bool = False) -> Path:
    """Compare the studies in `folders`; write `index.html`, `groups.csv`, `curves.csv`, `pairs.csv`, `left_out.csv` and
    `comparison.json` into `output` and return the page's path.

    By default `output` is a folder beside the first study, called after all of them. Works on studies in any state: what is
    missing is named. With `any_finetuning` scores after unlike ways of fine-tuning are compared as well, and what differs is
    named.

    Raises:
        UserError: a folder is no study or is given twice, `output` holds another page, there are not two groups of base models,
            or they have nothing in common.
    """
    found = compare(folders, any_finetuning)
    folder = output or _default_folder(found)
    if (folder / "index.html").exists() and not (folder / _RECORD).exists():
        raise UserError(f"{folder}: holds another page, which would be overwritten; name another folder by --output")
    with explain_disk_errors(folder):
        groups = tables.group_records(found.found, found.common)
        curves = tables.curve_records(found.found, found.common, found.quantities, found.settings)
        pairs = tables.pair_records(found.pairs)
        left_out = [asdict(item) for item in found.left_out]
        write_text_atomic(folder / "groups.csv", csv_text(tables.GROUP_COLUMNS, tables.flat(groups)))
        write_text_atomic(folder / "curves.csv", csv_text(tables.CURVE_COLUMNS, curves))
        write_text_atomic(folder / "pairs.csv", csv_text(tables.PAIR_COLUMNS, tables.flat(pairs)))
        write_text_atomic(folder / "left_out.csv", csv_text(tables.LEFT_OUT_COLUMNS, left_out))
        record = {
            "studies": [{"name": study.name, "folder": str(study.results.folder)} for study in found.studies],
            "groups": groups,
            "tasks": [outcome.name for outcome in found.common.outcomes],
            "answers": [asdict(card) for card in answer.cards(found.pairs)],
            "notes": answer.notes(found.studies, found.found, found.common),
            "pairs": pairs,
            "left_out": left_out,
            "curves": curves,
        }
        write_json_atomic(folder / _RECORD, record)
        write_text_atomic(folder / "index.html", render_comparison(found))
    return folder / "index.html"


def compare(folders: Sequence[Path], any_finetuning: bool = False) -> Comparison:
    """Read the studies and compute everything that is compared. Raises UserError as `write_comparison` does."""
    studies = read_studies(folders)
    groups, left_out = compared_groups(studies)
    if len(groups) < 2:
        shared = " once the base runs that the studies share are counted once" if len(studies) > 1 else ""
        raise UserError(
            f"{', '.join(map(str, folders))}: there is one group of base models{shared}, so there is nothing to compare. Name a "
            "study with other base models (another family, size or number of tokens); `study report` shows one group."
        )
    common = find_common(groups, any_finetuning)
    settings = settings_of(studies)
    found = find_all(groups, common, settings)
    quantities, of_quantities = shared_quantities(found, settings)
    left_out = [*left_out, *common.left_out, *_not_finished(studies), *_sampled(common), *of_quantities]
    pairs = pairs_of(found)
    comparison = Comparison(
        tuple(folders), studies, found, common, quantities, pairs, _merged(left_out), settings, any_finetuning
    )
    _refuse_nothing_in_common(comparison)
    return comparison


def _merged(left_out: Sequence[LeftOut]) -> list[LeftOut]:
    """What was left out for the same reason in several places as one."""
    places: dict[tuple[str, str], list[str]] = {}
    for item in left_out:
        places.setdefault((item.what, item.why), []).append(item.where)
    return [LeftOut(what, "; ".join(dict.fromkeys(where)), why) for (what, why), where in places.items()]


def _refuse_nothing_in_common(found: Comparison) -> None:
    with_losses = [each for each in found.found if len(each.losses) > 1]
    if found.common.groups or found.quantities or len(with_losses) > 1:
        return
    reasons = [f"{item.what} of {item.where}: {item.why}" for item in found.left_out[:8]]
    more = f"\n  and {len(found.left_out) - 8} more" if len(found.left_out) > 8 else ""
    states = [
        f"{study.name}: {sum(cell.status != 'done' for cell in study.results.cells)} of {len(study.results.cells)} runs have no "
        "results"
        for study in found.studies
    ]
    raise UserError(
        "the studies have nothing in common that can be compared: no task that two groups were fine-tuned on and asked alike, no "
        "held-out losses over λ in two groups, and no analyses in two.\n"
        + "\n".join(f"  {line}" for line in (*states, *reasons))
        + more
    )


def _not_finished(studies: Sequence[Study]) -> list[LeftOut]:
    """Runs without results, those of one reason together, and base models whose loss is not finite."""
    found: dict[tuple[str, str], list[str]] = {}
    for study in studies:
        for cell in study.results.cells:
            if cell.status != "done" and cell.kind != "finetune":  # what was fine-tuned counts once, by its evaluation
                found.setdefault((study.name, f"{cell.status}: {cell.reason or 'no reason was kept'}"), []).append(cell.id)
        for model in (model for group in study.results.groups for model in group.models):
            if model.pretrain.kind == "pretrain" and model.pretrain.status == "done" and model.held_out_loss is None:
                found.setdefault((study.name, "no finite held-out loss: the run diverged"), []).append(model.pretrain.id)
    return [LeftOut(_listed(cells), where, why) for (where, why), cells in found.items()]


def _listed(names: Sequence[str]) -> str:
    most = 6
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _sampled(common: Common) -> list[LeftOut]:
    differing = sampled_alike(common.outcomes)
    if not differing:
        return []
    why = f"the sampled answers were not drawn alike: {'; '.join(differing)}. Greedy scores do not depend on that"
    return [LeftOut("majority, pass and other scores of sampled answers", "all groups", why)]


def _default_folder(found: Comparison) -> Path:
    names = [study.results.name for study in found.studies]
    more = [f"and-{len(names) - _MOST_NAMED}-more"] if len(names) > _MOST_NAMED else []
    return found.studies[0].results.folder.parent / "-".join(["comparison", *names[:_MOST_NAMED], *more])


def render_comparison(found: Comparison) -> str:
    """The page as one self-contained HTML text. Everything but our own SVG is escaped."""
    draughtsman = ComparisonDraughtsman(found.found)
    asked = [pair for pair in found.pairs if pair.question != "other"]
    others = [pair for pair in found.pairs if pair.question == "other"]
    with drawing():
        figures = {
            "keys": {section: draughtsman.key(section) for section in ("answer", "scores", "gains", "loss", "inside")},
            "ranges": draughtsman.ranges(),
            "scores": draughtsman.mean_scores(),
            "gains": draughtsman.mean_gains(),
            "task_scores": draughtsman.tasks(found.common, "score"),
            "task_gains": draughtsman.tasks(found.common, "gain"),
            "losses": draughtsman.loss_rises(),
            "raw_losses": draughtsman.raw_losses(),
            "quantities": draughtsman.quantities(found.quantities),
        }
    option = ["--any-finetuning"] if found.any_finetuning else []
    context = {
        "title": " · ".join(study.name for study in found.studies),
        "studies": [(study.name, study.results.description) for study in found.studies],
        "palette": draughtsman.palette,
        "cards": answer.cards(found.pairs),
        "notes": [*answer.notes(found.studies, found.found, found.common), *_graders(found)],
        "asked": tables.pair_table(asked, answer.QUESTIONS) if asked else None,
        "other_pairs": tables.pair_table(others, answer.QUESTIONS) if others else None,
        "other_count": len(others),
        "models": tables.model_table(found.found),
        "best": tables.best_table(found.found, found.common),
        "task_choices": tables.task_choices_table(found.found, found.common) if found.common.all_outcomes else None,
        "compared": tables.compared_table(found.found, found.common) if found.common.all_outcomes else None,
        "sampled": tables.sampled_table(found.found, found.common, found.settings),
        "left_out": tables.left_out_table(found.left_out) if found.left_out else None,
        "limits": answer.limits(found.found, found.pairs, found.common),
        "command": " ".join(
            ["megatron-plasticity", "study", "compare", *(shlex.quote(str(folder)) for folder in found.folders), *option]
        ),
        "any_finetuning": found.any_finetuning,
        "base_models": sum(cell.kind in BASE_KINDS for study in found.studies for cell in study.results.cells),
        "tasks": len(found.common.outcomes),
        "versions": versions(),
        **figures,
    }
    return render_template("comparison/template.html.jinja", context)


def _graders(found: Comparison) -> list[str]:
    """Where the answers of a group were judged by several graders."""
    outcomes = {study.name: study.results.outcomes for study in found.studies}
    return list(
        dict.fromkeys(
            f"{each.group.label}: {sentence}"
            for each in found.found
            for study in each.group.studies
            for sentence in mixed_graders(each.group.models, outcomes[study])
        )
    )
