"""`metrics.jsonl`, the truth about what a run measured: one JSON object a line, `{"step": 10, "time": 1.7e9, "train/loss": 3.2}`.

JSON has no name for a float that is not finite, and a diverged run has some: they are written as the strings "nan", "inf" and
"-inf", and `read_metrics` gives floats back. Rows of one step may come in several lines with different metrics.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

from megatron_plasticity.config.files import write_text_atomic
from megatron_plasticity.errors import UserError

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_RESERVED = ("step", "time")


class MetricLog:
    """Appends rows to `metrics.jsonl`, each flushed at once, so that a killed run loses at most the line it was writing.

    `start_step` is the number of steps that are already in the weights: 0 for a run from the beginning, which empties the file,
    or the step N of the checkpoint that the run resumes from, which drops the rows with step > N (they will be measured again)
    and a torn last line. Therefore write the rows of step N before the checkpoint of step N. Not for several writers.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _keep_until(path, start_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Append one row. Values are numbers or anything that `float()` takes, such as a 0-d tensor."""
        for name in _RESERVED:
            if name in values:
                raise ValueError(f"a metric cannot be called {name!r}")
        row = {"step": int(step), "time": round(time.time(), 3)}
        row |= {name: _encode(value) for name, value in values.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until the rows are on the disk: before a checkpoint counts as written."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; twice is fine."""
        self._file.close()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics file in the order of writing; none if it does not exist yet.

    A last line without its line break is still being written, or was cut off by a kill, and is left out.
    Raises UserError for any other line that is not a row.
    """
    if not path.exists():
        return []
    return [parse_row(line, path, number) for number, line in enumerate(_whole_lines(path), start=1)]


def parse_row(line: str, path: Path, number: int) -> dict[str, Any]:
    """One line as a row with floats; `path` and the line `number` are for the message of the UserError."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise UserError(
            f"{path}, line {number}: expected a row of metrics such as "
            f'{{"step": 10, "time": 1.7e9, "train/loss": 3.2}}, found {line[:80]!r}. Delete the line to go on.'
        )
    return {name: _NON_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}


def _encode(value: SupportsFloat) -> int | float | str:
    if isinstance(value, int):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _whole_lines(path: Path) -> list[str]:
    # What follows the last line break is torn, or "" for a file that ends well.
    return path.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1]


def _keep_until(path: Path, step: int) -> None:
    if step == 0:
        kept = []
    else:
        lines = _whole_lines(path)
        kept = [line for number, line in enumerate(lines, start=1) if parse_row(line, path, number)["step"] <= step]
    text = "".join(line + "\n" for line in kept)
    if text.encode() != path.read_bytes():
        write_text_atomic(path, text)
