"""The paper's statements on a study: its results as the records that `analysis/assertions` tests.

Statements that compare groups of base models (another length of training, another learning rate) are tested once per study, all
others once per group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from megatron_plasticity.analysis.assertions.curves import Curve, curve, curve_over_units
from megatron_plasticity.analysis.assertions.internals import probes_rise, pseudo_rank_falls
from megatron_plasticity.analysis.assertions.losses import (
    LossGroup,
    gap_falls,
    loss_is_u_shaped,
    optimum_drops_in_longer_runs,
)
from megatron_plasticity.analysis.assertions.scores import (
    correlation_is_unstable,
    downstream_optimum_is_larger,
    order_survives_finetuning,
    order_survives_pretraining_rate,
    worse_loss_better_score,
)
from megatron_plasticity.analysis.assertions.strength import COLLAPSE_AT, flat_below_and_collapse_above
from megatron_plasticity.analysis.assertions.translation import Setting
from megatron_plasticity.analysis.assertions.verdict import Assertion, combined, in_order
from megatron_plasticity.analysis.paired_losses import ResampledLosses, resample_losses
from megatron_plasticity.analysis.plasticity import ScoreCurve, mean_curve
from megatron_plasticity.study.report.findings import Findings, sequence_losses
from megatron_plasticity.study.results import WEIGHT_DECAY_PATHS, BaseModel, Group, StudyResults
from megatron_plasticity.study.scores import bootstrap_settings, number

_PSEUDO_RANK_SHARE = 0.95
_NONE_USEFUL = (
    f"Every λ of the study is, on the paper's scale, {COLLAPSE_AT:g} or more, beyond the useful range: add smaller ones."
)
_LEARNING_RATE = "optimizer.learning_rate"
_SAME_LENGTH = 1.05
"""Factor within which the base models of a group count as equally long in training."""


@dataclass(frozen=True)
class StudyAssertions:
    """Every statement with its verdict."""

    groups: tuple[tuple[Assertion, ...], ...]
    """Of each group of the study."""
    across: tuple[Assertion, ...]
    """Of those that compare groups."""

    @property
    def as_one(self) -> tuple[Assertion, ...]:
        """All of them, of a study with one group."""
        return tuple(in_order([*self.groups[0], *self.across]))


def record(found: Sequence[Assertion]) -> list[dict[str, str]]:
    """For `report.json`."""
    return [asdict(item) for item in found]


def assess(results: StudyResults, findings: Sequence[Findings]) -> StudyAssertions:
    """Test each statement on the study; `findings` are those of its groups."""
    settings = bootstrap_settings(results.config)
    groups = [_Evidence.of(group, found, settings) for group, found in zip(results.groups, findings, strict=True)]
    across = (
        optimum_drops_in_longer_runs([LossGroup(each.group.label, each.losses, each.setting) for each in groups]),
        _pretraining_rates(groups),
    )
    return StudyAssertions(tuple(tuple(_of_group(each, results)) for each in groups), across)


@dataclass(frozen=True)
class _Evidence:
    """What several statements rest on."""

    group: Group
    found: Findings
    setting: Setting
    losses: Curve | None
    gaps: Curve | None
    scores: Curve | None

    @classmethod
    def of(cls, group: Group, found: Findings, settings: tuple[int, int]) -> _Evidence:
        measured = {model.weight_decay: losses for model in group.models if (losses := sequence_losses(model)) is not None}
        paired = resample_losses(measured, *settings)
        mean = mean_curve(list(found.score_curves.values()))
        # Without noise there is no test, but what is there should not be asked for.
        losses = {decay: fmean(found.held_out) for decay, found in measured.items()}
        unpaired = curve(list(losses), list(losses.values())) if losses else None
        return cls(
            group=group,
            found=found,
            setting=setting_of(group.models),
            losses=unpaired if paired is None else _losses(paired),
            gaps=unpaired if paired is None else Curve(paired.weight_decays, paired.gap, paired.resampled_gap),
            scores=None if mean is None else _scores(mean),
        )


def _losses(paired: ResampledLosses) -> Curve:
    return Curve(paired.weight_decays, paired.held_out, paired.resampled_held_out)


def _scores(found: ScoreCurve) -> Curve:
    return Curve(found.weight_decays, found.scores, found.resampled)


def _of_group(each: _Evidence, results: StudyResults) -> Iterator[Assertion]:
    yield loss_is_u_shaped(each.losses, each.setting)
    yield downstream_optimum_is_larger(each.losses, each.scores, each.setting)
    yield worse_loss_better_score(each.losses, each.scores)
    # The paper's trends inside the models, and its orders of λ, are of the useful range: those as strong as A8's 10 are left out.
    useful = _useful(each)
    yield probes_rise(probe_accuracies(useful))
    head_dim = next(
        (size for model in useful if model.attention and (size := number(model.attention.results.get("head_dim")))), None
    )
    settings = bootstrap_settings(results.config)
    yield pseudo_rank_falls(pseudo_ranks(useful, "qk", settings), pseudo_ranks(useful, "vp", settings), head_dim)
    yield gap_falls(each.gaps)
    yield flat_below_and_collapse_above(each.losses, each.scores, each.setting, _chance(each))
    paths = {path for point in results.variants.values() for path in point}
    varied = [path for path in paths if len({str(point.get(path)) for point in results.variants.values()}) > 1]
    decays = [model.weight_decay for model in useful]
    ways = {way: found.only(decays) for way, found in _ways(each.found, results).items()}
    yield order_survives_finetuning(ways, varied)
    losses = each.found.losses
    yield correlation_is_unstable(curve(list(losses), list(losses.values())) if losses else None, each.scores)


def setting_of(models: Sequence[BaseModel]) -> Setting:
    """What the base models of a group have in common; size and length only where all models have the same."""
    known = [
        (size, tokens / size)
        for model in models
        if (size := number((model.pretrain.results.get("parameters") or {}).get("total")))
        and (tokens := number(model.pretrain.results.get("tokens")))
    ]
    timescales = {model.weight_decay: model.pretrain.adamw_timescale for model in models}
    lengths = [length for _, length in known]
    if not known or max(lengths) > _SAME_LENGTH * min(lengths):
        return Setting(timescales)
    return Setting(timescales, known[0][0], lengths[0])


def _useful(each: _Evidence) -> list[BaseModel]:
    collapsed = each.setting.that_are([model.weight_decay for model in each.group.models], "at_least", COLLAPSE_AT)
    return [model for model in each.group.models if model.weight_decay not in collapsed]


def probe_accuracies(models: Sequence[BaseModel]) -> dict[str, dict[int, Curve]] | str:
    """Data set → layer → accuracy over λ, mean over seeds, of standardised features; or why there is none. The embedding is no
    layer."""
    found: dict[str, dict[int, dict[float, float]]] = {}
    for model in models:
        for name, entry in ((model.probes.results.get("datasets") if model.probes else None) or {}).items():
            table = (entry.get("variants") or {}).get("standardised") or {}
            for point, seeds in zip(table.get("points") or (), table.get("accuracy") or (), strict=False):
                place = str(point).split(".")
                if place[0] == "layers" and seeds:
                    found.setdefault(name, {}).setdefault(int(place[1]), {})[model.weight_decay] = fmean(seeds)
    if not models:
        return _NONE_USEFUL
    if not found and any(model.probes for model in models):
        return "The probes have no accuracies of layers on standardised features: put `true` among `standardise` of `probes`."
    if not found:
        return "No probes were fitted: put `probes: {}` among the `analyses`."
    return {
        name: {layer: curve(list(values), list(values.values())) for layer, values in sorted(layers.items())}
        for name, layers in found.items()
    }


def pseudo_ranks(models: Sequence[BaseModel], matrix: str, settings: tuple[int, int]) -> Curve | str:
    """Pseudo-rank over λ, mean over the heads of all layers, which are resampled; or why there is none."""
    heads: dict[float, list[float]] = {}
    for model in models:
        layers = (model.attention.results.get("layers") if model.attention else None) or ()
        ranks = [rank for layer in layers for rank in _at_share((layer.get(matrix) or {}).get("pseudo_rank") or {})]
        if ranks:
            heads[model.weight_decay] = ranks
    if not models:
        return _NONE_USEFUL
    if not any(model.attention for model in models):
        return "The attention matrices were not analysed: put `attention: {}` among the `analyses`."
    if not heads:
        return (
            f"The attention analysis has no pseudo-rank at a share of {_PSEUDO_RANK_SHARE}: put it among the `thresholds` of "
            "`attention`."
        )
    if len({len(ranks) for ranks in heads.values()}) > 1:
        return "The models do not have equally many attention heads, so that pseudo-ranks of single heads cannot be compared."
    return curve_over_units(heads, *settings)


def _at_share(table: Mapping[str, Any]) -> list[float]:
    return next((list(values) for share, values in table.items() if abs(float(share) - _PSEUDO_RANK_SHARE) < 1e-9), [])


def _chance(each: _Evidence) -> float:
    """Mean over tasks of what guessing scores, 0 where nothing is known."""
    chances: dict[str, float] = {}
    for model in each.group.models:
        for scores in model.finetuned_scores.values():
            chances.setdefault(scores.task, scores.chance or 0.0)
    return fmean(chances.values()) if chances else 0.0


def _ways(found: Findings, results: StudyResults) -> dict[str, Curve]:
    """Way of fine-tuning → mean score over the tasks that every way has."""
    by_way: dict[str, dict[str, ScoreCurve]] = {}
    for outcome in results.outcomes:
        if outcome.name in found.score_curves:
            by_way.setdefault(outcome.variant, {})[outcome.task] = found.score_curves[outcome.name]
    tasks = set.intersection(*(set(curves) for curves in by_way.values())) if by_way else set()
    means = {way: mean_curve([curves[task] for task in sorted(tasks)]) for way, curves in by_way.items()}
    return {way: _scores(mean) for way, mean in means.items() if mean is not None}


def _pretraining_rates(groups: Sequence[_Evidence]) -> Assertion:
    """Of groups that are alike but for the learning rate of pretraining; several sets of such groups have to agree."""
    alike: dict[str, dict[str, Curve]] = {}
    for each in groups:
        point = {path: value for path, value in each.group.models[0].pretrain.point.items() if path not in WEIGHT_DECAY_PATHS}
        rate = point.pop(_LEARNING_RATE, None)
        if rate is not None and each.scores is not None:
            decays = [model.weight_decay for model in _useful(each)]
            alike.setdefault(str(point), {})[f"learning rate {rate:g}"] = each.scores.only(decays)
    sets = [rates for rates in alike.values() if len(rates) > 1] or [{}]
    return combined([order_survives_pretraining_rate(rates) for rates in sets])
