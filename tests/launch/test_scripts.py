"""The shell wrapper: what it starts, and what it says when it is used wrongly."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def call(repository: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of the script, beside which there is no environment, with a `deepspeed` that prints its arguments."""
    script = folder / "launch_scripts" / "deepspeed.sh"
    script.parent.mkdir(exist_ok=True)
    script.write_text((repository / "launch_scripts" / "deepspeed.sh").read_text())
    fake = folder / "bin" / "deepspeed"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    return subprocess.run(["bash", script, *arguments], env=environment, capture_output=True, text=True, timeout=30)


def test_it_starts_the_launcher(repository: Path, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=8\n")
    ended = call(repository, tmp_path, str(hostfile), "pretrain", "configs/x.yaml", "name=with space")
    assert ended.returncode == 0
    assert ended.stdout.splitlines() == [
        "--hostfile",
        str(hostfile),
        "--module",
        "megatron_plasticity",
        "pretrain",
        "configs/x.yaml",
        "name=with space",
    ]


def test_it_explains_itself(repository: Path, tmp_path: Path) -> None:
    ended = call(repository, tmp_path)
    assert ended.returncode == 2
    assert "HOSTFILE has lines" in ended.stderr
    missing = call(repository, tmp_path, "nowhere", "pretrain", "x.yaml")
    assert missing.returncode == 2
    assert "nowhere: no such hostfile" in missing.stderr
