"""Running a program that nobody has read: what a function gives for arguments that a model wrote.

Each call gets a Python interpreter of its own, in which `sandbox_child.py` first gives up what it could do harm with and then
runs the program. The guarantees, from the kernel (Linux on x86-64 and aarch64):

- a seccomp filter lets through only the system calls of plain computation. There are no sockets, no processes or threads, no
  signals to others, and no file can be opened for writing;
- limits on time (wall clock and processor), memory, and the result's length. Whoever passes one is killed;
- an empty environment, a folder that holds nothing but the call, no inherited descriptors but the one that takes the result;
- the process dies with the one that started it.

Reading files outside Python's own library is refused by an audit hook, which is a fence and no wall. Where the filter cannot be
installed nothing is run: that is a `UserError`, since a weaker sandbox would look the same.

The expected value never enters the sandbox. The program can only say what it gives; whether that is right is found out here.
"""

from __future__ import annotations

import ast
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.literals import CONSTRUCTORS, Value

_CHILD = Path(__file__).with_name("sandbox_child.py")
_CHUNK_BYTES = 65536


@dataclass(frozen=True)
class Call:
    """A program that defines the function `f`, and the source of f's arguments."""

    program: str
    arguments: str


@dataclass(frozen=True)
class Limits:
    """What one call may use."""

    seconds: float = 5.0
    """Wall clock, start of the interpreter included."""
    memory_bytes: int = 512 * 1024**2
    """Address space of the interpreter."""
    result_bytes: int = 1024**2
    """Source of the result."""


class Sandbox:
    """Runs calls, as many at a time as there are workers."""

    def __init__(self, workers: int = 1, limits: Limits = Limits()) -> None:
        self._workers = workers
        self._limits = limits
        self._is_confined = False

    def run_all(self, calls: Sequence[Call]) -> list[Value | None]:
        """What each call gives, as built-in types; None where it fails, passes a limit, or gives something of another type.

        Raises UserError if this machine cannot confine a program.
        """
        if calls and not self._is_confined:
            self.check_confinement()
        with ThreadPoolExecutor(self._workers) as threads:
            return list(threads.map(self._run, calls))

    def check_confinement(self) -> None:
        """Ask, with a program that does not lie, whether processes can be confined; one that cannot runs nothing anyway.

        Raises UserError if not.
        """
        answer = _answer(self._output(Call("def f(): return 0", "")))
        if "unconfined" in answer:
            raise UserError(f"the sandbox for generated programs cannot be closed on this machine: {answer['unconfined']}")
        self._is_confined = True

    def _run(self, call: Call) -> Value | None:
        return _value(_answer(self._output(call)).get("value"))

    def _output(self, call: Call) -> bytes:
        """What the process writes to its pipe within its limits."""
        request = {
            "program": call.program,
            "arguments": call.arguments,
            "constructors": CONSTRUCTORS,
            "memory_bytes": self._limits.memory_bytes,
            "processor_seconds": int(self._limits.seconds) + 1,
            "result_bytes": self._limits.result_bytes,
        }
        with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
            Path(folder, "request.json").write_text(json.dumps(request), encoding="utf-8")
            reader, writer = os.pipe()
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-X", "utf8", str(_CHILD), str(writer)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=folder,
                    env={},
                    pass_fds=(writer,),
                    start_new_session=True,
                )
            except BaseException:
                os.close(reader)
                raise
            finally:
                os.close(writer)
            try:
                return self._read(reader)
            finally:
                os.close(reader)
                os.killpg(process.pid, signal.SIGKILL)  # its number is not given away before wait()
                process.wait()

    def _read(self, reader: int) -> bytes:
        deadline = time.monotonic() + self._limits.seconds
        output = b""
        while len(output) <= 2 * self._limits.result_bytes:
            ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(reader, _CHUNK_BYTES) if ready else b""
            if not chunk:
                return output if ready else b""
            output += chunk
        return b""


def _answer(output: bytes) -> dict[str, str]:
    try:
        answer = json.loads(output)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _value(source: object) -> Value | None:
    """The value that the process described: read as a literal, since the program may have written the description itself."""
    if not isinstance(source, str):
        return None
    try:
        return Value(ast.literal_eval(source))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
