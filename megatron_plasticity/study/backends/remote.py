"""The far end of an ssh connection: `python -m megatron_plasticity.study.backends.remote`.

What to run comes through stdin, so that neither the command nor its environment stands on a command line, and needs no quoting.
The command ends when the connection does: a runner that was killed, or that a network has cut off, leaves nothing behind. Since a
cut network closes no connection by itself, the runner says every few seconds that it is there. Over a pipe on one machine
(`study/cell.py`) the end of the pipe is enough.

Nothing but the standard library is imported here.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SECONDS_BETWEEN_SIGNS = 5.0
SECONDS_UNTIL_ALONE = 45.0
"""Without a sign for so long, this end takes the connection for lost."""
_SECONDS_BETWEEN_LOOKS = 0.2


def order(
    command: Sequence[str], folder: str, environment: Mapping[str, str], seconds_to_stop: float, signs: bool = True
) -> bytes:
    """The line that tells `main` what to run, and where; `signs`: whether signs of life will follow it."""
    content = {
        "command": list(command),
        "folder": folder,
        "environment": dict(environment),
        "seconds_to_stop": seconds_to_stop,
        "signs": signs,
    }
    return json.dumps(content).encode() + b"\n"


def main() -> int:
    """Run what the first line of stdin says; its exit code, where a signal n is 128 + n as in a shell."""
    line = sys.stdin.buffer.readline()
    if not line.strip():
        return 0
    content = json.loads(line)
    process = subprocess.Popen(
        content["command"],
        cwd=content["folder"],
        env={**os.environ, **content["environment"]},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    # However this process is told to go, the command goes with it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: _stop(process, content["seconds_to_stop"]))
    heard, connected = time.monotonic(), True
    while process.poll() is None:
        if connected and select.select([sys.stdin], [], [], _SECONDS_BETWEEN_LOOKS)[0]:
            heard, connected = time.monotonic(), bool(os.read(sys.stdin.fileno(), 4096))
        if not connected or (content["signs"] and time.monotonic() - heard > SECONDS_UNTIL_ALONE):
            break
    # Also when the command has ended by itself: DeepSpeed's launcher may be gone before its ranks.
    _stop(process, content["seconds_to_stop"])
    code = process.wait()
    return 128 - code if code < 0 else code


def _stop(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Let the command, and all that it has started, save and end; what does not end in time is killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while _lives(process) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)


def _lives(process: subprocess.Popen[bytes]) -> bool:
    """Whether anything in the process group that this process leads, or led, has not ended. A zombie has, and in a container
    there may be nobody who takes those of a leader that is gone."""
    if process.poll() is None:
        return True
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
            if int(group) == process.pid and state not in "ZX":
                return True
    return False


if __name__ == "__main__":
    sys.exit(main())
