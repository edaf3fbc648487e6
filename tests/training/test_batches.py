"""Batches: the same global batch whatever the layout, a permutation per epoch, and no more passes than were asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from megatron_plasticity.config.training import BatchConfig, Batching
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.micro_batch import MicroBatch
from megatron_plasticity.data.order import SampleOrder
from megatron_plasticity.data.sft import EncodedExample, EncodedExamples
from megatron_plasticity.data.token_store import TokenStore, TokenStoreWriter
from megatron_plasticity.errors import ConfigError, UserError
from megatron_plasticity.models.loss import IGNORE, linear_cross_entropy
from megatron_plasticity.parallel.grid import ProcessGrid
from megatron_plasticity.parallel.tensor import TensorRanks
from megatron_plasticity.training.batches import Batches, FinetuneBatches, PretrainBatches
from megatron_plasticity.training.objective import scored_positions

PADDING = 0
LAYOUTS = [(ranks, micro) for ranks in (1, 2, 4) for micro in (1, 2, 4, 8) if ranks * micro <= 8]
Row = tuple[tuple[int, ...], tuple[int, ...]]


def grid_of(rank: int, ranks: int) -> ProcessGrid:
    return ProcessGrid(rank, ranks, torch.device("cpu"))


def examples_of_unequal_lengths(count: int) -> list[EncodedExample]:
    """Example i begins with the id i + 1, so it can be recognised; ids of prompts and responses do not overlap."""
    return [
        EncodedExample((i + 1, *range(100, 100 + i % 4), *range(200, 203 + i % 5)), prompt_length=1 + i % 4) for i in range(count)
    ]


def finetune_batches(
    count: int, epochs: int, micro: int = 8, rank: int = 0, ranks: int = 1, batching: Batching = "as_drawn"
) -> FinetuneBatches:
    batch = BatchConfig(global_batch_size=8, micro_batch_size=micro)
    examples = EncodedExamples(examples_of_unequal_lengths(count))
    return FinetuneBatches(examples, epochs, batch, grid_of(rank, ranks), 42, PADDING, batching)


@pytest.fixture
def reader(tmp_path: Path) -> BlockReader:
    """11 blocks of 5 tokens, no two alike."""
    with TokenStoreWriter(tmp_path / "store", 1000) as writer:
        writer.add_document(range(1, 58))
    return BlockReader(TokenStore(tmp_path / "store"), sequence_length=4)


def pretrain_batches(reader: BlockReader, micro: int = 8, rank: int = 0, ranks: int = 1) -> PretrainBatches:
    batch = BatchConfig(global_batch_size=8, micro_batch_size=micro)
    return PretrainBatches(reader, SampleOrder(len(reader), 42), batch, grid_of(rank, ranks), steps=5)


def unpadded(micro_batch: MicroBatch) -> list[Row]:
    """Rows without the padding, whose width depends on the micro-batch."""
    rows = []
    for row, wanted in zip(micro_batch.inputs, micro_batch.targets, strict=True):
        length = int((row != PADDING).sum())
        assert (row[:length] != PADDING).all(), "padding is on the right"
        assert (wanted[length:] == IGNORE).all(), "padding is not learned"
        rows.append((tuple(row[:length].tolist()), tuple(wanted[:length].tolist())))
    return rows


def rows_of_step(of_ranks: list[Batches], step: int, micro: int) -> tuple[list[Row], int, int]:
    """The global batch put together from its ranks, in the order of its samples; and the two token counts, equal on all."""
    parts = [batches.step(step) for batches in of_ranks]
    assert len({(part.target_tokens, part.input_tokens) for part in parts}) == 1
    assert all(len(micro_batch.inputs) == micro for part in parts for micro_batch in part.micro_batches)
    rows = [
        row
        for accumulation in range(len(parts[0].micro_batches))
        for part in parts
        for row in unpadded(part.micro_batches[accumulation])
    ]
    return rows, parts[0].target_tokens, parts[0].input_tokens


@pytest.mark.parametrize(("ranks", "micro"), LAYOUTS)
def test_pretraining_batches_do_not_depend_on_the_layout(reader: BlockReader, ranks: int, micro: int) -> None:
    of_ranks: list[Batches] = [pretrain_batches(reader, micro, rank, ranks) for rank in range(ranks)]
    order = SampleOrder(len(reader), 42)
    for step in range(5):
        rows, target_tokens, input_tokens = rows_of_step(of_ranks, step, micro)
        blocks = [reader.read(int(block)).tolist() for block in order.blocks(8 * step, 8 * step + 8)]
        assert rows == [(tuple(block[:-1]), tuple(block[1:])) for block in blocks]
        assert target_tokens == input_tokens == 8 * 4


@pytest.mark.parametrize(("ranks", "micro"), LAYOUTS)
def test_finetuning_batches_do_not_depend_on_the_layout(ranks: int, micro: int) -> None:
    of_ranks: list[Batches] = [finetune_batches(11, 4, micro=micro, rank=rank, ranks=ranks) for rank in range(ranks)]
    whole: Batches = finetune_batches(11, 4)
    assert {batches.steps for batches in of_ranks} == {whole.steps} == {5}
    for step in range(whole.steps):
        rows, target_tokens, input_tokens = rows_of_step(of_ranks, step, micro)
        assert (rows, target_tokens, input_tokens) == rows_of_step([whole], step, 8)
        assert target_tokens == sum(target != IGNORE for _, targets in rows for target in targets)
        assert input_tokens == sum(len(inputs) for inputs, _ in rows)


def lengths_of(micro_batch: MicroBatch) -> list[int]:
    return [len(inputs) for inputs, _ in unpadded(micro_batch)]


@pytest.mark.parametrize(("ranks", "micro"), LAYOUTS)
def test_by_length_only_the_order_within_a_global_batch_changes(ranks: int, micro: int) -> None:
    """The longest come first, over accumulation steps and over the ranks that compute at the same time."""
    of_ranks: list[Batches] = [finetune_batches(11, 4, micro, rank, ranks, "by_length") for rank in range(ranks)]
    drawn: Batches = finetune_batches(11, 4)
    for step in range(drawn.steps):
        rows, *counts = rows_of_step(of_ranks, step, micro)
        expected, *expected_counts = rows_of_step([drawn], step, 8)
        assert Counter(rows) == Counter(expected)
        assert counts == expected_counts
        lengths = [len(inputs) for inputs, _ in rows]
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(("ranks", "micro"), LAYOUTS)
def test_packed_micro_batches_are_those_by_length_without_padding(ranks: int, micro: int) -> None:
    for rank in range(ranks):
        by_length = finetune_batches(11, 4, micro, rank, ranks, "by_length")
        packed = finetune_batches(11, 4, micro, rank, ranks, "packed")
        for step in range(packed.steps):
            assert packed.step(step).target_tokens == by_length.step(step).target_tokens
            assert packed.step(step).input_tokens == by_length.step(step).input_tokens
            for ours, rows in zip(packed.step(step).micro_batches, by_length.step(step).micro_batches, strict=True):
                assert ours.segments is not None
                assert list(ours.segments) == lengths_of(rows)
                texts = zip(ours.inputs[0].split(ours.segments), ours.targets[0].split(ours.segments), strict=True)
                assert [(tuple(a.tolist()), tuple(b.tolist())) for a, b in texts] == unpadded(rows)


@pytest.mark.parametrize("batching", get_args(Batching))
@pytest.mark.parametrize("tensor", [1, 4])
def test_padding_is_counted_without_making_a_batch(batching: Batching, tensor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it lies in the batches, also where sequence parallelism wants rows of a multiple of its ranks."""
    grid = replace(grid_of(0, 1), tensor=TensorRanks(size=tensor, sequence=True))
    batch = BatchConfig(global_batch_size=8, micro_batch_size=2)
    batches = FinetuneBatches(EncodedExamples(examples_of_unequal_lengths(11)), 4, batch, grid, 42, PADDING, batching)
    rows = [row for step in range(batches.steps) for part in batches.step(step).micro_batches for row in part.inputs]
    padding = sum(int((row == PADDING).sum()) for row in rows) / sum(map(len, rows))
    for function in ("collate", "pack"):
        monkeypatch.delattr(f"megatron_plasticity.training.batches.{function}")
    assert batches.padding_share() == pytest.approx(padding)


@pytest.mark.parametrize("batching", get_args(Batching))
def test_attention_is_counted_by_the_length_of_each_text(batching: Batching) -> None:
    lengths = [example.input_length for example in examples_of_unequal_lengths(8)]
    step = finetune_batches(8, 1, 2, batching=batching).step(0)
    assert (step.input_tokens, step.squared_lengths) == (sum(lengths), sum(length**2 for length in lengths))


def test_a_pretraining_text_is_a_whole_row(reader: BlockReader) -> None:
    step = pretrain_batches(reader).step(0)
    assert (step.input_tokens, step.squared_lengths) == (8 * 4, 8 * 4 * 4)


def test_padding_is_the_same_on_all_ranks_and_least_in_packs() -> None:
    shares = {batching: finetune_batches(11, 4, 2, batching=batching).padding_share() for batching in get_args(Batching)}
    assert shares["as_drawn"] > 2 * shares["by_length"] > 0
    assert shares["packed"] == 0.0
    two_ranks = [finetune_batches(11, 4, 2, rank, 2).padding_share() for rank in range(2)]
    assert two_ranks == [shares["as_drawn"]] * 2


def test_a_step_does_not_depend_on_the_steps_before_it(reader: BlockReader) -> None:
    for batches in (pretrain_batches(reader), finetune_batches(11, 4)):
        late = rows_of_step([batches], 3, 8)
        assert rows_of_step([batches], 0, 8) != late
        assert rows_of_step([batches], 3, 8) == late


def test_epochs_of_blocks_are_permutations(reader: BlockReader) -> None:
    batches = pretrain_batches(reader)
    seen = [rows for step in range(5) for rows in rows_of_step([batches], step, 8)[0]]
    epochs = [seen[start : start + len(reader)] for start in (0, 11, 22)]
    assert all(len(set(epoch)) == 11 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("count", "epochs", "steps"), [(11, 4, 5), (16, 2, 4), (8, 1, 1), (15, 1, 1), (3, 3, 1), (9, 7, 7)])
def test_finetuning_makes_whole_batches_and_no_more_passes_than_epochs(count: int, epochs: int, steps: int) -> None:
    batches = finetune_batches(count, epochs)
    assert batches.steps == steps == count * epochs // 8
    seen = [inputs[0] for step in range(steps) for inputs, _ in rows_of_step([batches], step, 8)[0]]
    assert max(Counter(seen).values()) <= epochs
    passes = [seen[start : start + count] for start in range(0, len(seen) - count + 1, count)]
    assert all(sorted(one) == list(range(1, count + 1)) for one in passes)
    assert count < 8 or len({tuple(one) for one in passes}) == len(passes), "each pass has an order of its own"


@pytest.mark.parametrize(("count", "epochs"), [(7, 1), (2, 3), (1, 7)])
def test_fewer_samples_than_a_batch_are_refused(count: int, epochs: int) -> None:
    """A step on them would repeat examples more often than the config says."""
    with pytest.raises(UserError, match=rf"task\.train_examples.*{count} usable.*epochs={epochs}.*batch\.global_batch_size=8"):
        finetune_batches(count, epochs)


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 12"):
        finetune_batches(16, 1, micro=4, ranks=3).step(0)


def test_prompts_are_inputs_only() -> None:
    """Other prompt ids of the same lengths change what is read and nothing of what is learned."""
    batch = BatchConfig(global_batch_size=8, micro_batch_size=8)
    first = examples_of_unequal_lengths(8)
    second = [EncodedExample((*(299,) * e.prompt_length, *e.ids[e.prompt_length :]), e.prompt_length) for e in first]
    steps = [FinetuneBatches(EncodedExamples(each), 1, batch, grid_of(0, 1), 42, PADDING).step(0) for each in (first, second)]
    first_batch, second_batch = (step.micro_batches[0] for step in steps)
    assert not torch.equal(first_batch.inputs, second_batch.inputs)
    assert torch.equal(first_batch.targets, second_batch.targets)
    targets = first_batch.targets
    assert set(targets[targets != IGNORE].tolist()) <= set(range(200, 208)), "only ids of responses"


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.01])
def test_what_is_predicted_on_prompts_and_padding_has_no_loss(z_loss_weight: float) -> None:
    targets = finetune_batches(8, 1).step(0).micro_batches[0].targets
    ignored = targets == IGNORE
    hidden = torch.randn(*targets.shape, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    matrix = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    scored = scored_positions(targets)
    loss = linear_cross_entropy(hidden, matrix, targets, scored=scored, z_loss_weight=z_loss_weight).total
    loss.backward()
    assert hidden.grad is not None
    assert not hidden.grad[ignored].any()
    assert hidden.grad[~ignored].any(dim=-1).all()
    changed = torch.where(ignored[..., None], -5 * hidden.detach(), hidden.detach())
    for positions in (scored, None):
        again = linear_cross_entropy(changed, matrix, targets, scored=positions, z_loss_weight=z_loss_weight).total
        torch.testing.assert_close(again, loss.detach(), rtol=1e-6, atol=0)
