"""Small Hugging Face folders, made by transformers itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;?!+-*/='\"()%\n"
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "rope_theta": 10_000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of Llama's kind: `</s>` ends a text, and its post-processor begins one with `<s>`."""
    from tokenizers import Tokenizer, decoders, models, processors

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {text: i for i, text in enumerate(["<unk>", "<s>", "</s>", *CHARACTERS])}
    pipeline = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    pipeline.decoder = decoders.Fuse()
    pipeline.add_special_tokens(["<unk>", "<s>", "</s>"])
    pipeline.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    pipeline.save(str(folder / "tokenizer.json"))


def write_model(
    folder: Path,
    model_type: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> Any:
    """A model of transformers' own, far from initialisation, saved by transformers with a tokenizer beside it; returns it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SHAPE, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                # Gains that are not 1 and attention that is not uniform, so that a misplaced norm or head shows.
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    return model


def as_pickle(folder: Path) -> None:
    """Turn the folder's safetensors into the pickle of older repositories."""
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder of safetensors."""
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to
