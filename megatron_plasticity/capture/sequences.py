"""The sequences whose activations are recorded, and the token positions that are kept of each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_plasticity.capture.shards import write_tensors
from megatron_plasticity.config.files import fsync_folder
from megatron_plasticity.errors import UserError

SEQUENCES_FILE = "sequences.safetensors"


@dataclass(frozen=True)
class CapturedSequences:
    """N sequences, the shorter ones padded on the right, which causal attention cannot see."""

    tokens: Tensor
    """[N, S] int64; 0 after a sequence's end."""
    lengths: Tensor
    """[N] int64; tokens of each sequence."""
    positions: Tensor
    """[N, K] int64: which positions are kept, in ascending order, and −1 where a sequence has fewer than others."""

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], kept: Sequence[range]) -> CapturedSequences:
        """From token ids, and the positions that are kept of each. ValueError if a sequence has no tokens or keeps nothing."""
        if not sequences or not all(map(len, sequences)) or not all(map(len, kept)):
            raise ValueError("expected sequences, each with tokens and with positions to keep")
        tokens = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
        positions = torch.full((len(sequences), max(map(len, kept))), -1, dtype=torch.int64)
        for row, (ids, places) in enumerate(zip(sequences, kept, strict=True)):
            tokens[row, : len(ids)] = torch.tensor(ids)
            positions[row, : len(places)] = torch.tensor(places)
        return cls(tokens, torch.tensor([len(ids) for ids in sequences]), positions)

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and kept positions of `size` sequences at a time, in order."""
        return zip(self.tokens.split(size), self.positions.split(size), strict=True)

    @property
    def sha256(self) -> str:
        """Of the tokens and positions: two sets of sequences are the same if and only if theirs is."""
        digest = hashlib.sha256()
        for tensor in (self.tokens, self.lengths, self.positions):
            digest.update(f"{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write them into a folder of activations, or find them there. UserError if it holds activations of other sequences."""
        path = folder / SEQUENCES_FILE
        if not path.is_file():
            tensors = {"tokens": self.tokens, "lengths": self.lengths, "positions": self.positions}
            write_tensors(path, {name: [tensor] for name, tensor in tensors.items()}, {})
            fsync_folder(folder)
        elif CapturedSequences.load(folder).sha256 != self.sha256:
            raise UserError(
                f"{folder}: holds activations of other sequences or positions; choose another folder, or move it away"
            )

    @classmethod
    def load(cls, folder: Path) -> CapturedSequences:
        """The sequences of a folder of activations. UserError if their file is missing or damaged."""
        path = folder / SEQUENCES_FILE
        try:
            tensors = load_file(path)
            return cls(tensors["tokens"], tensors["lengths"], tensors["positions"])
        except FileNotFoundError as error:
            raise UserError(f"{path}: is missing; record the activations again to know which sequences they are of") from error
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(f"{path}: truncated or damaged ({error}); move the folder away and record again") from error
