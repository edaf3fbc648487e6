"""The manifest of a folder of activations: one JSON row per event, appended after what it speaks of is in place.

Rows, by their `event`: `model` (the first row: whose activations these are), `shard` (a whole file of states of a take),
`statistics` (a file of statistics of a take) and `complete` (the take of a step, all its files). A *take* is one recording of a
step; the last complete take of a step is the one in force.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_plasticity.config.files import fsync_folder
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.errors import UserError

ACTIVATIONS_FOLDER = "activations"
"""Folder inside a run folder that holds the run's activations."""
MANIFEST_FILE = "manifest.jsonl"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """Rows (sequences) `first_row` to `last_row`, exclusive, of one point's activations in one take of a step."""

    step: int
    take: int
    point: str
    file: str
    """Path relative to the folder."""
    first_row: int
    last_row: int
    shape: tuple[int, ...]
    """Shape of the shard's tensor; its first axis is sequences."""
    dtype: str
    """Number format, as torch names it without the `torch.`."""


@dataclass(frozen=True)
class StatisticsFile:
    """The statistics of one point in one take of a step."""

    step: int
    take: int
    point: str
    file: str
    """Path relative to the folder."""


@dataclass(frozen=True)
class Manifest:
    """What a folder holds that is whole."""

    identity: dict[str, Any]
    """What was recorded, as the writer was told."""
    shards: tuple[Shard, ...]
    statistics: tuple[StatisticsFile, ...]
    complete: dict[int, int]
    """Step → number of the take in force."""

    def last_takes(self) -> dict[int, int]:
        """Step → highest number of a take that was begun; the next take's must be higher, since rows of unfinished ones stay."""
        takes = dict(self.complete)
        for file in (*self.shards, *self.statistics):
            takes[file.step] = max(takes.get(file.step, 0), file.take)
        return takes

    def in_force(self, step: int) -> list[Shard]:
        """Shards of the take in force of a step, in the order of their rows within each point."""
        return [shard for shard in self.shards if (shard.step, shard.take) == (step, self.complete.get(step))]

    def statistics_in_force(self, step: int) -> dict[str, StatisticsFile]:
        """Point → its statistics in the take in force of a step."""
        return {file.point: file for file in self.statistics if (file.step, file.take) == (step, self.complete.get(step))}


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None if it has none; a last row that a kill cut short is no row. UserError if damaged."""
    path = folder / MANIFEST_FILE
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    lines = text[: text.rfind(b"\n") + 1].splitlines()
    if not lines:
        return None
    shards: list[Shard] = []
    statistics: list[StatisticsFile] = []
    complete: dict[int, int] = {}
    identity: dict[str, Any] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            event = row.pop("event")
            if (event == "model") != (number == 1):
                raise ValueError(f"unexpected event {event!r}")
            if event == "model":
                if row["format"] != FORMAT:
                    raise UserError(
                        f"{path}: has format {row['format']}, and this version reads {FORMAT}; record the activations again"
                    )
                identity = row["identity"]
            elif event == "shard":
                shards.append(Shard(**{**row, "shape": tuple(row["shape"])}))
            elif event == "statistics":
                statistics.append(StatisticsFile(**row))
            elif event == "complete":
                complete[int(row["step"])] = int(row["take"])
            else:
                raise ValueError(f"unknown event {event!r}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, row {number}: damaged ({error}); move the folder away and record again") from error
    return Manifest(identity, tuple(shards), tuple(statistics), complete)


def begin_manifest(folder: Path, identity: Mapping[str, Any]) -> Manifest:
    """Start a manifest, or continue the one that is there, which must be of exactly this model (UserError)."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(folder)
    path = folder / MANIFEST_FILE
    if path.exists():  # a last row that was cut short would run into the next one
        whole = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, whole)
    if manifest is None:
        append_row(folder, {"event": "model", "format": FORMAT, "identity": dict(identity)})
        return Manifest(dict(identity), (), (), {})
    check_identity(folder, manifest, dict.fromkeys(manifest.identity) | dict(identity))
    return manifest


def check_identity(folder: Path, manifest: Manifest, identity: Mapping[str, Any]) -> None:
    """Raise UserError, with what differs, unless the folder's activations are of a model of which these things are true."""
    mine = json.loads(json.dumps(dict(identity)))  # tuples become lists, as in the file
    keys = [key for key in mine if manifest.identity.get(key) != mine[key]]
    if keys:
        difference = "; ".join(f"{key}: {manifest.identity.get(key)!r} there, {mine[key]!r} here" for key in keys)
        raise UserError(f"{folder}: holds activations of another model ({difference}); choose another folder")


def append_shard(folder: Path, shard: Shard) -> None:
    append_row(folder, {"event": "shard", **asdict(shard)}, wait=False)


def append_statistics(folder: Path, file: StatisticsFile) -> None:
    append_row(folder, {"event": "statistics", **asdict(file)}, wait=False)


def append_complete(folder: Path, step: int, take: int) -> None:
    """The take of this step is the one in force; all its files must be on disk."""
    append_row(folder, {"event": "complete", "step": step, "take": take})


def append_row(folder: Path, row: Mapping[str, Any], wait: bool = True) -> None:
    """Append one row, and `wait` until it and all before it are on disk. A file's need not: only with its take does it count."""
    path = folder / MANIFEST_FILE
    is_new = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        if wait:
            os.fsync(file.fileno())
    if is_new:
        fsync_folder(folder)


def model_identity(run: str, model: ModelConfig, weight_decay: float | None) -> dict[str, Any]:
    """What makes a model this one and no other: the hash of its run, its architecture, its λ (None if it is not known)."""
    return {"run": run, "model": model.model_dump(), "weight_decay": weight_decay}


def identity_digest(identity: Mapping[str, Any]) -> str:
    """A short hash that every shard carries, so that a file from another folder is noticed."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:16]
