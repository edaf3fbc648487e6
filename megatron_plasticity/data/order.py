"""The order of the samples of a run, as a pure function of (seed, sample index).

Nothing else enters: not the number of ranks or workers, not the micro-batch, not where a run was interrupted. Each epoch visits
every block once, in a permutation of its own. The permutation is never written down: it is a Feistel network on a power of four
that holds the block indexes, and an index that falls outside is sent through the network again until it falls inside
(cycle-walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).
"""

from __future__ import annotations

import hashlib

import numpy as np

# One BLAKE2b digest gives the keys of all rounds. Eight rounds, since small corpora have halves of only a few bits.
_ROUNDS = 8
# A Feistel network on two halves of one bit reaches few permutations; four bits are the least.
_SMALLEST_HALF_BITS = 2
# Samples whose blocks are computed together.
_SPAN = 4096


class SampleOrder:
    """Which block each sample of a run reads.

    Sample i belongs to epoch i // number_of_blocks. Memory is proportional to the number of samples that are asked for at once.
    """

    def __init__(self, number_of_blocks: int, seed: int) -> None:
        """Raises ValueError when there is no block, or more than 2^62."""
        if not 1 <= number_of_blocks <= 2**62:
            raise ValueError(f"number_of_blocks must lie in [1, 2^62], got {number_of_blocks}")
        self.number_of_blocks = number_of_blocks
        self.seed = seed
        self._kept: tuple[int, int, np.ndarray] | None = None
        self._half_bits = max(_SMALLEST_HALF_BITS, ((number_of_blocks - 1).bit_length() + 1) // 2)

    def distinct(self, samples: int) -> int:
        """How many different blocks the first `samples` samples read."""
        return min(samples, self.number_of_blocks)

    def first_reading(self, number: int) -> int:
        """The sample that is the `number`-th (from 0) to read a block that none before it has read."""
        return number

    def epoch(self, sample_index: int) -> int:
        """How often the blocks that sample `sample_index` is drawn from had all been read before."""
        return sample_index // self.number_of_blocks

    def block(self, sample_index: int) -> int:
        """Block that sample `sample_index` (from 0, over all epochs) reads."""
        return int(self.blocks(sample_index, sample_index + 1)[0])

    def blocks(self, start: int, stop: int) -> np.ndarray:
        """Blocks of the samples start, …, stop − 1: int64 array of that length. Raises ValueError unless 0 ≤ start ≤ stop."""
        if not 0 <= start <= stop:
            raise ValueError(f"expected 0 <= start <= stop, got start={start}, stop={stop}")
        result = np.empty(stop - start, dtype=np.int64)
        position = start
        while position < stop:
            epoch, offset = divmod(position, self.number_of_blocks)
            number, into = divmod(offset, _SPAN)
            taken = self._span(epoch, number)[into : into + stop - position]
            result[position - start : position - start + len(taken)] = taken
            position += len(taken)
        return result

    def _span(self, epoch: int, number: int) -> np.ndarray:
        """Blocks of an epoch's samples from number · _SPAN on. The last span is kept: a step asks for few samples, and computing
        few costs almost as much as computing many."""
        if self._kept is None or self._kept[:2] != (epoch, number):
            first = number * _SPAN
            indexes = np.arange(first, min(first + _SPAN, self.number_of_blocks), dtype=np.uint64)
            self._kept = (epoch, number, self._permute(indexes, epoch))
        return self._kept[2]

    def _permute(self, indexes: np.ndarray, epoch: int) -> np.ndarray:
        keys = _round_keys(self.seed, epoch)
        permuted = _feistel(indexes, keys, self._half_bits)
        while (outside := np.flatnonzero(permuted >= self.number_of_blocks)).size:
            permuted[outside] = _feistel(permuted[outside], keys, self._half_bits)
        return permuted.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"sample order, seed {seed}, epoch {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """A permutation of [0, 4^half_bits), one swap of the halves per key."""
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
