"""The CPU training bench: what it says of rows that are missing, wrong or slow, and the command itself."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from typing import Any

import pytest

from tests.tools import TOOLS, load_tool

sys.path.insert(0, str(TOOLS / "bench"))  # as a script it finds its neighbours by itself
bench = load_tool("bench/train_cpu")
LOSSES = [4.2, 4.1]


def turn(rate: float = 1000.0, processor: float | None = None, losses: list[float] = LOSSES) -> Any:
    return bench.Turn(losses, rate, rate if processor is None else processor, rate * 0.9, rate * 1.1)


def judged(rows: dict[str, Any], problems: dict[str, str] | None = None, compiled: bool = True) -> tuple[str, bool]:
    turns = {name: found if isinstance(found, list) else [found] for name, found in rows.items()}
    lines, good = bench.judged(turns, problems or {}, "fp32", compiled)
    return "\n".join(lines), good


ALL = {
    "ours": turn(1200.0),
    "ours, compiled": turn(2000.0),
    "our model, bare loop": turn(1250.0),
    "transformers": turn(1000.0),
    "transformers, compiled": turn(1600.0),
    "litgpt": turn(1100.0),
    "litgpt, compiled": turn(1500.0),
}


def test_like_is_compared_with_like() -> None:
    text, good = judged(ALL)
    assert good
    assert "as written, by wall time: ours is 1.09 of the best of the others, litgpt, and 0.96 of our model alone" in text
    assert "compiled, by processor time: ours is 1.25 of the best of the others, transformers, compiled" in text
    # Compiled peers that are faster than ours as written say nothing of ours as written, nor the other way round.
    text, good = judged({**ALL, "ours, compiled": turn(1550.0)})
    assert not good
    assert "as written: as wanted" in text
    assert "compiled: NOT AS WANTED (at least 1 of the others, by both)" in text


def test_both_clocks_must_agree() -> None:
    text, good = judged({**ALL, "ours": turn(1200.0, processor=1000.0)})
    assert not good
    assert "as written, by processor time: ours is 0.91" in text


def test_the_best_turn_counts() -> None:
    assert judged({**ALL, "ours": [turn(900.0), turn(1200.0)]})[1]
    assert not judged({**ALL, "litgpt": [turn(900.0), turn(1300.0)]})[1]


@pytest.mark.parametrize("missing", ALL)
def test_any_row_may_be_missing(missing: str) -> None:
    text, good = judged({name: found for name, found in ALL.items() if name != missing}, {missing: "no compiler"})
    assert f"not measured: {missing}: no compiler" in text
    assert good == (not missing.startswith("ours"))
    assert ("as written: as wanted" in text) == (missing != "ours")
    assert ("compiled: as wanted" in text) == (missing != "ours, compiled")


def test_without_any_peer_nothing_is_as_wanted() -> None:
    text, good = judged({"ours": turn()}, {"transformers": "not here", "litgpt": "not here"}, compiled=False)
    assert not good
    assert text.splitlines()[-1] == "as written: NOT AS WANTED (no valid row of the others)"
    assert not judged({}, {"ours": "failed"})[1]


@pytest.mark.parametrize("losses", [[4.2, 4.1003], [4.2, math.nan]])
def test_other_losses_do_not_count_in_any_turn(losses: list[float]) -> None:
    text, good = judged({**ALL, "litgpt": [turn(1100.0), turn(9000.0, losses=losses)]})
    assert not good
    assert "INVALID: the losses of litgpt are off by " in text
    assert "ours is 1.20 of the best of the others, transformers," in text


def test_a_candidate_that_failed_is_left_out_and_no_other(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[str] = []

    def measured(name: str, arguments: argparse.Namespace) -> Any:
        asked.append(name)
        return "no compiler" if name == "ours, compiled" else turn()

    monkeypatch.setattr(bench, "measured", measured)
    assert bench.compare(argparse.Namespace(turns=2, precision="fp32", no_compile=False)) == 1
    others = [name for name in bench.CANDIDATES if name != "ours, compiled"]
    assert asked == [*bench.CANDIDATES, *reversed(others)]
    assert "not measured: ours, compiled: no compiler" in capsys.readouterr().out


TINY = "--layers 1 --hidden-size 32 --vocab-size 64 --length 16 --batch 2 --micro-batch 2 --warm-up 1 --steps 2 --turns 1"
EXACT = ["--threads=1", "--no-compile", "--precision=bf16"]


@pytest.mark.full
@pytest.mark.distributed
def test_the_command() -> None:
    command = [
        sys.executable,
        str(TOOLS / "bench/train_cpu.py"),
        *TINY.split(),
        "--threads=1",
        "--no-compile",
        "--precision=bf16",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert ended.stderr == ""
    assert ended.returncode in (0, 1)  # what is faster at this size is not the point
    for name in ("ours", "our model, bare loop", "transformers"):
        assert any(line.startswith(f"{name:22}") and "tokens/s (" in line for line in ended.stdout.splitlines()), ended.stdout
    assert "INVALID" not in ended.stdout
    assert "as written, by processor time: ours is " in ended.stdout
    assert ", compiled" not in ended.stdout
