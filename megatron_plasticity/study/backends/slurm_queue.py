"""What Slurm's commands say of jobs: where each element of an array is, and how it ended."""

from __future__ import annotations

import getpass
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_plasticity.errors import UserError

_SECONDS = 60
# The controller is busy or restarting: the same command works later.
_PASSING = re.compile(r"timed out|Unable to contact|Connection refused|temporarily|try again|Zero Bytes were transmitted", re.I)
# More jobs than a user, an account or an array may have: fewer may be taken, or these later.
_FULL = re.compile(r"MaxSubmit|job submit limit|Invalid job array specification", re.I)
_ELEMENT = re.compile(r"(?P<job>\d+)_(?P<index>\d+)")

SUBMITTED_FILE = "slurm.json"
"""In the study's folder: what was submitted for it."""


@dataclass(frozen=True)
class Element:
    """One run in an array."""

    job: str
    index: int

    def __str__(self) -> str:
        return f"{self.job}_{self.index}"


@dataclass(frozen=True)
class InQueue:
    """An element that Slurm has not finished with."""

    state: str
    """Such as PENDING, RUNNING, REQUEUED."""
    where: str
    """Its nodes, or the reason why it waits."""


@dataclass(frozen=True)
class Finished:
    """An element that Slurm has finished with."""

    state: str
    """Such as COMPLETED, FAILED, TIMEOUT, OUT_OF_MEMORY, NODE_FAIL, CANCELLED."""
    exit_code: int
    """That of the batch script; negative: the signal that ended it."""


class SlurmIsAway(Exception):
    """The controller does not answer now; it will."""


class SlurmIsFull(Exception):
    """Slurm does not take so many jobs."""


@dataclass(frozen=True)
class SlurmQueue:
    """Slurm, as its command-line programs show it."""

    programs: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def find(cls) -> SlurmQueue:
        """Raises UserError if Slurm's programs are not on PATH."""
        found = {name: shutil.which(name) for name in ("sbatch", "squeue", "scancel", "sacct")}
        # sacct only says why a job ended; a cluster without accounting has none.
        if missing := [name for name in ("sbatch", "squeue", "scancel") if found[name] is None]:
            raise UserError(
                f"resources.backend=slurm needs {', '.join(missing)} on PATH: start the study on a login node of Slurm"
            )
        return cls({name: path for name, path in found.items() if path is not None})

    def submit(self, script: Path) -> str:
        """Number of the array job. Raises UserError with sbatch's own words, SlurmIsAway if it may work later, SlurmIsFull if it
        may work with fewer elements, or later."""
        return self._call("sbatch", "--parsable", str(script)).strip().partition(";")[0]

    def elements(self) -> dict[str, InQueue]:
        """What of this user is in the queue, as `JOB_INDEX`."""
        said = self._call("squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i|%T|%R")
        found = {}
        for line in said.splitlines():
            name, state, where = line.strip().split("|", 2)
            if _ELEMENT.fullmatch(name):
                found[name] = InQueue(state, where.strip("()"))
        return found

    def named(self, name: str) -> str | None:
        """Number of the array job with this name, if one is in the queue."""
        said = self._call("squeue", "--noheader", f"--user={getpass.getuser()}", f"--name={name}", "--format=%F")
        return next(iter(said.split()), None)

    def finished(self, jobs: Sequence[str]) -> dict[str, Finished]:
        """How elements of these jobs ended, as `JOB_INDEX`; nothing without Slurm's accounting."""
        if "sacct" not in self.programs or not jobs:
            return {}
        try:
            said = self._call(
                "sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(jobs)}", "--format=JobID,State,ExitCode"
            )
        except (UserError, SlurmIsAway):  # accounting is switched off, or its database is away
            return {}
        found = {}
        for line in said.splitlines():
            name, state, code = line.strip().split("|")
            if _ELEMENT.fullmatch(name):
                exit_code, _, signal = code.partition(":")
                found[name] = Finished(state.split()[0], -int(signal) if int(signal or 0) else int(exit_code))
        return found

    def cancel(self, elements: Sequence[str]) -> None:
        """End jobs or elements of them, as `JOB` or `JOB_INDEX`."""
        if elements:
            self._call("scancel", *elements)

    def _call(self, program: str, *arguments: str) -> str:
        try:
            ended = subprocess.run(
                [self.programs[program], *arguments], capture_output=True, text=True, timeout=_SECONDS, errors="replace"
            )
        except subprocess.TimeoutExpired:
            raise SlurmIsAway(f"{program} gave no answer in {_SECONDS} s") from None
        if ended.returncode == 0:
            return ended.stdout
        said = (ended.stderr.strip() or ended.stdout.strip() or f"exit code {ended.returncode}").splitlines()[-1]
        if _PASSING.search(said):
            raise SlurmIsAway(said)
        if program == "sbatch" and _FULL.search(ended.stderr):
            raise SlurmIsFull(said)
        raise UserError(f"{program} {' '.join(arguments)}: {said}")


def read_submitted(folder: Path) -> list[dict[str, Any]]:
    """The arrays that were submitted for the study in `folder` and may be in the queue: `number`, `name`, `job` (None if it was
    not noted in time), `kind`, and `folders`, the names of the run folders of its elements."""
    try:
        return list(json.loads((folder / SUBMITTED_FILE).read_text(encoding="utf-8"))["arrays"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / SUBMITTED_FILE}: cannot be read ({type(error).__name__}: {error}); see `squeue --me` for jobs of the "
            "study, cancel them, and delete the file"
        ) from None
