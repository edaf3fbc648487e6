"""Responses on disk until an evaluation has ended, so that one that was stopped asks nothing twice.

A pass over a test set is one file. Responses depend on the settings and the weights, for which the run folder's hash stands, and
on the question; so a pass that is there is the one that would be asked again.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow
import pyarrow.parquet

from megatron_plasticity.evaluation.responses import Response
from megatron_plasticity.evaluation.samples import put_table

_FOLDER = "responses"
_CUT = b"conversations_cut"


class KeptResponses:
    """The finished passes of one evaluation, below its run folder."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder / _FOLDER

    def load(self, name: str) -> tuple[list[list[Response]], int] | None:
        """Responses [question][sample] of a pass, and how many rewarded conversations were cut; None if it is not there whole."""
        try:
            table = pyarrow.parquet.read_table(self._path(name))
            rows: list[list[Response]] = []
            for row in table.to_pylist():
                if row.pop("question") == len(rows):
                    rows.append([])
                rows[-1].append(Response(**row))
            return rows, int((table.schema.metadata or {})[_CUT])
        except (OSError, pyarrow.ArrowException, KeyError, ValueError, TypeError, IndexError):
            return None

    def save(self, name: str, responses: Sequence[Sequence[Response]], cut: int) -> None:
        """Write a finished pass, all or nothing."""
        self._folder.mkdir(exist_ok=True)
        schema = pyarrow.schema(
            [
                ("question", pyarrow.int64()),
                ("text", pyarrow.string()),
                ("tokens", pyarrow.int64()),
                ("finish", pyarrow.string()),
                ("reward", pyarrow.float64()),
            ],
            metadata={_CUT: str(cut)},
        )
        rows = [{"question": number, **asdict(response)} for number, row in enumerate(responses) for response in row]
        put_table(self._path(name), pyarrow.Table.from_pylist(rows, schema))

    def remove(self) -> None:
        """They stand in the table of samples now."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.parquet"
