"""The command that starts a verb of ours on several processes under the deepspeed launcher."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_plasticity.errors import UserError


def deepspeed_command(verb: str, config: Path, processes: int, overrides: Sequence[str] = ()) -> list[str]:
    """`deepspeed --num_gpus N --module megatron_plasticity VERB CONFIG …`, for the processes of one machine.

    On a machine without GPUs set `DS_ACCELERATOR=cpu`: the launcher then counts slots instead of devices.
    """
    launcher = Path(sys.executable).with_name("deepspeed")
    found = str(launcher) if launcher.is_file() else shutil.which("deepspeed")
    if found is None:
        raise UserError(
            "the `deepspeed` launcher is not beside this Python nor on PATH; install the project with `pip install -e .`"
        )
    return [
        # The launcher's own shebang may name a Python of an environment that was moved.
        sys.executable, found, "--num_gpus", str(processes), "--master_port", str(_free_port()),
        "--module", "megatron_plasticity", verb, str(config), *overrides,
    ]  # fmt: skip


def _free_port() -> int:
    """A port that was free a moment ago; several jobs of one machine must not meet on the default one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
