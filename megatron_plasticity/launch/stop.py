"""Sends a signal to the ranks of a launch that run on this machine: `python -m megatron_plasticity.launch.stop FOLDER SIGNAL`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from megatron_plasticity.launch.folder import LaunchFolder
from megatron_plasticity.tracking.process import host_name, is_alive


def signal_ranks(folder: LaunchFolder, number: int) -> list[int]:
    """Signal every rank that lives on this machine; returns which."""
    reached = []
    for record in folder.records():
        if record.host == host_name() and record.exit_code is None and is_alive(record.pid, record.process_start):
            with suppress(ProcessLookupError):
                os.kill(record.pid, number)
                reached.append(record.rank)
    return reached


if __name__ == "__main__":
    print(*signal_ranks(LaunchFolder(Path(sys.argv[1])), int(sys.argv[2])))
