"""What the training benches share: the batches, and our initial weights in the models of others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import command
import torch
from torch import Tensor

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.models.families import FAMILIES
from megatron_plasticity.models.huggingface import huggingface_config, to_huggingface

FOLLOWS = 0.9
"""Share of the tokens that follow from the one before."""

MicroBatches = list[tuple[Tensor, Tensor]]
"""Inputs and targets [B, S], int64, of each micro-batch of a step."""


def batches(vocab_size: int, sequences: int, length: int, micro_batch: int, steps: int) -> list[MicroBatches]:
    """`steps` global batches of `sequences` texts in which each token follows from the one before, so that there is something to
    learn; they are the same however they are cut into micro-batches."""
    generator = torch.Generator().manual_seed(1)
    successor = torch.randperm(vocab_size, generator=generator)
    made = []
    for _ in range(steps):
        tokens = torch.randint(vocab_size, (sequences, 1), generator=generator)
        columns = [tokens[:, 0]]
        for _ in range(length):
            noise = torch.randint(vocab_size, (sequences,), generator=generator)
            follow = torch.rand(sequences, generator=generator) < FOLLOWS
            columns.append(torch.where(follow, successor[columns[-1]], noise))
        rows = torch.stack(columns, dim=1)
        made.append([(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in rows.split(micro_batch)])
    return made


def transformers_model(weights: Mapping[str, Tensor], config: ModelConfig) -> Any:
    """transformers' model of the family with these weights, by our names, in fp32 and training mode, with SDPA."""
    import transformers

    values = huggingface_config(config)
    theirs = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    (name,) = values["architectures"]
    return (
        getattr(transformers, name)
        .from_pretrained(
            None, config=theirs, state_dict=to_huggingface(weights, config), dtype=torch.float32, attn_implementation="sdpa"
        )
        .train()
    )


def litgpt_model(weights: Mapping[str, Tensor], config: ModelConfig) -> Any:
    """litgpt's GPT with these weights, by our names, in fp32; its settings of a family are those of the models that it lists."""
    from litgpt import GPT, Config  # pyright: ignore[reportMissingImports]
    from litgpt.scripts import convert_hf_checkpoint  # pyright: ignore[reportMissingImports]

    family = FAMILIES[config.family]
    after: dict[str, Any] = {"norm_1": False, "norm_2": False, "post_attention_norm": True, "post_mlp_norm": True}
    theirs = Config(
        name="bench",
        block_size=config.context_length,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        n_layer=config.layers,
        n_head=config.query_heads,
        n_embd=config.hidden_size,
        head_size=config.head_dim,
        n_query_groups=config.kv_heads,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=config.norm_eps,
        mlp_class_name="LLaMAMLP",
        intermediate_size=config.mlp_hidden_size,
        rope_base=int(config.rope_theta),
        **(after if family.norm_placement == "output" else {}),
        **({"norm_qk": True, "norm_qk_type": "olmo2"} if family.qk_norm else {}),
    )
    convert = {"llama2": "copy_weights_hf_llama", "olmo2": "copy_weights_olmo2"}[config.family]
    model = GPT(theirs)
    converted: dict[str, Any] = {}
    getattr(convert_hf_checkpoint, convert)(theirs, defaultdict(dict), converted, to_huggingface(weights, config))
    model.load_state_dict(converted)
    return model


def olmo_core_model(config: ModelConfig, fused_loss: bool) -> Any:
    """OLMo-core's transformer of this shape; its trainer draws its weights, which `olmo_core_weights` can replace. `fused_loss`
    takes Liger's linear cross-entropy, which OLMo-core has as an option."""
    from olmo_core.nn.feed_forward import FeedForwardConfig  # pyright: ignore[reportMissingImports]
    from olmo_core.nn.lm_head import LMLossImplementation  # pyright: ignore[reportMissingImports]
    from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig  # pyright: ignore[reportMissingImports]

    family = FAMILIES[config.family]
    theirs = TransformerConfig.llama_like(
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        n_layers=config.layers,
        n_heads=config.query_heads,
        n_kv_heads=None if config.kv_heads == config.query_heads else config.kv_heads,
        head_dim=None if config.head_dim * config.query_heads == config.hidden_size else config.head_dim,
        qk_norm=family.qk_norm,
        layer_norm_eps=config.norm_eps,
        rope_theta=int(config.rope_theta),
        feed_forward=FeedForwardConfig(hidden_size=config.mlp_hidden_size, bias=False),
        block_name=TransformerBlockType.reordered_norm if family.norm_placement == "output" else TransformerBlockType.default,
    )
    if fused_loss:
        theirs.lm_head.loss_implementation = LMLossImplementation.fused_linear
    return theirs.build(init_device="meta")


def olmo_core_weights(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our weights under OLMo-core's names, by its own converter."""
    from olmo_core.nn.hf.convert import convert_state_from_hf  # pyright: ignore[reportMissingImports]
    from transformers import AutoConfig

    values = huggingface_config(config)
    model_type = values.pop("model_type")
    theirs = AutoConfig.for_model(model_type, **values)
    return convert_state_from_hf(theirs, to_huggingface(weights, config), model_type=model_type)


if __name__ == "__main__":
    command.no_command("train_cpu.py")
