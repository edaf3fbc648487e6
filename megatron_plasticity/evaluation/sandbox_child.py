"""The inside of the sandbox (`sandbox.py`): confines its own process, then runs one call and describes what it gives.

It is started as a file in an isolated interpreter, so it imports the standard library alone. The steps that confine come before
any line of the program is read.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import ItemsView, KeysView
from pathlib import Path
from typing import Any

_MAY_NOT_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

# System calls of plain computation and of importing modules, by their numbers in Linux: read, write, close, memory, signal
# handlers, clocks, getrandom, futex, status of files, names of folders, exit.
_ALLOWED = {
    "x86_64": (
        0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 21, 24, 25, 28, 35, 39, 60, 63, 79, 89, 96, 98,
        100, 102, 104, 107, 108, 131, 186, 202, 204, 217, 219, 228, 229, 230, 231, 262, 267, 269, 318, 324, 332, 334, 439,
    ),
    "aarch64": (
        17, 48, 57, 61, 62, 63, 64, 65, 66, 67, 73, 78, 79, 80, 93, 94, 98, 101, 113, 114, 115, 123, 124, 128, 132, 134,
        135, 139, 153, 160, 165, 169, 172, 174, 175, 176, 177, 178, 214, 215, 216, 222, 226, 233, 278, 283, 291, 293, 439,
    ),
}  # fmt: skip
_FCNTL, _IOCTL = 1, 2
_OPERATIONS = {"x86_64": ((72, _FCNTL), (16, _IOCTL)), "aarch64": ((25, _FCNTL), (29, _IOCTL))}
_HARMLESS_OPERATIONS = {_FCNTL: (1, 2, 3, 1030), _IOCTL: (0x5401, 0x5451)}
"""Calls that do many things, and which of them (their second argument) are let through: F_GETFD, F_SETFD, F_GETFL and
F_DUPFD_CLOEXEC; TCGETS (is it a terminal?) and FIOCLEX. Others send signals, or change files that are open for reading."""
_OPENS = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}
"""Calls that open a file, and which of their arguments holds the flags."""
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_LET, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 1, 22, 38, 2

_REFUSED_EVENTS = ("os", "socket", "subprocess", "ctypes", "signal", "fcntl", "mmap", "resource", "shutil", "pty", "syslog")
_SCALARS: tuple[Any, ...] = (int, float, complex, str, bytes)
_PATH_EVENTS = ("open", "os.listdir", "os.scandir")


def _main() -> None:
    channel = int(sys.argv[1])
    request = json.loads(Path("request.json").read_text(encoding="utf-8"))
    limit_resources(request["memory_bytes"], request["processor_seconds"])
    try:
        die_with_parent()
        filter_system_calls()
    except OSError as error:
        _say(channel, {"unconfined": str(error)})
    refuse_by_audit()
    try:
        value = _describe(_call(request["program"], request["arguments"], request["constructors"]), depth=0)
    except BaseException:  # SystemExit and MemoryError, too, are ways to give no value
        os._exit(1)
    _say(channel, {"value": value} if len(value) <= request["result_bytes"] else {})


def _say(channel: int, answer: dict[str, str]) -> None:
    message = json.dumps(answer).encode()
    while message:
        message = message[os.write(channel, message) :]
    os._exit(0)


def limit_resources(memory_bytes: int, processor_seconds: int) -> None:
    """Bound memory and time; no files, no core dumps, no further processes."""
    for which, limit in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, processor_seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 32),
    ):
        resource.setrlimit(which, (limit, limit))


def die_with_parent() -> None:
    """Have this process killed when the thread that started it ends. Raises OSError if it cannot be done."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, None)


def filter_system_calls() -> None:
    """Let through `_ALLOWED` and the opening of files for reading; anything else fails with EPERM.

    Raises OSError if it cannot be done.
    """
    machine = platform.machine()
    if machine not in _ALLOWED:
        raise OSError(f"there is no filter of system calls for {sys.platform} on {machine}")
    program = _filter_program(machine)
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, None)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header)


def _prctl(option: int, value: int, pointer: bytes | None) -> None:
    if sys.platform != "linux":
        raise OSError("processes can be confined on Linux only")
    call = ctypes.CDLL(None, use_errno=True).prctl
    call.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong)
    if call(option, value, pointer, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def _filter_program(machine: str) -> bytes:
    """The filter as classic BPF (seccomp(2)): instructions of 8 bytes, code, jump if true, jump if false, value."""
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    for number in _ALLOWED[machine]:
        lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _LET)]
    for number, kind in _OPERATIONS[machine]:
        operations = _HARMLESS_OPERATIONS[kind]
        lines += [(_EQUAL, 0, 2 + 2 * len(operations), number), (_LOAD, 0, 0, _ARGUMENTS_AT + 8)]
        for operation in operations:
            lines += [(_EQUAL, 0, 1, operation), (_RETURN, 0, 0, _LET)]
        lines.append((_RETURN, 0, 0, _REFUSE))
    for number, flags in _OPENS[machine]:
        lines += [
            (_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * flags),
            (_ANY_BIT, 0, 1, _MAY_NOT_WRITE),
            (_RETURN, 0, 0, _REFUSE),
            (_RETURN, 0, 0, _LET),
        ]
    lines.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def refuse_by_audit() -> None:
    """Refuse, as far as Python can, what the filter would, and the reading of files outside the standard library."""
    library = tuple(os.path.realpath(folder) + os.sep for folder in sys.path if folder.startswith(sys.base_prefix))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _PATH_EVENTS:
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else ""
            if not (os.path.realpath(path) + os.sep).startswith(library):
                raise PermissionError(f"{event}: {path!r} is outside the sandbox")
        elif event.split(".")[0] in _REFUSED_EVENTS:
            raise PermissionError(f"{event} is refused in the sandbox")

    sys.addaudithook(hook)


def _call(program: str, arguments: str, constructors: list[str]) -> object:
    """f(arguments). The arguments are made first, and see nothing of the program."""
    names = {name: getattr(builtins, name) for name in constructors}
    positional, named = eval(f"(lambda *a, **k: (a, k))({arguments}\n)", {"__builtins__": names})
    namespace: dict[str, Any] = {"__name__": "program"}
    exec(compile(program, "program", "exec"), namespace)
    return namespace["f"](*positional, **named)


def _describe(value: object, depth: int) -> str:
    """Source of a literal that equals the value; subclasses and views are written as the built-in type that they equal."""
    if depth > 100:
        raise ValueError("nested too deeply")
    if value is None or value is True or value is False:
        return repr(value)
    for kind in _SCALARS:
        if isinstance(value, kind):
            return kind.__repr__(value)
    if isinstance(value, bytearray):
        return repr(bytes(value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_describe(k, depth + 1)}: {_describe(v, depth + 1)}" for k, v in dict.items(value)) + "}"
    if isinstance(value, tuple):
        return "(" + "".join(f"{_describe(item, depth + 1)}, " for item in tuple.__iter__(value)) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(_describe(item, depth + 1) for item in list.__iter__(value)) + "]"
    if isinstance(value, set | frozenset | KeysView | ItemsView):
        return "{" + ", ".join(_describe(item, depth + 1) for item in value) + "}" if value else "set()"
    raise TypeError(f"{type(value)} has no literal")


if __name__ == "__main__":
    _main()
