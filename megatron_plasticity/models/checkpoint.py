"""The checkpoint folder: whole, named, layout-free tensors that a run of any layout, or no run at all, can read.

    step-400/
        model.json                   the architecture
        weights-00001.safetensors    fp32 master weights, by parameter name, cut into shards
        exp_avg-00001.safetensors    AdamW moments, the same way (absent where training will not go on)
        adapters-00001.safetensors   of a run with LoRA: the adapters, which the weights hold merged; the moments are then theirs
        trainer.json                 what training needs beside tensors
        COMPLETE                     size and SHA-256 of every file; without it the folder is not a checkpoint

The folder is written under a temporary name, synced and renamed, with the marker as its last file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_plasticity.config.files import atomic_folder, sha256_file
from megatron_plasticity.config.load import check_config
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.errors import CheckpointError
from megatron_plasticity.models.sizes import parameter_shapes
from megatron_plasticity.models.transformer import Transformer

MARKER = "COMPLETE"
MODEL_FILE = "model.json"
TRAINER_FILE = "trainer.json"
WEIGHTS = "weights"
ADAPTERS = "adapters"
SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class CheckpointFolder:
    """A complete checkpoint on disk. Get one from `open_checkpoint` or `latest_checkpoint`."""

    path: Path
    model: ModelConfig
    trainer: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.trainer["step"])

    def tensors(self, group: str = WEIGHTS, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Mapping[str, Tensor]:
        """The tensors of `weights`, `exp_avg`, `exp_avg_sq` or `adapters` by name, fp32, on the CPU, each read when looked up.

        Names and shapes are checked now: against `shapes`, or the architecture."""
        files: dict[str, Path] = {}
        stored: dict[str, tuple[int, ...]] = {}
        for file in sorted(self.path.glob(f"{group}-*.safetensors")):
            with open_safetensors(file) as shard:
                for name in shard.keys():  # noqa: SIM118  (not a dict)
                    files[name], stored[name] = file, tuple(shard.get_slice(name).get_shape())
        if not files:
            raise CheckpointError(
                f"{self.path}: holds no {group!r} tensors; training cannot go on from a checkpoint without them"
            )
        expected = parameter_shapes(self.model) if shapes is None else shapes
        wrong = sorted(name for name in {*stored, *expected} if stored.get(name) != expected.get(name))
        if wrong:
            origin = MODEL_FILE if shapes is None else "the config"
            raise CheckpointError(
                f"{self.path}: {group} do not fit {origin}: {', '.join(wrong[:5])}{' …' if len(wrong) > 5 else ''}"
            )
        return _StoredTensors(files)

    def build_model(self, device: torch.device) -> Transformer:
        """The model with these weights in fp32, for evaluation and analysis."""
        with torch.device("meta"):
            model = Transformer(self.model)
        model.load_state_dict(self.tensors(), assign=True)
        return model.to(device).eval()


class _StoredTensors(Mapping[str, Tensor]):
    """Tensors on disk by name. Nothing is kept: a process that needs a part of a large model never holds the whole of it."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        with open_safetensors(self._files[name]) as shard:
            return shard.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def save_checkpoint(
    path: Path, model: ModelConfig, trainer: dict[str, Any], groups: Mapping[str, Iterable[tuple[str, Tensor | None]]]
) -> None:
    """Write `groups` (name → pairs of parameter name and whole fp32 tensor, consumed one at a time) and what belongs to them.

    `trainer` must hold "step". An existing folder at `path` is replaced only once the new one is complete.
    """
    with atomic_folder(path) as folder:
        for group, tensors in groups.items():
            for number, shard in enumerate(_shards(tensors), start=1):
                save_file(shard, folder / f"{group}-{number:05d}.safetensors")
        (folder / MODEL_FILE).write_text(model.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / TRAINER_FILE).write_text(json.dumps(trainer, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in sorted(folder.iterdir())}
        (folder / MARKER).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")


def open_checkpoint(path: Path, verify: bool = True) -> CheckpointFolder:
    """The checkpoint at `path`: a checkpoint folder, or a run folder, whose latest one is taken.

    `verify` reads every file once to compare its hash. Raises CheckpointError for a missing, half-written or damaged checkpoint.
    """
    if (path / "checkpoints").is_dir():
        found = latest_checkpoint(path, verify)
        if found is None:
            raise CheckpointError(f"{path}: this run has no complete checkpoint yet; let it run, or name another run")
        return found
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint or run folder")
    if not (path / MARKER).is_file():
        raise CheckpointError(
            f"{path}: not a complete checkpoint (its {MARKER} marker is missing, so it was cut off while being written, "
            "or is no checkpoint); use an earlier step-N folder"
        )
    _check_files(path, verify)
    model = check_config(ModelConfig, _read_json(path / MODEL_FILE), str(path / MODEL_FILE))
    return CheckpointFolder(path, model, _read_json(path / TRAINER_FILE))


def latest_checkpoint(run: Path, verify: bool = True, damaged: list[str] | None = None) -> CheckpointFolder | None:
    """The intact checkpoint of a run folder with the highest step; None if there is none. Damaged ones are passed over, and why
    is added to `damaged`."""
    for path in sorted(_step_folders(run), key=_step_of, reverse=True):
        try:
            return open_checkpoint(path, verify)
        except CheckpointError as error:
            if damaged is not None:
                damaged.append(str(error))
    return None


def _step_folders(run: Path) -> Iterator[Path]:
    return (p for p in (run / "checkpoints").glob("step-*") if p.is_dir() and re.fullmatch(r"step-\d+", p.name))


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _shards(tensors: Iterable[tuple[str, Tensor | None]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        assert tensor is not None, "only the main process has whole tensors, and only it writes"
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().to("cpu", torch.float32).contiguous()
        size += tensor.nbytes
    if shard:
        yield shard


def _check_files(path: Path, verify: bool) -> None:
    files = _read_json(path / MARKER)
    if not {MODEL_FILE, TRAINER_FILE, f"{WEIGHTS}-00001.safetensors"} <= files.keys():
        raise CheckpointError(f"{path}: its {MARKER} marker does not list what a checkpoint has; use an earlier step-N folder")
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing; the checkpoint is damaged, use an earlier step-N folder")
        if not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
            raise CheckpointError(f"{path}: its {MARKER} marker is damaged at {name}; use an earlier step-N folder")
        if file.stat().st_size != facts["bytes"] or (verify and sha256_file(file) != facts["sha256"]):
            raise CheckpointError(
                f"{path}: {name} is not what was written (size or SHA-256 differs); use an earlier step-N folder"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def open_safetensors(file: Path) -> Any:
    """The file, opened for reading tensor by tensor. Raises CheckpointError, which names it."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None
