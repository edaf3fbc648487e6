"""Where the runs of a study are carried out. The runner knows what is here; each back end is one module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_plasticity.errors import UserError

if TYPE_CHECKING:  # a plan imports much, and the processes that only pass a command on need nothing of it
    from megatron_plasticity.study.plan import PlannedCell

# Long enough to write a checkpoint of any model that runs on one machine.
SECONDS_TO_STOP = 120.0
# Whoever waits for one that waits is more patient than that one, which would otherwise be killed before it has ended its own.
SECONDS_TO_STOP_REMOTELY = SECONDS_TO_STOP + 30
SECONDS_TO_STOP_ALL = SECONDS_TO_STOP_REMOTELY + 30


@dataclass(frozen=True)
class Ended:
    """How an attempt at a run ended, as far as its back end can tell; the run folder says the rest."""

    exit_code: int | None
    """Negative: the number of the signal that ended it. None: the back end does not know."""
    reason: str | None = None
    """What the back end knows of the end, such as that Slurm's time was up."""
    lost: bool = False
    """Machine or connection went away, which says nothing about the run."""
    cancelled: bool = False
    """A person ended it on purpose: it is not tried again."""


class Job(Protocol):
    """One attempt at one run."""

    cell: PlannedCell

    @property
    def where(self) -> str:
        """Machine, or place in a queue, for a person."""
        ...

    @property
    def is_active(self) -> bool:
        """Whether it has left the queue, so that signs of life can be expected."""
        ...

    def ended(self) -> Ended | None:
        """How it ended; None while it is under way. Returns at once."""
        ...

    def stop(self) -> None:
        """Ask it to save and to end. Returns at once."""
        ...

    def kill(self) -> None:
        """End it without asking."""
        ...


class Backend(Protocol):
    """A place for runs. Errors that concern all runs alike are raised as UserError."""

    outlives_runner: bool
    """Whether jobs go on when the runner ends, to be adopted by the next one."""

    def check(self, folder: Path) -> None:
        """Whether runs with folders under `folder`, which exists, can be started. Raises UserError with all problems."""
        ...

    def adopt(self, cells: Sequence[PlannedCell]) -> list[Job]:
        """Those of these cells that an earlier runner started and that are still under way."""
        ...

    def free(self) -> int:
        """How many more runs can be started now."""
        ...

    def start(self, cells: Sequence[PlannedCell]) -> list[Job]:
        """Start these runs, at most `free()`, whose folders exist; what could not be started now is not in the answer."""
        ...

    def wait(self, jobs: Sequence[Job], seconds: float) -> None:
        """Return when something may have happened to one of the jobs, after `seconds` at the latest."""
        ...

    def farewell(self, jobs: Sequence[Job]) -> str:
        """What a person should know of jobs that go on after the runner; empty if none do."""
        ...


def refuse(where: str, problems: Sequence[str]) -> None:
    """Raise UserError with all problems, if there are any."""
    if problems:
        raise UserError("\n  ".join([where, *problems]))
