"""Which environment variables reach the ranks of other machines, and on which way.

DeepSpeed's launcher writes every variable that it forwards into the command lines of pdsh, ssh and the remote shell, where `ps`
shows it to everybody, and into its log: those that begin with MLFLOW, PYTHON, NCCL, MV2 or UCX, and all that DS_ENV_FILE lists.
So it is given only what must be there before Python starts, and the rest travels in a file that only its owner can read
(`launch/folder.py`). No list of names that sound secret is needed: nothing else goes the open way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_plasticity.errors import UserError

# Settings of libraries, and what stores and hubs are reached by.
_FORWARDED = (
    *("MLFLOW_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "DATASETS_"),
    *("NCCL_", "GLOO_", "UCX_", "MV2_", "FI_", "OMP_", "MKL_", "KMP_", "GOMP_"),
    *("TORCH", "PYTORCH_", "CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_", "TRITON_", "DS_", "DEEPSPEED_", "MEGATRON_PLASTICITY_"),
    *("AWS_", "AZURE_", "GOOGLE_", "S3_", "REQUESTS_CA_BUNDLE", "SSL_CERT_"),
    *("DO_NOT_TRACK", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"),
)
# Each machine has its own.
_KEPT_HERE = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "DS_ENV_FILE", "MEGATRON_PLASTICITY_LAUNCH")
# Read by the loader, or by DeepSpeed's process on each machine, before a rank could read a file.
_NEEDED_EARLIER = ("LD_LIBRARY_PATH", "LD_PRELOAD", "DS_ACCELERATOR")
_DEEPSPEED_FORWARDS = ("MLFLOW", "PYTHON", "NCCL", "MV2", "UCX")
# Python's own settings have no underscore, but for a few that do not matter here.
_OF_PYTHON = re.compile(r"PYTHON[A-Z0-9]+")
# DeepSpeed quotes with nothing but double quotes, and pdsh replaces what begins with %.
_CARRIED = re.compile(r"[\w@+=:,./ -]*")


@dataclass(frozen=True)
class Travelling:
    """Variables by the way that they take."""

    launcher: dict[str, str]
    """The environment of DeepSpeed's launcher itself; of it only PYTHON… goes further."""
    open: dict[str, str]
    """On command lines."""
    private: dict[str, str]
    """In a file that only its owner can read."""


def travelling(environment: Mapping[str, str], named: Sequence[str] = (), *, openly: bool = True) -> Travelling:
    """Sort an environment; `named` are further variables for the ranks. `openly`: some of them go on command lines, which ranks
    on this machine, who inherit them, do not need.

    Raises UserError, with all problems, for one that is named and not set, or that must travel openly and cannot.
    """
    problems = [f"--env {name}: this variable is not set here" for name in named if name not in environment]
    wanted = _deepspeed_file(environment) | {
        name: value
        for name, value in environment.items()
        if name in named or (name.upper().startswith(_FORWARDED) and name not in _KEPT_HERE)
    }
    early = {name: environment[name] for name in _NEEDED_EARLIER if name in environment}
    early |= {name: wanted.pop(name) for name in _NEEDED_EARLIER if name in wanted}
    launcher = {}
    for name, value in environment.items():
        if name.startswith(_DEEPSPEED_FORWARDS) and not _OF_PYTHON.fullmatch(name):
            wanted.setdefault(name, value)
        elif name != "DS_ENV_FILE":
            launcher[name] = value
    on_command_lines = {**early, **{name: value for name, value in launcher.items() if _OF_PYTHON.fullmatch(name)}}
    for name, value in on_command_lines.items():
        if openly and not _CARRIED.fullmatch(value):
            problems.append(f"{name}: DeepSpeed's launcher carries only letters, digits, spaces and @+=:,./_- in this variable")
    if problems:
        raise UserError("\n  ".join(["the environment cannot travel to the other machines", *problems]))
    return Travelling(launcher, early, wanted)


def write_deepspeed_file(path: Path, variables: Mapping[str, str]) -> None:
    """A file for DS_ENV_FILE."""
    path.write_text("".join(f"{name}={value}\n" for name, value in variables.items()), encoding="utf-8")


def _deepspeed_file(environment: Mapping[str, str]) -> dict[str, str]:
    """What a file of the user's own tells DeepSpeed to forward: DS_ENV_FILE, or .deepspeed_env in the home folder or here."""
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    found: dict[str, str] = {}
    for folder in (Path(environment.get("HOME", os.sep)), Path()):
        file = folder / name
        if not file.is_file():
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            key, separator, value = line.partition("=")
            if separator:
                found[key.strip()] = value.strip()
            elif line.strip():
                raise UserError(f"{file}: {key!r}: expected lines NAME=VALUE")
    return found
