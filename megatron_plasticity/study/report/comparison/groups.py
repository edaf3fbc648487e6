"""The groups that a comparison is about: of all studies, each base model once.

Two studies may hold the same base run: its folder's name ends in the same hash, wherever it lies. Groups that share one are one
group, with the fine-tunings of both, so that no run counts twice as evidence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_plasticity.errors import UserError
from megatron_plasticity.study.report.comparison.facts import Facts, count_text, facts_of, family_text, ratio_text
from megatron_plasticity.study.report.comparison.terms import Evaluations, evaluations_of
from megatron_plasticity.study.results import BASE_KINDS, BaseModel, Cell, StudyResults, collect

_ANALYSES = ("probes", "attention", "overfitting", "features", "truncation")


@dataclass(frozen=True)
class Study:
    """A study of the comparison, and what it is called there."""

    name: str
    results: StudyResults


@dataclass(frozen=True)
class Member:
    """One base model of a group."""

    model: BaseModel
    timescale: float | None
    """AdamW timescale, a share of the run; None for λ = 0, and where it is not known."""
    evaluations: Evaluations

    @property
    def weight_decay(self) -> float:
        return self.model.weight_decay


@dataclass(frozen=True)
class ComparedGroup:
    """Base models that differ in λ only, by ascending λ."""

    label: str
    """Unique in the comparison."""
    studies: tuple[str, ...]
    name: str
    """What its study calls it: values of the other axes; empty where λ is the only one."""
    members: tuple[Member, ...]
    facts: Facts
    timescales_of_recipe: bool = False
    """Whether timescales are those of the paper's recipe, since the models were pretrained elsewhere."""

    @property
    def models(self) -> tuple[BaseModel, ...]:
        return tuple(member.model for member in self.members)

    @property
    def timescales(self) -> dict[float, float | None]:
        """λ → AdamW timescale."""
        return {member.weight_decay: member.timescale for member in self.members}


@dataclass(frozen=True)
class LeftOut:
    """Something that was not compared, and why."""

    what: str
    where: str
    why: str


def read_studies(folders: Sequence[Path]) -> tuple[Study, ...]:
    """The studies in these folders.

    Raises UserError, with all problems at once, where one is no study, is given twice, or is a copy of another.
    """
    found: list[StudyResults] = []
    problems: list[str] = []
    places: dict[Path, Path] = {}
    for folder in folders:
        if (first := places.setdefault(folder.resolve(), folder)) is not folder:
            problems.append(f"{folder}: is {first} once more; name each study once")
            continue
        try:
            results = collect(folder)
        except UserError as error:
            problems.append(str(error))
            continue
        if any(cell.kind in BASE_KINDS for cell in results.cells):
            found.append(results)
        else:
            problems.append(f"{folder}: the study has no base models, so there is nothing of it to compare")
    runs = [frozenset(digest_of(cell) for cell in results.cells) for results in found]
    for index, results in enumerate(found):
        if (first_index := runs.index(runs[index])) < index:
            problems.append(
                f"{results.folder}: holds the same runs as {found[first_index].folder}, of which it seems to be a copy; a study "
                "compared with itself says nothing, so leave one of them out"
            )
    if problems:
        raise UserError("\n".join(problems))
    names = Counter(results.name for results in found)
    return tuple(Study(r.name if names[r.name] == 1 else f"{r.name} ({r.folder})", r) for r in found)


def digest_of(cell: Cell) -> str:
    """Kind and hash of a run: equal wherever the run lies and whatever it is called."""
    return f"{cell.kind}-{cell.folder.name.rsplit('-', 1)[-1]}"


def compared_groups(studies: Sequence[Study]) -> tuple[list[ComparedGroup], list[LeftOut]]:
    """The groups of all studies, those that share base runs as one, ordered by family, size and length; and what is left out."""
    parts = [
        _Part((study.name,), group.label, _members(study.results, group.models))
        for study in studies
        for group in study.results.groups
    ]
    left_out: list[LeftOut] = []
    whole: list[_Part] = []
    for part in parts:
        sharing = [other for other in whole if other.runs & part.runs]
        for other in sharing:
            whole.remove(other)
            left_out.append(_once(other, part))
            part, doubles = _joined(other, part)
            left_out += doubles
        whole.append(part)
    groups = [_group(part) for part in whole]
    groups.sort(key=lambda g: (g.facts.family or "~", g.facts.parameters or 0, g.facts.tokens_per_parameter or 0, g.name))
    return _labelled(groups), left_out


@dataclass(frozen=True)
class _Part:
    studies: tuple[str, ...]
    name: str
    members: tuple[Member, ...]

    @property
    def runs(self) -> set[str]:
        return {digest_of(member.model.pretrain) for member in self.members}

    @property
    def text(self) -> str:
        return " and ".join(self.studies) + (f": {self.name}" if self.name else "")


def _members(results: StudyResults, models: Sequence[BaseModel]) -> tuple[Member, ...]:
    return tuple(Member(model, model.pretrain.adamw_timescale, evaluations_of(model.pretrain, results)) for model in models)


def _once(one: _Part, other: _Part) -> LeftOut:
    count = len(one.runs & other.runs)
    runs = "1 base run" if count == 1 else f"{count} base runs"
    return LeftOut(
        "base models",
        f"{one.text}; {other.text}",
        f"they share {runs} (equal hashes), so they are one group here and each run counts once",
    )


def _joined(one: _Part, other: _Part) -> tuple[_Part, list[LeftOut]]:
    """Both as one group. Of two runs at one λ that are not the same, the second is left out."""
    members = {member.weight_decay: member for member in one.members}
    left_out = []
    for member in other.members:
        known = members.get(member.weight_decay)
        if known is None:
            members[member.weight_decay] = member
        elif digest_of(known.model.pretrain) == digest_of(member.model.pretrain):
            members[member.weight_decay] = Member(
                _with_analyses(known.model, member.model), known.timescale, known.evaluations.joined(member.evaluations)
            )
        else:
            why = f"another run than that of {one.text} at this λ, which is compared"
            left_out.append(LeftOut(f"base model at λ = {member.weight_decay:.3g}", other.text, why))
    names = dict.fromkeys(name for name in (one.name, other.name) if name)
    studies = tuple(dict.fromkeys((*one.studies, *other.studies)))
    return _Part(studies, " / ".join(names), tuple(members[decay] for decay in sorted(members))), left_out


def _with_analyses(one: BaseModel, other: BaseModel) -> BaseModel:
    """`one` with the analyses that only `other` has, and with its pretraining run if that one is done and the first's is not."""
    pretrain = other.pretrain if one.pretrain.status != "done" and other.pretrain.status == "done" else one.pretrain
    lacking = {name: getattr(other, name) for name in _ANALYSES if getattr(one, name) is None}
    return replace(one, pretrain=pretrain, **lacking)


def _group(part: _Part) -> ComparedGroup:
    facts = facts_of([member.model for member in part.members])
    recipe = facts.setting.recipe
    unknown = all(member.timescale is None for member in part.members)
    members = part.members
    if unknown and recipe is not None:
        members = tuple(
            replace(m, timescale=1 / (recipe.rate_times_steps * m.weight_decay) if m.weight_decay else None) for m in members
        )
    return ComparedGroup("", part.studies, part.name, members, facts, unknown and recipe is not None)


def _labelled(groups: Sequence[ComparedGroup]) -> list[ComparedGroup]:
    """With the shortest labels that tell them apart: the model, and where it is not enough its study, or what that calls it."""
    models = [_model_label(group) for group in groups]
    labels = list(models)
    for model in dict.fromkeys(models):
        same = [index for index, label in enumerate(models) if label == model]
        if len(same) == 1 and model:
            continue
        studies = {index: " and ".join(groups[index].studies) for index in same}
        names = {index: groups[index].name for index in same}
        both = {index: " · ".join(part for part in (studies[index], names[index]) if part) for index in same}
        chosen = next((found for found in (studies, names, both) if len(set(found.values())) == len(same)), both)
        for index in same:
            labels[index] = " · ".join(part for part in (model, chosen[index]) if part)
    count = Counter(labels)
    labels = [label if count[label] == 1 else f"{label} ({index + 1})" for index, label in enumerate(labels)]
    return [replace(group, label=label) for group, label in zip(groups, labels, strict=True)]


def _model_label(group: ComparedGroup) -> str:
    facts = group.facts
    if facts.family is None and facts.parameters is None:
        return ""
    size = count_text(facts.parameters) if facts.parameters else ""
    length = f"{ratio_text(facts.tokens_per_parameter)}×" if facts.tokens_per_parameter else ""
    return " ".join(part for part in (family_text(facts.family), size, length) if part and part != "?")
