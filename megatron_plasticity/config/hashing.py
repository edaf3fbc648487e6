"""The hash that names a run: equal hashes mean equal results, so a run that is done is never done twice.

It covers everything that decides the results and nothing else: the fields of the config that are not marked `neutral`
(see `config/base.py`), the hashes of the inputs (corpus, base model …), and the version of our own code that matters.
A field that a later release adds changes the hash of every config that has it, even at its default, unless it is marked
`added_later`: then only another value than the default enters.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pydantic.fields import FieldInfo

from megatron_plasticity.config.analysis import (
    AttentionConfig,
    FeaturesConfig,
    ModelCaptureConfig,
    OverfittingConfig,
    ProbesConfig,
    TruncationConfig,
)
from megatron_plasticity.config.base import ADDED_LATER, AFFECTS_RESULTS, Section
from megatron_plasticity.config.data import CorpusConfig
from megatron_plasticity.config.evaluation import EvaluateConfig, HarnessConfig
from megatron_plasticity.config.interchange import ImportConfig
from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig

HASH_DIGITS = 10

KINDS: dict[str, type[Section]] = {
    "corpus": CorpusConfig,
    "pretrain": PretrainConfig,
    "import": ImportConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "harness": HarnessConfig,
    "capture": ModelCaptureConfig,
    "probes": ProbesConfig,
    "attention": AttentionConfig,
    "truncation": TruncationConfig,
    "overfitting": OverfittingConfig,
    "features": FeaturesConfig,
    "study": StudyConfig,
}
"""Every kind of work that is named by a hash, and the section that configures it."""

RESULTS_VERSION: dict[str, int] = {
    "corpus": 1,
    "pretrain": 1,
    "import": 1,
    "finetune": 1,
    "evaluate": 2,
    "harness": 1,
    "capture": 1,
    "probes": 1,
    "attention": 1,
    "truncation": 1,
    "overfitting": 1,
    "features": 1,
    "study": 1,
}
"""Version of the code behind each kind. Raise the number of a kind in the same commit as a change after which the same config
gives other results (a repaired metric, another initialisation, another order of the data); earlier runs then no longer count as
done. A change of speed, messages or file layout leaves it alone."""


def config_hash(section: Section, /, **inputs: str) -> str:
    """Ten hex digits of SHA-256 over the canonical JSON of what decides the results of `section`.

    `inputs` are the hashes of what the run reads, by name, such as `corpus=<sha256>` or `base=<hash of the base run>`.
    The result depends neither on the order of keys nor on neutral fields, however deep they lie.
    """
    kind = kind_of(section)
    identity = {
        "kind": kind,
        "version": RESULTS_VERSION.get(kind, 1),
        "config": canonical(section),
        "inputs": inputs,
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]


def kind_of(section: Section) -> str:
    """Name of the kind that `section` configures; for a section that is not a kind of its own, the name of its class."""
    for kind, cls in KINDS.items():
        if type(section) is cls:
            return kind
    return type(section).__name__


def canonical(value: Any) -> Any:
    """`value` as plain JSON types without the neutral fields of the sections in it.

    Non-finite floats, for which JSON has no name, become `{"float": "inf"}`, which no string can be mistaken for.
    """
    match value:
        case Section():
            return {
                name: canonical(getattr(value, name))
                for name, field in type(value).model_fields.items()
                if affects_results(field) and not _added_later_and_unset(field, getattr(value, name))
            }
        case Mapping():
            return {str(key): canonical(item) for key, item in value.items()}
        case list() | tuple():
            return [canonical(item) for item in value]
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case PurePath():
            return value.as_posix()
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"a config cannot hold a {type(value).__name__}: {value!r}")


def affects_results(field: FieldInfo) -> bool:
    """Whether a field of a section enters the hash."""
    extra = field.json_schema_extra
    return not (isinstance(extra, dict) and extra.get(AFFECTS_RESULTS) is False)


def _added_later_and_unset(field: FieldInfo, value: Any) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and extra.get(ADDED_LATER) is True and value == field.default
