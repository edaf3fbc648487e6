"""Studies made of invented numbers for the tests of the comparison: those of `fabricate`, with configs and hashes like real ones.

    python -m tests.study.fabricate_comparison FOLDER

writes some that differ in family, size and tokens per parameter. Nothing here is a measurement.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_plasticity.config.evaluation import EvaluateConfig
from megatron_plasticity.config.load import check_config, merge
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.tracking.plain_types import section_to_yaml
from tests.study.fabricate import Fabrication, fabricate

SHAPE = {"layers": 4, "hidden_size": 64, "mlp_hidden_size": 176, "query_heads": 4, "kv_heads": 4, "head_dim": 16}
STEPS, BATCH, CONTEXT = 400, 32, 256


@dataclass(frozen=True)
class Setting:
    """What the base models of a study are."""

    what: Fabrication
    family: str = "llama2"
    parameters: int = 1_400_000
    tokens_per_parameter: float = 20.0
    learning_rate: float = 1e-3
    corpus: str = "fineweb-edu"
    tokenizer: str = "llama"
    identity: str = ""
    """Equal identities make equal base runs; by default the study's name."""
    finetune: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the recipe of fine-tuning."""
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    """Changes to that of evaluation."""
    pretrain: Mapping[str, Any] = field(default_factory=dict)
    questions: str = ""
    """Other questions than those of the other studies, if not empty."""
    peak: float | None = None
    """λ at which scores are highest; None leaves those of `fabricate`."""
    valley: float | None = None
    """λ at which the loss is lowest; None leaves those of `fabricate`."""

    @property
    def steps(self) -> int:
        return round(self.parameters * self.tokens_per_parameter / (BATCH * CONTEXT))


def fabricate_setting(folder: Path, setting: Setting) -> Path:
    """Write the study and return its folder."""
    study = fabricate(folder, setting.what)
    path = study / "study.json"
    tree = json.loads(path.read_text())
    names = {}
    for cell in tree["cells"]:
        cell["adamw_timescale"] = _timescale(setting, cell["weight_decay"])
        of_base = setting.identity or setting.what.name
        content = (
            of_base if cell["kind"] == "pretrain" else f"{of_base} {setting.finetune} {setting.evaluate} {setting.what.name}"
        )
        digest = sha256(f"{cell['id']} {content}".encode()).hexdigest()[:10]
        names[cell["id"]] = digest
        before, cell["folder"] = cell["folder"], f"{cell['id']}-{digest}"
        if (study / before).is_dir():
            (study / before).rename(study / cell["folder"])
            _write_run(study / cell["folder"], cell, setting, names)
    path.write_text(json.dumps(tree))
    return study


def _timescale(setting: Setting, decay: float) -> float | None:
    return 1 / (setting.learning_rate * decay * setting.steps) if decay else None


def _write_run(folder: Path, cell: dict[str, Any], setting: Setting, names: Mapping[str, str]) -> None:
    kind = cell["kind"]
    section = {"pretrain": _pretrain, "finetune": _finetune, "evaluate": _evaluate}.get(kind)
    inputs: dict[str, str] = {"model": names.get(cell["parent"] or "", "")}
    if section is not None:
        (folder / "config.yaml").write_text(section_to_yaml(section(cell, setting)))
    if kind == "probes":
        probes = {"name": "probes", "output": "runs", "run": "x", "train_texts": 1000, "test_texts": 500}
        (folder / "config.yaml").write_text(yaml.safe_dump(probes))
        inputs |= {"texts": "equal"}
    if kind == "pretrain":
        inputs = {"corpus": sha256(setting.corpus.encode()).hexdigest()}
        (folder / "tokenizer.json").write_text(setting.tokenizer)
    (folder / "inputs.json").write_text(json.dumps(inputs))
    results = folder / "results.json"
    if results.is_file():
        found = json.loads(results.read_text())
        _change(found, cell, setting)
        results.write_text(json.dumps(found))


def _change(found: dict[str, Any], cell: dict[str, Any], setting: Setting) -> None:
    decay = cell["weight_decay"]
    if cell["kind"] == "pretrain":
        total = setting.parameters
        found["parameters"] = {"total": total, "non_embedding": total // 2}
        found["tokens"] = setting.steps * BATCH * CONTEXT
        found["steps"] = setting.steps
        if setting.valley is not None:
            found["held_out_loss"] = _valley(setting.valley, decay)
    if cell["kind"] == "overfitting" and setting.valley is not None:
        shift = _valley(setting.valley, decay) - found["held_out_loss"]
        found["held_out_loss"] += shift
        found["seen_loss"] += shift
        for side in ("held_out_losses", "seen_losses"):
            found[side] = [loss + shift for loss in found.get(side, ())]
    if cell["kind"] == "evaluate":
        found["rules"] = "own"
        for task, entry in found["tasks"].items():
            entry["questions_sha256"] = sha256(f"{task} {setting.questions}".encode()).hexdigest()
            if cell["task"] and setting.peak is not None:
                _answer_by_skill(entry, setting.peak, decay, cell["id"])


def _far(peak: float, decay: float) -> float:
    """How far λ is from the peak, in decades; λ = 0 is two decades below 0.1."""
    return abs(np.log10(max(decay, 1e-3)) - np.log10(peak))


def _valley(valley: float, decay: float) -> float:
    return 2.6 + 0.12 * _far(valley, decay) ** 2


def _answer_by_skill(entry: dict[str, Any], peak: float, decay: float, identity: str) -> None:
    """Right answers to the easiest questions: to fewer of them the further λ is from the peak, and a few by chance."""
    count = entry["questions"]
    difficulty = np.random.default_rng(3).permutation(count) / count
    luck = np.random.default_rng(int(sha256(identity.encode()).hexdigest()[:8], 16)).random(count) < 0.03
    right = ((difficulty < 0.7 - 0.16 * _far(peak, decay)) ^ luck).astype(int)
    entry["greedy_correct"] = right.tolist()
    entry["metrics"]["greedy"] = {
        "value": float(right.mean()),
        "low": float(right.mean()) - 0.1,
        "high": float(right.mean()) + 0.1,
    }


def _pretrain(cell: dict[str, Any], setting: Setting) -> PretrainConfig:
    tree = {
        "name": cell["id"], "output": "runs", "steps": setting.steps, "seed": cell["point"].get("seed", 42),
        "model": {"family": setting.family, "vocab_size": 512, "context_length": CONTEXT, **SHAPE},
        "data": {"folder": f"data/{setting.corpus}"}, "engine": {"zero_stage": 0, "precision": "fp32"},
        "optimizer": {"learning_rate": setting.learning_rate, "weight_decay": cell["weight_decay"]},
        "batch": {"global_batch_size": BATCH, "micro_batch_size": BATCH},
    }  # fmt: skip
    return check_config(PretrainConfig, merge(tree, dict(setting.pretrain)), "fabricated pretraining")


def _finetune(cell: dict[str, Any], setting: Setting) -> FinetuneConfig:
    tree: dict[str, Any] = {
        "name": cell["id"], "output": "runs", "base": "runs/base", "max_length": CONTEXT, "epochs": 3,
        "engine": {"zero_stage": 0, "precision": "fp32"}, "task": {"name": cell["task"], "train_examples": 1000},
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.0}, "batch": {"global_batch_size": 8, "micro_batch_size": 8},
    }  # fmt: skip
    tree = merge(tree, dict(setting.finetune))
    for path, value in cell.get("variant", {}).items():
        *sections, last = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return check_config(FinetuneConfig, tree, "fabricated fine-tuning")


def _evaluate(cell: dict[str, Any], setting: Setting) -> EvaluateConfig:
    tasks = [cell["task"]] if cell["task"] else list(setting.what.tasks)
    tree = {
        "name": cell["id"], "output": "runs", "run": "runs/model", "samples": 8,
        "tasks": [{"name": task, "test_examples": setting.what.questions} for task in tasks],
    }  # fmt: skip
    return check_config(EvaluateConfig, merge(tree, dict(setting.evaluate)), "fabricated evaluation")


GRID = (0.0, 0.1, 0.3, 1.0, 3.0)


def four_settings() -> dict[str, Setting]:
    """Two families, two lengths, two sizes. As a timescale the best λ by loss is the same at both lengths."""
    what = Fabrication(weight_decays=GRID, questions=400)
    llama = Setting(replace(what, name="llama-20x"), valley=1.0, peak=1.4)
    olmo = Setting(
        replace(what, name="olmo-20x", seed=1), family="olmo2", corpus="olmo-mix", tokenizer="dolma", valley=0.8, peak=1.2
    )
    return {
        "llama-20x": llama,
        "llama-large": replace(
            llama, what=replace(what, name="llama-large", seed=2), parameters=5_600_000, valley=0.35, peak=1.2
        ),
        "olmo-20x": olmo,
        "olmo-140x": replace(
            olmo, what=replace(what, name="olmo-140x", seed=3), tokens_per_parameter=140.0, valley=0.1, peak=0.3
        ),
    }


if __name__ == "__main__":
    for name, each in four_settings().items():
        print(fabricate_setting(Path(sys.argv[1]) / name, each))
