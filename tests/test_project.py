"""What pyproject.toml promises, and how the Makefile finds its interpreter."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import megatron_plasticity

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]

# Import name → name on the package index, where they differ.
DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "flash_attn": "flash-attn", "lm_eval": "lm-eval"}
# Found at run time if the machine has them; docs/install.md says how they get there.
NOT_ON_THE_INDEX = {"apex", "flash_attn_interface"}


def required_names(requirements: list[str]) -> set[str]:
    return {match[0].lower() for line in requirements if (match := re.match(r"[A-Za-z0-9._-]+", line))}


def imported_packages() -> set[str]:
    """Top-level names that the package imports anywhere, without ours and the standard library's."""
    names: set[str] = set()
    for path in (ROOT / "megatron_plasticity").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"megatron_plasticity"}


def test_every_import_is_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    declared = required_names(PROJECT["dependencies"] + extras["gpu"] + extras["data"] + extras["eval"] + extras["lora"])
    used = {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in imported_packages() - NOT_ON_THE_INDEX}
    assert used - declared == set()


def test_unrelated_apex_is_not_required() -> None:
    requirements = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    assert "apex" not in required_names(requirements)
    assert "torch" in required_names(PROJECT["dependencies"])


def test_version_comes_from_the_package() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert (ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]).samefile(megatron_plasticity.__file__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", megatron_plasticity.__version__)


def test_ignored_files_spare_the_code() -> None:
    """A bare `data/` in .gitignore would swallow megatron_plasticity/data, and with it the built package's."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    code = ["megatron_plasticity/data/order.py", "configs/runs/llama2-debug.yaml", "tests/data/test_order.py", "docs/config.md"]
    left_behind = [
        "data/some-corpus/train.bin",  # not of the quickstart, whose folder may be a link, behind which git does not look
        "runs/some-study/report.html",
        "mlflow.db",
        ".venv/bin/python",
        ".coverage.host.1",
    ]
    found = subprocess.run([git, "check-ignore", "--no-index", *code, *left_behind], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.split() == left_behind


# --- Makefile ---


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def make(*arguments: str, path: Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`make` with only the programs of the folder `path` and the system's own shell tools to be found."""
    tool = shutil.which("make")
    if tool is None:
        pytest.skip("needs make")
    path.mkdir(exist_ok=True)
    for program in ("bash", "sed", "expand", "touch"):
        found = shutil.which(program)
        assert found is not None
        (path / program).symlink_to(found)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = [tool, "--no-print-directory", "-f", str(ROOT / "Makefile"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment | {"PATH": str(path)}, capture_output=True, text=True, timeout=60)


def test_interpreter_that_does_not_start_is_passed_over(tmp_path: Path) -> None:
    bin_folder = tmp_path / "bin"
    executable(bin_folder / "python3.12", 'echo "pyenv: python3.12: command not found" >&2; exit 127')
    executable(bin_folder / "python3.11", "exit 1")  # starts, and says it is not usable
    executable(bin_folder / "python3", "exit 0")
    assert make("python", path=bin_folder).stdout.strip() == str(bin_folder / "python3")


def test_newest_usable_interpreter_is_taken(tmp_path: Path) -> None:
    bin_folder = tmp_path / "bin"
    for name in ("python3", "python3.11"):
        executable(bin_folder / name, f'exec "{sys.executable}" "$@"')
    assert make("python", path=bin_folder).stdout.strip() == str(bin_folder / "python3.11")


def test_without_an_interpreter_make_says_what_to_do(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    finished = make("environment", path=tmp_path / "bin", cwd=tmp_path)
    assert finished.returncode != 0
    assert "Python 3.11 or 3.12" in finished.stderr
    assert "make PYTHON=" in finished.stderr
    assert not (tmp_path / ".venv").exists()


def test_interpreter_that_a_person_names_is_checked(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    executable(tmp_path / "python3.9", "exit 1")
    finished = make("environment", f"PYTHON={tmp_path / 'python3.9'}", path=tmp_path / "bin", cwd=tmp_path)
    assert finished.returncode != 0
    assert "python3.9 cannot be used" in finished.stderr


def test_help_is_what_a_bare_make_shows(tmp_path: Path) -> None:
    finished = make(path=tmp_path / "bin")
    assert finished.returncode == 0
    for target in ("quickstart", "test", "lint", "docs", "clean"):
        assert re.search(rf"^  {target} +\S", finished.stdout, re.M), target


def test_torch_is_installed_first_and_pinned() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^TORCH \?= torch==\d+\.\d+\.\d+$", text, re.M)
    installs = [line for line in text.splitlines() if "-m pip install" in line]
    assert [line.endswith('"$(TORCH)"') for line in installs] == [True, False]
