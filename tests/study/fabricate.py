"""A complete small study folder made of invented numbers with plausible shapes, for the tests of the report.

    python -m tests.study.fabricate FOLDER

The numbers come from a seeded generator: a U-shaped loss over λ, fine-tuned scores that peak at a larger λ, probe accuracy that
rises with λ, and so on. Nothing here is a measurement.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from megatron_plasticity.analysis.training_dynamics import timescale_position
from megatron_plasticity.study.grid import points, variant_name

TASKS: dict[str, tuple[str, float]] = {
    "arithmetic": ("number", 0.0),
    "algebra": ("maths", 0.0),
    "categories": ("choice", 0.25),
    "trials": ("yes_no_maybe", 1 / 3),
    "passage": ("choice", 0.25),
    "steps": ("choice", 0.1),
}
ANALYSES = ("probes", "attention", "overfitting", "features", "truncation")
STEPS, LEARNING_RATE, LAYERS, HEADS, HEAD_DIM, SAMPLES = 400, 1e-3, 4, 4, 16, 8
PARAMETER_CLASSES = ("token_embedding", "head", "attention", "mlp", "norm")


@dataclass(frozen=True)
class Fabrication:
    """What to invent."""

    name: str = "invented"
    description: str = "Does a larger weight decay in pretraining make a model gain more from fine-tuning?"
    weight_decays: tuple[float, ...] = (0.0, 0.1, 0.5, 1.5, 5.0)
    seeds: tuple[int, ...] = (42,)
    """More than one makes `seed` a second axis of the grid."""
    tasks: tuple[str, ...] = tuple(TASKS)
    analyses: tuple[str, ...] = ANALYSES
    questions: int = 120
    statuses: dict[str, str] = field(default_factory=dict)
    """Cell id → status other than done ("missing": no folder at all)."""
    error: str = "CUDA-free machine ran out of memory while allocating 3.2 GiB; lower batch.micro_batch_size."
    response: str = "3 boxes of 4 hold 3 * 4 = 12 pens. The answer is 12."
    token: str = "the"
    seed: int = 0
    older: bool = False
    """As written before results kept the losses of single sequences, the reward and the hash of the questions."""
    graders: dict[str, str] = field(default_factory=dict)
    """Cell id → grader other than `words`."""
    finetune_axes: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Config path of fine-tuning → values."""
    finetune_steps: tuple[int, ...] = ()
    test_sets: dict[str, int] = field(default_factory=dict)
    """Test set of every task → number of questions, which add up to `questions`; the last has groups."""


def fabricate(folder: Path, what: Fabrication = Fabrication()) -> Path:
    """Write the study folder `folder` and return it."""
    generator = np.random.default_rng(what.seed)
    cells = _cells(what)
    folder.mkdir(parents=True)
    study = {
        "name": what.name,
        "description": what.description,
        "config": _config(what),
        "corpus": {
            "folder": "data/quickstart-01234567",
            "manifest": {"sha256": "0" * 64, "splits": {"train": {"tokens": 400_000}, "held_out": {"tokens": 64_000}}},
        },
        "cells": cells,
    }
    _write_json(folder / "study.json", study)
    for cell in cells:
        status = what.statuses.get(cell["id"], "done")
        if status != "missing":
            _write_cell(folder / cell["folder"], cell, status, what, generator)
    return folder


def _config(what: Fabrication) -> dict[str, Any]:
    axes: dict[str, Any] = {"optimizer.weight_decay": list(what.weight_decays)}
    if len(what.seeds) > 1:
        axes["seed"] = list(what.seeds)
    base = {
        "model": {
            "family": "llama2",
            "layers": LAYERS,
            "hidden_size": HEADS * HEAD_DIM,
            "query_heads": HEADS,
            "kv_heads": 2,
            "head_dim": HEAD_DIM,
        },
        "optimizer": {"learning_rate": LEARNING_RATE},
        "steps": STEPS,
        "seed": min(what.seeds),
    }
    tasks = [{"name": task, "train_examples": 1000, "test_examples": what.questions, "seed": 42} for task in what.tasks]
    finetuning = {"finetune_axes": what.finetune_axes, "finetune_steps": what.finetune_steps}
    return {
        "name": what.name,
        "description": what.description,
        "base": base,
        "axes": axes,
        "tasks": tasks,
        "resources": {"threads": 1},
        **{name: value for name, value in finetuning.items() if value},
    }


def _cells(what: Fabrication) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = []

    def add(
        kind: str, label: str, base: dict[str, Any], task: str | None = None, parent: str | None = None, **further: Any
    ) -> str:
        identity = f"{kind}-{label}"
        digest = sha256(identity.encode()).hexdigest()[:10]
        cells.append(
            {
                "id": identity,
                "kind": kind,
                "folder": f"{identity}-{digest}",
                **base,
                "task": task,
                "parent": parent,
                "needs": [parent] if parent else [],
                **further,
            }
        )
        return identity

    for seed in what.seeds:
        for decay in what.weight_decays:
            point: dict[str, Any] = {"optimizer.weight_decay": decay}
            label = f"wd{decay:g}"
            if len(what.seeds) > 1:
                point["seed"] = seed
                label += f"-seed{seed}"
            timescale = 1 / (LEARNING_RATE * decay * STEPS) if decay else None
            base = {"point": point, "weight_decay": decay, "adamw_timescale": timescale}
            pretrain = add("pretrain", label, base)
            for step in (None, *what.finetune_steps) if what.tasks else ():
                at = label if step is None else f"{label}-step{step}"
                further: dict[str, Any] = {} if step is None else {"step": step}
                add("evaluate", at, base, parent=pretrain, **further)
                for task, point in itertools.product(what.tasks, points(what.finetune_axes)):
                    name = "-".join(part for part in (at, task, variant_name(point)) if part)
                    varied = {**further, "variant": point} if point else further
                    finetune = add("finetune", name, base, task, pretrain, **varied)
                    add("evaluate", name, base, task, finetune, **varied)
            for kind in what.analyses:
                add(kind, label, base, parent=pretrain)
    return cells


def _write_cell(folder: Path, cell: dict[str, Any], status: str, what: Fabrication, generator: np.random.Generator) -> None:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"name: {cell['id']}\n", encoding="utf-8")
    state = {
        "status": status, "host": "somewhere", "pid": 4321, "started": 1_760_000_000.0, "heartbeat": 1_760_000_100.0,
        "finished": 1_760_000_130.0 if status in ("done", "failed") else None,
        "error": what.error if status == "failed" else None,
        "progress": {"done": STEPS // 2, "total": STEPS, "unit": "steps"} if status == "running" else None,
    }  # fmt: skip
    _write_json(folder / "state.json", state)
    if cell["kind"] in ("pretrain", "finetune") and status != "pending":
        _write_metrics(folder / "metrics.jsonl", cell, generator, STEPS if status == "done" else STEPS // 2)
    if status == "done":
        maker = {
            "pretrain": _pretrain, "finetune": _finetune, "evaluate": _evaluate,
            "probes": _probes, "attention": _attention, "overfitting": _overfitting,
            "features": _features, "truncation": _truncation,
        }[cell["kind"]]  # fmt: skip
        _write_json(folder / "results.json", maker(cell, what, generator))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False), encoding="utf-8")


def _strength(decay: float) -> float:
    """λ on a scale that is 0 at λ = 0, about 0.5 at 0.5 and about 0.9 at 5."""
    return decay / (decay + 0.5)


def _loss(decay: float) -> float:
    return 2.62 + 0.55 * (_strength(decay) - 0.42) ** 2


def _skill(decay: float, task: str) -> float:
    """Chance-free accuracy after fine-tuning; peaks at a larger λ than the loss does."""
    ease = {"arithmetic": 0.42, "algebra": 0.30, "categories": 0.6, "trials": 0.5, "passage": 0.45, "steps": 0.35}[task]
    return ease - 0.5 * (_strength(decay) - 0.68) ** 2


def _write_metrics(path: Path, cell: dict[str, Any], generator: np.random.Generator, steps: int) -> None:
    decay, rows = cell["weight_decay"], []
    for step in range(0, steps + 1, 10):
        share = step / STEPS
        loss = _loss(decay) + 4.6 * math.exp(-7 * share) + generator.normal(0, 0.02)
        rate = LEARNING_RATE * min(1.0, share / 0.1 + 1e-3) * (0.55 + 0.45 * math.cos(math.pi * share))
        row: dict[str, float] = {
            "step": step, "time": 1_760_000_000.0 + step, "train/loss": loss, "train/learning_rate": rate,
            "train/learning_rate_times_weight_decay": rate * decay, "train/tokens_per_second": 9_000 + generator.normal(0, 90),
            "train/gradient_norm": 0.35 + 2 * math.exp(-9 * share) + 0.1 * _strength(decay) + abs(generator.normal(0, 0.03)),
        }  # fmt: skip
        if step % 50 == 0:
            for index, name in enumerate(PARAMETER_CLASSES):
                growth = (12 + 4 * index) * (1 + 1.5 * share)
                row[f"weight_norm/{name}"] = growth * math.exp(-1.6 * _strength(decay) * share)
                row[f"update_norm/{name}"] = 0.05 * growth * (rate / LEARNING_RATE + 0.02)
        if step % 100 == 0 and cell["kind"] == "pretrain":
            row["held_out/loss"] = loss + 0.02
            row["seen/loss"] = loss - 0.02
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _pretrain(cell: dict[str, Any], what: Fabrication, generator: np.random.Generator) -> dict[str, Any]:
    loss = _loss(cell["weight_decay"]) + generator.normal(0, 0.003)
    return {
        "held_out_loss": loss, "held_out_sequences": 512, "seen_loss": loss - 0.03, "train_loss": loss - 0.02, "steps": STEPS,
        "tokens": STEPS * 32 * 256, "weight_decay": cell["weight_decay"],
        "parameters": {"total": 1_400_000, "non_embedding": 900_000},
        "checkpoint": f"checkpoints/step-{STEPS}",
    }  # fmt: skip


def _finetune(cell: dict[str, Any], what: Fabrication, generator: np.random.Generator) -> dict[str, Any]:
    loss = 0.9 - 0.5 * _skill(cell["weight_decay"], cell["task"]) + generator.normal(0, 0.01)
    return {"train_loss": loss, "steps": STEPS, "examples": 1000, "weight_decay": 0.0, "checkpoint": f"checkpoints/step-{STEPS}"}


def _interval(values: np.ndarray, generator: np.random.Generator) -> dict[str, float]:
    means = generator.choice(values, (200, len(values))).mean(axis=1)
    return {"value": float(values.mean()), "low": float(np.quantile(means, 0.025)), "high": float(np.quantile(means, 0.975))}


def _evaluate(cell: dict[str, Any], what: Fabrication, generator: np.random.Generator) -> dict[str, Any]:
    tasks, examples = {}, {}
    for task in [cell["task"]] if cell["task"] else what.tasks:
        kind, chance = TASKS[task]
        skill = _skill(cell["weight_decay"], task) if cell["task"] else 0.02 + 0.03 * _strength(cell["weight_decay"])
        skill *= cell.get("step", STEPS) / STEPS
        # Questions differ in difficulty and are the same ones for every model, so correctness is paired between models.
        difficulty = np.random.default_rng(int(sha256(task.encode()).hexdigest()[:8], 16)).normal(0, 0.2, what.questions)
        probability = np.clip(chance + (1 - chance) * (skill + difficulty), 0.02, 0.98)
        greedy = (generator.random(what.questions) < probability).astype(int)
        sampled = (generator.random((what.questions, SAMPLES)) < 0.85 * probability[:, None]).astype(int)
        solved = sampled[sampled.any(axis=1)].mean(axis=1)
        metrics = {
            "greedy": _interval(greedy, generator),
            "maj": _interval((sampled.mean(axis=1) > 0.4).astype(int), generator),
            "pass": _interval(sampled.max(axis=1), generator),
            "format_rate": _interval((generator.random(what.questions) < (0.97 if cell["task"] else 0.2)).astype(int), generator),
        }
        if len(solved):
            metrics["correct_ratio"] = _interval(solved, generator)
        tasks[task] = {
            "answer_kind": kind, "questions": what.questions, "chance": chance, "metrics": metrics,
            "greedy_correct": greedy.tolist(), "sampled_correct": sampled.tolist(),
        }  # fmt: skip
        if not what.older:
            metrics["rm"] = _interval(sampled[:, 0], generator)
            tasks[task] |= {
                "grader": what.graders.get(cell["id"], "words"),
                "reward": {"kind": "length", "model": None},
                "questions_sha256": sha256(task.encode()).hexdigest(),
            }
        if what.test_sets:
            tasks[task]["test_sets"] = _test_sets(what, greedy, generator)
        examples[task] = [
            {
                "prompt": f"Question {index} of {task}: 3 boxes hold 4 pens each. How many pens?",
                "response": what.response, "extracted": "12" if index else None, "answer": "12", "correct": bool(index),
            }
            for index in range(3)
        ]  # fmt: skip
    return {"tasks": tasks, "examples": examples}


def _test_sets(what: Fabrication, greedy: np.ndarray, generator: np.random.Generator) -> dict[str, Any]:
    """Parts of the results by test set; the score of the whole is `_evaluate`'s, of all questions alike."""
    ends = np.cumsum(list(what.test_sets.values()))
    parts = dict(zip(what.test_sets, np.split(greedy, ends[:-1]), strict=True))
    found: dict[str, Any] = {
        name: {"questions": len(part), "chance": 0.0, "metrics": {"greedy": _interval(part, generator)}}
        for name, part in parts.items()
    }
    *_, last = parts
    found[last]["groups"] = {
        f"level {1 + level}": {"questions": len(part), "greedy": float(part.mean())}
        for level, part in enumerate(np.array_split(parts[last], 2))
    }
    return found


def _probes(cell: dict[str, Any], what: Fabrication, generator: np.random.Generator) -> dict[str, Any]:
    points = ["embed", *(f"layers.{layer}.resid_post" for layer in range(LAYERS))]
    datasets = {}
    for name, classes, chance in (
        ("topic", ["markup", "network", "numeric", "text"], 0.25),
        ("polarity", ["negative", "positive"], 0.5),
    ):
        variants = {}
        for variant, offset in (("standardised", 0.0), ("raw", -0.03)):
            accuracy = [
                [
                    float(
                        np.clip(
                            chance
                            + (1 - chance) * (0.3 + 0.08 * layer + 0.25 * _strength(cell["weight_decay"]))
                            + offset
                            + noise,
                            0,
                            1,
                        )
                    )
                    for noise in generator.normal(0, 0.012, 3)
                ]
                for layer in range(len(points))
            ]
            variants[variant] = {"accuracy": accuracy, "points": points, "chosen_c": [[0.1] * 3] * len(points)}
        datasets[name] = {"classes": classes, "chance": chance, "variants": variants}
    return {"datasets": datasets}


def _attention(cell: dict[str, Any], what: Fabrication, generator: np.random.Generator) -> dict[str, Any]:
    strength = _strength(cell["weight_decay"])
    layers, spectra = [], {"qk": [], "vp": []}
    ranks: dict[str, list[float]] = {"qk": [], "vp": []}
    for layer in range(LAYERS):
        entry: dict[str, Any] = {}
        for matrix, slope in (("qk", 0.05 + 0.5 * strength), ("vp", 0.04 + 0.04 * strength)):
            singular = np.exp(
                -slope * np.arange(HEAD_DIM)[None, :] * (1 + 0.1 * layer) + generator.normal(0, 0.02, (HEADS, HEAD_DIM))
            )
            singular = -np.sort(-singular, axis=1)
            shares, squares = (np.cumsum(values, 1) / values.sum(1, keepdims=True) for values in (singular, singular**2))
            entry[matrix] = {
                "pseudo_rank": {f"{t:.2f}": [int(n) for n in (shares < t).sum(1) + 1] for t in (0.9, 0.95, 0.99)},
                "pseudo_rank_squared": {f"{t:.2f}": [int(n) for n in (squares < t).sum(1) + 1] for t in (0.9, 0.95, 0.99)},
                "nuclear": singular.sum(1).tolist(), "frobenius": np.sqrt((singular**2).sum(1)).tolist(),
                "stable_rank": ((singular**2).sum(1) / singular[:, 0] ** 2).tolist(),
                "entropy_rank": (singular.sum(1) / singular[:, 0]).tolist(),
            }  # fmt: skip
            spectra[matrix].append((singular / singular[:, :1]).mean(0).tolist())
            ranks[matrix].append(float(np.mean(entry[matrix]["pseudo_rank"]["0.95"])))
        entry["maps"] = {name: generator.random(HEADS).tolist() for name in ("entropy", "sink", "previous_token")}
        layers.append(entry)
    tokens = ["<s>", " def", " f", "(", "x", "):", "\n", "$x$", what.token, " return", " x", "\x00"]
    maps = []
    for layer, head in ((0, 0), (1, 2), (3, 1)):
        scores = np.tril(np.exp(generator.normal(0, 1, (len(tokens), len(tokens))) + 3 * np.eye(len(tokens), k=-1) * (head == 2)))
        maps.append({"layer": layer, "head": head, "tokens": tokens, "weights": (scores / scores.sum(1, keepdims=True)).tolist()})
    summary = {"qk_pseudo_rank": float(np.mean(ranks["qk"])), "vp_pseudo_rank": float(np.mean(ranks["vp"]))}
    return {"layers": layers, "mean_spectrum": spectra, "head_dim": HEAD_DIM, "summary": summary, "example_maps": maps}


def _overfitting(cell: dict[str, Any], what: Fabrication, generator: np.random.Generator) -> dict[str, Any]:
    def around(value: float, width: float) -> dict[str, float]:
        return {"value": value, "low": value - width, "high": value + width}

    loss, gap = _loss(cell["weight_decay"]), 0.05 * math.exp(-2.5 * _strength(cell["weight_decay"]))
    deciles = [around(gap * (0.7 + 0.06 * decile) + generator.normal(0, 0.002), 0.008) for decile in range(10)]
    # Sequences differ in difficulty and are the same ones for every model.
    difficulty = np.random.default_rng(1).normal(0, 0.4, 40)
    difficulty -= difficulty.mean()
    result = {"held_out_loss": loss, "seen_loss": loss - gap, "gap": around(gap, 0.004), "sequences": 512, "by_decile": deciles}
    if what.older:
        return result
    return {
        **result, "passes": STEPS * 32 * 256 / 400_000,
        "seen_losses": (loss - gap + difficulty[:20] + generator.normal(0, 0.01, 20)).tolist(), "seen_blocks": list(range(20)),
        "held_out_losses": (loss + difficulty[20:] + generator.normal(0, 0.01, 20)).tolist(),
        "held_out_blocks": list(range(20)),
    }  # fmt: skip


def _features(cell: dict[str, Any], what: Fabrication, generator: np.random.Generator) -> dict[str, Any]:
    decay = cell["weight_decay"]
    strength, width = _strength(decay), HEADS * HEAD_DIM

    def layer(index: int) -> dict[str, Any]:
        shares = {"0": 0.0, "0.025": 0.02 + 0.2 * strength + 0.01 * index, "0.1": 0.05 + 0.4 * strength + 0.02 * index}
        rank = width * (0.9 - 0.5 * strength - 0.03 * index)
        ranks = {"entropy_rank": rank, "srank": int(0.9 * rank), "stable_rank": 0.1 * rank}
        centred = {"entropy_rank": rank + 1, "srank": int(0.9 * rank) + 1, "stable_rank": 0.2 * rank}
        norm = {"mean": (4 + 2 * index) * (1.2 - strength), "deviation": 0.4}
        return {"dormant_units": shares, "dormant_heads": shares, "norm": norm, "uncentred": ranks, "centred": centred}

    layers = [layer(index) for index in range(LAYERS)]
    steps = list(range(50, STEPS + 1, 50))
    rates = [LEARNING_RATE * (0.55 + 0.45 * math.cos(math.pi * step / STEPS)) for step in steps]
    classes, summary = {}, {}
    for index, name in enumerate(PARAMETER_CLASSES):
        weights = [(12 + 4 * index) * (1 + 1.5 * step / STEPS * (1 - strength)) for step in steps]
        updates = [1.5 * rate * (12 + 4 * index) for rate in rates]
        predicted = [math.sqrt(2 * rate * decay * 0.1 / 1.9) for rate in rates] if decay else None
        relative = [update / weight for update, weight in zip(updates, weights, strict=True)]
        classes[name] = {
            "weight_norm": weights, "update_norm": updates, "relative_update": relative, "equilibrium": predicted,
            "effective_learning_rate": [rate / weight for rate, weight in zip(rates, weights, strict=True)],
        }  # fmt: skip
        over = relative[-1] / predicted[-1] if predicted else None
        summary[name] = {
            "relative_update": relative[-1],
            "effective_learning_rate": rates[-1] / weights[-1],
            "over_equilibrium": over,
        }
    timescale = {"of_run": cell["adamw_timescale"], "position": timescale_position(cell["adamw_timescale"])}
    return {
        "layers": layers, "final_norm": layers[-1], "summary": layers[0], "sequences": 64, "positions": 64 * 256,
        "hidden_size": width, "weights": {"classes": {}, "layers": [], "others": {}},
        "training": {
            "timescale": timescale, "gradient_norm": 0.4, "steps": steps, "learning_rate": rates, "classes": classes,
            "summary": summary,
        },
    }  # fmt: skip


def _truncation(cell: dict[str, Any], what: Fabrication, generator: np.random.Generator) -> dict[str, Any]:
    def outcome(rank: int, height: float) -> dict[str, Any]:
        value = height * math.exp(-0.4 * rank)
        return {"loss": 2.6 + value, "increase": {"value": value, "low": 0.9 * value, "high": 1.1 * value}, "product_error": 0.5}

    needed = 1.2 - _strength(cell["weight_decay"])
    targets = {
        product: {
            str(rank): {"truncated": outcome(rank, height * needed), "control": outcome(rank, 2 * height * needed)}
            for rank in (0, 1, 2, 4, 8)
        }
        for product, height in (("qk", 0.8), ("vp", 2.0))
    }
    return {"loss": 2.6, "sequences": 64, "head_dim": HEAD_DIM, "targets": targets}


if __name__ == "__main__":
    print(fabricate(Path(sys.argv[1])))
