"""What a study of this size cannot say, computed from what it did."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_plasticity.study.results import BASE_KINDS, StudyResults, UnequalSeeds
from megatron_plasticity.study.scores import number

_NAMED = 8
"""Places with missing seeds that are named; of more, the number is."""


def limits(results: StudyResults) -> list[str]:
    """Sentences on scale, seeds, intervals and questions, most important first."""
    return [
        text
        for text in (
            _imported(results),
            _scale(results),
            _unsteady(results),
            _repetition(results),
            _seeds(results),
            _finetune_seeds(results),
            _unequal_seeds(results),
            _intervals(results),
            _questions(results),
            _sources(results),
            _base_models_only(results),
            _grid(results),
            _comparisons(results),
        )
        if text
    ]


def _scale(results: StudyResults) -> str:
    done = [cell.results for cell in results.cells if cell.kind in BASE_KINDS and cell.results]
    known = [
        (size, count)
        for r in done
        if (size := number((r.get("parameters") or {}).get("total"))) and (count := number(r.get("tokens")))
    ]
    if not known:
        return ""
    sizes, tokens = [size for size, _ in known], [count for _, count in known]
    ratios = [count / size for size, count in known]
    which = "The" if len(known) == len(done) else f"The {len(known)} of {len(done)}"
    whose = "" if len(known) == len(done) else " whose tokens are known"
    return (
        f"Scale. {which} base models{whose} have {_range(sizes)} parameters and saw {_range(tokens)} tokens, "
        f"{_range(ratios)} tokens per parameter. The paper's models "
        "have 0.5 to 4 billion parameters and 20 or 140 tokens per parameter. A λ found here does not carry over as a number; "
        "the AdamW timescale is the "
        "quantity to carry over, and that it does is a conjecture to test."
    )


def _unsteady(results: StudyResults) -> str:
    found = []
    for cell in results.cells:
        skipped, spikes = (len(cell.results.get(name) or ()) for name in ("skipped_steps", "loss_spikes"))
        told = [f"{count} {what}" for count, what in ((skipped, "skipped"), (spikes, "with a spike of the loss")) if count]
        if told:
            found.append(f"{cell.id} ({', '.join(told)})")
    if not found:
        return ""
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return (
        "Unsteady training. Steps of these runs were left out, since their gradient was not finite, or their loss stood out from "
        f"those before: {', '.join(found[:_NAMED])}{more}. Whether λ or chance did it, one run cannot tell."
    )


def _imported(results: StudyResults) -> str:
    if all(cell.kind != "import" for cell in results.cells):
        return ""
    return (
        "Imported models. The base models were pretrained elsewhere. Their λ and numbers of tokens are what the study's config "
        "says of them, and their training data, seeds and held-out losses are not known here: this study compares scores, and "
        "cannot say which λ a choice by loss would have made."
    )


def _repetition(results: StudyResults) -> str:
    manifest = (results.corpus or {}).get("manifest") or {}
    distinct = number(((manifest.get("splits") or {}).get("train") or {}).get("tokens"))
    tokens = [count for cell in results.cells if cell.kind == "pretrain" and (count := number(cell.results.get("tokens")))]
    if not distinct or not tokens or max(tokens) <= distinct:
        return ""
    return (
        f"Repetition. The corpus has {distinct:,.0f} training tokens, so the base models read it {max(tokens) / distinct:.1f} "
        "times over, while the paper's models see each document at most once. Repetition makes overfitting, and what weight "
        "decay does about it, larger."
    )


def _range(values: list[float]) -> str:
    low, high = _short(min(values)), _short(max(values))
    return low if low == high else f"{low} to {high}"


def _short(value: float) -> str:
    for size, unit in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.2g}"


def _seeds(results: StudyResults) -> str:
    seeds = {str(cell.point[path]) for cell in results.cells for path in cell.point if path == "seed" or path.endswith(".seed")}
    if len(seeds) > 1:
        return (
            f"Seeds. Each λ was trained with {len(seeds)} seeds, shown side by side; their spread is the only sight of "
            "training noise here."
        )
    return (
        "Seeds. Each λ was trained once. Two runs that differ in the seed alone also differ in loss and in scores, and this "
        "study cannot tell such a difference "
        "from an effect of λ."
    )


def _finetune_seeds(results: StudyResults) -> str:
    if len(results.finetune_seeds) < 2:
        return ""
    return (
        f"Seeds of fine-tuning. Each base model is fine-tuned with {len(results.finetune_seeds)} seeds, and their scores are "
        "averaged question by question. The spread over them is in its own table, and is not part of the intervals."
    )


def _unequal_seeds(results: StudyResults) -> str:
    found = [(group.label, each) for group in results.groups for each in group.unequal_seeds]
    if not found:
        return ""
    return (
        "Missing seeds. Not every λ finished the same seeds of fine-tuning. Scores are averaged over the seeds that every λ of a "
        f"comparison finished, and the others are left out: {'; '.join(_lacking(*each) for each in found[:_NAMED])}"
        + (f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
        + ". Run the study again to complete them."
    )


def _lacking(group: str, unequal: UnequalSeeds) -> str:
    step = "" if unequal.step is None else f"step {unequal.step}"
    where = ", ".join(part for part in (group, unequal.outcome, step) if part)
    who = ", ".join(f"λ = {decay:.3g} lacks {_seed_names(seeds)}" for decay, seeds in unequal.lacking.items())
    return f"{where}: {who}, {'compared over ' + _seed_names(unequal.compared) if unequal.compared else 'so nothing is compared'}"


def _seed_names(seeds: Sequence[str]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}"


def _intervals(results: StudyResults) -> str:
    return (
        "Intervals. They are bootstrap intervals over questions or sequences: they say how a score would change with another "
        "test set of the same kind, and "
        "nothing of how it would change with another training run. They are therefore too narrow for statements about λ in "
        "general."
    )


def _questions(results: StudyResults) -> str:
    counts = sorted({s.questions for g in results.groups for m in g.models for s in m.finetuned_scores.values() if s.questions})
    if not counts:
        return ""
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    width = 100 * 1.96 * (0.25 / counts[0]) ** 0.5
    return (
        f"Questions. A task is {span} test questions; at {counts[0]} questions an accuracy near one half is known to about "
        f"±{width:.0f} points. "
        "The tasks stand for kinds of tasks; a ranking of λ on them need not hold on others."
    )


def _sources(results: StudyResults) -> str:
    kinds = {cell.kind for cell in results.cells}
    if "pretrain" not in kinds:
        return ""
    topics = ((results.config.get("analyses") or {}).get("probes") or {}).get("datasets") or ()
    documented = "probes" in kinds and "topic" in topics and bool((results.config.get("corpus") or {}).get("python_text"))
    start = "The texts of the topic probe and the held-out documents come" if documented else "The held-out documents come"
    return (
        f"Sources. {start} from the same sources as the training text. Held-out documents were not trained on, but they are of "
        "the same kind, so a held-out loss says little about text of another kind"
        + ("; and passages of the topic probe may have been read in training." if documented else ".")
    )


def _base_models_only(results: StudyResults) -> str:
    names = {"probes": "Probes", "attention": "spectra"}
    found = [name for kind, name in names.items() if any(cell.kind == kind for cell in results.cells)]
    if not found:
        return ""
    what = " and ".join(found)
    return (
        f"Base models only. {what[0].upper()}{what[1:]} were taken of the base models, not of the fine-tuned ones: they do not "
        "show what fine-tuning changes inside a model."
    )


def _grid(results: StudyResults) -> str:
    decays = results.weight_decays
    if len(decays) < 2:
        return "Grid. There is one λ, so nothing can be said about the effect of λ."
    return (
        f"Grid. Only {len(decays)} values of λ were tried; the best of them is not the optimum between them. Learning rate, "
        "schedule and batch were not tuned "
        "anew for each λ."
    )


def _comparisons(results: StudyResults) -> str:
    if len(results.outcomes) < 2:
        return ""
    ways = f", {len(results.variants)} ways of fine-tuning" if results.variants else ""
    return (
        f"Many looks. With {len(results.tasks)} tasks{ways} and {len(results.weight_decays)} values of λ, some differences look "
        "large by chance. Figures and tables make no "
        "correction for that, so single tasks are for exploring; the tests of the paper's statements do."
    )
