"""The tool that kills `data prepare` and compares what it leaves: here without kills, with another number of workers only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools import load_tool

check_restart = load_tool("check_restart")


@pytest.mark.slow
def test_another_number_of_workers_leaves_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "first.txt"
    text.write_text("A document of its own.", encoding="utf-8")
    assert check_restart.main(["--megabytes", "1", "--kills", "0", "--text", str(text)]) == 0
    assert "are equal byte for byte" in capsys.readouterr().out


def test_a_difference_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for output, content in (("a", b"same"), ("b", b"other")):
        (tmp_path / output / "corpus-0").mkdir(parents=True)
        (tmp_path / output / "corpus-0" / "train.bin").write_bytes(content)
    assert check_restart.compare(tmp_path / "a", tmp_path / "b") == 1
    assert "NOT equal: train.bin" in capsys.readouterr().out
