"""Reading a folder of activations: every point of a step as one array over its shards, and its statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_plasticity.capture.manifest import MANIFEST_FILE, Shard, check_identity, identity_digest, read_manifest
from megatron_plasticity.capture.sequences import CapturedSequences
from megatron_plasticity.capture.statistics import PointStatistics, from_tensors
from megatron_plasticity.capture.writer import TENSOR
from megatron_plasticity.errors import UserError


class ActivationStore:
    """Reads a folder of activations; only complete dumps are seen.

    Args:
        folder: what an `ActivationWriter` wrote.
        identity: what must be true of the model (some or all of `model_identity`), such as {"run": "<hash of its run>"}.

    Raises:
        UserError: the folder holds no activations, is damaged, or is of another model.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any] | None = None) -> None:
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(
                f"{folder}: holds no activations (no {MANIFEST_FILE}); `capture` in a run's config makes them, and so does the "
                "command `capture`"
            )
        check_identity(folder, manifest, identity or {})
        self.folder = folder
        self.identity = manifest.identity
        self._manifest = manifest
        self._digest = identity_digest(manifest.identity)

    @property
    def steps(self) -> list[int]:
        """Steps that have a complete dump, in order."""
        return sorted(self._manifest.complete)

    @property
    def sequences(self) -> CapturedSequences:
        """The sequences that the activations are of, and which positions were kept. Raises UserError."""
        return CapturedSequences.load(self.folder)

    def points(self, step: int) -> list[str]:
        """Names of which the dump of a step holds states."""
        return list(dict.fromkeys(shard.point for shard in self._shards(step)))

    def points_with_statistics(self, step: int) -> list[str]:
        """Hook points of which the dump of a step holds statistics."""
        self._shards(step)
        return list(self._manifest.statistics_in_force(step))

    def array(self, step: int, point: str) -> ActivationArray:
        """The states of one point at one step, of which nothing is read yet. Raises UserError if there are none."""
        shards = [shard for shard in self._shards(step) if shard.point == point]
        if not shards:
            raise self._no_point(step, point, self.points(step))
        return ActivationArray(self.folder, tuple(shards), self._digest)

    def read(self, step: int, point: str) -> Tensor:
        """States of one point at one step, in the number format on disk; first axis sequences. Raises UserError."""
        return self.array(step, point)[:]

    def statistics(self, step: int, point: str) -> PointStatistics:
        """Statistics of one point at one step. Raises UserError if there are none, or their file is damaged."""
        if point not in self.points_with_statistics(step):
            raise self._no_point(step, f"statistics of {point}", self.points_with_statistics(step))
        files = self._manifest.statistics_in_force(step)
        path = self.folder / files[point].file
        with _Opened(path, self._digest, point, step) as file:
            return from_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict

    def _no_point(self, step: int, wanted: str, there: Sequence[str]) -> UserError:
        return UserError(f"{self.folder}: step {step} has no point {wanted!r}; it has {', '.join(there) or 'none'}")

    def _shards(self, step: int) -> list[Shard]:
        if step not in self._manifest.complete:
            raise UserError(
                f"{self.folder}: no complete dump of step {step}; there are {', '.join(map(str, self.steps)) or 'none'}"
            )
        return self._manifest.in_force(step)


@dataclass(frozen=True)
class ActivationArray:
    """The shards of one point as one array, of which only the rows that are asked for are read."""

    folder: Path
    shards: tuple[Shard, ...]
    digest: str

    def __len__(self) -> int:
        return self.shards[-1].last_row

    @property
    def shape(self) -> tuple[int, ...]:
        """First axis sequences."""
        return (len(self), *self.shards[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Number format on disk."""
        return getattr(torch, self.shards[0].dtype)

    def __getitem__(self, rows: slice) -> Tensor:
        """Consecutive sequences, as `array[100:200]`. Raises UserError if a shard that is read is missing or damaged."""
        start, stop, stride = rows.indices(len(self))
        if stride != 1:
            raise ValueError(f"expected consecutive rows, got a stride of {stride}")
        pieces = [
            self._rows_of(shard, max(start - shard.first_row, 0), stop - shard.first_row)
            for shard in self.shards
            if shard.first_row < stop and start < shard.last_row
        ]
        if not pieces:
            return torch.empty(0, *self.shape[1:], dtype=self.dtype)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _rows_of(self, shard: Shard, start: int, stop: int) -> Tensor:
        path = self.folder / shard.file
        with _Opened(path, self.digest, shard.point, shard.step) as file:
            stored = file.get_slice(TENSOR)
            shape, dtype = tuple(stored.get_shape()), stored[:0].dtype
            if shape != shard.shape or str(dtype) != f"torch.{shard.dtype}":
                raise UserError(
                    f"{path}: holds {shape} {dtype}, the manifest says {shard.shape} {shard.dtype}; "
                    f"record step {shard.step} again"
                )
            return stored[start : min(stop, shape[0])]


class _Opened:
    """A safetensors file that must be of this model, point and step, inside a `with` block; all that is wrong is a UserError."""

    def __init__(self, path: Path, digest: str, point: str, step: int) -> None:
        self._path, self._step = path, step
        self._metadata = {"model": digest, "point": point, "step": str(step)}

    def __enter__(self) -> Any:
        again = f"record step {self._step} again"
        try:
            file = safe_open(self._path, framework="pt")
        except FileNotFoundError as error:
            raise UserError(f"{self._path}: this shard is missing; {again}") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._path}: this shard is truncated or damaged ({error}); {again}") from error
        if (file.metadata() or {}) != self._metadata:
            raise UserError(f"{self._path}: this shard is of another model, step or point than the manifest says; {again}")
        return file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SafetensorError | KeyError):
            raise UserError(f"{self._path}: damaged ({error}); record step {self._step} again") from error
