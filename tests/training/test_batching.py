"""Fine-tuning batched by length or packed: each example sees itself alone, and training is that of padded rows as drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import Batching, FinetuneConfig, PretrainConfig
from megatron_plasticity.data.sft import EncodedExample, EncodedExamples
from megatron_plasticity.models.attention import AttentionBackend
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.parallel.grid import process_grid
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.training.batches import FinetuneBatches
from megatron_plasticity.training.engine import TrainingEngine
from megatron_plasticity.training.finetune import finetune
from megatron_plasticity.training.pretrain import pretrain
from tests.ranks import run_on_ranks
from tests.training.programs import MODEL, OLMO, initial_model, recipe, whole
from tests.training.test_layouts import assert_close, assert_same_rows
from tests.training.test_pretrain import final_weights

SEGMENTS = (5, 1, 7, 3)
FAMILIES = pytest.mark.parametrize("model", [MODEL, OLMO], ids=["llama2", "olmo2"])


def random_tokens(rows: int) -> Tensor:
    return torch.randint(0, MODEL.vocab_size, (rows, sum(SEGMENTS)), generator=torch.Generator().manual_seed(3))


@FAMILIES
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_text_has_the_logits_that_it_has_alone(model: ModelConfig, backend: AttentionBackend) -> None:
    transformer = Transformer(model, backend)
    initialise(transformer, seed=1)
    tokens = random_tokens(2)
    logits = transformer(tokens, segments=SEGMENTS)
    for text, ours in zip(tokens.split(SEGMENTS, dim=1), logits.split(SEGMENTS, dim=1), strict=True):
        torch.testing.assert_close(ours, transformer(text), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits, transformer(tokens), atol=1e-2), "without segments the texts do see each other"


@FAMILIES
def test_nothing_of_a_text_reaches_another(model: ModelConfig) -> None:
    """Other tokens in one text leave the logits of all others as they are, bit for bit."""
    transformer = initial_model(model)
    tokens = random_tokens(1)
    logits = transformer(tokens, segments=SEGMENTS).split(SEGMENTS, dim=1)
    starts = torch.tensor((0, *SEGMENTS)).cumsum(0)
    for text, length in enumerate(SEGMENTS):
        changed = tokens.clone()
        columns = slice(int(starts[text]), int(starts[text]) + length)
        changed[:, columns] = (changed[:, columns] + 1) % model.vocab_size
        others = transformer(changed, segments=SEGMENTS).split(SEGMENTS, dim=1)
        same = [torch.equal(ours, theirs) for ours, theirs in zip(logits, others, strict=True)]
        assert same == [other != text for other in range(len(SEGMENTS))]


@dataclass(frozen=True)
class Step:
    """What one optimizer step computed."""

    loss: float
    gradients: dict[str, Tensor]
    shapes: list[tuple[int, ...]]
    """Of the micro-batches."""


def examples_of_unequal_lengths() -> list[EncodedExample]:
    """Sixteen examples of 5 to 15 tokens in a small language, each with a prompt."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(5, 16, (16,), generator=generator).tolist()
    starts = torch.randint(1, 5, (16,), generator=generator).tolist()
    return [
        EncodedExample(tuple((start * n * n) % 61 for n in range(length)), 1 + start)
        for start, length in zip(starts, lengths, strict=True)
    ]


def one_step(
    model: ModelConfig, batching: Batching, zero_stage: int = 0, micro_batch: int = 8, checkpointing: bool = False
) -> Step:
    settings = recipe(zero_stage, clip=0.0, global_batch=16, micro_batch=micro_batch, checkpointing=checkpointing)
    with process_grid(torch.device("cpu")) as grid:
        batches = FinetuneBatches(EncodedExamples(examples_of_unequal_lengths()), 1, settings.batch, grid, 42, 0, batching)
        engine = TrainingEngine(initial_model(model), settings, 0.0, grid)
        batch = batches.step(0)
        loss = float(engine.train_batch(batch)) / batch.target_tokens
        first_moments = whole(engine.full_moments("exp_avg"))
        engine.close()
    gradients = {name: moment / (1 - settings.optimizer.betas[0]) for name, moment in first_moments.items()}
    return Step(loss, gradients, [tuple(part.inputs.shape) for part in batch.micro_batches])


@FAMILIES
@pytest.mark.parametrize(("zero_stage", "micro_batch", "checkpointing"), [(0, 16, False), (1, 4, True), (3, 4, True)])
@pytest.mark.parametrize("batching", ["by_length", "packed"])
def test_loss_and_gradients_are_those_of_padded_rows(
    model: ModelConfig, batching: Batching, zero_stage: int, micro_batch: int, checkpointing: bool
) -> None:
    ours = one_step(model, batching, zero_stage, micro_batch, checkpointing)
    padded = one_step(model, "as_drawn")
    assert ours.loss == pytest.approx(padded.loss, rel=1e-6)
    assert set(ours.gradients) == set(padded.gradients)
    for name, gradient in ours.gradients.items():
        assert float((gradient - padded.gradients[name]).norm() / padded.gradients[name].norm()) < 2e-6, name
    assert len(ours.shapes) == 16 // micro_batch
    if batching == "packed":
        tokens = sum(example.input_length for example in examples_of_unequal_lengths())
        assert sum(columns for _, columns in ours.shapes) == tokens
        assert {rows for rows, _ in ours.shapes} == {1}


def finetune_on_a_rank(config: FinetuneConfig) -> str:
    """For `run_on_ranks`."""
    return str(finetune(config, NoProgress()).path)


LAYOUTS = {
    "by length, pipeline 2 × tensor 2 with sequence": (
        4,
        {"batching": "by_length", "parallel": {"pipeline": 2, "tensor": 2, "sequence": True}, "batch": {"micro_batch_size": 1}},
    ),
    "packed, tensor 2 with sequence, ZeRO 3": (
        2,
        {
            "batching": "packed",
            "parallel": {"tensor": 2, "sequence": True},
            "engine": {"zero_stage": 3, "activation_checkpointing": True},
            "batch": {"micro_batch_size": 3},
        },
    ),
    "packed, data 2, ZeRO 3": (
        2,
        {"batching": "packed", "engine": {"zero_stage": 3}, "batch": {"micro_batch_size": 1}},
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_runs_under_other_layouts_train_the_same_model(
    pretrain_config: Callable[..., PretrainConfig],
    finetune_config: Callable[..., FinetuneConfig],
    tmp_path: Path,
    layout: str,
) -> None:
    """Against one process with padded rows as drawn: every metric, and the weights."""
    base = pretrain(pretrain_config({"steps": 2, "model": {"family": "olmo2", "context_length": 128}}), NoProgress())
    shared = {
        "optimizer": {"learning_rate": 0.001, "eps": 1e-5},
        "task": {"name": "steps"},
        "max_length": 120,
        "batch": {"global_batch_size": 6, "micro_batch_size": 6},
        "epochs": 3,
    }
    alone = finetune(finetune_config(base.path, {**shared, "output": str(tmp_path / "a")}), NoProgress())
    processes, changes = LAYOUTS[layout]
    batch = {**shared["batch"], **changes["batch"]}  # type: ignore[dict-item]
    config = finetune_config(base.path, {**shared, **changes, "batch": batch, "output": str(tmp_path / "b")})
    together = RunFolder.open(Path(run_on_ranks(processes, finetune_on_a_rank, config, log=tmp_path / "log")[0]))
    assert together.results["steps"] == alone.results["steps"] > 1
    assert_same_rows(together, alone)
    assert_close(final_weights(together), final_weights(alone))
    assert together.results["padding_share"] < 0.02 < alone.results["padding_share"]
