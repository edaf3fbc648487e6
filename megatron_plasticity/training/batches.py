"""Which sequences each rank sees in each step: a pure function of the step, so nothing has to be stored to go on.

Sample numbers of step s are [s·G, (s+1)·G) for a global batch of G. Micro-batch a of data-parallel rank r takes the slice that
starts at (a·ranks + r)·micro, so the global batch is the same set whatever the number of ranks. Processes that share a
data-parallel rank (pipeline stages, tensor-parallel ranks) see the same sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_plasticity.config.deepspeed import accumulation_steps
from megatron_plasticity.config.training import BatchConfig, Batching
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.micro_batch import MicroBatch
from megatron_plasticity.data.order import SampleOrder
from megatron_plasticity.data.sft import EncodedExample, EncodedExamples, collate, pack
from megatron_plasticity.parallel.grid import ProcessGrid
from megatron_plasticity.training.duration import finetuning_steps


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step's work for one rank."""

    micro_batches: list[MicroBatch]
    """On the CPU, one per accumulation step, each of `micro_batch_size` sequences."""
    target_tokens: int
    """Targets that count towards the loss, in the whole global batch."""
    input_tokens: int
    """Tokens that are not padding, in the whole global batch."""
    squared_lengths: int
    """Sum of the squares of the lengths of its texts, without padding, which is what attention costs."""
    samples: list[list[int]]
    """What each micro-batch consists of: one number per row, or all those that are packed into its only row."""


class Batches(Protocol):
    steps: int
    """Optimizer steps of the run."""
    sample_name: str
    """What `StepBatch.samples` are the numbers of."""

    def step(self, step: int) -> StepBatch:
        """The batch of step `step`, 0-based."""
        ...


class PretrainBatches:
    """Blocks of a token store in their seeded order, epoch after epoch."""

    sample_name = "block"

    def __init__(self, reader: BlockReader, order: SampleOrder, batch: BatchConfig, grid: ProcessGrid, steps: int) -> None:
        self.steps = steps
        self._reader, self._order, self._batch, self._grid = reader, order, batch, grid

    def step(self, step: int) -> StepBatch:
        size = self._batch.global_batch_size
        blocks = self._order.blocks(step * size, (step + 1) * size)
        parts = [blocks[part] for part in _slices(self._batch, self._grid)]
        length = self._reader.sequence_length
        return StepBatch(
            [MicroBatch(*self._reader.batch(part)) for part in parts],
            target_tokens=size * length,
            input_tokens=size * length,
            squared_lengths=size * length**2,
            samples=[[int(block) for block in part] for part in parts],
        )


class FinetuneBatches:
    """Examples in a new order each epoch. Each rank knows every example's length, so it counts the global targets by itself.

    Which examples a step sees is the same for every batching. Other than `as_drawn` sorts them within the global batch, the
    longest first: then a micro-batch has examples of similar length, and so have the micro-batches that ranks compute at the same
    time, where the quicker would wait for the slower; and a run that does not fit into memory fails at once.
    """

    sample_name = "example"

    def __init__(
        self,
        examples: EncodedExamples,
        epochs: int,
        batch: BatchConfig,
        grid: ProcessGrid,
        seed: int,
        padding_id: int,
        batching: Batching = "as_drawn",
    ) -> None:
        """Raises UserError when all epochs together do not fill one global batch."""
        self.steps = finetuning_steps(len(examples), epochs, batch)
        self._examples, self._batch, self._grid, self._padding_id = examples, batch, grid, padding_id
        self._batching: Batching = batching
        self._order = SampleOrder(len(examples), seed)

    def step(self, step: int) -> StepBatch:
        numbers = self._chosen(step)
        chosen = [self._examples[number] for number in numbers]
        parts = list(_slices(self._batch, self._grid))
        # The first token of an example is never a target, the last one never an input.
        return StepBatch(
            [self._micro_batch(chosen[part]) for part in parts],
            target_tokens=sum(example.response_length for example in chosen),
            input_tokens=sum(example.input_length for example in chosen),
            squared_lengths=sum(example.input_length**2 for example in chosen),
            samples=[numbers[part] for part in parts],
        )

    def padding_share(self) -> float:
        """Share of all positions that the run computes, on all ranks, that hold no token. It depends on the layout."""
        size, micro = self._batch.global_batch_size, self._batch.micro_batch_size
        lengths = self._examples.input_lengths[self._order.blocks(0, self.steps * size)].reshape(self.steps, size)
        if self._batching != "as_drawn":
            lengths = np.sort(lengths)[:, ::-1]
        parts = lengths.reshape(self.steps, size // micro, micro)
        rows, columns = (1, parts.sum(axis=2)) if self._batching == "packed" else (micro, parts.max(axis=2))
        positions = rows * int((-(-columns // self._multiple) * self._multiple).sum())
        return 1.0 - int(lengths.sum()) / positions

    def _chosen(self, step: int) -> list[int]:
        """The numbers of the global batch's examples, in the order in which it is cut into micro-batches."""
        size = self._batch.global_batch_size
        numbers = [int(number) for number in self._order.blocks(step * size, (step + 1) * size)]
        lengths = self._examples.input_lengths
        return numbers if self._batching == "as_drawn" else sorted(numbers, key=lambda number: -lengths[number])

    def _micro_batch(self, examples: list[EncodedExample]) -> MicroBatch:
        return (pack if self._batching == "packed" else collate)(examples, self._padding_id, self._multiple)

    @property
    def _multiple(self) -> int:
        """What sequence parallelism wants rows to be a multiple of."""
        return self._grid.tensor.size if self._grid.tensor.sequence else 1


def _slices(batch: BatchConfig, grid: ProcessGrid) -> Iterator[slice]:
    micro = batch.micro_batch_size
    for accumulation in range(accumulation_steps(batch, grid.data_size)):
        start = (accumulation * grid.data_size + grid.data_rank) * micro
        yield slice(start, start + micro)
