"""`state.json` of a run folder: what the run is doing, and which process does it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from megatron_plasticity.config.files import write_json_atomic
from megatron_plasticity.tracking.disk import explain_disk_errors
from megatron_plasticity.tracking.plain_types import from_json, read_json_object, to_json
from megatron_plasticity.tracking.process import host_name, is_alive

Status = Literal["pending", "running", "done", "failed", "interrupted"]


@dataclass(frozen=True)
class RunState:
    """Times are Unix seconds. pending → running → done | failed | interrupted; the last two may run again."""

    status: Status = "pending"
    host: str | None = None
    pid: int | None = None
    process_start: int | None = None
    """When the kernel started that process, so that a later one with the same number is not taken for it."""
    started: float | None = None
    """Begin of the latest attempt."""
    heartbeat: float | None = None
    """Last sign of life."""
    finished: float | None = None
    """End of the latest attempt."""
    attempts: int = 0
    error: str | None = None
    """Why the latest attempt did not end well."""
    progress: dict[str, Any] | None = None
    """`done`, `total`, `unit` and what else the last update said."""

    @classmethod
    def read(cls, path: Path) -> RunState:
        """The state as it is now: a run whose process on this host is gone is `interrupted`, whatever the file says.

        Raises UserError if the file is missing or unreadable.
        """
        known = {field.name for field in fields(cls)}
        state = cls(**{key: from_json(value) for key, value in read_json_object(path).items() if key in known})
        if state.status == "running" and state.host == host_name() and not is_alive(state.pid, state.process_start):
            return replace(state, status="interrupted", error=f"process {state.pid} on {state.host} ended without a word")
        return state

    def write(self, path: Path) -> None:
        """Replace the file in one step. Raises UserError if the disk is full."""
        with explain_disk_errors(path.parent):
            write_json_atomic(path, to_json(asdict(self)))
