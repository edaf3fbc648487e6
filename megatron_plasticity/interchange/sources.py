"""Where a model to import lies: a folder in Hugging Face's format, here or on the hub. Other formats are refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_plasticity.config.files import sha256_files
from megatron_plasticity.config.interchange import ImportRecipe
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.data.prepare import TOKENIZER_FILE
from megatron_plasticity.data.tokenizer import Tokenizer, check_tokenizer_fits
from megatron_plasticity.errors import UserError
from megatron_plasticity.interchange.weights import HuggingFaceWeights, weight_files
from megatron_plasticity.models.huggingface import check_tied_head, matching_names, model_config_from_huggingface

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL_FILES = ["*.json", "config.yaml"]

# What lies in a folder that is not in Hugging Face's format → what it is, and how it gets there.
_OTHER_FORMATS = {
    "model_and_optim": "OLMo-core's own checkpoint; convert it with its src/examples/huggingface/convert_checkpoint_to_hf.py",
    "adapter_config.json": "an adapter without its model; merge it into the model with peft's merge_and_unload",
    "lit_model.pth": "a LitGPT checkpoint; convert it with `litgpt convert_from_litgpt`, and add config.json and tokenizer.json",
    "params.json": "Meta's own checkpoint; convert it with transformers' models/llama/convert_llama_weights_to_hf.py",
    "model.pt": "OLMo's own checkpoint; convert it with transformers' models/olmo2/convert_olmo2_weights_to_hf.py",
    "config.yaml": "OLMo's own checkpoint; convert it with transformers' models/olmo2/convert_olmo2_weights_to_hf.py",
}


@dataclass(frozen=True)
class Source:
    """A model that can be imported: config, names and shapes of the weights, and tokenizer are known to fit together."""

    path: Path
    identity: str
    """Of a folder the SHA-256 of what is read of it, of a hub name `name@commit`."""
    model: ModelConfig
    weights: HuggingFaceWeights
    names: dict[str, str]
    """Canonical name → name in `weights`."""
    tokenizer: Tokenizer

    @property
    def inputs(self) -> dict[str, str]:
        """What enters the hash of the import."""
        return {"source": self.identity, "tokenizer": self.tokenizer.sha256}


def find_source(recipe: ImportRecipe) -> Source:
    """The model that `recipe` names, downloaded if it lies on the hub; only the heads of its weights are read, unless it is a
    folder, whose content is hashed.

    Raises UserError naming what is wrong: nothing there, another format, a model that is not ours, tensors that do not fit, no
    tokenizer.
    """
    path = _located(recipe.source, recipe.revision, weights=True)
    values = read_config(path)
    try:
        model = model_config_from_huggingface(values)
        files = weight_files(path)
        weights = HuggingFaceWeights(files)
        names = matching_names(weights.shapes, model)
        check_tied_head(weights, model)
    except UserError as error:
        raise UserError(f"{recipe.source}: {error}") from None
    tokenizer, tokenizer_file = _tokenizer(recipe, path)
    check_tokenizer_fits(tokenizer, model)
    _check_end_of_text(recipe.source, tokenizer, values, _read_object(path / GENERATION_FILE))
    used = [path / CONFIG_FILE, *files, tokenizer_file]
    identity = _commit_of(path, recipe.source) or _content_hash(used)
    return Source(path, identity, model, weights, names, tokenizer)


def read_config(path: Path) -> dict[str, Any]:
    """Content of the folder's `config.json`; UserError for a folder in another format."""
    for name, what in _OTHER_FORMATS.items():
        # Meta and OLMo leave such a file beside a converted model too; what counts then is config.json.
        if (path / name).exists() and not (path / CONFIG_FILE).is_file():
            raise UserError(f"{path}: is {what}")
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"{path}: has no {CONFIG_FILE}, so it is no model in Hugging Face's format")
    values = _read_object(path / CONFIG_FILE)
    if "model_type" not in values and isinstance(values.get("model"), dict):
        raise UserError(f"{path}: is {_OTHER_FORMATS['model_and_optim']}")
    if values.get("model_type") == "hf_olmo":
        raise UserError(f"{path}: {CONFIG_FILE} has model_type 'hf_olmo', a wrapper around {_OTHER_FORMATS['model.pt']}")
    return values


def _located(source: str, revision: str, weights: bool) -> Path:
    folder = Path(source).expanduser()
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f"{source}: is a file; name the folder that holds {CONFIG_FILE} and the weights")
        return folder.resolve()
    if not _HUB_NAME.fullmatch(source):
        raise UserError(f"{source}: there is no such folder, and it is no name on the Hugging Face hub, which is owner/model")
    return _downloaded(source, revision, weights)


def _downloaded(name: str, revision: str, weights: bool) -> Path:
    """The snapshot of a hub repository in Hugging Face's cache: small files first, so that a model of another kind is refused
    before its weights are fetched."""
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> Path:
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        except Exception as error:  # the hub's, httpx's and the system's errors share no other base
            reason = " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
            raise UserError(
                f"{name}: there is no such folder, and revision {revision!r} cannot be had from the Hugging Face hub: {reason}\n"
                f"Without a network, fetch it elsewhere with `hf download {name} --local-dir DIR` and name DIR as the source."
            ) from None

    path = fetch(_SMALL_FILES)
    if not weights:
        return path
    model_config_from_huggingface(read_config(path))
    path = fetch([*_SMALL_FILES, "model*.safetensors"])
    return path if any(path.glob("model*.safetensors")) else fetch([*_SMALL_FILES, "pytorch_model*.bin"])


def _commit_of(path: Path, name: str) -> str | None:
    """`name@commit` of a snapshot in Hugging Face's cache, whose files are named by their content already."""
    return f"{name}@{path.name}" if path.parent.name == "snapshots" and not Path(name).expanduser().exists() else None


def _tokenizer(recipe: ImportRecipe, source: Path) -> tuple[Tokenizer, Path]:
    if recipe.tokenizer is None:
        path = source / TOKENIZER_FILE
    elif (path := Path(recipe.tokenizer).expanduser()).suffix != ".json":
        path = _located(recipe.tokenizer, "main", weights=False) / TOKENIZER_FILE
    if not path.is_file():
        hint = (
            "; its tokenizer.model alone will not do, since converters disagree on what it means"
            if (path.parent / "tokenizer.model").is_file()
            else ""
        )
        raise UserError(
            f"{path.parent}: has no {TOKENIZER_FILE}{hint}. Set `tokenizer` to one, or to a folder or hub name that has one"
        )
    return Tokenizer.load(path), path


def _check_end_of_text(source: str, tokenizer: Tokenizer, *configs: Mapping[str, Any]) -> None:
    """UserError where the id that ended texts in pretraining, by the first of `configs` that says so, is not the tokenizer's."""
    stated = next((ids for values in configs if (ids := values.get("eos_token_id")) is not None), None)
    if stated is None or tokenizer.end_of_text in (stated if isinstance(stated, list) else [stated]):
        return
    raise UserError(
        f"{source}: its eos_token_id is {stated}, but its tokenizer's end-of-text token has id {tokenizer.end_of_text}: "
        "fine-tuning would end answers with a token that the model does not know as an end. Set `tokenizer` to that of its "
        f"pretraining, or correct {CONFIG_FILE}"
    )


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file; UserError for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values


def _content_hash(files: Iterable[Path]) -> str:
    return sha256_files((file.name, file) for file in files)
