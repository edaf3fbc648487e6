"""The support table, row by row: what is refused is refused when the config is read, and its nearest neighbour is not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_plasticity.config import deepspeed as config_deepspeed
from megatron_plasticity.config.deepspeed import deepspeed_json, effective_zero_stage
from megatron_plasticity.config.load import check_config, merge
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.parallel import ParallelConfig
from megatron_plasticity.config.support import SUPPORT, check_supported
from megatron_plasticity.config.training import (
    EngineConfig,
    FinetuneConfig,
    FinetuneRecipe,
    LoraConfig,
    PretrainConfig,
    TrainingRecipe,
)
from megatron_plasticity.errors import ConfigError
from megatron_plasticity.parallel.grid import process_grid
from megatron_plasticity.training import engine as training_engine
from megatron_plasticity.training.engine import TrainingEngine
from tests.ranks import run_on_ranks
from tests.training.programs import engine_run, initial_model, recipe

Tree = dict[str, Any]

BASE: Tree = {
    "name": "small",
    "model": {
        "family": "llama2",
        "layers": 4,
        "hidden_size": 32,
        "mlp_hidden_size": 48,
        "query_heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "context_length": 16,
    },
    "data": {"folder": "data"},
    "optimizer": {"learning_rate": 0.01, "weight_decay": 0.1},
    "batch": {"global_batch_size": 8, "micro_batch_size": 1},
    "steps": 10,
}


FINETUNE: Tree = {
    **{key: value for key, value in BASE.items() if key not in ("model", "data", "steps")},
    "base": "runs/base",
    "task": {"name": "arithmetic"},
    "max_length": 16,
}


@dataclass(frozen=True)
class Example:
    """Changes to `BASE`, or to `FINETUNE` if they are settings of fine-tuning, that a row of the table is about."""

    accepted: Tree
    refused: Tree | None = None
    says: tuple[str, ...] = ()
    """What the message must name."""


def parallel(**values: Any) -> Tree:
    return {"parallel": values}


def stage(number: int, precision: str = "bf16") -> Tree:
    return {"engine": {"zero_stage": number, "precision": precision}}


EXAMPLES: dict[str, list[Example]] = {
    "ZeRO 0–3 × data parallelism, fp32 or bf16": [
        Example(stage(number, precision)) for number in range(4) for precision in ("fp32", "bf16")
    ],
    "ZeRO 0–3 × tensor parallelism, with or without sequence parallelism": [
        Example({**stage(number), **parallel(tensor=2, sequence=sequence)}) for number in range(4) for sequence in (False, True)
    ],
    "pipeline × ZeRO 0 or 1 × tensor, sequence and data parallelism": [
        Example({**stage(number), **parallel(pipeline=2, tensor=2, sequence=True)}) for number in range(2)
    ],
    "pipeline × ZeRO 2 or 3": [
        Example(
            accepted={**stage(1), **parallel(pipeline=2)},
            refused={**stage(number), **parallel(pipeline=2)},
            says=(f"engine.zero_stage={number}", "parallel.pipeline=2", "use zero_stage 1"),
        )
        for number in (2, 3)
    ],
    "ZeRO 0 in bf16, or with a pipeline": [
        Example(stage(0, "bf16")),
        Example({**stage(0, "fp32"), **parallel(pipeline=2)}),
    ],
    "tensor ranks that do not divide query heads, MLP width or vocabulary": [
        Example(
            accepted=parallel(tensor=4),
            refused={**parallel(tensor=4), "model": {"query_heads": 6, "kv_heads": 2, "hidden_size": 48}},
            says=("parallel.tensor=4", "query_heads=6"),
        ),
        Example(
            accepted={**parallel(tensor=2), "model": {"mlp_hidden_size": 50}},
            refused={**parallel(tensor=4), "model": {"mlp_hidden_size": 50}},
            says=("parallel.tensor=4", "mlp_hidden_size=50"),
        ),
        Example(
            accepted={**parallel(tensor=4), "model": {"vocab_size": 68}},
            refused={**parallel(tensor=4), "model": {"vocab_size": 65}},
            says=("parallel.tensor=4", "vocab_size=65"),
        ),
    ],
    "more tensor ranks than key/value heads": [
        Example(parallel(tensor=4)),
        Example({**parallel(tensor=4), "model": {"kv_heads": 1}}),
    ],
    "tensor ranks that neither divide the key/value heads nor are a multiple of them": [
        Example(
            accepted={**parallel(tensor=2), "model": {"query_heads": 12, "kv_heads": 6, "hidden_size": 96}},
            refused={**parallel(tensor=4), "model": {"query_heads": 12, "kv_heads": 6, "hidden_size": 96}},
            says=("parallel.tensor=4", "kv_heads=6"),
        ),
    ],
    "sequence parallelism on a context that the tensor ranks do not divide": [
        Example(
            accepted={**parallel(tensor=4, sequence=False), "model": {"context_length": 18}},
            refused={**parallel(tensor=4, sequence=True), "model": {"context_length": 18}},
            says=("parallel.sequence", "parallel.tensor=4", "context_length=18"),
        ),
    ],
    "more stages than layers, or layers_per_stage that do not add up": [
        Example(
            accepted=parallel(pipeline=4),
            refused=parallel(pipeline=5),
            says=("parallel.pipeline=5", "the model has 4"),
        ),
        Example(
            accepted=parallel(pipeline=2, layers_per_stage=[1, 3]),
            refused=parallel(pipeline=2, layers_per_stage=[1, 4]),
            says=("parallel.layers_per_stage=[1, 4]", "adds up to 5", "4 layers"),
        ),
    ],
    "activation checkpointing, gradient accumulation, tied embeddings": [
        Example(
            {
                **parallel(pipeline=2, tensor=2, sequence=True),
                "engine": {"zero_stage": 1, "activation_checkpointing": True},
                "model": {"tied_embeddings": True},
            }
        )
    ],
    "NVIDIA apex × ZeRO 3": [
        Example(
            accepted={**stage(2), "optimizer": {"implementation": "apex"}},
            refused={**stage(3), "optimizer": {"implementation": "apex"}},
            says=("optimizer.implementation: apex", "engine.zero_stage: 3"),
        )
    ],
    "DeepSpeed's AdamW × ZeRO 0–3 × every layout": [
        Example({**stage(number), **layout, "optimizer": {"implementation": "deepspeed"}})
        for number, layout in ((0, {}), (1, parallel(pipeline=2, tensor=2)), (2, parallel(tensor=2)), (3, {}))
    ],
    "fine-tuning batched as drawn or by length": [
        Example({"batching": batching, **parallel(pipeline=2, tensor=2, sequence=True), **stage(1)})
        for batching in ("as_drawn", "by_length")
    ],
    "packed fine-tuning × ZeRO 0–3 × data, tensor and sequence parallelism": [
        Example({"batching": "packed", **stage(number), **parallel(tensor=2, sequence=sequence)})
        for number in range(4)
        for sequence in (False, True)
    ],
    "packed fine-tuning × pipeline": [
        Example(
            accepted={"batching": "by_length", **parallel(pipeline=2)},
            refused={"batching": "packed", **parallel(pipeline=2)},
            says=("batching: packed", "parallel.pipeline=2", "use batching: by_length"),
        )
    ],
    "LoRA × ZeRO 0–3 × data parallelism, with every batching": [
        Example({"lora": {}, "batching": batching, **stage(number)})
        for number in range(4)
        for batching in ("as_drawn", "by_length", "packed")
    ],
    "LoRA × tensor parallelism or pipeline": [
        Example(
            accepted={"lora": {}, **stage(3)},
            refused={"lora": {}, **layout},
            says=("lora", "zero_stage: 3", *says),
        )
        for layout, says in (
            (parallel(tensor=2), ("parallel.tensor=2",)),
            (parallel(pipeline=2), ("parallel.pipeline=2",)),
        )
    ],
    "compiled blocks × every layout": [
        Example({"engine": {"zero_stage": number, "compile": True}, **layout})
        for number, layout in ((0, {}), (3, parallel(tensor=2, sequence=True)), (1, parallel(pipeline=2)))
    ],
    "compiled blocks × packed batches": [
        Example(
            accepted={"batching": "by_length", "engine": {"compile": True}},
            refused={"batching": "packed", "engine": {"compile": True}},
            says=("engine.compile", "batching: packed"),
        )
    ],
    "compiled blocks × LoRA": [
        Example(
            accepted={"lora": {}, "engine": {"compile": False}},
            refused={"lora": {}, "engine": {"compile": True}},
            says=("engine.compile", "lora"),
        )
    ],
    "engine.attention × every layout and batching": [
        Example({"engine": {"attention": "eager"}, **parallel(pipeline=2, tensor=2, sequence=True)}),
        Example({"engine": {"attention": "sdpa-flash"}, "batching": "packed"}),
    ],
    "a FlashAttention package or cuDNN × fp32": [
        Example(
            accepted={"engine": {"attention": name, "precision": "bf16"}},
            refused={"engine": {"attention": name, "precision": "fp32"}},
            says=(f"engine.attention: {name}", "engine.precision: bf16"),
        )
        for name in ("flash-attention-3", "sdpa-cudnn")
    ],
    "attention kernels of CUDA × device: cpu": [
        Example(
            accepted={"engine": {"attention": "sdpa-flash"}, "device": "cpu"},
            refused={"engine": {"attention": name}, "device": "cpu"},
            says=(f"engine.attention: {name}", "device: cpu"),
        )
        for name in ("flash-attention-4", "sdpa-efficient")
    ],
}

each_example = pytest.mark.parametrize(
    "example",
    [pytest.param(example, id=f"{row}-{i}") for row, examples in EXAMPLES.items() for i, example in enumerate(examples)],
)


def read(changes: Tree) -> TrainingRecipe:
    if changes.keys() & FinetuneRecipe.model_fields.keys() - TrainingRecipe.model_fields.keys():
        return check_config(FinetuneConfig, merge(FINETUNE, changes), "config.yaml")
    return check_config(PretrainConfig, merge(BASE, changes), "config.yaml")


def test_every_row_is_tried_and_every_refusal_is_seen() -> None:
    assert list(EXAMPLES) == [row.combination for row in SUPPORT]
    for row in SUPPORT:
        assert all((example.refused is not None) == (row.verdict == "refused") for example in EXAMPLES[row.combination])


@each_example
def test_what_is_supported_is_accepted(example: Example) -> None:
    read(example.accepted)


@each_example
def test_what_is_not_is_refused_when_the_config_is_read(example: Example) -> None:
    if example.refused is None:
        return
    with pytest.raises(ConfigError) as error:
        read(example.refused)
    for words in example.says:
        assert words in str(error.value)


@pytest.mark.parametrize("row", SUPPORT, ids=lambda row: row.combination)
def test_a_row_concerns_its_own_configs_only(row: Any) -> None:
    """Each refusal comes from the one row that says it."""
    for combination, examples in EXAMPLES.items():
        for example in examples:
            if example.refused is not None and combination != row.combination:
                tree = merge(BASE, example.refused)
                model = ModelConfig.model_validate(tree["model"])
                settings = recipe_without_check(tree)
                assert row.problem(settings, model) is None


def recipe_without_check(tree: Tree) -> FinetuneRecipe:
    """The recipe as it would be if nothing checked what goes together."""
    config = check_config(FinetuneConfig, FINETUNE, "config.yaml")
    return config.model_copy(
        update={
            "parallel": ParallelConfig.model_validate(tree.get("parallel", {})),
            "engine": EngineConfig.model_validate(tree.get("engine", {})),
            "optimizer": config.optimizer.model_copy(update=tree["optimizer"]),
            "batching": tree.get("batching", "as_drawn"),
            "lora": LoraConfig() if "lora" in tree else None,
        }
    )


def test_fine_tuning_is_checked_when_its_base_is_known() -> None:
    """The config does not say which model it trains: what does not depend on it is refused at once, the rest with the base."""
    tree: Tree = {
        "name": "small",
        "base": "runs/base",
        "task": {"name": "arithmetic"},
        "max_length": 16,
        "optimizer": BASE["optimizer"],
        "batch": BASE["batch"],
        "parallel": {"tensor": 3},
    }
    config = check_config(FinetuneConfig, tree, "config.yaml")
    model = ModelConfig.model_validate(BASE["model"])
    with pytest.raises(
        ConfigError, match=r"runs/base.*\n.*parallel\.tensor=3 must divide the model's query_heads=4, vocab_size=64"
    ):
        check_supported(config, model, "runs/base")
    check_supported(config.model_copy(update={"parallel": ParallelConfig(tensor=2)}), model, "runs/base")
    with pytest.raises(ConfigError, match="zero_stage=2 does not go with"):
        check_config(FinetuneConfig, {**tree, "parallel": {"pipeline": 2}, "engine": {"zero_stage": 2}}, "config.yaml")


@pytest.mark.parametrize(
    ("engine", "pipeline", "runs_as"),
    [
        (EngineConfig(zero_stage=0, precision="fp32"), 1, 0),
        (EngineConfig(zero_stage=0, precision="bf16"), 1, 1),
        (EngineConfig(zero_stage=0, precision="fp32"), 2, 1),
        (EngineConfig(zero_stage=1, precision="fp32"), 2, 1),
        (EngineConfig(zero_stage=3, precision="bf16"), 1, 3),
    ],
)
def test_stage_zero_is_adapted(engine: EngineConfig, pipeline: int, runs_as: int) -> None:
    """Under a pipeline DeepSpeed's own clips by a wrong norm (shown in tests/distributed/test_oracle.py); for bf16 see below."""
    assert effective_zero_stage(engine, ParallelConfig(pipeline=pipeline)) == runs_as


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_deepspeed_itself_refuses_a_pipeline_with_partitioned_gradients(zero_stage: int, tmp_path: Path) -> None:
    allowed = recipe(1, global_batch=8, micro_batch=4, parallel=ParallelConfig(pipeline=2))
    unchecked = allowed.model_copy(update={"engine": EngineConfig(zero_stage=zero_stage, precision="fp32")})  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism"):
        run_on_ranks(2, engine_run, unchecked, 1, log=tmp_path / "log")


def test_deepspeeds_stage_zero_in_bf16_refuses_or_takes_a_step_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses gradients in fp32; without them, it decays the weights once before the first step. So we run stage 1."""
    for module in (config_deepspeed, training_engine):
        monkeypatch.setattr(module, "effective_zero_stage", lambda engine, parallel: engine.zero_stage)
    with process_grid(torch.device("cpu")) as grid:
        with pytest.raises(NotImplementedError, match="unsupported mix"):
            TrainingEngine(initial_model(), recipe(0, "bf16"), 0.3, grid)

        def without_types_of_data(*arguments: Any) -> Tree:
            return {key: value for key, value in deepspeed_json(*arguments).items() if key != "data_types"}

        monkeypatch.setattr(training_engine, "deepspeed_json", without_types_of_data)
        engine = TrainingEngine(initial_model(), recipe(0, "bf16", scope="all"), 0.3, grid)
        masters = engine._engine.optimizer.fp32_groups[0]
    for master, initial in zip(masters, initial_model().parameters(), strict=True):
        torch.testing.assert_close(master.data, initial.detach().bfloat16().float() * (1 - 0.005 * 0.3))


def test_zero_three_steps_a_group_several_times_a_step() -> None:
    """Why apex, which counts a step of a group per call, is refused there: Adam's bias correction would run ahead."""
    assert calls_of_the_optimizer(recipe(2)) == {"decayed": 1, "not_decayed": 1}
    in_sub_groups = recipe(3, deepspeed={"zero_optimization": {"sub_group_size": 2000}})
    assert calls_of_the_optimizer(in_sub_groups)["decayed"] > 1


def calls_of_the_optimizer(settings: TrainingRecipe) -> Counter[str]:
    """How often DeepSpeed has the optimizer step each decay group in one training step."""
    calls: Counter[str] = Counter()

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        calls.update(group["name"] for group in optimizer.param_groups if group["params"])

    def observe(engine: TrainingEngine, step: int) -> None:
        if step == 0:
            engine._engine.optimizer.optimizer.register_step_post_hook(count)

    engine_run(settings, 2, observe=observe)
    return calls
