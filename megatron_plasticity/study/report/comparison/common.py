"""Which scores of the groups can be compared: on the same questions, judged alike, after the same way of fine-tuning.

As many groups are compared as have a task in common, on all the tasks that every one of them has. What is left out is kept with
the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_plasticity.errors import UserError
from megatron_plasticity.study.report.comparison.groups import ComparedGroup, LeftOut
from megatron_plasticity.study.report.comparison.terms import Evaluated, differences

_Runs = Mapping[float, Mapping[str, Evaluated]]
"""λ → seed of fine-tuning → what was evaluated."""


@dataclass(frozen=True)
class SharedOutcome:
    """A task after one way of fine-tuning that at least two groups have."""

    name: str
    """The task's, with the way behind it where there are several."""
    task: str
    runs: Mapping[int, _Runs]
    """Group → the runs that are compared, of the same seeds at every λ."""
    seeds: Mapping[int, tuple[str, ...]]
    """Group → those seeds."""
    shared_seeds: tuple[str, ...]
    """Those that every group has; empty where they have none in common, and each group is averaged over its own."""

    @property
    def evaluated(self) -> Evaluated:
        """Any of them; all have the same terms."""
        return next(run for runs in self.runs.values() for seeds in runs.values() for run in seeds.values())


@dataclass(frozen=True)
class Common:
    """What the groups have in common."""

    groups: tuple[int, ...]
    """Those whose mean scores are compared; empty where no two groups share a task."""
    outcomes: tuple[SharedOutcome, ...]
    """On which every one of them has scores: what mean scores are means over."""
    partial: tuple[SharedOutcome, ...]
    """What only some groups share: compared by itself, not in the mean."""
    left_out: tuple[LeftOut, ...]

    @property
    def all_outcomes(self) -> tuple[SharedOutcome, ...]:
        return (*self.outcomes, *self.partial)


def find_common(groups: Sequence[ComparedGroup], any_finetuning: bool = False) -> Common:
    """Match the scores of the groups; with `any_finetuning` those after unlike ways of fine-tuning as well.

    Raises UserError where the latter is asked of a group that was fine-tuned on a task in several ways.
    """
    if any_finetuning:
        _refuse_several_ways(groups)
    left_out: list[LeftOut] = []
    by_key: dict[str, dict[int, _Runs]] = {}
    for index, group in enumerate(groups):
        for runs in _runs_of(group, left_out):
            run = next(iter(next(iter(runs.values())).values()))
            by_key.setdefault(run.key_of_questions if any_finetuning else run.key, {})[index] = runs
    shared = {key: found for key, found in by_key.items() if len(found) > 1}
    # Of two largest sets of groups the one with more in common, and then the first.
    chosen = max(shared.values(), key=lambda f: (len(f), sum(set(f) <= set(other) for other in shared.values())), default={})
    members = tuple(sorted(chosen))
    basis = {key: {i: found[i] for i in members} for key, found in shared.items() if members and set(members) <= set(found)}
    partial = {key: found for key, found in shared.items() if key not in basis}
    names = _names({key: _any(found) for key, found in shared.items()})
    outcomes = tuple(_outcome(names[key], found, groups, left_out) for key, found in basis.items())
    rest = tuple(_outcome(names[key], found, groups, left_out) for key, found in partial.items())
    left_out += _unmatched(groups, by_key, members, names)
    return Common(members, outcomes, rest, tuple(dict.fromkeys(left_out)))


def _any(found: Mapping[int, _Runs]) -> Evaluated:
    return next(run for runs in found.values() for seeds in runs.values() for run in seeds.values())


def _refuse_several_ways(groups: Sequence[ComparedGroup]) -> None:
    for group in groups:
        ways: dict[str, set[str]] = {}
        for run in (run for member in group.members for run in member.evaluations.tuned):
            ways.setdefault(run.task, set()).add(repr(sorted(run.finetuned.items())))
        if several := [f"{task} in {len(found)} ways" for task, found in ways.items() if len(found) > 1]:
            raise UserError(
                f"{group.label} ({', '.join(group.studies)}) was fine-tuned on {', '.join(several)}, and --any-finetuning would "
                "not know which of them to compare with another group's. Leave it out: then each is compared with the same way."
            )


def _runs_of(group: ComparedGroup, left_out: list[LeftOut]) -> list[_Runs]:
    """The runs of a group, one entry for each set of terms.

    Of answers to one task after one way of fine-tuning that were judged in several ways, those of most λ are kept.
    """
    found: dict[str, dict[float, dict[str, Evaluated]]] = {}
    left_out += _unusable(group)
    for member in group.members:
        for run in member.evaluations.tuned:
            found.setdefault(run.key, {}).setdefault(member.weight_decay, {})[run.seed] = run
    kept: dict[tuple[str, str], str] = {}
    for key, runs in found.items():
        run = next(iter(next(iter(runs.values())).values()))
        same = (run.task, repr(sorted(run.finetuned.items())))
        if same in kept and len(found[kept[same]]) >= len(runs):
            left_out.append(_judged_otherwise(group, runs, found[kept[same]]))
        else:
            if same in kept:
                left_out.append(_judged_otherwise(group, found[kept[same]], runs))
            kept[same] = key
    return [paired for key in kept.values() if (paired := _paired(group, found[key], left_out))]


def _unusable(group: ComparedGroup) -> list[LeftOut]:
    """Scores whose terms are not known, those of one reason together."""
    reasons: dict[str, list[tuple[str, float, str]]] = {}
    for member in group.members:
        for item in member.evaluations.unusable:
            reasons.setdefault(item.why, []).append((item.task, member.weight_decay, item.example))
    found = []
    for why, items in reasons.items():
        tasks, decays = dict.fromkeys(task for task, _, _ in items), dict.fromkeys(f"{decay:.3g}" for _, decay, _ in items)
        example = f" ({items[0][2]})" if items[0][2] else ""
        found.append(LeftOut(", ".join(tasks), f"{group.label}, λ = {', '.join(decays)}", why + example))
    return found


def _judged_otherwise(group: ComparedGroup, dropped: _Runs, kept: _Runs) -> LeftOut:
    one, other = (next(iter(next(iter(runs.values())).values())) for runs in (dropped, kept))
    decays = ", ".join(f"{decay:.3g}" for decay in sorted(dropped))
    return LeftOut(
        one.task,
        f"{group.label}, λ = {decays}",
        f"not asked and judged like the other λ: {'; '.join(differences(one.judged, other.judged))}",
    )


def _paired(group: ComparedGroup, runs: _Runs, left_out: list[LeftOut]) -> _Runs:
    """Only the seeds that every λ has, of the λ that have any."""
    seeds = _in_all([list(found) for found in runs.values()])
    every = list(dict.fromkeys(seed for found in runs.values() for seed in found))
    if dropped := [seed for seed in every if seed not in seeds]:
        task = next(iter(next(iter(runs.values())).values())).task
        why = "not finished at every λ" + ("" if seeds else ", and no seed is, so that the λ cannot be compared")
        left_out.append(LeftOut(f"{task}, seed {', '.join(dropped)} of fine-tuning", group.label, why))
    return {decay: {seed: found[seed] for seed in seeds} for decay, found in runs.items()} if seeds else {}


def _in_all(lists: Sequence[Sequence[str]]) -> list[str]:
    return [item for item in lists[0] if all(item in other for other in lists)]


def _outcome(name: str, found: Mapping[int, _Runs], groups: Sequence[ComparedGroup], left_out: list[LeftOut]) -> SharedOutcome:
    seeds = {index: list(next(iter(runs.values()))) for index, runs in found.items()}
    shared = _in_all(list(seeds.values()))
    if shared:
        for index, of_group in seeds.items():
            if dropped := [seed for seed in of_group if seed not in shared]:
                what = f"{name}, seed {', '.join(dropped)} of fine-tuning"
                left_out.append(LeftOut(what, groups[index].label, "the other groups do not have it"))
    used = {index: tuple(shared or of_group) for index, of_group in seeds.items()}
    runs = {
        index: {decay: {seed: of_seed[seed] for seed in used[index]} for decay, of_seed in of_group.items()}
        for index, of_group in found.items()
    }
    return SharedOutcome(name, _any(found).task, runs, used, tuple(shared))


def _names(found: Mapping[str, Evaluated]) -> dict[str, str]:
    """Key → name: the task, and where a task is there several times, by what the others differ from it."""
    names = {}
    for key, run in found.items():
        alike = [other for other in found.values() if other.task == run.task]
        terms = dict.fromkeys(term for other in alike for term in other.terms)
        telling = [term for term in terms if len({other.terms.get(term) for other in alike}) > 1]
        shown = ", ".join(f"{term.split(': ')[-1].split('.')[-1]} = {run.terms.get(term, 'default')}" for term in telling)
        names[key] = f"{run.task}, {shown}" if telling else run.task
    return names


def _unmatched(
    groups: Sequence[ComparedGroup], by_key: Mapping[str, Mapping[int, _Runs]], members: Sequence[int], names: Mapping[str, str]
) -> list[LeftOut]:
    """What is not in the mean, with the tasks of one reason together."""
    tasks: dict[tuple[str, str], list[str]] = {}
    for key, found in by_key.items():
        run = _any(found)
        for index in found:
            if members and set(members) <= set(found):
                if index not in members:
                    why = "the group lacks other tasks that the mean is over; compared task by task only"
                    tasks.setdefault((groups[index].label, why), []).append(names[key])
                continue
            if len(found) > 1:
                lacking = ", ".join(groups[i].label for i in members if i not in found)
                why = f"not of all groups ({lacking} lacks it), so it is compared by itself and not in the mean"
                tasks.setdefault((groups[index].label, why), []).append(names[key])
                continue
            tasks.setdefault((groups[index].label, _why_alone(groups, by_key, index, run)), []).append(run.task)
    return [LeftOut(", ".join(dict.fromkeys(of_reason)), where, why) for (where, why), of_reason in tasks.items()]


def _why_alone(groups: Sequence[ComparedGroup], by_key: Mapping[str, Mapping[int, _Runs]], index: int, run: Evaluated) -> str:
    """By what it differs from the nearest of another group on the same task."""
    nearest: tuple[list[str], str] | None = None
    for found in by_key.values():
        other = _any(found)
        others = [i for i in found if i != index]
        if other.task != run.task or not others:
            continue
        differing = differences(run.terms, other.terms)
        if nearest is None or len(differing) < len(nearest[0]):
            nearest = differing, groups[others[0]].label
    if nearest is None:
        return "no other group has this task"
    return f"not the same as in {nearest[1]}: {'; '.join(nearest[0])}"


def sampled_alike(outcomes: Sequence[SharedOutcome]) -> list[str]:
    """In what the sampled answers to the compared tasks were drawn unalike; empty where they can be compared."""
    found: list[str] = []
    for outcome in outcomes:
        runs = [run for of_group in outcome.runs.values() for seeds in of_group.values() for run in seeds.values()]
        for run in runs[1:]:
            found += differences(runs[0].sampled, run.sampled)
    return list(dict.fromkeys(found))
