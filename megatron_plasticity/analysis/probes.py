"""Linear probes: how well a class can be read off the frozen state of the last token, layer by layer.

Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (1610.01644). That accuracy rises with
λ is a claim of Han, Bordt, Zhang and Kakade (2602.11137); the recipe of the fit is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from megatron_plasticity.capture.points import hook_points
from megatron_plasticity.capture.recorder import Recorder
from megatron_plasticity.config.analysis import ProbesRecipe
from megatron_plasticity.data.labelled_text import LabelledText, label_names, labelled_texts
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.tracking.progress import Progress

_TOLERANCE = 1e-6
_SEARCH_TOLERANCE = 1e-4
_ITERATIONS = 10_000
_INNER_SHARE = 0.1
_TOKENS_PER_BATCH = 8192
_TEST_SEED = 0
_CONSTANT = 1e-6  # deviation, relative to the mean, up to which a feature counts as constant


@dataclass(frozen=True)
class Probe:
    """A fitted probe: class k scores weights[k]·x + bias[k]; with two classes one row, whose score is the log-odds of class 1."""

    weights: np.ndarray
    bias: np.ndarray

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """Share of rows of `features` [N, d] whose highest score is their label's [N]."""
        scores = features @ self.weights.T + self.bias
        predicted = (scores[:, 0] > 0).astype(np.int64) if len(self.weights) == 1 else scores.argmax(axis=1)
        return float((predicted == labels).mean())


def fit_probe(features: np.ndarray, labels: np.ndarray, classes: int, c: float, tolerance: float = _TOLERANCE) -> Probe:
    """The logistic regression of labels [N] (0 … classes − 1) on features [N, d] with inverse L2 strength C.

    Minimises C·Σ_i CE(W·x_i + b, y_i) + ½·‖W‖²; the bias is free. With two classes W is one vector (log-odds), not two. This is
    scikit-learn's `LogisticRegression(C=c)`, and it is what runs: on a CPU its L-BFGS reaches the optimum in half to two
    thirds of the time of torch's, which pays for Python at each step. The objective per sample is within 1e-5 of the optimum.
    """
    solver = _solver(labels, classes, tolerance).set_params(C=c)
    return _probe(solver.fit(features, labels))


def choose_c(features: np.ndarray, labels: np.ndarray, classes: int, grid: Sequence[float], seed: int) -> float:
    """The C of `grid` with the best accuracy on a random 10 % of the rows after fitting on the others; the smallest of equals."""
    if len(grid) == 1:
        return grid[0]
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = max(1, round(_INNER_SHARE * len(labels)))
    inner, fitted = order[:held_out], order[held_out:]
    # From strong to weak regularisation, each fit beginning at the one before.
    solver = _solver(labels[fitted], classes, _SEARCH_TOLERANCE).set_params(warm_start=True)
    best_c, best_accuracy = grid[0], -1.0
    for c in sorted(grid):
        probe = _probe(solver.set_params(C=c).fit(features[fitted], labels[fitted]))
        accuracy = probe.accuracy(features[inner], labels[inner])
        if accuracy > best_accuracy:
            best_c, best_accuracy = c, accuracy
    return best_c


def _solver(labels: np.ndarray, classes: int, tolerance: float) -> LogisticRegression:
    present = len(np.unique(labels))
    if present != classes:
        raise UserError(f"only {present} of {classes} classes are among the {len(labels)} training texts; raise `train_texts`")
    return LogisticRegression(tol=tolerance, max_iter=_ITERATIONS)


def _probe(solver: LogisticRegression) -> Probe:
    return Probe(np.array(solver.coef_), np.array(solver.intercept_))


def layer_points(model: Transformer) -> list[str]:
    """Where probes are fitted: `embed`, the state after each block, and `final_norm` (what the head reads)."""
    return [name for name in hook_points(model.config) if name in ("embed", "final_norm") or name.endswith(".resid_post")]


@torch.no_grad()
def last_token_states(
    model: Transformer,
    sequences: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """State of each sequence's last token at each of `layer_points`: {point: float64 [len(sequences), d]}, in the order given.

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
                states[point] = torch.empty(len(sequences), recorded[point].shape[1], dtype=torch.float64)
            states[point][rows] = recorded[point].double()
        done += len(rows)
        if progress is not None:
            progress.update(done, len(sequences), "texts")
    return {point: states[point].numpy() for point in points}


def _batches_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Row numbers in batches of similar length, at most `_TOKENS_PER_BATCH` tokens (padding included) in each."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batches and (len(batches[-1]) + 1) * lengths[row] <= _TOKENS_PER_BATCH:  # in ascending order this row is the longest
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def run_probes(
    model: Transformer,
    tokenizer: Tokenizer,
    recipe: ProbesRecipe,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Probes of every data set, layer point, variant and seed: `results.json` of a `probes` run.

    `{"max_tokens", "datasets": {name: {"classes", "chance", "train_texts" (per seed), "test_texts", "variants": {"standardised" |
    "raw": {"points", "accuracy", "chosen_c"}}}}}`; `accuracy` and `chosen_c` are [point][seed]. `chance` is the accuracy on the
    test texts of always answering their commonest class. A text is encoded as it is, nothing put before it, and cut to the first
    `max_tokens` tokens (or to the model's context, if that is shorter).
    """
    max_tokens = min(recipe.max_tokens, model.config.context_length)
    results: dict[str, Any] = {}
    for name in recipe.datasets:
        test = labelled_texts(name, "test", recipe.test_texts, seed=_TEST_SEED)
        trains = [labelled_texts(name, "train", recipe.train_texts, seed=seed) for seed in recipe.seeds]
        row_of = {text: row for row, text in enumerate(dict.fromkeys(item.text for part in (test, *trains) for item in part))}
        sequences = [ids[:max_tokens] for ids in tokenizer.encode_batch(list(row_of))]
        states = last_token_states(model, sequences, device, progress)
        _check_finite(states)
        results[name] = {
            "train_texts": [len(train) for train in trains],
            "test_texts": len(test),
            **_probe_dataset(name, states, row_of, trains, test, recipe, progress),
        }
    return {"max_tokens": max_tokens, "datasets": results}


def _probe_dataset(
    name: str,
    states: dict[str, np.ndarray],
    row_of: dict[str, int],
    trains: list[list[LabelledText]],
    test: list[LabelledText],
    recipe: ProbesRecipe,
    progress: Progress | None,
) -> dict[str, Any]:
    classes = label_names(name)
    test_rows, test_labels = _rows_and_labels(test, row_of)
    variants: dict[str, Any] = {
        "standardised" if standardise else "raw": {"points": list(states), "accuracy": [], "chosen_c": []}
        for standardise in recipe.standardise
    }
    done, total = 0, len(states) * len(variants) * len(trains)
    for features in states.values():
        for variant, outcome in variants.items():
            accuracies, chosen = [], []
            for seed, train in zip(recipe.seeds, trains, strict=True):
                rows, labels = _rows_and_labels(train, row_of)
                fitted, asked = features[rows], features[test_rows]
                if variant == "standardised":
                    fitted, asked = standardised(fitted, asked)
                c = choose_c(fitted, labels, len(classes), recipe.regularisation, seed)
                accuracies.append(fit_probe(fitted, labels, len(classes), c).accuracy(asked, test_labels))
                chosen.append(c)
                done += 1
                if progress is not None:
                    progress.update(done, total, "probes", dataset=name)
            outcome["accuracy"].append(accuracies)
            outcome["chosen_c"].append(chosen)
    chance = float(np.bincount(test_labels, minlength=len(classes)).max() / len(test_labels))
    return {"classes": list(classes), "chance": chance, "variants": variants}


def standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both, less the training rows' mean and divided by their standard deviation (by 1 where a feature is constant)."""
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    # A constant feature's deviation is rounding of its size, not exactly zero: states are computed in fp32, whose relative
    # rounding is 6e-8 and grows over the layers.
    deviation[deviation <= _CONSTANT * np.abs(mean)] = 1.0
    return (train - mean) / deviation, (test - mean) / deviation


def _rows_and_labels(texts: list[LabelledText], row_of: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([row_of[item.text] for item in texts]), np.array([item.label for item in texts])


def _check_finite(states: dict[str, np.ndarray]) -> None:
    for point, values in states.items():
        if not np.isfinite(values).all():
            raise UserError(
                f"the model's activations at {point} are not finite: its weights have diverged, so nothing can be probed"
            )
