"""Which MLflow store to talk to, and how: quickly giving up, without telemetry, and without credentials in any message."""

from __future__ import annotations

import base64
import configparser
import fcntl
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from megatron_plasticity.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "DO_NOT_TRACK": "true",
    # The mirror comes back every few seconds by itself, so that a request need not be patient (MLflow's own: 120 s).
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
# MLflow's client would repeat any request whose answer was lost, so that a run could be made twice and nobody knew. We ask
# what has arrived before we repeat anything.
_NO_RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
_SECRET_NAMES = re.compile(r"TOKEN$|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY$")
_SHORTEST_SECRET = 6
"""Shorter values of variables whose names sound like secrets, such as `1` or `true`, are left alone: they are words."""
_SHORTEST_PASSWORD = 4
# Everything between `://` and the last `@` of the word: a password may hold `/` or `@` itself.
_CREDENTIALS = re.compile(r"(?<=://)[^\s'\"<>]*@")
# Names of tables being created, and each retry of a request, are no news to the person who trains.
_TALKATIVE = {"alembic": logging.WARNING, "mlflow.store": logging.WARNING, "urllib3.connectionpool": logging.ERROR}


class StoreError(UserError):
    """The store could not be reached, or did not want what it was sent; a later attempt may succeed."""


def tracking_uri(folder: Path) -> str:
    """`MLFLOW_TRACKING_URI` if it is set, else the SQLite file `mlflow.db` in `folder`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"


def connect(uri: str) -> MlflowClient:
    """A client of the store at `uri`. Importing MLflow costs seconds, and making a new SQLite store some more.

    Raises UserError if MLflow is not installed, or does not understand the URI.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.update(_NO_RETRIES)
    for name, level in _TALKATIVE.items():
        logging.getLogger(name).setLevel(level)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise UserError(f"MLflow cannot be imported ({error}); `pip install mlflow` brings it") from None
    try:
        # MLflow's migrations fail if two processes run them at once.
        with alone_with(sqlite_folder(uri)):
            return MlflowClient(tracking_uri=uri)
    except MlflowException as error:
        raise StoreError(f"MLflow at {without_credentials(uri)}: {without_credentials(str(error))}") from None


def sqlite_folder(uri: str) -> Path | None:
    """The folder of an SQLite store; None for any other."""
    return Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else None


@contextmanager
def alone_with(folder: Path | None) -> Iterator[None]:
    """Let only one process at a time into the block, of those that name the same `folder`; None lets everyone in.

    The folder itself is locked: a lock file would stay behind, and closing a second descriptor of a database would take SQLite's
    own locks away.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def without_credentials(text: str) -> str:
    """`text` with the user and password of every URI in it left out, and all secrets that this process knows starred out: those
    of its environment, and those that it would send to MLflow, in any form in which a message may repeat them."""
    return redactor()(text)


def redactor() -> Callable[[str], str]:
    """`without_credentials` for many texts: the secrets are looked up once."""
    secrets = sorted(_secrets(), key=len, reverse=True)

    def redacted(text: str) -> str:
        text = _CREDENTIALS.sub("", text)
        for secret in secrets:
            text = text.replace(secret, "***")
        return text

    return redacted


def _secrets() -> set[str]:
    found = {value for name, value in os.environ.items() if _SECRET_NAMES.search(name.upper()) and len(value) >= _SHORTEST_SECRET}
    logins = {(os.environ.get("MLFLOW_TRACKING_USERNAME", ""), os.environ.get("MLFLOW_TRACKING_PASSWORD", "")), _login_of_file()}
    if in_uri := _CREDENTIALS.search(os.environ.get("MLFLOW_TRACKING_URI", "")):
        user, _, password = in_uri.group().removesuffix("@").partition(":")
        logins.add((unquote(user), unquote(password)))
    for user, password in logins:
        if len(password) >= _SHORTEST_PASSWORD:
            found |= {password, quote(password, safe=""), base64.b64encode(f"{user}:{password}".encode()).decode()}
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        found.add(token)
    return found


def _login_of_file() -> tuple[str, str]:
    """User and password in `~/.mlflow/credentials`, which MLflow reads where the environment has none."""
    parser = configparser.ConfigParser(interpolation=None)
    with suppress(OSError, configparser.Error, UnicodeDecodeError, RuntimeError):
        parser.read(Path("~/.mlflow/credentials").expanduser())
    section = parser["mlflow"] if parser.has_section("mlflow") else {}
    return section.get("mlflow_tracking_username", ""), section.get("mlflow_tracking_password", "")
