"""A folder that Hugging Face's tools load, from any run or checkpoint folder.

    config.json, generation_config.json
    model.safetensors, or model-00001-of-0000N.safetensors … and model.safetensors.index.json
    tokenizer.json, tokenizer_config.json
    parity.json                             see `parity.py`

It is written under a temporary name, checked, and renamed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Literal

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_plasticity.config.files import atomic_folder, write_json_atomic
from megatron_plasticity.data.prepare import TOKENIZER_FILE
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError
from megatron_plasticity.interchange.parity import PARITY_FILE, check_parity
from megatron_plasticity.interchange.sources import CONFIG_FILE
from megatron_plasticity.interchange.weights import SAFETENSORS, SAFETENSORS_INDEX
from megatron_plasticity.models.checkpoint import CheckpointFolder
from megatron_plasticity.models.huggingface import huggingface_config, huggingface_names
from megatron_plasticity.models.sizes import parameter_shapes
from megatron_plasticity.tracking.disk import explain_disk_errors
from megatron_plasticity.tracking.progress import Progress
from megatron_plasticity.tracking.trained_model import TrainedModel

SHARD_BYTES = 4 * 2**30
ExportDtype = Literal["float32", "bfloat16"]


def export_model(run: Path, output: Path | None, progress: Progress, dtype: ExportDtype = "float32", parity: bool = True) -> Path:
    """Write the model at a run or checkpoint folder as a Hugging Face folder and return where it lies, by default
    `RUN/huggingface/step-N` (`step-N-bfloat16`).

    One shard is in memory at a time; the parity check then takes 4 bytes per parameter, 6 in bf16. Raises UserError, and leaves
    nothing, if `output` holds something already, the disk is full, or the logits of the two sides differ.
    """
    trained = TrainedModel.open(run)
    checkpoint, tokenizer = trained.checkpoint, trained.tokenizer()
    output = output or default_output(trained, dtype)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is there already; name another folder with --output, or delete it")
    end = tokenizer.end_of_text
    # The embedding's padding_idx follows config.json's pad_token_id and would stop that row's gradient: none is named there.
    config = {**huggingface_config(checkpoint.model), "eos_token_id": end, "torch_dtype": dtype}
    with explain_disk_errors(output.parent), atomic_folder(output) as folder:
        write_json_atomic(folder / CONFIG_FILE, config)
        write_json_atomic(folder / "generation_config.json", {"eos_token_id": end, "pad_token_id": end, "do_sample": False})
        _write_tokenizer(folder, tokenizer, checkpoint.model.context_length)
        _write_weights(folder, checkpoint, getattr(torch, dtype), progress)
        _check_tokenizer(folder, tokenizer)
        if parity:
            what = {"dtype": dtype, "model": trained.identity, "step": checkpoint.step}
            write_json_atomic(folder / PARITY_FILE, {**check_parity(checkpoint, folder, getattr(torch, dtype)), **what})
    return output


def default_output(trained: TrainedModel, dtype: ExportDtype) -> Path:
    """Where an export goes if nobody says: inside the run folder."""
    suffix = "" if dtype == "float32" else f"-{dtype}"
    return trained.run.path / "huggingface" / f"step-{trained.checkpoint.step}{suffix}"


def exported_tensors(weights: Mapping[str, Tensor], names: Mapping[str, str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Pairs of Hugging Face name and tensor, one at a time. A tied model has no `lm_head.weight`."""
    for ours, theirs in names.items():
        yield theirs, weights[ours].to(dtype).contiguous()


def _write_weights(folder: Path, checkpoint: CheckpointFolder, dtype: torch.dtype, progress: Progress) -> None:
    names = huggingface_names(checkpoint.model)
    sizes = {names[name]: math.prod(shape) * dtype.itemsize for name, shape in parameter_shapes(checkpoint.model).items()}
    shards = _shards(sizes)
    tensors = exported_tensors(checkpoint.tensors(), names, dtype)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SAFETENSORS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(dict(islice(tensors, len(shard))), folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
        progress.update(len(places), len(sizes), "tensors")
    if len(shards) > 1:
        write_json_atomic(folder / SAFETENSORS_INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in their order, cut so that no shard has more than SHARD_BYTES, unless one tensor has."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
    path = folder / TOKENIZER_FILE
    tokenizer.save(path)
    pipeline = tokenizers.Tokenizer.from_file(str(path))
    if pipeline.encode("a").ids != pipeline.encode("a", add_special_tokens=False).ids:
        # Llama's begins each text with <s>. Our models never saw one there, so the export must not add it.
        write_json_atomic(path, {**json.loads(path.read_text(encoding="utf-8")), "post_processor": None})
    end = pipeline.id_to_token(tokenizer.end_of_text)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    write_json_atomic(folder / "tokenizer_config.json", settings)


def _check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """That AutoTokenizer gives the ids that the model was trained on."""
    from transformers import AutoTokenizer

    text = "Human: What is  12 + 30?\nAssistant: The answer is 42."
    ids = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)(text)["input_ids"]
    if ids != tokenizer.encode(text):
        raise UserError(
            f"{folder}: transformers reads the exported tokenizer differently: {ids[:12]} … instead of "
            f"{tokenizer.encode(text)[:12]} …. Nothing was kept. Please report this tokenizer."
        )
