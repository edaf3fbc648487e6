"""What the commands of this folder have in common: how they read their arguments, judge a target, and end. Without torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_plasticity.errors import ending_the_process

BAD_INPUT = 2


class Parser(argparse.ArgumentParser):
    """One whose complaints are one line each, as those of all our commands are."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message} (--help lists all arguments)\n")


def parser(documentation: str | None, missed: str = "a target was missed, or could not be measured") -> Parser:
    """A parser whose help is the documentation of a bench, with its example, and its exit codes. `missed`: what 1 means."""
    codes = f"exit codes: 0 all is as wanted; 1 {missed}; 2 bad input, and nothing was measured"
    return Parser(description=documentation, epilog=codes, formatter_class=argparse.RawDescriptionHelpFormatter)


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `least` on."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, not {text!r}")
        return int(text)

    return number


positive = at_least(1)


def multiple_of(unit: int) -> Callable[[str], int]:
    """The type of an argument that is a positive multiple of `unit`."""

    def number(text: str) -> int:
        if positive(text) % unit:
            raise argparse.ArgumentTypeError(f"expected a multiple of {unit}, not {text!r}")
        return int(text)

    return number


def verdict(good: bool, wanted: str) -> str:
    """What stands beside a figure: whether it is as wanted, and what that would be."""
    return f"{'as wanted' if good else 'NOT AS WANTED'} ({wanted})"


def run(main: Callable[[], int]) -> NoReturn:
    """Run a bench and end with its exit code; a UserError is its message and its own code, which is 2 for bad input."""
    with ending_the_process():
        sys.exit(main())


def no_command(of: str) -> NoReturn:
    """End a file of this folder that was started by itself, though it is only a part of `of`."""
    print(f"error: this is a part of tools/bench/{of} and no command; run that", file=sys.stderr)
    sys.exit(BAD_INPUT)
