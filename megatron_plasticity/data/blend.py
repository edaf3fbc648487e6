"""Several corpora as one: which corpus each sample comes from, as a pure function of the sample's index.

Of the first n samples a share p of all goes to the first corpus: sample i does if ⌊(i+1)·p⌋ > ⌊i·p⌋, and it is then that corpus's
sample number ⌊i·p⌋. The others are numbered i − ⌊i·p⌋ and shared out among the remaining corpora in the same way. So the shares
are exact, to within one sample for each corpus, in every prefix of a run, hence in every step to within a few samples; and no
list of choices is ever made.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.order import SampleOrder
from megatron_plasticity.data.token_store import TokenStore
from megatron_plasticity.errors import UserError

# Shares are fractions with denominators up to this, so that products with sample numbers up to 2^42 fit 64 bits.
_LARGEST_DENOMINATOR = 1 << 20


class BlendOrder(SampleOrder):
    """Which block each sample reads, when the blocks of several corpora are numbered one corpus after the other.

    Each corpus has epochs of its own: a permutation of its blocks, then another one.
    """

    def __init__(self, corpora: Sequence[tuple[int, float]], seed: int) -> None:
        """`corpora` is the number of blocks and the weight of each. Raises ValueError when one has no blocks or no weight,
        and UserError when one has so little weight that it would never be read."""
        if not corpora or any(weight <= 0 for _, weight in corpora):
            raise ValueError(f"expected corpora with positive weights, got {corpora}")
        super().__init__(sum(blocks for blocks, _ in corpora), seed)
        self._orders = [SampleOrder(blocks, seed + number) for number, (blocks, _) in enumerate(corpora)]
        self._offsets = np.cumsum([0] + [blocks for blocks, _ in corpora[:-1]])
        weights = [Fraction(str(weight)) for _, weight in corpora]
        # The share of each corpus in what the corpora before it leave.
        self._shares = [
            (weight / sum(weights[number:])).limit_denominator(_LARGEST_DENOMINATOR) for number, weight in enumerate(weights)
        ]
        if any(share in (0, 1) for share in self._shares[:-1]):
            listed = ", ".join(f"{weight:g}" for _, weight in corpora)
            raise UserError(f"data.blend: of the weights {listed} one is too small: shares are told apart to one in a million")

    def distinct(self, samples: int) -> int:
        return sum(min(count, order.number_of_blocks) for count, order in zip(self.counts(samples), self._orders, strict=True))

    def first_reading(self, number: int) -> int:
        if not 0 <= number < self.number_of_blocks:
            raise ValueError(f"expected a number below {self.number_of_blocks}, got {number}")
        high = 1
        while self.distinct(high) <= number:
            high *= 2
        return bisect.bisect_right(range(high), number, key=lambda sample: self.distinct(sample + 1))

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples come from each corpus."""
        counts = []
        for share in self._shares:
            taken = samples * share.numerator // share.denominator
            counts.append(taken)
            samples -= taken
        return counts

    def corpora(self, start: int, stop: int) -> np.ndarray:
        """Corpus, by number, of the samples start, …, stop − 1: int64 array of that length."""
        corpora = np.full(stop - start, len(self._shares) - 1, dtype=np.int64)
        places, numbers = np.arange(stop - start), np.arange(start, stop, dtype=np.int64)
        for corpus, share in enumerate(self._shares[:-1]):
            before = numbers * share.numerator // share.denominator
            chosen = (numbers + 1) * share.numerator // share.denominator > before
            corpora[places[chosen]] = corpus
            places, numbers = places[~chosen], (numbers - before)[~chosen]
        return corpora

    def epoch(self, sample_index: int) -> int:
        corpus = int(self.corpora(sample_index, sample_index + 1)[0])
        return self._orders[corpus].epoch(self.counts(sample_index)[corpus])

    def blocks(self, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop:
            raise ValueError(f"expected 0 <= start <= stop, got start={start}, stop={stop}")
        result = np.empty(stop - start, dtype=np.int64)
        corpora = self.corpora(start, stop)
        first, last = self.counts(start), self.counts(stop)
        for corpus, order in enumerate(self._orders):
            result[corpora == corpus] = order.blocks(first[corpus], last[corpus]) + self._offsets[corpus]
        return result


class BlendedBlocks(BlockReader):
    """The blocks of several stores, numbered one store after the other."""

    def __init__(self, readers: Sequence[BlockReader]) -> None:
        """`readers` must agree about the sequence length."""
        self.readers = readers
        self.store = readers[0].store
        self.sequence_length = readers[0].sequence_length
        self._ends = np.cumsum([len(reader) for reader in readers])
        self._blocks = int(self._ends[-1])

    def tokens(self, blocks: np.ndarray) -> np.ndarray:
        for block in (blocks.min(initial=0), blocks.max(initial=0)):
            self._check(block)
        result = np.empty((len(blocks), self.sequence_length + 1), dtype=np.int64)
        corpora = np.searchsorted(self._ends, blocks, side="right")
        for corpus, reader in enumerate(self.readers):
            own = corpora == corpus
            result[own] = reader.tokens(blocks[own] - (self._ends[corpus] - len(reader)))
        return result

    def locate(self, block: int) -> tuple[TokenStore, int]:
        self._check(block)
        corpus = int(np.searchsorted(self._ends, block, side="right"))
        return self.readers[corpus].locate(block - int(self._ends[corpus]) + len(self.readers[corpus]))

    def _check(self, block: int) -> None:
        if not 0 <= block < self._blocks:
            raise IndexError(f"block {block} lies outside the blended corpora, which hold {self._blocks} blocks")
