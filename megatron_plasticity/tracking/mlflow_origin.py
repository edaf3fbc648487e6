"""Where the model of a run comes from: what MLflow can filter every run of a study by, however far down the tree it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.models.sizes import parameter_count

_LONGEST_LINE = 16
"""Runs between a run and the pretraining that it comes from; a guard against folders that name one another."""


@dataclass(frozen=True)
class Origin:
    """What is known of the pretraining of a model. None where it is not: of models from elsewhere, of runs that have moved."""

    family: str | None = None
    parameters: int | None = None
    """All parameters; a tied embedding counts once."""
    seed: int | None = None
    steps: int | None = None
    tokens: int | None = None
    weight_decay: float | None = None
    """λ, also where the config states it as a timescale."""

    @property
    def size(self) -> str | None:
        """The number of parameters as people say it: `1M`, `0.5B`."""
        return None if self.parameters is None else short_count(self.parameters)

    @property
    def tokens_per_parameter(self) -> float | None:
        return self.tokens / self.parameters if self.tokens and self.parameters else None


def origin_of(folder: Path, config: Mapping[str, Any]) -> Origin:
    """The origin of the model that the run in `folder`, with the resolved `config`, makes or reads. Never raises."""
    for _ in range(_LONGEST_LINE):
        base = config.get("base") or config.get("run")
        if not isinstance(base, str) or (found := _run_folder(folder, Path(base))) is None:
            break
        folder, config = found, read_config(found)
    return _of_pretraining(config) if isinstance(config.get("model"), Mapping) else _of_import(folder, config)


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved config of a run folder as it stands, unchecked; empty if it cannot be read."""
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def short_count(number: int) -> str:
    """`355k`, `1M`, `0.5B`: two digits, from a tenth of a billion on in billions."""
    for unit, least, size in (("B", 1e8, 1e9), ("M", 1e6, 1e6), ("k", 1e3, 1e3)):
        if number >= least:
            digits = f"{number / size:.2g}" if number / size < 100 else f"{number / size:.0f}"
            return digits + unit
    return str(number)


def _of_pretraining(config: Mapping[str, Any]) -> Origin:
    try:
        checked = PretrainConfig.model_validate(config)
    except ValueError:  # of an earlier release
        optimizer = config.get("optimizer")
        return Origin(
            family=config["model"].get("family"),
            seed=config.get("seed"),
            steps=config.get("steps"),
            weight_decay=optimizer.get("weight_decay") if isinstance(optimizer, Mapping) else None,
        )
    return Origin(
        family=checked.model.family,
        parameters=parameter_count(checked.model).total,
        seed=checked.seed,
        steps=checked.total_steps,
        tokens=checked.total_steps * checked.tokens_per_step,
        weight_decay=checked.weight_decay,
    )


def _of_import(folder: Path, config: Mapping[str, Any]) -> Origin:
    labels = Origin(weight_decay=config.get("weight_decay"), tokens=config.get("tokens")) if "source" in config else Origin()
    for path in sorted((folder / "checkpoints").glob("step-*/model.json")):
        try:
            model = ModelConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
        return Origin(
            family=model.family,
            parameters=parameter_count(model).total,
            tokens=labels.tokens,
            weight_decay=labels.weight_decay,
        )
    return labels


def _run_folder(reader: Path, base: Path) -> Path | None:
    """The run folder that `base`, a run or checkpoint folder, names; it may be relative to where the reader was run, or have
    moved together with it."""
    name = next((part for part in reversed(base.parts) if re.fullmatch(r"[a-z_]+-.+-[0-9a-f]+", part)), None)
    places = [*(place for place in (base, *base.parents) if place.name == name), reader.resolve().parent / (name or "")]
    return next((place for place in places if name and (place / "config.yaml").is_file() and place != reader), None)
