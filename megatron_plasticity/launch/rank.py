"""What a process does first when a launcher has started it, and last.

Under our own launch it takes the environment that its launch has left for it, and writes down where it runs and how it ends.
Under Slurm's `srun` it learns its rank from Slurm's variables.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from megatron_plasticity.errors import LostProcess, UserError, ending_the_process
from megatron_plasticity.launch.folder import LaunchFolder, RankRecord
from megatron_plasticity.launch.slurm import check_meeting_place, rank_environment
from megatron_plasticity.tracking.process import host_name, process_start

LAUNCH_FOLDER = "MEGATRON_PLASTICITY_LAUNCH"
"""Variable that names the folder of the launch that a rank belongs to."""


@contextmanager
def launched_rank(environment: MutableMapping[str, str], *, trains: bool = False) -> Iterator[None]:
    """Be a rank of whatever launched this process during the block; without a launcher nothing happens. `trains`: what is in the
    block may be one of several ranks of a run, which must meet.

    Ends the process if the launch was stopped before it got here, or has left nothing that can be read.
    """
    if trains:
        with ending_the_process():
            check_meeting_place(environment)
    environment.update(rank_environment(environment))
    # Taken out: what this process starts is no rank of the launch.
    path, rank = environment.pop(LAUNCH_FOLDER, None), environment.get("RANK")
    if path is None or rank is None:
        yield
        return
    folder = LaunchFolder(Path(path))
    with ending_the_process(f"error (rank {rank})"):
        environment.update(folder.environment())
    record = RankRecord(int(rank), host_name(), os.getpid(), process_start(os.getpid()))
    with suppress(OSError):  # a full disk is for the run to report
        folder.record(record)
        if len(folder.records()) >= int(environment.get("WORLD_SIZE", "0")) > 0:
            folder.forget_environment()  # all have read it; whoever launched may be gone
    if (number := folder.stop_signal) is not None:
        print(f"error (rank {rank}): stopped before it began", file=sys.stderr, flush=True)
        sys.exit(128 + number)
    code, because_of_another = 1, False
    try:
        yield
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        because_of_another = isinstance(ended.__context__, LostProcess)  # which cli.py has explained
        raise
    finally:
        with suppress(OSError, UserError):  # the exit code itself matters more
            folder.record(replace(record, exit_code=code, ended=time.time(), because_of_another=because_of_another))
