"""The folder of one launch, shared by the machine that launches and those that run: logs, and what the two sides tell each other.

launch.json          which process launched it, where
command              the launcher's command, as it was started
launcher.log         what the launcher and its remote shells said
*_rankN.log          what rank N said
ranks/N.json         where rank N runs, and with what exit code it ended
environment.json     variables for the ranks, readable by its owner only; gone as soon as every rank has read it
stop                 a signal number: ranks that start after the launch was stopped end at once
"""

from __future__ import annotations

import json
import os
import stat
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_plasticity.config.files import write_json_atomic, write_text_atomic
from megatron_plasticity.errors import UserError
from megatron_plasticity.tracking.process import host_name, is_alive, process_start

_SECONDS_TO_START = 24 * 3600.0


@dataclass(frozen=True)
class RankRecord:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    process_start: int | None
    """As in `tracking/process.py`."""
    exit_code: int | None = None
    """None while it runs, and for one that was killed."""
    ended: float | None = None
    """Unix seconds."""
    because_of_another: bool = False
    """Whether it ended, with the other's exit code, because another rank had failed or was gone."""


@dataclass(frozen=True)
class LaunchFolder:
    path: Path

    @classmethod
    def create(cls, path: Path, environment: dict[str, str]) -> LaunchFolder:
        """Make the folder, with `environment` for its ranks. Raises UserError if it cannot keep that to its owner."""
        folder = cls(path)
        (path / "ranks").mkdir(parents=True)
        descriptor = os.open(folder._environment, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            # Before anything is written: some network file systems know no owners.
            if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
                folder._environment.unlink()
                raise UserError(
                    f"{path}: this file system cannot keep a file to its owner, and the ranks' environment may hold passwords; "
                    "name another shared folder with --logs"
                )
            json.dump(environment, file)
        return folder

    @property
    def _environment(self) -> Path:
        return self.path / "environment.json"

    def environment(self) -> dict[str, str]:
        """The variables for the ranks. Raises UserError if they are gone or somebody else wrote them."""
        try:
            with self._environment.open(encoding="utf-8") as file:
                if os.fstat(file.fileno()).st_uid != os.getuid():
                    raise UserError(f"{self._environment}: belongs to another user; this rank does not read it")
                return json.load(file)
        except OSError as error:
            raise UserError(
                f"{self._environment}: a rank on this machine cannot read it ({error.strerror}); the folder must be one that all "
                "machines of the launch share"
            ) from None

    def forget_environment(self) -> None:
        """Remove what may hold secrets."""
        self._environment.unlink(missing_ok=True)

    def record(self, record: RankRecord) -> None:
        write_json_atomic(self.path / "ranks" / f"{record.rank}.json", asdict(record))

    def records(self) -> list[RankRecord]:
        """Of the ranks that have started, by rank; without those that cannot be read just now, as happens on network file systems
        (ESTALE) while they are replaced."""
        found = []
        with suppress(OSError):
            for file in list((self.path / "ranks").glob("*.json")):
                with suppress(OSError, ValueError, TypeError):
                    found.append(RankRecord(**json.loads(file.read_text(encoding="utf-8"))))
        return sorted(found, key=lambda record: record.rank)

    def ask_to_stop(self, signal_number: int) -> None:
        """Let ranks that have not started yet end at once."""
        write_text_atomic(self.path / "stop", f"{signal_number}\n")

    @property
    def stop_signal(self) -> int | None:
        """The signal by which the launch was stopped."""
        with suppress(OSError):
            return int((self.path / "stop").read_text(encoding="utf-8"))
        return None

    def log_of(self, rank: int) -> Path | None:
        """The log of a rank, once it is there; DeepSpeed puts the time before its name."""
        with suppress(OSError):
            return next(iter(sorted(self.path.glob(f"*_rank{rank}.log"))), None)
        return None

    # --- Who launched it.

    def record_launcher(self) -> None:
        """Note that this process watches over the ranks."""
        write_json_atomic(
            self.path / "launch.json", {"host": host_name(), "pid": os.getpid(), "process_start": process_start(os.getpid())}
        )

    def launcher(self) -> tuple[str, int | None]:
        """The machine of the process that watches over the ranks, and its number if it runs on this machine and lives. Raises
        UserError if this is not the folder of a launch."""
        try:
            noted = json.loads((self.path / "launch.json").read_text(encoding="utf-8"))
            host, pid, started = noted["host"], int(noted["pid"]), noted["process_start"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.path}: not the folder of a launch, such as runs/launches/NAME-TIME-NUMBER, which `launch` prints when it "
                "starts"
            ) from None
        return host, pid if host == host_name() and is_alive(pid, started) else None


def sweep(launches: Path) -> None:
    """Remove the environments that launches under this folder have left behind: of those whose process is gone from this machine,
    and of those that are a day old, in which all ranks have started."""
    with suppress(OSError):
        for file in list(launches.glob("*/environment.json")):
            with suppress(OSError):
                folder, is_old = LaunchFolder(file.parent), time.time() - file.stat().st_mtime > _SECONDS_TO_START
                try:
                    host, pid = folder.launcher()
                    is_left = host == host_name() and pid is None
                except UserError:  # it has just been made
                    is_left = False
                if is_left or is_old:
                    folder.forget_environment()
