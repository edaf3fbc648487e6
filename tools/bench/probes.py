"""How fast a whole sweep of probes is beside scikit-learn's, and how near each comes to the optimum, in one run.

    python tools/bench/probes.py [--rows 4000] [--width 512] [--layers 17] [--classes 2 4] [--device cpu]

A sweep is what a run does for one data set and one seed: of each layer, standardised and raw, fit each C to nine tenths of the
rows, choose one by the rest, and fit that to all. scikit-learn fits one after the other, each search beginning where the one
before ended. Features are made up: correlated, as activations are, with deviations that fall as a power of their rank.

A comparison in which ours ends farther than 1e-4 from the optimum is INVALID, whatever its time. Exit code: 0 if all is as
wanted, 1 if not, 2 for bad input, 21 without scikit-learn.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from training_setting import UNAVAILABLE

from megatron_plasticity.analysis.logistic import SharedFeatures, fit_logistic
from megatron_plasticity.analysis.probes import probe_layers
from megatron_plasticity.config.analysis import ProbesRecipe

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

RECIPE = ProbesRecipe()
SEED = 0
SEARCH_TOLERANCE, TOLERANCE, ITERATIONS = 1e-4, 1e-6, 10_000  # of scikit-learn: largest entry of the gradient per sample


def main() -> int:
    """Run both sweeps for each number of classes and print times, their ratio and the worst gaps."""
    parser = argparse.ArgumentParser(description="Speed and accuracy of the sweep of probes beside scikit-learn's.")
    parser.add_argument("--rows", type=int, default=4000, help="training rows (default: 4000)")
    parser.add_argument("--width", type=int, default=512, help="features (default: 512)")
    parser.add_argument("--layers", type=int, default=17, help="layers (default: 17)")
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 4], help="numbers of classes (default: 2 and 4)")
    parser.add_argument("--device", default="cpu", help="where our sweep runs; scikit-learn's runs on the CPU (default: cpu)")
    parser.add_argument("--threads", type=int, help="threads of both (default: all cores)")
    arguments = parser.parse_args()
    try:
        import sklearn.linear_model  # noqa: F401
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        print(f"scikit-learn, with which this compares, cannot be used here: {error}", file=sys.stderr)
        return UNAVAILABLE
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    with threadpool_limits(arguments.threads):
        met = [compare(arguments.rows, arguments.width, arguments.layers, classes, device) for classes in arguments.classes]
    return 0 if all(met) else 1


def compare(rows: int, width: int, layers: int, classes: int, device: torch.device) -> bool:
    """Both sweeps on the same features, layer by layer in turns, so that other work on the machine hits both alike. Whether all
    is as wanted."""
    seconds = {"scikit-learn": 0.0, "ours": 0.0}
    gaps = {"scikit-learn": 0.0, "ours": 0.0}
    _warm_up(device)
    for layer in range(layers):
        features, labels = make_layer(rows + rows // 10, width, classes, layer)
        split = features[:rows], labels[:rows], features[rows:], labels[rows:]
        begun = time.perf_counter()
        theirs = scikit_learn_sweep(*split)
        seconds["scikit-learn"] += time.perf_counter() - begun
        moved = [torch.from_numpy(part).to(device) for part in split]
        begun = time.perf_counter()
        probe_layers(moved[0][None], moved[1], moved[2][None], moved[3], classes, RECIPE, SEED).accuracy.cpu()
        seconds["ours"] += time.perf_counter() - begun
        for name, gap in worst_gaps(moved[0], moved[1], classes, theirs).items():
            gaps[name] = max(gaps[name], gap)
    ratio = seconds["scikit-learn"] / seconds["ours"]
    met, valid = ratio >= 1, gaps["ours"] <= 1e-4
    verdict = "INVALID" if not valid else "as wanted" if met else "NOT AS WANTED"
    parts = (f"{name} {seconds[name]:.2f} s (worst gap of the objective {gaps[name]:.1e})" for name in seconds)
    print(
        f"{classes} classes, {layers} × [{rows}, {width}], {device}: {', '.join(parts)}; ratio {ratio:.2f}, {verdict} "
        "(targets: ratio 1, gap 1e-4)",
        flush=True,
    )
    return met and valid


def make_layer(rows: int, width: int, classes: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [rows, width] and labels that a linear rule tells right for most rows, the more so in later layers."""
    generator = np.random.default_rng([SEED, layer])
    hidden = generator.normal(size=(rows, width))
    rule = generator.normal(size=(width, classes)) / np.sqrt(width)
    labels = ((1 + layer / 2) * hidden @ rule + generator.gumbel(size=(rows, classes))).argmax(axis=1)
    rotation = np.linalg.qr(generator.normal(size=(width, width)))[0]
    features = hidden / np.sqrt(1 + np.arange(width)) @ rotation + generator.normal(size=width)
    return features.astype(np.float32).astype(np.float64), labels


Fit = tuple[int, float, "LogisticRegression"]
"""Variant, C and the fit on all rows."""


def scikit_learn_sweep(train: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> list[Fit]:
    """The sweep of one layer, one fit after the other."""
    from sklearn.linear_model import LogisticRegression

    order = np.random.default_rng(SEED).permutation(len(labels))
    held_out, fitted = order[: len(order) // 10], order[len(order) // 10 :]
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    fits: list[Fit] = []
    for variant, standardise in enumerate(RECIPE.standardise):
        features, asked = ((train - mean) / deviation, (test - mean) / deviation) if standardise else (train, test)
        search = LogisticRegression(tol=SEARCH_TOLERANCE, max_iter=ITERATIONS, warm_start=True)
        found = [
            search.set_params(C=c).fit(features[fitted], labels[fitted]).score(features[held_out], labels[held_out])
            for c in RECIPE.regularisation
        ]
        c = RECIPE.regularisation[int(np.argmax(found))]
        final = LogisticRegression(C=c, tol=TOLERANCE, max_iter=ITERATIONS).fit(features, labels)
        final.score(asked, test_labels)
        fits.append((variant, c, final))
    return fits


def worst_gaps(train: torch.Tensor, labels: torch.Tensor, classes: int, theirs: list[Fit]) -> dict[str, float]:
    """Objective per sample above that of our solver at a tolerance of 1e-12: ours at each C, theirs at the one they chose."""
    shared = SharedFeatures.of(train[None], RECIPE.standardise)
    strengths = train.new_tensor(RECIPE.regularisation).expand(1, len(RECIPE.standardise), -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where 1e-12 is below what float64 can tell
        optimum = fit_logistic(shared, labels, classes, strengths, tolerance=1e-12)
    found = fit_logistic(shared, labels, classes, strengths)

    def objective(coefficients: torch.Tensor, variant: int, c: float) -> float:
        scores = shared.rows[0] @ coefficients.T
        scores = torch.cat([torch.zeros_like(scores), scores], dim=1) if classes == 2 else scores
        penalty = (coefficients[:, :-1] * shared.scales[0, variant, :-1]).square().sum() / 2
        return (cross_entropy(scores, labels) + penalty / (c * len(labels))).item()

    gaps = {"scikit-learn": 0.0, "ours": 0.0}
    for variant in range(len(RECIPE.standardise)):
        for index, c in enumerate(RECIPE.regularisation):
            gap = objective(found[0, variant, index], variant, c) - objective(optimum[0, variant, index], variant, c)
            gaps["ours"] = max(gaps["ours"], gap)
    for variant, c, fit in theirs:
        weights = torch.from_numpy(fit.coef_).to(train.device)
        bias = torch.from_numpy(fit.intercept_).to(train.device)
        if RECIPE.standardise[variant]:
            weights = weights / shared.scales[0, variant, :-1]
        else:
            bias = bias + weights @ shared.mean[0, 0]
        best = objective(optimum[0, variant, RECIPE.regularisation.index(c)], variant, c)
        gaps["scikit-learn"] = max(gaps["scikit-learn"], objective(torch.cat([weights, bias[:, None]], 1), variant, c) - best)
    return gaps


def _warm_up(device: torch.device) -> None:
    features, labels = make_layer(100, 8, 2, 0)
    probe_layers(
        torch.from_numpy(features)[None].to(device), torch.from_numpy(labels).to(device),
        torch.from_numpy(features)[None].to(device), torch.from_numpy(labels).to(device), 2, RECIPE, SEED,
    )  # fmt: skip
    scikit_learn_sweep(features, labels, features, labels)


if __name__ == "__main__":
    sys.exit(main())
