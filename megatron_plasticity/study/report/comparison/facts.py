"""What the base models of a group have in common: family, size, length, text, and the settings of their pretraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from megatron_plasticity.analysis.assertions.translation import Setting
from megatron_plasticity.config.files import sha256_file
from megatron_plasticity.config.hashing import canonical
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.data.prepare import TOKENIZER_FILE
from megatron_plasticity.errors import UserError
from megatron_plasticity.study.report.assertions import setting_of
from megatron_plasticity.study.report.comparison.terms import leaves
from megatron_plasticity.study.results import BaseModel, Cell
from megatron_plasticity.study.scores import number
from megatron_plasticity.tracking.plain_types import read_json_object
from megatron_plasticity.tracking.run_folder import RunFolder

FAMILIES = {"llama2": "Llama-2", "olmo2": "OLMo-2"}
"""As results name them, and as people do."""
_OF_THE_GRID = (
    "optimizer.weight_decay",
    "optimizer.adamw_timescale",
    "steps",
    "tokens",
    "name",
    "device",
    "evaluate_every_steps",
)
"""Settings that a comparison is about, or that say nothing of the model."""
_DIGITS = 12


@dataclass(frozen=True)
class Facts:
    """What is not known is None."""

    setting: Setting
    family: str | None = None
    tokens: float | None = None
    corpus: str | None = None
    """Name of its folder, with those that are blended in."""
    corpus_sha256: str | None = None
    tokenizer_sha256: str | None = None
    held_out: str | None = None
    """Equal where held-out losses are of the same sequences of the same text, in the same tokens."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Config path of pretraining → value, without λ, length and data; empty where it is not known."""

    @property
    def parameters(self) -> float | None:
        return self.setting.parameters

    @property
    def tokens_per_parameter(self) -> float | None:
        return self.setting.tokens_per_parameter


def facts_of(models: Sequence[BaseModel]) -> Facts:
    """From the folders of the base models, the first that says it."""
    config = _first(_config(model.pretrain) for model in models)
    corpus = _first(_inputs(model.pretrain).get("corpus") for model in models)
    tokens = {number(model.pretrain.results.get("tokens")) for model in models} - {None}
    return Facts(
        setting=setting_of(models),
        family=config.model.family if config else _first(_imported_family(model.pretrain) for model in models),
        tokens=next(iter(tokens)) if len(tokens) == 1 else None,
        corpus=None
        if config is None
        else " + ".join(p.name for p in (config.data.folder, *(b.folder for b in config.data.blend))),
        corpus_sha256=corpus,
        tokenizer_sha256=_first(_file_hash(model.pretrain.folder / TOKENIZER_FILE) for model in models),
        held_out=None if config is None or corpus is None else _held_out(models, config, corpus),
        settings=_settings(config) if config else {},
    )


def _config(cell: Cell) -> PretrainConfig | None:
    try:
        config = RunFolder(cell.folder).config
    except UserError:
        return None
    return config if isinstance(config, PretrainConfig) else None


def _inputs(cell: Cell) -> Mapping[str, Any]:
    try:
        return RunFolder(cell.folder).inputs
    except UserError:
        return {}


def _imported_family(cell: Cell) -> str | None:
    """From the architecture beside the weights: an import's config does not say it."""
    if cell.kind != "import" or not (place := cell.results.get("checkpoint")):
        return None
    try:
        return str(read_json_object(cell.folder / str(place) / "model.json")["family"])
    except (UserError, KeyError):
        return None


def _file_hash(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None


def _held_out(models: Sequence[BaseModel], config: PretrainConfig, corpus: str) -> str:
    """Of the sequences behind the losses that are compared (see `findings.py`)."""
    blocks = {tuple(m.overfitting.results.get("held_out_blocks") or ()) for m in models if m.overfitting is not None}
    which = sorted(blocks) if blocks else config.data.held_out_sequences
    return sha256(repr((corpus, config.model.context_length, which)).encode()).hexdigest()[:_DIGITS]


def _settings(config: PretrainConfig) -> dict[str, str]:
    tree = canonical(config)
    return {
        path: value
        for path, value in leaves(tree)
        if path not in _OF_THE_GRID and path.split(".")[0] not in ("checkpoint", "capture", "logging")
    }


def _first(found: Any) -> Any:
    return next((value for value in found if value is not None), None)


def family_text(family: str | None) -> str:
    """The family as people name it; `?` where it is not known."""
    return "?" if family is None else FAMILIES.get(family, family)


def count_text(count: float | None) -> str:
    """`1.5B`, `125M`, `4.1k`: a number of parameters or tokens in two or three digits; `?` where it is not known."""
    if count is None:
        return "?"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}" if count / size >= 10 else f"{count / size:.2g}{unit}"
    return f"{count:.0f}"


def ratio_text(ratio: float | None) -> str:
    """Tokens per parameter: whole from ten on; `?` where it is not known."""
    return "?" if ratio is None else f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"
