"""How much of `metrics.jsonl` an MLflow run has got: the file `mlflow.json` in the run folder, and what follows from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_plasticity.config.files import write_json_atomic
from megatron_plasticity.tracking.metrics import parse_row
from megatron_plasticity.tracking.mlflow_content import allowed_name

CURSOR_FILE = "mlflow.json"
_TAIL_BYTES = 4096


class Measurement(NamedTuple):
    """One number of one metric; the time in Unix seconds."""

    name: str
    value: float
    time: float
    step: int


@dataclass
class Cursor:
    """What has been sent. `steps` alone decides what is new; `bytes` and `tail` spare parsing the whole file each time."""

    run_id: str
    steps: dict[str, int] = field(default_factory=dict)
    """Metric → last step sent. Steps of one metric grow along the file, so that what is not beyond it was sent before."""
    bytes: int = 0
    """How far `metrics.jsonl` was read."""
    tail: str = ""
    """Hash of the last bytes before `bytes`; another one means that a resumed run has rewritten the file."""
    sending: bool = False
    """Numbers were on their way when this was written: whether they arrived, only the server knows."""

    @classmethod
    def read(cls, folder: Path) -> Cursor | None:
        """The cursor of a run folder; None if there is none, or it cannot be understood."""
        try:
            return cls(**json.loads((folder / CURSOR_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        write_json_atomic(folder / CURSOR_FILE, asdict(self))

    def take_new(self, path: Path) -> list[Measurement]:
        """What the whole lines of the metrics file `path` say beyond this cursor, which moves on over it."""
        if not path.exists():
            return []
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        begin = self.bytes if _tail(whole, self.bytes) == self.tail else 0
        first_line = whole.count(b"\n", 0, begin) + 1
        lines = whole[begin:].decode("utf-8", errors="replace").split("\n")[:-1]
        rows = [parse_row(line, path, number) for number, line in enumerate(lines, start=first_line)]
        self.bytes, self.tail = len(whole), _tail(whole, len(whole))
        return self.take(
            Measurement(allowed_name(name), value, float(row.get("time", 0.0)), row["step"])
            for row in rows
            for name, value in row.items()
            if name not in ("step", "time") and _is_number(value)
        )

    def take(self, measurements: Iterable[Measurement]) -> list[Measurement]:
        """Those of `measurements` that are beyond this cursor, which moves on over them."""
        new = []
        for measurement in measurements:
            if measurement.step > self.steps.get(measurement.name, -1):
                self.steps[measurement.name] = measurement.step
                new.append(measurement)
        return new


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tail(content: bytes, end: int) -> str:
    """Hash of the last bytes of `content` before `end`; empty where there are not so many bytes."""
    if not 0 < end <= len(content):
        return ""
    return hashlib.sha256(content[max(0, end - _TAIL_BYTES) : end]).hexdigest()[:16]
