"""Machines for studies in tests: an `ssh` that runs the command here, and a Slurm that does so in a queue."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_plasticity.config.load import check_config, merge
from megatron_plasticity.config.study import StudyConfig
from tests.study.small import small_tree

STAND_IN = Path(__file__).with_name("stand_in")
FAKE_SLURM = Path(__file__).with_name("fake_slurm.py")
NOTHING = {"probes": None, "attention": None, "overfitting": None, "features": None, "truncation": None}

# Takes options as ssh does, then a host and one line for its shell.
_SSH = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
while words and words[0].startswith("-"):
    words = words[2:] if words[0] == "-o" else words[1:]
host, line = words[0], " ".join(words[1:])
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
if os.path.exists(os.path.join({folder!r}, host + ".away")):
    sys.stderr.write("ssh: connect to host " + host + " port 22: No route to host\\n")
    sys.exit(255)
if os.path.exists(os.path.join({folder!r}, host + ".blind")):
    line = "sed s/seen-by-all/not-seen/ | (" + line + ")"
if os.path.exists(os.path.join({folder!r}, host + ".old")):
    line = "(" + line + ") | sed 's/torch.: ./&old-/'"
os.environ["FAKE_HOST"] = host
os.execv("/bin/sh", ["sh", "-c", line])
"""


def counting_study(folder: Path, corpus: Path, changes: dict[str, Any] | None = None) -> StudyConfig:
    """A study of pretraining runs alone, of a corpus that is prepared; each run counts to ten (`stand_in/runs.py`)."""
    tree = small_tree(folder, {"corpus": None, "analyses": NOTHING, "tasks": []})
    tree = merge(tree, {"base": {"data": {"folder": str(corpus)}}, "resources": {"retry_seconds": 0.05}})
    return check_config(StudyConfig, merge(tree, changes or {}), "counting study")


def stand_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runs of studies count to ten."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_IN), str(Path.cwd())]))


def fake_ssh(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put an `ssh` on PATH for which every name is this machine; the calls of it are written to the file returned. A machine
    NAME is away while there is a file `NAME.away` in `folder`, does not see shared files while there is one `NAME.blind`,
    and has an old torch while there is one `NAME.old`."""
    log = folder / "ssh.log"
    log.touch()
    _program(folder / "bin" / "ssh", _SSH.format(python=sys.executable, log=str(log), folder=str(folder)))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return log


@contextmanager
def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put Slurm's programs on PATH; its state is in the folder that is given, and no job outlives the block."""
    state = folder / "slurm-state"
    (state / "jobs").mkdir(parents=True)
    for name in ("sbatch", "squeue", "sacct", "scancel", "scontrol", "srun"):
        _program(folder / "bin" / name, f'#!/bin/sh\nexec {sys.executable} {FAKE_SLURM} {name} "$@"\n')
    monkeypatch.setenv("FAKE_SLURM", str(state))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    yield state
    (state / "away").unlink(missing_ok=True)
    subprocess.run([folder / "bin/scancel", *(path.stem for path in (state / "jobs").glob("*.json"))], check=True)


def _program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
