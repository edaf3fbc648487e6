"""Linear probes: how well a class can be read off the frozen state of the last token, layer by layer.

Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (1610.01644). That accuracy rises with
λ is a claim of Han, Bordt, Zhang and Kakade (2602.11137); the recipe of the fit is our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_plasticity.analysis.logistic import SharedFeatures, accuracy, fit_logistic
from megatron_plasticity.capture.points import hook_points
from megatron_plasticity.capture.recorder import Recorder
from megatron_plasticity.config.analysis import ProbesRecipe
from megatron_plasticity.data.labelled_text import LabelledText
from megatron_plasticity.data.probe_sets import LabelledSet
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.tracking.progress import Progress

_INNER_SHARE = 0.1
_TOKENS_PER_BATCH = 8192
_TEST_SEED = 0
_CPU_BATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class Outcome:
    """What the probes of some layers found, for each variant [layers, variants]."""

    accuracy: Tensor
    """Share of the test rows that are told right."""
    strength: Tensor
    """The C that was chosen."""


def probe_layers(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, classes: int, recipe: ProbesRecipe, seed: int
) -> Outcome:
    """Probes of all variants of `recipe`, fitted on rows [layers, n, d] and asked about others [layers, m, d].

    C is chosen by the accuracy on a random 10 % of the training rows after fitting on the rest (the smallest of equals); then the
    probe is fitted on all of them. Labels [n], [m] are 0 … classes − 1, and `check_rows` has nothing against them.
    """
    held_out, order = _inner_split(len(labels), recipe, seed)
    labels = labels[order]
    shared = SharedFeatures.of(train[:, order], recipe.standardise)
    grid = torch.tensor(sorted(recipe.regularisation), dtype=torch.float64, device=train.device)
    strengths = grid.expand(*shared.scales.shape[:2], -1)
    start = None
    if held_out:
        found = fit_logistic(shared, labels, classes, strengths, first_row=held_out)
        told_right = accuracy(found, shared.rows[:, :held_out], labels[:held_out])
        index = told_right.argmax(dim=-1, keepdim=True)  # the first of equals
        strengths = strengths.gather(-1, index)
        start = found.take_along_dim(index[..., None, None], dim=2)
    found = fit_logistic(shared, labels, classes, strengths, start=start)
    return Outcome(accuracy(found, shared.like(test), test_labels)[..., 0], strengths[..., 0])


def _inner_split(count: int, recipe: ProbesRecipe, seed: int) -> tuple[int, Tensor]:
    """How many rows are held out to choose C, and the order of all rows [count] that begins with them."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    return (max(1, round(_INNER_SHARE * count)) if len(recipe.regularisation) > 1 else 0), order


def check_rows(name: str, labels: Tensor, classes: Sequence[str], recipe: ProbesRecipe, seed: int) -> None:
    """Raise UserError if, of the training `labels` [n], too few are left to fit every class when some are held out."""
    held_out, order = _inner_split(len(labels), recipe, seed)
    present = labels[order][held_out:].unique().tolist()
    if len(present) < len(classes):
        missing = ", ".join(repr(label) for index, label in enumerate(classes) if index not in present)
        raise UserError(
            f"data set {name!r}, seed {seed}: not enough rows for a split: of {len(labels)} training texts {held_out} are held "
            f"out to choose C, and none of the others is of class {missing}; raise `train_texts`"
        )


def layer_points(model: Transformer) -> list[str]:
    """Where probes are fitted: `embed`, the state after each block, and `final_norm` (what the head reads)."""
    return [name for name in hook_points(model.config) if name in ("embed", "final_norm") or name.endswith(".resid_post")]


@torch.no_grad()
def last_token_states(
    model: Transformer,
    sequences: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """State of each sequence's last token at each of `layer_points`: {point: float32 [len(sequences), d]}, in the order given.

    Sequences run in order of length, so that little is padded, and are padded on the right, which causal attention cannot see.
    """
    if not all(sequences):
        raise ValueError("a sequence without tokens has no last token")
    points = layer_points(model)
    last_layer = [point for point in points if point.endswith(".resid_post")][-1]
    # final_norm works on each position by itself: apply it to the few states wanted, and no logits need be computed.
    recorder = Recorder(model, [point for point in points if point != "final_norm"], positions="last")
    states: dict[str, Tensor] = {}
    done = 0
    for rows in _batches_by_length([len(ids) for ids in sequences]):
        lengths = torch.tensor([len(sequences[row]) for row in rows])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for index, row in enumerate(rows):
            tokens[index, : len(sequences[row])] = torch.tensor(sequences[row])
        recorded = recorder.record(tokens.to(device), lengths)
        norm = model.final_norm
        recorded["final_norm"] = norm(recorded[last_layer].to(norm.weight)).float().cpu()
        for point in points:
            if point not in states:
                states[point] = torch.empty(len(sequences), recorded[point].shape[1])
            states[point][rows] = recorded[point].float()
        done += len(rows)
        if progress is not None:
            progress.update(done, len(sequences), "texts")
    return {point: states[point] for point in points}


def _batches_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Row numbers in batches of similar length, at most `_TOKENS_PER_BATCH` tokens (padding included) in each."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batches and (len(batches[-1]) + 1) * lengths[row] <= _TOKENS_PER_BATCH:  # in ascending order this row is the longest
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


@dataclass(frozen=True)
class _Drawn:
    """The texts of a data set that a run reads."""

    name: str
    classes: tuple[str, ...]
    trains: list[list[LabelledText]]
    """For each seed of the recipe."""
    test: list[LabelledText]

    @classmethod
    def of(cls, name: str, texts: LabelledSet, recipe: ProbesRecipe) -> _Drawn:
        test = texts.texts("test", recipe.test_texts, seed=_TEST_SEED)
        if not test:
            raise UserError(f"data set {name!r} has no test texts")
        trains = [texts.texts("train", recipe.train_texts, seed=seed) for seed in recipe.seeds]
        for seed, train in zip(recipe.seeds, trains, strict=True):
            check_rows(name, _labels(train), texts.classes, recipe, seed)
        return cls(name, texts.classes, trains, test)


def run_probes(
    model: Transformer,
    tokenizer: Tokenizer,
    recipe: ProbesRecipe,
    sets: Mapping[str, LabelledSet],
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Probes of every data set, layer point, variant and seed: `results.json` of a `probes` run.

    `{"max_tokens", "datasets": {name: {"classes", "chance", "train_texts" (per seed), "test_texts", "variants": {"standardised" |
    "raw": {"points", "accuracy", "chosen_c"}}}}}`; `accuracy` and `chosen_c` are [point][seed]. `chance` is the accuracy on the
    test texts of always answering their commonest class. A text is encoded as it is, nothing put before it, and cut to the first
    `max_tokens` tokens (or to the model's context, if that is shorter). Raises UserError before any work when a set has too few
    texts.
    """
    max_tokens = min(recipe.max_tokens, model.config.context_length)
    results: dict[str, Any] = {}
    for drawn in [_Drawn.of(name, texts, recipe) for name, texts in sets.items()]:
        row_of = {
            text: row for row, text in enumerate(dict.fromkeys(item.text for p in (drawn.test, *drawn.trains) for item in p))
        }
        sequences = [ids[:max_tokens] for ids in tokenizer.encode_batch(list(row_of))]
        states = last_token_states(model, sequences, device, progress)
        _check_finite(states)
        results[drawn.name] = _probe_dataset(drawn, states, row_of, recipe, torch.device(device), progress)
    return {"max_tokens": max_tokens, "datasets": results}


def _probe_dataset(
    drawn: _Drawn,
    states: Mapping[str, Tensor],
    row_of: Mapping[str, int],
    recipe: ProbesRecipe,
    device: torch.device,
    progress: Progress | None,
) -> dict[str, Any]:
    points, test_labels = list(states), _labels(drawn.test)
    names = ["standardised" if standardise else "raw" for standardise in recipe.standardise]
    variants: dict[str, Any] = {
        name: {"points": points, "accuracy": [[] for _ in points], "chosen_c": [[] for _ in points]} for name in names
    }
    done, total = 0, len(points) * len(drawn.trains)
    for seed, train in zip(recipe.seeds, drawn.trains, strict=True):
        rows, test_rows = ([row_of[item.text] for item in part] for part in (train, drawn.test))
        labels = _labels(train)
        together = _layers_together(len(train), next(iter(states.values())).shape[1], len(drawn.classes), recipe, device)
        for first in range(0, len(points), together):
            chosen = points[first : first + together]
            fitted, asked = (torch.stack([states[point][part] for point in chosen]).to(device) for part in (rows, test_rows))
            found = probe_layers(fitted, labels.to(device), asked, test_labels.to(device), len(drawn.classes), recipe, seed)
            for index, variant in enumerate(names):
                for point, (accuracies, strengths) in enumerate(
                    zip(found.accuracy.tolist(), found.strength.tolist(), strict=True)
                ):
                    variants[variant]["accuracy"][first + point].append(accuracies[index])
                    variants[variant]["chosen_c"][first + point].append(strengths[index])
            done += len(chosen)
            if progress is not None:
                progress.update(done, total, "probes", dataset=drawn.name)
    return {
        "classes": list(drawn.classes),
        "chance": float(test_labels.bincount().max() / len(test_labels)),
        "train_texts": [len(train) for train in drawn.trains],
        "test_texts": len(drawn.test),
        "variants": variants,
    }


def _layers_together(rows: int, width: int, classes: int, recipe: ProbesRecipe, device: torch.device) -> int:
    """How many layers to probe at once: as many as fit, one at least."""
    problems = len(recipe.standardise) * len(recipe.regularisation) * classes
    features, bases, scores = 3 * rows * width, 3 * len(recipe.standardise) * width**2, problems * (8 * rows + 25 * width)
    # On a CPU, layers in one batch save calls and nothing else: they should stay within its caches as far as they can.
    memory = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _CPU_BATCH_BYTES
    return max(1, int(memory // (8 * (features + bases + scores))))


def _labels(texts: Sequence[LabelledText]) -> Tensor:
    return torch.tensor([item.label for item in texts], dtype=torch.int64)


def _check_finite(states: Mapping[str, Tensor]) -> None:
    for point, values in states.items():
        if not values.isfinite().all():
            raise UserError(
                f"the model's activations at {point} are not finite: its weights have diverged, so nothing can be probed"
            )
