"""What a run has kept so far and can go on from, a line each: `python -m megatron_plasticity.launch.kept VERB CONFIG [K=V …]`.

A batch script asks before and after: a job that adds nothing must not be queued again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_plasticity.errors import ending_the_process
from megatron_plasticity.launch.job import LaunchedJob


def kept(folder: Path) -> list[str]:
    """Checkpoints of training and responses of an evaluation in a run folder, with the sizes of files, sorted."""
    found = [path.name for path in folder.glob("checkpoints/step-*")]
    return sorted([*found, *(f"{path.name} {path.stat().st_size}" for path in folder.glob("responses/*"))])


def main() -> None:
    verb, config, *overrides = sys.argv[1:]
    with ending_the_process():
        folder = LaunchedJob.load(verb, Path(config), overrides).earlier()  # type: ignore[arg-type]  # cli.py knows the verbs
    print(*(kept(folder.path) if folder is not None else ()), sep="\n")


if __name__ == "__main__":
    main()
