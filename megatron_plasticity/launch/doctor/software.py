"""Versions: Python, this package, what it requires, compilers, and what only some studies need."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import megatron_plasticity
from megatron_plasticity.launch.doctor.facts import Compilers, Parts, Program, Requirement, Software
from megatron_plasticity.launch.doctor.probing import output_of

_DISTRIBUTION = "megatron-plasticity"
_RUN_TIME_EXTRAS = ("gpu", "data", "eval", "lora")
ONLY_FOR_METRICS = ("psutil", "nvidia-ml-py")
"""Declared, and without them a run lacks nothing but the utilisation of its machine."""
NOT_FOR_TRAINING = {
    "pyarrow": "no `evaluate` and `data prepare`, and of tasks and probe sets the procedural ones alone",
    "scipy": "no `analyze features`, no `study report` or `compare`",
    "mlflow": "no copy in MLflow until `megatron-plasticity mlflow sync` makes it where MLflow is",
    "scikit-learn": "no `tools/bench/probes.py`",
    "datasets": "no data sets from the hub",
}
"""Declared, large, and not imported by `pretrain`, `finetune`, `capture` and the other analyses; what fails without each."""
_OPTIONAL = ("vllm", "nvidia-ml-py", "psutil", "triton", "liger-kernel", "transformer-engine")
_COMMANDS = ("deepspeed", "ssh", "pdsh", "sbatch", "srun", "nvidia-smi")


def software() -> Software:
    """Python, this package, and every package that it declares. Raises ImportError where not even `packaging` is there."""
    from packaging.specifiers import SpecifierSet

    folder = Path(megatron_plasticity.__file__).resolve().parent
    commit, changed = _commit(folder)
    lines, python = declared_lines(folder)
    return Software(
        python=platform.python_version(),
        python_specifier=python,
        python_fits=platform.python_version() in SpecifierSet(python, prereleases=True),
        executable=sys.executable,
        project=megatron_plasticity.__version__,
        location=str(folder),
        commit=commit,
        changed=changed,
        requirements=tuple(requirements(lines)),
    )


def requirements(lines: Sequence[tuple[str, str | None]]) -> Iterator[Requirement]:
    """What is installed of requirements, each with the extra that it belongs to."""
    from packaging.requirements import Requirement as Declared

    for line, extra in lines:
        declared = Declared(line)
        installed = _version(declared.name)
        fits = installed is not None and declared.specifier.contains(installed, prereleases=True)
        yield Requirement(declared.name, str(declared.specifier), installed, fits, extra)


def declared_lines(folder: Path) -> tuple[list[tuple[str, str | None]], str]:
    """Our requirements with their extras, and the Pythons we run on: as a checkout declares them, else as they were installed.
    (An editable installation keeps what was declared on the day it was made.)"""
    project = _pyproject(folder.parent)
    if project is not None:
        extras = project.get("optional-dependencies", {})
        lines: list[tuple[str, str | None]] = [(line, None) for line in project["dependencies"]]
        lines += [(line, extra) for extra in _RUN_TIME_EXTRAS for line in extras.get(extra, ())]
        return lines, project["requires-python"]
    from packaging.requirements import Requirement as Declared

    metadata = importlib.metadata.metadata(_DISTRIBUTION)
    lines = []
    for line in importlib.metadata.requires(_DISTRIBUTION) or ():
        declared = Declared(line)
        marker, declared.marker = declared.marker, None
        if marker is None or marker.evaluate({"extra": ""}):
            lines.append((str(declared), None))
        else:
            lines += [(str(declared), extra) for extra in _RUN_TIME_EXTRAS if marker.evaluate({"extra": extra})]
    return lines, metadata["Requires-Python"] or ""


def _pyproject(folder: Path) -> dict[str, Any] | None:
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return None
    return project if project.get("name") == _DISTRIBUTION else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> tuple[str | None, bool]:
    """The commit of the checkout that `folder` is part of, and whether tracked files differ from it."""
    if shutil.which("git") is None:
        return None, False
    git = ("git", "-C", str(folder), "--no-optional-locks")
    try:
        if not output_of([*git, "ls-files", "__init__.py"]).strip():
            return None, False  # it lies in somebody else's repository, such as an environment in a project's folder
        commit = output_of([*git, "rev-parse", "--short=10", "HEAD"]).strip()
        return commit, bool(output_of([*git, "status", "--porcelain", "--untracked-files=no", "--", "."]).strip())
    except OSError:
        return None, False


def compilers() -> Compilers:
    """Those that torch.compile and DeepSpeed's operations would be built with."""
    cxx, ninja = shutil.which(os.environ.get("CXX", "c++")), shutil.which("ninja")
    cuda_home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(cuda_home, "bin", "nvcc")) if cuda_home else shutil.which("nvcc")
    release = None
    if nvcc is not None and Path(nvcc).is_file():
        words = output_of([nvcc, "--version"]).replace(",", " ").split()
        release = words[words.index("release") + 1] if "release" in words else None
    return Compilers(
        cxx=output_of([cxx, "--version"]).splitlines()[0] if cxx else None,
        nvcc=release,
        cuda_home=cuda_home,
        ninja=output_of([ninja, "--version"]).strip() if ninja else None,
    )


def parts() -> Parts:
    """Packages that are used where they are there, commands, and where models from the hub are kept."""
    from huggingface_hub import constants

    beside = Path(sys.executable).parent
    commands = {name: shutil.which(name) or shutil.which(name, path=str(beside)) for name in _COMMANDS}
    return Parts(
        packages=tuple(Program(name, _version(name)) for name in _OPTIONAL),
        commands=tuple(Program(name, path) for name, path in commands.items()),
        foreign_apex=_foreign_apex(),
        hub_cache=constants.HF_HUB_CACHE,
        hub_offline=constants.HF_HUB_OFFLINE,
    )


def is_nvidia_apex(folder: Path) -> bool:
    """Whether a package called apex is NVIDIA's: the one of that name on PyPI is a toolkit for web applications."""
    return (folder / "optimizers" / "fused_adam.py").is_file() and (folder / "multi_tensor_apply").is_dir()


def apex_folder() -> Path | None:
    """Where a package called apex lies, whoever's it is; it is not imported."""
    found = importlib.util.find_spec("apex")
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


def _foreign_apex() -> str | None:
    folder = apex_folder()
    return (_version("apex") or "unknown version") if folder is not None and not is_nvidia_apex(folder) else None
