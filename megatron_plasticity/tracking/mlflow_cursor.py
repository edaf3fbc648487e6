"""How much of a run folder's metrics an MLflow run has got: the file `mlflow.json` in the folder, and what follows from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_plasticity.config.files import write_json_atomic
from megatron_plasticity.tracking.metrics import parse_row
from megatron_plasticity.tracking.mlflow_content import allowed_name
from megatron_plasticity.tracking.system_metrics import FILES

CURSOR_FILE = "mlflow.json"
_TAIL_BYTES = 4096

KnownSteps = Mapping[str, Set[int]]
"""Metric → the steps of it that a store has."""


class Measurement(NamedTuple):
    """One number of one metric; the time in Unix seconds."""

    name: str
    value: float
    time: float
    step: int


@dataclass(frozen=True)
class Position:
    """A place in a file of metrics, behind a whole line."""

    bytes: int = 0
    lines: int = 0
    tail: str = ""
    """Hash of the last bytes before it; another one means that a resumed run has rewritten the file."""


@dataclass
class Cursor:
    """What has been sent. `steps` alone decides what is new; `positions` spare reading whole files each time."""

    run_id: str
    steps: dict[str, int] = field(default_factory=dict)
    """Metric → last step sent. Steps of one metric grow along its file, so that what is not beyond it was sent before."""
    positions: dict[str, Position] = field(default_factory=dict)
    """Name of a file → how far it was read."""
    sending: bool = False
    """Numbers were on their way when this was written: whether they arrived, only the server knows."""
    doubtful: bool = False
    """The server did not answer when a run was to be made: it may make another one for this folder, and later than we ask."""

    @classmethod
    def read(cls, folder: Path) -> Cursor | None:
        """The cursor of a run folder; None if there is none, or it cannot be understood."""
        try:
            tree = json.loads((folder / CURSOR_FILE).read_text(encoding="utf-8"))
            return cls(**{**tree, "positions": {name: Position(**place) for name, place in tree["positions"].items()}})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def write(self, folder: Path) -> None:
        write_json_atomic(folder / CURSOR_FILE, asdict(self))

    def goes_on(self, folder: Path) -> bool:
        """Whether the files of metrics still begin with what was read of them: a resumed run may have rewritten them, and only
        the store knows then what it has of their steps."""
        return all(_tail(folder / name, place.bytes) == place.tail for name, place in self.positions.items())

    def take_new(self, folder: Path, known: KnownSteps | None = None) -> list[Measurement]:
        """What the whole lines of the files of metrics say beyond this cursor, which moves on over it; `known` is left out.

        Raises UserError for a line that is not a row.
        """
        new: list[Measurement] = []
        for path in sorted([folder / "metrics.jsonl", *folder.glob(FILES)]):
            if path.is_file():
                new += self.take(self._measurements(path), known)
        return new

    def take(self, measurements: Iterable[Measurement], known: KnownSteps | None = None) -> list[Measurement]:
        """Those of `measurements` that are beyond this cursor, which moves on over them, and not `known`."""
        new = []
        for measurement in measurements:
            if measurement.step > self.steps.get(measurement.name, -1):
                self.steps[measurement.name] = measurement.step
                if measurement.step not in (known or {}).get(measurement.name, ()):
                    new.append(measurement)
        return new

    def _measurements(self, path: Path) -> list[Measurement]:
        begin = self.positions.get(path.name, Position())
        with path.open("rb") as file:
            file.seek(begin.bytes)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        lines = content.decode("utf-8", errors="replace").split("\n")[:-1]
        rows = [parse_row(line, path, number) for number, line in enumerate(lines, start=begin.lines + 1)]
        if lines:
            end = begin.bytes + len(content)
            self.positions[path.name] = Position(end, begin.lines + len(lines), _tail(path, end))
        return [
            Measurement(allowed_name(name), value, float(row.get("time", 0.0)), row["step"])
            for row in rows
            for name, value in row.items()
            if name not in ("step", "time") and _is_number(value)
        ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tail(path: Path, end: int) -> str:
    """Hash of the last bytes of a file before `end`; empty where there are not so many bytes."""
    begin = max(0, end - _TAIL_BYTES)
    try:
        with path.open("rb") as file:
            file.seek(begin)
            content = file.read(end - begin)
    except OSError:
        return ""
    return hashlib.sha256(content).hexdigest()[:16] if len(content) == end - begin else ""
