"""What all probes share: commands that may hang, names that may take long, and errors as one line."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_plasticity.tracking.mlflow_store import without_credentials

T = TypeVar("T")

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|PRIVATE|(^|_)(API_?)?KEYS?($|_)")
_TOO_SHORT_TO_REDACT = 6


def output_of(command: Sequence[str], seconds: float = 10.0) -> str:
    """What a command prints. Raises OSError if it cannot start, fails, or takes longer than `seconds`."""
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"`{' '.join(command)}` did not answer within {seconds:g} s") from None
    if ended.returncode:
        said = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
        raise OSError(f"`{' '.join(command)}` ended with {ended.returncode}" + (f": {said[-1]}" if said else ""))
    return ended.stdout


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of a call that cannot be told how long it may take, such as resolving a name. Raises TimeoutError."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)  # one that never returns must not keep us
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def one_line(error: BaseException, longest: int = 300) -> str:
    """An error as one line; the type is said where the text alone says little."""
    text = " ".join(str(error).split())
    if not isinstance(error, OSError) or not text:
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return text if len(text) <= longest else text[: longest - 1] + "…"


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name may hold a secret."""
    return _SECRET_NAME.search(name.upper()) is not None


def redacted(text: str) -> str:
    """`text` without credentials in URIs and without the values of secret environment variables.

    Nothing secret is collected; this is for messages of other libraries, which we do not write.
    """
    text = without_credentials(text)
    for name, value in os.environ.items():
        if is_secret(name) and len(value) >= _TOO_SHORT_TO_REDACT:
            text = text.replace(value, "***")
    return text
