"""Commands that start several processes under the deepspeed launcher."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_plasticity.errors import UserError


def launcher_command(program: Sequence[str], processes: int, devices: Sequence[str] = ()) -> list[str]:
    """`deepspeed … PROGRAM` for `processes` ranks on this machine. PROGRAM is a script, or `--module` and a module, with its
    arguments.

    `devices` are the GPUs to use, by their index: given a number of GPUs, the launcher ignores CUDA_VISIBLE_DEVICES. On a machine
    without GPUs set `DS_ACCELERATOR=cpu`: the launcher then counts slots instead of devices.
    """
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        raise UserError(
            "the `deepspeed` launcher is not beside this Python nor on PATH; install the project with `pip install -e .`"
        )
    where = ["--include", f"localhost:{','.join(devices)}"] if devices else ["--num_gpus", str(processes)]
    # Through our own Python: the launcher's first line may name one of an environment that was moved.
    return [sys.executable, found, *where, "--master_port", str(_free_port()), *program]


def deepspeed_command(verb: str, config: Path, processes: int, devices: Sequence[str] = ()) -> list[str]:
    """The command of a verb of ours: `deepspeed … --module megatron_plasticity VERB CONFIG`."""
    return launcher_command(["--module", "megatron_plasticity", verb, str(config)], processes, devices)


def _free_port() -> int:
    """A port that was free a moment ago; several jobs of one machine must not meet on the default one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
