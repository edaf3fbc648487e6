"""The tool that breaks training on purpose: its cheap scenarios are clean, and it says so when one is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.tools import TOOLS, load_tool


@pytest.mark.slow
def test_a_kill_in_each_phase_and_a_full_disk_change_nothing() -> None:
    command = [sys.executable, str(TOOLS / "chaos.py"), "--kills", "5", "--only", "kills", "full_disk"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    kills, disk = ended.stdout.splitlines()
    assert kills.startswith("kills ")
    assert "all equal" in kills
    assert "the disk is full" in disk or "skipped" in disk


def test_what_differs_is_named_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    chaos = load_tool("chaos")
    with pytest.raises(chaos.Broken, match="weights differs"):
        chaos.compare({"metrics": [], "weights": "a"}, {"metrics": [], "weights": "b"})
    with pytest.raises(chaos.Broken, match="ledger"):
        chaos.compare({"ledger.json": "a"}, {})

    def broken(tool: Any, undisturbed: Mapping[str, Any]) -> str:
        raise chaos.Broken("it was not equal")

    monkeypatch.setattr(chaos, "SCENARIOS", (broken,))
    monkeypatch.setattr(chaos.Chaos, "prepare", lambda self: None)
    monkeypatch.setattr(chaos.Chaos, "config", lambda self, name, **changes: None)
    monkeypatch.setattr(chaos.Chaos, "run", lambda self, *arguments, **keywords: [0])
    monkeypatch.setattr(chaos, "folder_of", lambda config: None)
    monkeypatch.setattr(chaos, "outcome", lambda folder: {})
    assert chaos.main([]) == 1
    assert "BROKEN" in capsys.readouterr().out
