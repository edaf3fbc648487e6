"""A study from its folder: to run again what failed, and to take its jobs out of a queue."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_plasticity.config.load import check_config
from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.errors import FolderHeld, UserError
from megatron_plasticity.study.claim import wait_for_a_silent_runner
from megatron_plasticity.study.recipes import study_folder
from megatron_plasticity.study.status import CellStatus, read_status


def config_of(folder: Path) -> StudyConfig:
    """The study that was last run in `folder`. Raises UserError if there is none, or if its folder is another one from here."""
    read_status(folder)  # says what is wrong with a folder that is no study's
    path = folder / "study.json"
    config = check_config(StudyConfig, json.loads(path.read_text(encoding="utf-8"))["config"], str(path))
    if study_folder(config).resolve() != folder.resolve():
        raise UserError(
            f"{folder}: its runs lie in {study_folder(config)}, as seen from where the study was started; go to that folder first"
        )
    return config


def cells_to_retry(folder: Path, named: Sequence[str]) -> list[str]:
    """The runs that failed, or those that are named. Raises UserError, with all problems, for a name that is none, and for a run
    that is done."""
    cells = {cell.id: cell for cell in read_status(folder).cells}
    problems = []
    for name in named:
        if name not in cells:
            near = difflib.get_close_matches(name, cells, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see `megatron-plasticity study status {folder} --all`"
            problems.append(f"{name}: there is no such run; {hint}")
        elif cells[name].status == "done":
            problems.append(f"{name}: is done; to have it done again, move {cells[name].folder} away")
        elif (root := _failed_root(cells, name)) not in (None, *named):
            problems.append(f"{name}: it needs {root}, which failed; retry that, and this one follows")
    if problems:
        raise UserError("\n  ".join([f"{folder}: these runs cannot be tried again", *problems]))
    return list(named) or [cell.id for cell in cells.values() if cell.status == "failed"]


def _failed_root(cells: Mapping[str, CellStatus], name: str) -> str | None:
    """The failed run because of which this one cannot be started, if that is so."""
    if cells[name].status != "blocked":
        return None
    while cells[name].status == "blocked" and (needed := cells[name].needs) is not None:
        name = needed
    return name


def cancel(folder: Path) -> list[str]:
    """Take the study's jobs out of Slurm's queue; returns what was there. Raises FolderHeld if its runner is still at it."""
    from megatron_plasticity.study.backends.slurm import cancel_submitted

    read_status(folder)
    try:
        wait_for_a_silent_runner(folder, print)
    except FolderHeld as error:
        raise FolderHeld(f"{error} It would submit anew what is cancelled.") from None
    return list(cancel_submitted(folder))
