from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_plasticity.errors import UserError
from megatron_plasticity.tracking.metrics import MetricLog, read_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def write_steps(path: Path, *steps: int, start_step: int = 0) -> None:
    with MetricLog(path, start_step) as log:
        for step in steps:
            log.write(step, {"train/loss": 10.0 - step})


def test_rows_come_back_in_order_with_their_time(path: Path) -> None:
    with MetricLog(path) as log:
        log.write(0, {"held_out/loss": 5.5})
        log.write(10, {"train/loss": 4.0, "train/tokens": 7})
    first, second = read_metrics(path)
    assert first == {"step": 0, "time": first["time"], "held_out/loss": 5.5}
    assert second == {"step": 10, "time": second["time"], "train/loss": 4.0, "train/tokens": 7}
    assert second["time"] >= first["time"] > 1.6e9


def test_every_row_is_on_disk_at_once(path: Path) -> None:
    with MetricLog(path) as log:
        log.write(1, {"a": 1.0})
        assert [row["step"] for row in read_metrics(path)] == [1]
        log.sync()


def test_numbers_of_numpy_and_torch_are_taken(path: Path) -> None:
    with MetricLog(path) as log:
        log.write(1, {"a": np.float32(0.5), "b": torch.tensor(2.0), "c": np.int64(3)})
    assert read_metrics(path)[0].items() >= {"a": 0.5, "b": 2.0, "c": 3.0}.items()


def test_what_is_not_finite_is_written_as_a_string_and_read_as_a_float(path: Path) -> None:
    with MetricLog(path) as log:
        log.write(1, {"a": math.nan, "b": math.inf, "c": torch.tensor(-math.inf)})
    raw = json.loads(path.read_text(), parse_constant=pytest.fail)  # strict JSON: other programs can read it
    assert (raw["a"], raw["b"], raw["c"]) == ("nan", "inf", "-inf")
    row = read_metrics(path)[0]
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_resuming_drops_what_will_be_measured_again(path: Path) -> None:
    write_steps(path, 0, 10, 20, 30)
    write_steps(path, 30, 40, start_step=20)
    assert [row["step"] for row in read_metrics(path)] == [0, 10, 20, 30, 40]


def test_starting_from_the_beginning_empties_the_file(path: Path) -> None:
    write_steps(path, 0, 10)
    write_steps(path, 0, 10)
    assert [row["step"] for row in read_metrics(path)] == [0, 10]


def test_resuming_drops_a_torn_line_wherever_it_was_cut(path: Path) -> None:
    write_steps(path, 10, 20)
    whole = path.read_bytes()
    first_line = whole.index(b"\n") + 1
    for cut in range(first_line + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert [row["step"] for row in read_metrics(path)] == [10]
        write_steps(path, 20, start_step=20)
        assert [row["step"] for row in read_metrics(path)] == [10, 20]
        assert path.read_bytes().endswith(b"\n")


def test_truncating_is_atomic(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_steps(path, 10, 20)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("killed here")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="killed here"):
        MetricLog(path, 10)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_file_that_needs_no_change_is_left_alone(path: Path) -> None:
    write_steps(path, 10, 20)
    inode = path.stat().st_ino
    MetricLog(path, 20).close()
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("line", ["{not json", "[1, 2]", '{"loss": 1.0}', '{"step": "ten"}'])
def test_a_damaged_line_is_named(path: Path, line: str) -> None:
    write_steps(path, 10)
    with path.open("a") as file:
        file.write(line + '\n{"step": 20, "time": 0.0}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: expected a row of metrics"):
        read_metrics(path)


def test_reserved_names_are_refused(path: Path) -> None:
    with MetricLog(path) as log, pytest.raises(ValueError, match="'step'"):
        log.write(1, {"step": 2.0})
    assert read_metrics(path) == []


def test_a_missing_file_has_no_rows(path: Path) -> None:
    assert read_metrics(path) == []
