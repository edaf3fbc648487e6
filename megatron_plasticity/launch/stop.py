"""Stops a launch: `python -m megatron_plasticity.launch.stop FOLDER`, on the machine where `launch` runs, or if that is gone on a
machine of its ranks. They save and end, as after Ctrl-C.

With `--ranks NUMBER` it sends a signal to the ranks of this machine alone, which is how `launch` reaches them.
"""

from __future__ import annotations

import argparse
import os
import signal
from contextlib import suppress
from pathlib import Path

from megatron_plasticity.errors import UserError, ending_the_process
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


def stop(folder: LaunchFolder) -> str:
    """Tell a launch to save and stop; returns what was done. Raises UserError if nothing of it can be reached from here."""
    host, pid = folder.launcher()
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        return f"process {pid}, which watches over the ranks, was told; it lets every rank save and stop"
    left = [record for record in folder.records() if record.exit_code is None]
    if reached := signal_ranks(folder, signal.SIGTERM):
        # Ranks agree among themselves to stop.
        return f"rank {', '.join(map(str, reached))} was told; all ranks of the run save and stop"
    elsewhere = sorted({record.host for record in left if record.host != host_name()})
    if host != host_name():
        elsewhere = list(dict.fromkeys([host, *elsewhere]))
    if elsewhere:
        raise UserError(f"{folder.path}: nothing of it lives on this machine; try the same command on {' or '.join(elsewhere)}")
    return "nothing of it runs any more"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_plasticity.launch.stop", description="Let the run of a launch save and stop."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of logs that `launch` printed")
    parser.add_argument("--ranks", type=int, metavar="NUMBER", help="send this signal to the ranks of this machine alone")
    arguments = parser.parse_args()
    folder = LaunchFolder(arguments.folder)
    if arguments.ranks is not None:
        print(*signal_ranks(folder, arguments.ranks))
        return
    with ending_the_process():
        print(stop(folder))


if __name__ == "__main__":
    main()
