"""The house keeps its shape: imports go down the list of rooms, and what has to be light is light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_plasticity"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the top of the house to its ground; a room imports from itself and from rooms below it.
ROOMS = (
    "__main__",
    "cli",
    "verbs",
    "study",
    "launch",
    "training",
    "evaluation",
    "analysis",
    "capture",
    "interchange",
    "tracking",
    "optim",
    "data",
    "models",
    "parallel",
    "config",
    "errors",
    "__init__",
)
HEAVY = (
    "torch",
    "transformers",
    "deepspeed",
    "datasets",
    "mlflow",
    "matplotlib",
    "sklearn",
    "scipy",
    "pandas",
    "numpy",
    "tokenizers",
)
# Packages that take seconds to import; they are imported inside the functions that need them.
SLOW = ("transformers", "deepspeed", "mlflow")
# A whole process of `--help`, in seconds of CPU time: on a quiet machine no more than half a second goes by.
HELP_SECONDS = 0.5

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())


def room_of(module: str) -> str:
    """The room of `megatron_plasticity.data.order` is `data`; that of the package itself is `__init__`."""
    return [*module.split("."), "__init__"][1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of the modules that `tree` imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            module = node.module or ""
            # `from megatron_plasticity import data` imports the room, not just a name of the package.
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == PACKAGE.name else (module,)


def imported_at_start(tree: ast.Module) -> Iterator[str]:
    """As `imports`, but only what runs when the module is imported: not in functions, not for type checkers."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield from imports(node)


@each_module
def test_imports_go_down_the_house(path: Path) -> None:
    own = room_of(module_name(path))
    assert own in ROOMS, f"{own} is not a room: give it a place in ROOMS and in docs/architecture.md"
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if name.split(".")[0] != PACKAGE.name:
            continue
        room = room_of(name) if room_of(name) in ROOMS else "__init__"  # a name such as __version__
        assert ROOMS.index(room) >= ROOMS.index(own), f"{own} imports from {room}, which lies above it"


@each_module
def test_slow_packages_are_imported_where_they_are_used(path: Path) -> None:
    started = {name.split(".")[0] for name in imported_at_start(ast.parse(path.read_text(encoding="utf-8")))}
    # The fork server's preload exists to pay for such imports once, before the ranks are forked.
    assert started & set(SLOW) == set() or module_name(path) == "megatron_plasticity.launch.preload"


def loaded_by(code: str) -> set[str]:
    """Names of the top-level packages that a fresh interpreter has loaded after `code`."""
    script = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=plain_environment(), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return set(finished.stdout.split())


def plain_environment() -> dict[str, str]:
    """Ours without coverage, whose measuring of child processes would be measured too."""
    return {key: value for key, value in os.environ.items() if not key.startswith("COV")}


def test_config_needs_no_heavy_package() -> None:
    names = [module_name(path) for path in MODULES if room_of(module_name(path)) in ("config", "errors", "__init__")]
    assert "megatron_plasticity.config.load" in names
    assert loaded_by("import " + ", ".join(names)) & set(HEAVY) == set()


def test_cli_needs_no_heavy_package() -> None:
    assert loaded_by("import megatron_plasticity.cli") & set(HEAVY) == set()


def test_help_is_light_and_quick() -> None:
    """Loads no heavy package and takes less than half a second of CPU time, best of three (a busy machine is not our fault)."""
    seconds = []
    for _ in range(3):
        command = [sys.executable, "-X", "importtime", "-m", "megatron_plasticity", "--help"]
        before = os.times()
        finished = subprocess.run(command, cwd=ROOT, env=plain_environment(), capture_output=True, text=True)
        after = os.times()
        assert finished.returncode == 0, finished.stderr
        assert "usage" in finished.stdout.lower()
        loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in finished.stderr.splitlines() if "|" in line}
        assert "argparse" in loaded or "typer" in loaded, "the import log could not be read"
        assert loaded & set(HEAVY) == set()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < HELP_SECONDS
