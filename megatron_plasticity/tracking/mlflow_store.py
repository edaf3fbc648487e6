"""Which MLflow store to talk to, and how: quickly giving up, without telemetry, and without credentials in any message."""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_plasticity.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

# The mirror comes back every few seconds by itself, so that a request need not be patient (MLflow's own: 7 retries of 120 s).
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
# Everything between `://` and the last `@` of the word: a password may hold `/` or `@` itself.
_CREDENTIALS = re.compile(r"(?<=://)[^\s'\"<>]*@")
# Names of tables being created, and each retry of a request, are no news to the person who trains.
_TALKATIVE = {"alembic": logging.WARNING, "mlflow.store": logging.WARNING, "urllib3.connectionpool": logging.ERROR}


def tracking_uri(folder: Path) -> str:
    """`MLFLOW_TRACKING_URI` if it is set, else the SQLite file `mlflow.db` in `folder`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"


def connect(uri: str) -> MlflowClient:
    """A client of the store at `uri`. Importing MLflow costs seconds, and making a new SQLite store some more.

    Raises UserError if MLflow is not installed, or does not understand the URI.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name, level in _TALKATIVE.items():
        logging.getLogger(name).setLevel(level)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise UserError(f"MLflow cannot be imported ({error}); `pip install mlflow` brings it") from None
    try:
        with _alone_in_making(uri):
            return MlflowClient(tracking_uri=uri)
    except MlflowException as error:
        raise UserError(f"MLflow at {without_credentials(uri)}: {without_credentials(str(error))}") from None


def sqlite_folder(uri: str) -> Path | None:
    """The folder of an SQLite store; None for any other."""
    return Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else None


@contextmanager
def _alone_in_making(uri: str) -> Iterator[None]:
    """Let only one process at a time make an SQLite store: MLflow's migrations fail if two processes run them at once.

    The folder itself is locked, since closing a second descriptor of the file would take SQLite's own locks away.
    """
    folder = sqlite_folder(uri)
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
    """`text` with the user and password of every URI in it left out, and MLflow's secrets of the environment starred out."""
    text = _CREDENTIALS.sub("", text)
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return text
