"""The configs of a study's runs: each point of a grid set into what the study says of pretraining, importing and fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_plasticity.config.interchange import ImportConfig
from megatron_plasticity.config.load import check_config, merge
from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.config.training import FinetuneRecipe, PretrainConfig
from megatron_plasticity.data.prepare import prepared_folder
from megatron_plasticity.study.grid import point_text, points, with_point


def study_folder(config: StudyConfig) -> Path:
    return config.output / config.name


def study_device(config: StudyConfig) -> str:
    """`auto`, `cpu` or `cuda`: where the study's models are trained."""
    return config.finetune.device if config.bases and config.finetune else config.base.get("device", "auto")


def corpus_folder(config: StudyConfig) -> Path | None:
    """Prepared corpus, if the study has one of its own."""
    return prepared_folder(config.corpus) if config.corpus else None


def pretrain_config(config: StudyConfig, point: Mapping[str, Any]) -> PretrainConfig:
    """The pretraining run at a point of the study's axes, not named yet. Raises ConfigError if it is not valid."""
    tree = with_point(config.base, point)
    tree = merge(tree, {"name": "unnamed", "output": str(study_folder(config)), "logging": {"mlflow": False}})
    if config.corpus is not None:
        tree = merge(tree, {"data": {"folder": str(corpus_folder(config))}})
    return check_config(PretrainConfig, tree, f"base with {point_text(point)}")


def import_configs(config: StudyConfig) -> list[ImportConfig]:
    """What a study of imported bases imports, in its order."""
    shared = ImportConfig.model_fields.keys() - {"output"}
    return [ImportConfig(**base.model_dump(include=set(shared)), output=study_folder(config)) for base in config.bases]


def finetune_recipe(
    config: StudyConfig, changes: Mapping[str, Any] | None = None, variant: Mapping[str, Any] | None = None
) -> FinetuneRecipe:
    """The study's recipe with what one of its bases changes in it, at a point of `finetune_axes`.

    Raises ConfigError if that is not valid.
    """
    assert config.finetune is not None  # check_study
    if not changes and not variant:
        return config.finetune
    tree = with_point(merge(config.finetune.model_dump(), dict(changes or {})), variant or {})
    return check_config(FinetuneRecipe, tree, f"finetune with {point_text(variant)}" if variant else "finetune of a base")


def variants(config: StudyConfig) -> list[dict[str, Any]]:
    """The points of `finetune_axes`; one empty point without axes."""
    return points(config.finetune_axes)
