"""The tensors of a Hugging Face folder by name, read when they are looked up: safetensors, or pickles of plain tensors."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_plasticity.errors import UserError
from megatron_plasticity.models.checkpoint import open_safetensors

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
_PICKLE = "pytorch_model.bin"
_PICKLE_INDEX = "pytorch_model.bin.index.json"
# fp32 holds each of these exactly.
_EXACT = (torch.float32, torch.bfloat16, torch.float16)
_NAMES_IN_SAFETENSORS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the folder's weights, safetensors before pickles. UserError if there are none, or some are missing."""
    for index, single in ((SAFETENSORS_INDEX, SAFETENSORS), (_PICKLE_INDEX, _PICKLE)):
        if (folder / index).is_file():
            return _listed(folder / index)
        if (folder / single).is_file():
            return [folder / single]
    raise UserError(f"{folder}: has no weights; expected {SAFETENSORS}, {SAFETENSORS_INDEX} with its shards, or {_PICKLE}")


def _listed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError("the values of weight_map are not names of files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: cannot be read as an index of shards: {type(error).__name__} {error}") from None
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index}: names files outside its folder: {', '.join(outside)}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(f"{index.parent}: shards that {index.name} names are missing: {', '.join(missing)}")
    return [index.parent / name for name in names]


class HuggingFaceWeights(Mapping[str, Tensor]):
    """Tensors by name, as stored. `shapes` and `dtypes` are known from the start, tensors are read one at a time.

    Pickles are read as data only (`weights_only=True`): a file that holds anything but tensors is refused, and never executed.
    Raises UserError for a damaged file, and for numbers that fp32 cannot hold exactly (quantised weights, float64).
    """

    def __init__(self, files: list[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        self._pickle: tuple[Path, dict[str, Tensor]] | None = None
        for file in files:
            for name, shape, dtype in self._heads(file):
                if name in self._files:
                    raise UserError(f"{file}: holds {name}, which {self._files[name].name} holds as well")
                if dtype not in _EXACT:
                    raise UserError(
                        f"{file}: {name} is stored as {_text(dtype)}; expected float32, bfloat16 or float16, since "
                        "quantised weights are not imported"
                    )
                self._files[name], self.shapes[name], self.dtypes[name] = file, shape, _text(dtype)

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        if file.suffix == ".bin":
            return self._unpickled(file)[name]
        with open_safetensors(file) as shard:
            return shard.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _heads(self, file: Path) -> Iterator[tuple[str, tuple[int, ...], Any]]:
        if file.suffix == ".bin":
            for name, tensor in self._unpickled(file).items():
                yield name, tuple(tensor.shape), tensor.dtype
            return
        with open_safetensors(file) as shard:
            for name in shard.keys():  # noqa: SIM118  (not a dict)
                head = shard.get_slice(name)
                yield name, tuple(head.get_shape()), _NAMES_IN_SAFETENSORS.get(head.get_dtype(), head.get_dtype())

    def _unpickled(self, file: Path) -> dict[str, Tensor]:
        """The tensors of one pickle; the last one opened is kept, mapped from the disk where its format allows."""
        if self._pickle is None or self._pickle[0] != file:
            self._pickle = (file, _load_pickle(file))
        return self._pickle[1]


def _load_pickle(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch raises pickle, zip, runtime and key errors here
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{file}: cannot be read as plain tensors, and nothing else in it is executed: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: expected a mapping from names to tensors")
    return state


def _text(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
