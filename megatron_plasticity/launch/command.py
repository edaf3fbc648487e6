"""Commands that start several processes under the deepspeed launcher."""

from __future__ import annotations

import re
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_plasticity.errors import UserError

# What the remote shell takes as it is.
_PLAIN = re.compile(r"[\w@+=:,./-]*")


def launcher_command(
    program: Sequence[str], processes: int, devices: Sequence[str] = (), logs: Path | None = None, port: int | None = None
) -> list[str]:
    """`deepspeed … PROGRAM` for `processes` ranks on this machine. PROGRAM is a script, or `--module` and a module, with its
    arguments.

    `devices` are the GPUs to use, by their index: given a number of GPUs, the launcher ignores CUDA_VISIBLE_DEVICES. On a machine
    without GPUs set `DS_ACCELERATOR=cpu`: the launcher then counts slots instead of devices. With `logs` each rank writes to
    a file of its own there. `port` is where ranks meet; left out, a free one is taken.
    """
    where = ["--include", f"localhost:{','.join(devices)}"] if devices else ["--num_gpus", str(processes)]
    return [*launcher_program(), *where, "--master_port", str(port or free_port()), *_log_option(logs), *program]


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of several machines meet."""

    address: str
    """Of the first machine, as the others reach it."""
    port: int


def cluster_command(
    program: Sequence[str], hostfile: Path, meeting: Meeting, logs: Path, include: str | None = None, exclude: str | None = None
) -> list[str]:
    """`deepspeed --hostfile … PROGRAM` for ranks on the machines of a hostfile, over pdsh and ssh.

    Raises UserError for a path or an argument that the remote shells would take apart.
    """
    carried = [str(Path.cwd()), sys.executable, str(logs), *program]
    if wrong := [text for text in carried if not _PLAIN.fullmatch(text)]:
        raise UserError(
            "DeepSpeed's launcher hands paths to other machines without quotes, so that spaces and special characters cannot be "
            f"in them: {', '.join(map(repr, wrong))}"
        )
    return [
        *launcher_program(),
        *("--hostfile", str(hostfile)),
        *(("--include", include) if include else ()),
        *(("--exclude", exclude) if exclude else ()),
        # With one machine left it would otherwise start the ranks here, whichever machine that is.
        "--force_multi",
        # The preflight has asked every machine, with the user's own ssh options, which these two would leave out.
        "--no_ssh_check",
        *("--master_addr", meeting.address),
        *("--master_port", str(meeting.port)),
        *_log_option(logs),
        *program,
    ]


def _log_option(logs: Path | None) -> tuple[str, ...]:
    return () if logs is None else ("--enable_each_rank_log", str(logs))


def launcher_program() -> list[str]:
    """What starts DeepSpeed's launcher. Raises UserError if it is not installed."""
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        raise UserError(
            "the `deepspeed` launcher is not beside this Python nor on PATH; install the project with `pip install -e .`"
        )
    # Through our own Python: the launcher's first line may name one of an environment that was moved.
    return [sys.executable, found]


def deepspeed_command(verb: str, config: Path, processes: int, devices: Sequence[str] = ()) -> list[str]:
    """The command of a verb of ours: `deepspeed … --module megatron_plasticity VERB CONFIG`."""
    return launcher_command(["--module", "megatron_plasticity", verb, str(config)], processes, devices)


def free_port() -> int:
    """A port that was free a moment ago; several jobs of one machine must not meet on the default one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
