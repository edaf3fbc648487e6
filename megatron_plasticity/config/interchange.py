"""Models that come from elsewhere: what to import from a Hugging Face folder, and what is known of how it was trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from megatron_plasticity.config.base import Section, neutral
from megatron_plasticity.config.load import apply_override, check_config, load_config


class ImportRecipe(Section):
    name: str = neutral(pattern=r"^[A-Za-z0-9._-]+$")
    """Readable name; part of the run folder's name."""
    source: str = neutral(min_length=1)
    """Folder with `config.json` and weights, or a name on the Hugging Face hub such as `allenai/OLMo-2-0425-1B`. What lies there
    enters the hash: of a folder the content, of a hub name the commit."""
    revision: str = neutral("main")
    """Branch, tag or commit, for a hub name; a commit makes sure that it is the same model tomorrow."""
    tokenizer: str | None = neutral(None)
    """Folder, `tokenizer.json` or hub name to take the tokenizer from (its hash enters this run's); by default the source."""
    parity: bool = neutral(True)
    """Compare the logits with those of transformers' own model before the import counts. Takes 4 bytes of memory per parameter (6
    if the source is in bf16), one model after the other: 16 to 24 GB for 4 billion parameters."""
    weight_decay: float | None = neutral(None, ge=0)
    """λ that the model was pretrained with; puts it on the λ axis of a study. A label: it can be corrected later."""
    tokens: PositiveInt | None = neutral(None)
    """Tokens that the model was pretrained on; a label as well."""


class ImportConfig(ImportRecipe):
    """A model from a Hugging Face folder (`megatron-plasticity import-hf`)."""

    output: Path = neutral(Path("runs"))
    """Folder under which the run folder is made."""


def import_config(source: str, overrides: Sequence[str]) -> ImportConfig:
    """The config in the YAML file `source`, or that of a folder or hub name, called after its last part; overrides on top.

    `source=DIR` is understood as well. Raises ConfigError, with all problems in one message.
    """
    if Path(source).suffix in (".yaml", ".yml"):
        return load_config(ImportConfig, Path(source), overrides)
    source = source if Path(source).exists() else source.removeprefix("source=")
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(source).resolve().name)
    tree: dict[str, Any] = {"name": name, "source": source}
    for override in overrides:
        apply_override(tree, override)
    return check_config(ImportConfig, tree, source)


class ImportedBase(ImportRecipe):
    """A base model of a study that was pretrained elsewhere."""

    group: str = neutral("")
    """Models that share it differ in λ only, and are compared with one another; architecture and `finetune` must be the same."""
    finetune: dict[str, Any] = neutral({})
    """Changes to the study's `finetune` for this base, such as `{optimizer: {learning_rate: 7.5e-6}}`. They enter the hash of its
    fine-tuning runs."""
