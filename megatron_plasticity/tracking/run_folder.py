"""The folder of one run: `<output>/<kind>-<name>-<hash>/`, with a resolved config, a state and results.

config.yaml     the resolved config; loads back to an equal section
inputs.json     name → hash of what the run reads (corpus, base model)
state.json      pending → running → done | failed | interrupted; the last two may run again
lock            held (flock) by the process that runs the folder; its text names that process
metrics.jsonl   see `tracking/metrics.py`
results.json    written once, when the run is done
checkpoints/step-N/, activations/, ledger.json, log
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from os import getpid
from pathlib import Path
from typing import Any

from megatron_plasticity.config.base import Section
from megatron_plasticity.config.files import write_json_atomic, write_text_atomic
from megatron_plasticity.config.hashing import KINDS, config_hash
from megatron_plasticity.config.load import load_config
from megatron_plasticity.errors import FolderHeld, Interrupted, UserError
from megatron_plasticity.tracking.disk import explain_disk_errors
from megatron_plasticity.tracking.lock import file_lock
from megatron_plasticity.tracking.plain_types import from_json, read_json_object, section_to_yaml, to_json
from megatron_plasticity.tracking.process import host_name, process_start
from megatron_plasticity.tracking.run_state import RunState, Status

__all__ = ["RunFolder", "RunState", "Status", "explain_disk_errors"]

SECONDS_BETWEEN_UPDATES = 1.0
# A process on another host cannot be looked at: it counts as gone when it has given no sign of life for so long.
SECONDS_UNTIL_FORGOTTEN = 600.0

_NAME = re.compile(r"(?P<kind>[a-z_]+)-(?P<name>.+)-(?P<hash>[0-9a-f]+)")


@dataclass(frozen=True)
class RunFolder:
    """One run on disk. Holds nothing but the path: every question is answered from the files."""

    path: Path

    @classmethod
    def create(cls, output: Path, kind: str, name: str, config: Section, inputs: Mapping[str, str]) -> RunFolder:
        """Make the folder of this run, or find it if an equal run was made before.

        Neutral fields of `config` may differ from the earlier ones: `config.yaml` then follows the new config, unless the run
        is done or is running now. Raises UserError if the folder cannot be written.
        """
        if not isinstance(config, KINDS.get(kind, Section)):
            raise ValueError(f"a run of kind {kind!r} is configured by {KINDS[kind].__name__}, not {type(config).__name__}")
        folder = cls(output / f"{kind}-{name}-{config_hash(config, **inputs)}")
        if not _NAME.fullmatch(folder.path.name):
            raise ValueError(f"{folder.path.name!r} is not <kind>-<name>-<hash>")
        with explain_disk_errors(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
            known = (folder.path / "state.json").exists()
            if not known or folder.state.status not in ("running", "done"):
                write_json_atomic(folder.path / "inputs.json", dict(inputs))
                write_text_atomic(folder.path / "config.yaml", section_to_yaml(config))
            if not known:
                folder._write(RunState())
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The run folder at `path`; UserError if there is none, with what is there instead."""
        if not path.is_dir():
            raise UserError(f"{path}: there is no such run folder{_hint(path)}")
        if not (path / "config.yaml").is_file() or not (path / "state.json").is_file():
            raise UserError(
                f"{path}: not a run folder, which has config.yaml and state.json, such as runs/pretrain-NAME-HASH{_hint(path)}"
            )
        if not _NAME.fullmatch(path.resolve().name):
            raise UserError(f"{path}: a run folder is called <kind>-<name>-<hash>; give this one its name back")
        return cls(path)

    @classmethod
    def containing(cls, path: Path) -> RunFolder:
        """The run folder that `path` is, or in which it lies, such as that of a checkpoint folder."""
        for candidate in (path, *path.absolute().parents):
            if (candidate / "config.yaml").is_file() and (candidate / "state.json").is_file():
                return cls.open(candidate)
        return cls.open(path)

    # What the run is

    @property
    def kind(self) -> str:
        return self._name_part("kind")

    @property
    def name(self) -> str:
        return self._name_part("name")

    @property
    def hash(self) -> str:
        return self._name_part("hash")

    @property
    def config(self) -> Section:
        """The resolved config. Raises ConfigError if someone edited it into something else."""
        return load_config(KINDS[self.kind], self.path / "config.yaml")

    @property
    def inputs(self) -> dict[str, str]:
        """Name → hash of what the run reads."""
        return read_json_object(self.path / "inputs.json")

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def checkpoints(self) -> list[Path]:
        """The folders `checkpoints/step-N`, earliest step first. Whether one is complete is for the training room to say."""
        found = [p for p in (self.path / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdecimal()]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    # What it is doing

    @property
    def state(self) -> RunState:
        """The state as it is now. A run whose process on this host is gone is `interrupted`, whatever the file says."""
        return RunState.read(self.path / "state.json")

    @property
    def is_done(self) -> bool:
        return self.state.status == "done"

    @property
    def results(self) -> dict[str, Any]:
        """`results.json` of a run that is done. Raises UserError for one that is not."""
        if not self.is_done:
            raise UserError(f"{self.path}: has no results yet, its state is {self.state.status!r}. Run it to the end first.")
        return from_json(read_json_object(self.path / "results.json"))

    @contextmanager
    def running(self) -> Iterator[RunFolder]:
        """Run this folder inside the block: lock it, mark it as running, and record how the block ended.

        The block ends with `mark_done`. An error marks the run as failed, Ctrl-C or `Interrupted` as interrupted.
        Raises UserError if another process runs it, or if it is done.
        """
        with self.lock():
            self.mark_running()
            try:
                yield self
                if not self.is_done:
                    raise RuntimeError(f"{self.path}: the run came to its end without results")
            except BaseException as error:
                # The error of the run matters more than one while noting it down. A state that stays "running" is
                # recognised later: its process will be gone.
                with suppress(OSError, UserError):
                    self.mark_failed(error)
                raise

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this folder for this process; FolderHeld naming host and process if another one has it.

        Where the file system has no locks, or does not share them between hosts, the heartbeat decides.
        """
        with file_lock(self.path / "lock"):
            self._refuse_a_live_foreign_host()
            yield

    def mark_running(self) -> None:
        """A new attempt by this process begins. Hold the lock, or use `running`, which does."""
        before = self.state
        if before.status == "done":
            raise UserError(f"{self.path}: is done already; delete the folder to run it again")
        now = time.time()
        self._write(
            RunState(
                status="running",
                host=host_name(),
                pid=getpid(),
                process_start=process_start(getpid()),
                started=now,
                heartbeat=now,
                attempts=before.attempts + 1,
            )
        )

    def mark_done(self, results: Mapping[str, Any]) -> None:
        """Write `results.json`, then the state: a folder that says it is done has its results.

        Numbers that are not finite become `{"float": "nan"}`, since JSON has no name for them; `results` gives floats back.
        """
        with explain_disk_errors(self.path):
            write_json_atomic(self.path / "results.json", to_json(results))
        self._write(replace(self.state, status="done", finished=time.time(), heartbeat=time.time(), error=None))

    def mark_failed(self, error: BaseException | str) -> None:
        """The attempt ended without results: `interrupted` if someone stopped it, else `failed`. What is done stays done."""
        stopped = isinstance(error, KeyboardInterrupt | Interrupted)
        text = error if isinstance(error, str) else _describe(error)
        if not self.is_done:
            self._write(replace(self.state, status="interrupted" if stopped else "failed", finished=time.time(), error=text))

    def revoke(self, error: BaseException | str) -> None:
        """A run that was done has turned out to be wrong: it counts as failed, and what reads it refuses it. Hold the lock."""
        self._write(replace(self.state, status="failed", error=error if isinstance(error, str) else _describe(error)))

    def update_progress(self, done: float, total: float, unit: str, **info: float | str) -> None:
        """A sign of life with the progress, written at most once a second (and when `done` reaches `total`).

        Does nothing if the run is not marked as running.
        """
        state = self.state
        now = time.time()
        recent = state.heartbeat is not None and 0 <= now - state.heartbeat < SECONDS_BETWEEN_UPDATES
        if state.status != "running" or (recent and state.progress is not None and done < total):
            return
        # Where this attempt, or this phase of it, began: what was done before tells nothing about its speed.
        before = state.progress or {}
        same_phase = (before.get("unit"), before.get("total")) == (unit, total)
        begin = (
            {"first_done": before["first_done"], "first_time": before["first_time"]}
            if same_phase
            else {"first_done": done, "first_time": now}
        )
        self._write(replace(state, heartbeat=now, progress={"done": done, "total": total, "unit": unit, **begin, **info}))

    def _write(self, state: RunState) -> None:
        state.write(self.path / "state.json")

    def _refuse_a_live_foreign_host(self) -> None:
        state = self.state
        silent_for = max(0.0, time.time() - (state.heartbeat or 0))  # the clock of the other host may be ahead
        if state.status == "running" and state.host != host_name() and silent_for < SECONDS_UNTIL_FORGOTTEN:
            raise FolderHeld(
                f"{self.path}: is being run by process {state.pid} on {state.host}, last heard of {silent_for:.0f} s ago. If "
                f"you know that it is gone, delete {self.path / 'state.json'}, or wait until it has been silent for "
                f"{SECONDS_UNTIL_FORGOTTEN:.0f} s."
            )

    def _name_part(self, part: str) -> str:
        match = _NAME.fullmatch(self.path.resolve().name)
        if match is None:
            raise UserError(f"{self.path}: a run folder is called <kind>-<name>-<hash>")
        return match[part]


def _hint(path: Path) -> str:
    for parent in path.absolute().parents:
        if (parent / "state.json").is_file():
            return f"; it lies in the run folder {parent}"
    within = path if path.is_dir() else path.parent
    runs = sorted(p.parent.name for p in within.glob("*/state.json")) if within.is_dir() else []
    near = difflib.get_close_matches(path.name, runs, n=1)
    if near:
        return f"; did you mean {within / near[0]}?"
    return f"; run folders in {within}: {', '.join(runs[:5])}{' …' if len(runs) > 5 else ''}" if runs else ""


def _describe(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
