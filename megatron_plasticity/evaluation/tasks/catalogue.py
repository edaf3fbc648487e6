"""The task files that ship with the package, and the suites they make up."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from megatron_plasticity.config.load import load_config, read_yaml
from megatron_plasticity.config.task_files import TaskFile
from megatron_plasticity.errors import UserError

FILES = Path(__file__).resolve().parent / "files"
_SUITES = FILES / "suites.yaml"


def shipped_tasks() -> dict[str, Path]:
    """The file of each shipped task, by its name."""
    return {path.stem: path for path in sorted(FILES.glob("*.yaml")) if path != _SUITES}


def suites() -> dict[str, list[str]]:
    """The tasks of each suite, by its name."""
    return read_yaml(_SUITES)


def find_task_files(words: Sequence[str]) -> list[Path]:
    """The files that `words` ask for, each once: names of tasks, names of suites, and paths of task files of one's own.

    Raises UserError that names the nearest for a word that is none of these.
    """
    tasks, by_suite = shipped_tasks(), suites()
    found: dict[Path, None] = {}
    for word in words:
        if word in by_suite:
            found |= dict.fromkeys(tasks[name] for name in by_suite[word])
        elif word in tasks:
            found[tasks[word]] = None
        elif word.endswith((".yaml", ".yml")):
            found[Path(word)] = None
        else:
            near = difflib.get_close_matches(word, [*tasks, *by_suite], n=2)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(
                f"{word!r} is no task, suite or task file: {hint}the suites are {', '.join(by_suite)}, the tasks "
                f"{', '.join(tasks)}; a task file of your own ends in .yaml"
            )
    return list(found)


def load_task_file(path: Path) -> TaskFile:
    """Read and check a task file. Raises ConfigError that lists all problems."""
    return load_config(TaskFile, path)
