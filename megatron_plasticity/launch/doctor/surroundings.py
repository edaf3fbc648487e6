"""What training and evaluation lean on beside the hardware: DeepSpeed's operations, the sandbox, MLflow, data, variables."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.doctor.facts import CompiledOps, Environment, Prepared, Sandbox, Tracking
from megatron_plasticity.launch.doctor.probing import is_secret, one_line, within
from megatron_plasticity.tracking.mlflow_store import sqlite_folder, without_credentials

_TRACKING_SECONDS = 2.0
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

# Variables whose values are shown: of these families, and of these names.
_SHOWN_FAMILIES = (
    "CUBLAS_", "CUDA_", "DS_", "GLOO_", "GOMP_", "KMP_", "MKL_", "NCCL_", "NVIDIA_", "OMP_", "PYTORCH_", "TOKENIZERS_", "TORCH",
    "TRITON_",
)  # fmt: skip
_SHOWN = (
    "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
    "CC", "CXX", "LD_LIBRARY_PATH", "LD_PRELOAD", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONHASHSEED", "PYTHONPATH",
    "RANK", "WORLD_SIZE",
)  # fmt: skip
# Of these only the names are.
_NAMED_FAMILIES = ("HF_", "HUGGING_FACE_", "MLFLOW_")
_NAMED_IF_SECRET = ("AWS_", "AZURE_", "WANDB_")
_TOKEN_LENGTH = 24


def ops() -> CompiledOps:
    """Which of DeepSpeed's operations were built with it, from the file that its installation writes: importing it takes
    seconds."""
    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("DeepSpeed is not installed")
    written = ast.parse(Path(found.origin).with_name("git_version_info_installed.py").read_text(encoding="utf-8"))
    values = {
        target.id: node.value
        for node in written.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    installed = {
        name: built for name, built in ast.literal_eval(values["installed_ops"]).items() if "not_implemented" not in name
    }
    # As torch.utils.cpp_extension has it.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    return CompiledOps(
        prebuilt=tuple(name for name, built in installed.items() if built),
        not_built=tuple(name for name, built in installed.items() if not built),
        folder=str(folder),
        in_folder=tuple(sorted({path.stem for path in folder.rglob("*.so")})),
    )


def sandbox() -> Sandbox:
    """Whether programs that a model wrote can be run here, asked of the sandbox itself."""
    from megatron_plasticity.evaluation.literals import Value
    from megatron_plasticity.evaluation.sandbox import Call, Limits
    from megatron_plasticity.evaluation.sandbox import Sandbox as Confinement

    try:
        (answer,) = Confinement(limits=Limits(seconds=20.0)).run_all([Call("def f(a, b): return a * b", "6, 7")])
    except UserError as error:
        return Sandbox(one_line(error))
    return Sandbox(None if answer == Value(42) else "a program in it gives no answer, or a wrong one")


def tracking() -> Tracking:
    """Whether the MLflow store that MLFLOW_TRACKING_URI names answers. Without it runs write a file in their own folder."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return Tracking(None, None)
    shown = without_credentials(uri).partition("?")[0]
    try:
        within(_TRACKING_SECONDS, lambda: _ask_store(shown))
    except (OSError, TimeoutError) as error:
        return Tracking(shown, one_line(error))
    return Tracking(shown, None)


def _ask_store(uri: str) -> None:
    """Raises OSError if the store at `uri`, which has no credentials in it, cannot be reached, LookupError if it is of an unknown
    kind."""
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    if scheme in ("http", "https"):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_TRACKING_SECONDS).close()
        except urllib.error.HTTPError as error:
            if error.code != 401:  # that is an answer: it wants credentials, which are nothing to try out here
                raise OSError(f"HTTP {error.code} from it, or from a proxy on the way") from None
        except urllib.error.URLError as error:
            raise OSError(str(error.reason)) from None
    elif scheme == "sqlite":
        folder = sqlite_folder(uri)
        if folder is not None and not os.access(folder, os.W_OK):
            raise OSError(f"{folder} is not there, or cannot be written to")
    elif scheme in _PORTS and parts.hostname:
        socket.create_connection((parts.hostname, parts.port or _PORTS[scheme]), _TRACKING_SECONDS).close()
    elif scheme == "file" or (not scheme and uri != "databricks"):
        raise OSError("MLflow no longer takes a folder of files: use sqlite:///path/to/mlflow.db")
    else:
        raise LookupError(f"nothing is known here about how to ask MLflow's store {uri}")


def prepared() -> Prepared:
    """Corpora and tasks in the folders where they are put by default."""
    from megatron_plasticity.config.data import CorpusConfig
    from megatron_plasticity.config.tasks import TaskConfig
    from megatron_plasticity.data.manifest import MANIFEST_FILE, read_manifest
    from megatron_plasticity.evaluation.tasks.prepared import read_manifest as read_task

    corpora, tasks, damaged = [], [], []
    for folder in sorted(path.parent for path in CorpusConfig.model_fields["output"].default.glob(f"*/{MANIFEST_FILE}")):
        if folder.is_symlink():
            continue  # the short name of one of the others
        try:
            corpora.append(f"{folder.name} ({read_manifest(folder)['splits']['train']['tokens']:,} tokens)")
        except (UserError, KeyError, TypeError):
            damaged.append(str(folder))
    for folder in sorted(path for path in TaskConfig.model_fields["folder"].default.glob("*") if path.is_symlink()):
        try:
            tasks.append(read_task(folder)["name"])
        except (UserError, KeyError, TypeError):
            damaged.append(str(folder))
    return Prepared(tuple(corpora), tuple(tasks), tuple(damaged))


def environment() -> Environment:
    """Variables that change results, speed or what is used. A value is shown only if neither its name nor its looks are those of
    a secret."""
    shown, hidden = {}, []
    for name in sorted(os.environ):
        value = os.environ[name]
        may_show = name.startswith(_SHOWN_FAMILIES) or name in _SHOWN
        if may_show and not is_secret(name) and not _looks_secret(value):
            shown[name] = without_credentials(value)
        elif may_show or name.startswith(_NAMED_FAMILIES) or (is_secret(name) and name.startswith(_NAMED_IF_SECRET)):
            hidden.append(name)
    return Environment(shown, tuple(hidden))


def _looks_secret(value: str) -> bool:
    """A long word of letters and digits; paths, lists and the UUIDs of GPUs are made of short ones."""
    return any(
        len(word) >= _TOKEN_LENGTH and re.search(r"\d", word) and re.search(r"[A-Za-z]", word)
        for word in re.split(r"[^A-Za-z0-9_+]", value)
    )
