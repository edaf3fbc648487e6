"""Errors that a person can act on.

A `UserError` is the only exception whose text reaches the terminal without a traceback: it names the key or the path,
says what was expected, and what to do. Everything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input or a bad environment; the message is for the person who started the command."""

    exit_code = 2


class ConfigError(UserError):
    """A config that cannot be used; the message lists every problem at once."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, damaged, or belongs to another run."""


class Interrupted(UserError):
    """The run was asked to stop (Ctrl-C, SIGTERM, SIGUSR1) and has saved what it needs to go on."""

    def __init__(self, message: str, signal_number: int, by_all: bool = False) -> None:
        """`by_all`: every process of the job has agreed to stop."""
        super().__init__(message)
        self.exit_code = 128 + signal_number
        self.by_all = by_all


class LostProcess(UserError):
    """Another process of the job failed, is gone or hangs, so that this one cannot go on; the same command goes on from the
    latest checkpoint. The exit code is that of the process that failed; of one that is gone or hangs, that of a failure which may
    not come again (EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75

    def __init__(self, message: str, exit_code: int = exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class FolderHeld(UserError):
    """Another process has the folder now; the same command works when that one has ended. An exit code of its own (EX_CANTCREAT
    of sysexits.h), which launchers pass on, tells a runner that nothing was tried."""

    exit_code = 73


class TimeLimitTooShort(UserError):
    """The time limit of a queue came before a run had kept anything: it would go round for ever (EX_CONFIG of sysexits.h)."""

    exit_code = 78


@contextmanager
def ending_the_process(prefix: str = "error") -> Iterator[None]:
    """A UserError inside the block ends the process: its text in one line on standard error, and its exit code."""
    try:
        yield
    except UserError as error:
        print(f"{prefix}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def problems_of(checks: Iterable[Callable[[], object]]) -> list[str]:
    """What the checks raise, line by line; without the headings of messages that list several problems."""
    problems: list[str] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            heading, *rest = str(error).splitlines()
            problems += [line.strip() for line in rest] or [heading]
    return problems
