"""What a score is a score of: the terms that two scores must share before they can be compared.

They are read from the folders of the runs themselves, since a study's config says what was asked for, and a folder what was done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_plasticity.config.evaluation import EvaluateConfig
from megatron_plasticity.config.hashing import canonical
from megatron_plasticity.config.training import FinetuneConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.study.results import Cell, StudyResults
from megatron_plasticity.study.scores import TaskScores, read_scores
from megatron_plasticity.tracking.run_folder import RunFolder

Terms = Mapping[str, str]
"""What it is called → its value as text."""

SAMPLING = ("samples", "temperature", "top_p", "top_k", "seed")
"""Settings of an evaluation that reach the sampled answers only."""
_NOT_OF_GREEDY = (*SAMPLING, "reward", "tasks", "device", "bootstrap_resamples", "batch_size")
_NOT_OF_FINETUNING = ("seed", "device", "checkpoint", "capture", "task")
QUESTIONS, TEST_SETS, RULES, GRADER, LIBRARY = "test questions", "test sets", "rules", "grader", "library that grades"
_LONGEST_VALUE = 48
_UNREADABLE = "the config of the evaluation, or of the fine-tuning before it, cannot be read, so its terms are not known"


@dataclass(frozen=True)
class Evaluated:
    """The scores of one model on one task, and what they are scores of."""

    task: str
    scores: TaskScores
    judged: Terms
    """How it was asked and judged: equal before and after fine-tuning, or there is no gain."""
    finetuned: Terms = field(default_factory=dict)
    """How it was fine-tuned; empty for a base model."""
    sampled: Terms = field(default_factory=dict)
    """How the sampled answers were drawn."""
    seed: str = ""
    """Of fine-tuning: runs that differ in it alone are repeats."""

    @property
    def terms(self) -> Terms:
        return {**self.judged, **self.finetuned}

    @property
    def key(self) -> str:
        """Equal if and only if task and terms are."""
        return json.dumps([self.task, *sorted(self.terms.items())])

    @property
    def key_of_questions(self) -> str:
        """Equal if and only if the task is, and how it was asked and judged; after whatever fine-tuning."""
        return json.dumps([self.task, *sorted(self.judged.items())])


@dataclass(frozen=True)
class Unusable:
    """A score that cannot be compared with anything."""

    task: str
    why: str
    example: str = ""
    """Where it is seen, with the message."""


@dataclass(frozen=True)
class Evaluations:
    """Of the last checkpoint of one base model."""

    base: tuple[Evaluated, ...] = ()
    tuned: tuple[Evaluated, ...] = ()
    unusable: tuple[Unusable, ...] = ()

    def joined(self, other: Evaluations) -> Evaluations:
        """With those of the same base model in another study; a run that both have counts once."""
        return Evaluations(
            _distinct((*self.base, *other.base)),
            _distinct((*self.tuned, *other.tuned)),
            tuple(dict.fromkeys((*self.unusable, *other.unusable))),
        )


def _distinct(found: tuple[Evaluated, ...]) -> tuple[Evaluated, ...]:
    first: dict[tuple[str, str], Evaluated] = {}
    for each in found:
        first.setdefault((each.key, each.seed), each)
    return tuple(first.values())


def evaluations_of(base: Cell, results: StudyResults) -> Evaluations:
    """Everything that was evaluated of `base` and of what was fine-tuned from its last checkpoint."""
    finetunes = {cell.id: cell for cell in results.cells if cell.kind == "finetune" and cell.parent == base.id}
    before: list[Evaluated] = []
    after: list[Evaluated] = []
    unusable: list[Unusable] = []
    for cell in results.cells:
        if cell.kind != "evaluate" or cell.step is not None or cell.status != "done":
            continue
        parent = finetunes.get(cell.parent or "")
        if parent is None and cell.parent != base.id:
            continue
        scores = read_scores(cell.results, results.config)
        tasks = scores if parent is None else [task for task in scores if task == cell.task]
        try:
            way = _Way.of(cell, parent)
        except UserError as error:
            unusable += [Unusable(task, _UNREADABLE, " ".join(str(error).split())) for task in tasks]
            continue
        for task in tasks:
            if (why := _not_known(scores[task])) is not None:
                unusable.append(Unusable(task, why))
            else:
                (before if parent is None else after).append(_evaluated(task, scores[task], cell, way))
    return Evaluations(tuple(before), tuple(after), tuple(dict.fromkeys(unusable)))


def _not_known(scores: TaskScores) -> str | None:
    """Why scores cannot be compared, by what the evaluation kept."""
    if scores.questions_sha256 is None:
        return "which questions were asked was not kept by the evaluation; evaluate again"
    return None if scores.greedy_correct else "the evaluation kept no verdict per question; evaluate again"


@dataclass(frozen=True)
class _Way:
    """What the configs of an evaluation, and of the fine-tuning before it, say."""

    asked: Terms
    finetuned: Terms
    seed: str

    @classmethod
    def of(cls, evaluate: Cell, finetune: Cell | None) -> _Way:
        """Raises UserError where they cannot be read."""
        run = RunFolder(evaluate.folder)
        asked = run.config
        if not isinstance(asked, EvaluateConfig):
            raise UserError("the config of the evaluation cannot be read")
        settings = dict(leaves(canonical(asked)))
        if finetune is None:
            return cls(settings, {}, "")
        trained = RunFolder(finetune.folder)
        recipe = trained.config
        if not isinstance(recipe, FinetuneConfig):
            raise UserError("the config of the fine-tuning cannot be read")
        way = {path: value for path, value in leaves(canonical(recipe)) if path.split(".")[0] not in _NOT_OF_FINETUNING}
        way |= {"train_examples": str(recipe.task.train_examples), "choice of examples": str(recipe.task.seed)}
        if (data := trained.inputs.get("task")) is not None:
            way["training data"] = data[:12]
        library = {LIBRARY: run.inputs["grader"]} if "grader" in run.inputs else {}
        return cls(settings, {**library, **{f"fine-tuning: {path}": value for path, value in way.items()}}, str(recipe.seed))


def _evaluated(task: str, scores: TaskScores, evaluate: Cell, way: _Way) -> Evaluated:
    judged = {
        QUESTIONS: str(scores.questions_sha256)[:12],
        TEST_SETS: ", ".join(test_set.name for test_set in scores.test_sets) or "one",
        RULES: str(evaluate.results.get("rules") or "not kept"),
        GRADER: scores.grader or "not kept",
        **{f"evaluation: {path}": value for path, value in way.asked.items() if path.split(".")[0] not in _NOT_OF_GREEDY},
    }
    sampled = {path: way.asked.get(path, "default") for path in SAMPLING}
    return Evaluated(task, scores, judged, way.finetuned, sampled, way.seed)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and text of everything in a plain tree that is not a mapping itself."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)


def differences(one: Terms, other: Terms) -> list[str]:
    """Each term that differs, with both values."""
    names = dict.fromkeys([*one, *other])
    return [
        f"{name} {_shown(one.get(name))} against {_shown(other.get(name))}" for name in names if one.get(name) != other.get(name)
    ]


def _shown(value: str | None) -> str:
    if value is None:
        return "default"
    flat = " ".join(value.split())
    return flat if len(flat) <= _LONGEST_VALUE else flat[: _LONGEST_VALUE - 1] + "…"
