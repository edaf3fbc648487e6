"""Collect the wheels that a machine without a network still needs, which has torch and transformers already.

    python tools/wheelhouse.py --output wheels
    python tools/wheelhouse.py --output wheels --have target.json --extra evaluation --limit 100

The target is Linux on x86_64 with glibc 2.28 or newer. What it has is assumed (torch, transformers, and what these require), or
is in the file of --have, which one of these makes there. The first says the most: what each package requires, too.

    python -m pip inspect --local > target.json
    python -m pip list --format=json > target.json
    python -m pip freeze > target.txt

pip decides what is needed, in an environment that is made to look like the target; your settings of pip (an index of your own, a
proxy) hold. Exit code: 0; 1 if the wheels weigh more than --limit, which are there all the same; 2 if there are none.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from megatron_plasticity.config.files import sha256_file
from megatron_plasticity.launch.doctor.software import NOT_FOR_TRAINING

ROOT = Path(__file__).resolve().parent.parent
SUMS, REQUIREMENTS = "SHA256SUMS", "requirements.txt"
LIMIT = 45.0
PYTHON = "3.12"
TORCH = "2.11.0"

BUILD = {"DS_BUILD_OPS": "0"}
"""The environment of a build. Without compiled operations, none of which our settings use, DeepSpeed is pure Python."""

GLIBC = 28  # glibc 2.28, that of RHEL 8
OLDEST_PIP = Version("23.3")
"""The first that answers for another platform without installing."""
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)),
    *(f"manylinux{name}_x86_64" for name in ("2014", "2010", "1")),
)

ASSUMED = """
    anyio==4.16.0 certifi==2026.10.18 click==8.5.1 filelock==4.2.11 fsspec==2026.9.0 h11==0.16.0 hf-xet==1.8.0 httpcore==1.0.9
    httpx==0.28.1 huggingface-hub==1.33.0 idna==3.20 jinja2==3.1.6 markdown-it-py==4.3.0 markupsafe==3.0.3 mdurl==0.1.2
    mpmath==1.3.0 networkx==3.6.1 numpy==2.5.5 packaging==26.3 pygments==2.21.0 pyyaml==6.0.3 regex==2026.11.15 rich==15.0.0
    safetensors==0.8.0 setuptools==80.9.0 shellingham==1.5.4 sympy==1.14.0 tokenizers==0.23.3 tqdm==4.70.1 transformers==5.17.0
    triton==3.6.0 typer==0.29.2 typing-extensions==4.16.0
"""
"""What a machine with torch 2.11 and transformers 5.17 has, beside torch itself and its CUDA libraries."""
NEVER_CARRIED = ("torch", "triton")
"""A torch from the index would replace the one that was built for the target's driver."""


PARTS = {"evaluation": ("pyarrow",), "features": ("scipy",), "mlflow": ("mlflow", "scikit-learn"), "hub": ("datasets",)}
"""What is left out unless --extra asks for it; `NOT_FOR_TRAINING` says what that costs."""


class WheelhouseError(Exception):
    """Says what is wrong and what to do; nothing was written."""


class PipError(WheelhouseError):
    """pip failed."""

    def __init__(self, complaint: str, python: str) -> None:
        super().__init__(explained(complaint, python))
        self.without_wheel = without_wheel(complaint)


@dataclass(frozen=True)
class Had:
    """A package of the target."""

    name: str
    version: str
    requires: tuple[str, ...] | None = None
    """As its metadata says; None where that is not known."""
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """The machine that the wheels are for."""

    python: str
    had: Mapping[str, Had]
    environment: Mapping[str, str]
    """What the markers of requirements are about."""
    described: str
    """For a person: how the packages are known."""


@dataclass
class Found:
    """What pip said."""

    wheels: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name, each as in pip's report."""
    notes: list[str] = field(default_factory=list)


# --- what the target has ---


def assumed_target(python: str, torch: str) -> Target:
    """A machine with torch and transformers, and what these require."""
    return _target(python, [*_pinned(ASSUMED.split()), Had("torch", torch)], f"assumed: torch {torch}, transformers 5.17")


def read_target(path: Path, python: str) -> Target:
    """The target as `pip inspect`, `pip list --format=json` or `pip freeze` described it. Raises WheelhouseError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise WheelhouseError(f"--have {path}: cannot be read: {error}") from None
    environment: Mapping[str, str] | None = None
    try:
        listed = json.loads(text) if text.lstrip().startswith(("{", "[")) else None
        if isinstance(listed, dict):
            had = [_inspected(entry["metadata"]) for entry in listed["installed"]]
            environment = {key: str(value) for key, value in listed["environment"].items()}
        elif listed is not None:
            had = [Had(entry["name"], entry["version"]) for entry in listed]
        else:
            had = list(_pinned(_frozen_lines(text)))
        for package in had:
            Version(package.version)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WheelhouseError(
            f"--have {path}: not what `pip inspect`, `pip list --format=json` or `pip freeze` writes ({error}); make it on the "
            "target with `python -m pip inspect --local`"
        ) from None
    target = _target(python, had, str(path), environment)
    if "torch" not in target.had:
        raise WheelhouseError(f"--have {path}: names no torch; this tool is for machines that have it (docs/install.md)")
    said = target.environment["python_version"]
    if said != python:
        raise WheelhouseError(f"--have {path}: was made with Python {said}, and --python says {python}")
    return target


def _target(python: str, had: Iterable[Had], described: str, environment: Mapping[str, str] | None = None) -> Target:
    if environment is None:
        environment = {
            **{key: str(value) for key, value in default_environment().items()},
            "python_version": python,
            "python_full_version": f"{python}.0",
            "implementation_name": "cpython",
            "implementation_version": f"{python}.0",
            "platform_python_implementation": "CPython",
            "os_name": "posix",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": "x86_64",
        }
    return Target(python, {canonicalize_name(package.name): package for package in had}, environment, described)


def _inspected(metadata: Mapping[str, Any]) -> Had:
    requires, extras = metadata.get("requires_dist", ()), metadata.get("provides_extra", ())
    return Had(metadata["name"], metadata["version"], tuple(requires), tuple(extras))


def _frozen_lines(text: str) -> Iterable[str]:
    for line in text.splitlines():
        stripped = line.split(" ;")[0].strip()
        if not stripped or stripped.startswith(("#", "-")):
            continue  # what is installed from a folder (-e) has nothing to do with the wheels
        name, at, address = stripped.partition(" @ ")
        if at:
            file = unquote(urlsplit(address).path).rpartition("/")[2]
            try:
                stripped = f"{name}=={parse_wheel_filename(file)[1]}"
            except InvalidWheelFilename:
                raise ValueError(
                    f"the line `{stripped}` states no version, as conda's do not; `pip list --format=json` states it"
                ) from None
        yield stripped


def _pinned(lines: Iterable[str]) -> Iterable[Had]:
    for line in lines:
        name, equals, version = line.replace("===", "==").partition("==")
        if not equals:
            raise ValueError(f"the line `{line}` is not NAME==VERSION")
        yield Had(name.strip(), version.strip())


# --- what the project needs ---


def project_requirements(
    project: Mapping[str, Any], extras: Sequence[str], everything: bool, target: Target
) -> list[Requirement]:
    """What to ask pip for. `extras` are parts, or extras of the project; with `everything` nothing is left out."""
    optional = project.get("optional-dependencies", {})
    unknown = [extra for extra in extras if extra not in PARTS and extra not in optional]
    if unknown:
        known = ", ".join([*PARTS, *(name for name in optional if name not in PARTS)])
        raise WheelhouseError(f"--extra {' '.join(unknown)}: there is no such thing; known: {known}")
    left_out = set() if everything else {name for part in PARTS if part not in extras for name in PARTS[part]}
    lines = [*project["dependencies"], *(line for extra in extras for line in optional.get(extra, ()))]
    wanted = [Requirement(line) for line in lines]
    return [r for r in wanted if canonicalize_name(r.name) not in left_out and _concerns(r, target, frozenset())]


def _concerns(requirement: Requirement, target: Target, extras: Iterable[str]) -> bool:
    """Whether the target meets the requirement's marker, for a package that was asked for with `extras`."""
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({**target.environment, "extra": extra}) for extra in ("", *extras))


def resolve(wanted: Sequence[Requirement], target: Target, pip: Pip, built: Path, workspace: Path) -> Found:
    """What pip would install on the target beside what it has. To `built` come wheels of what the index has as source only."""
    python = pretended(target, workspace / "pretended")
    wanted = list(wanted)
    tried: set[str] = set()
    while True:
        report = workspace / "report.json"
        lines = workspace / "wanted.txt"
        lines.write_text("".join(f"{_unmarked(requirement)}\n" for requirement in wanted), encoding="utf-8")
        options = ["--dry-run", "--report", str(report), *_platform_options(target, built), "-r", str(lines)]
        try:
            pip.run(["--python", str(python), "install", *options])
        except PipError as error:
            sources = [line for line in error.without_wheel if line not in tried]
            if not sources:
                raise
            tried.update(sources)
            for line in sources:
                build_source(line, pip, built, error)
            continue
        wheels: dict[str, dict[str, Any]] = {
            canonicalize_name(w["metadata"]["name"]): w for w in json.loads(report.read_bytes())["install"]
        }
        found, unseen = _followed(wanted, wheels, target)
        if not unseen:
            return found
        # pip goes by the markers of the Python that runs it: what only the target's ask for, it has to be told.
        wanted += unseen


def _followed(
    wanted: Sequence[Requirement], wheels: Mapping[str, dict[str, Any]], target: Target
) -> tuple[Found, list[Requirement]]:
    """Those of pip's wheels that the target needs, by its own markers; and what it needs that is not among them."""
    found = Found()
    unseen: dict[str, Requirement] = {}
    waiting, done = list(wanted), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (key := (name, frozenset(requirement.extras))) in done:
            continue
        done.add(key)
        if name in wheels:
            found.wheels[name] = wheels[name]
            required = map(Requirement, wheels[name]["metadata"].get("requires_dist", ()))
            waiting += [r for r in required if _concerns(r, target, requirement.extras)]
        elif name not in target.had:
            unseen[name] = requirement
        elif requirement.extras and target.had[name].requires is None:
            extras = ",".join(sorted(requirement.extras))
            found.notes.append(
                f"{name}[{extras}] is asked for; whether the target has what its extra needs is known from `pip inspect` alone"
            )
    return found, list(unseen.values())


def _unmarked(requirement: Requirement) -> str:
    plain = Requirement(str(requirement))
    plain.marker = None
    return str(plain)


def pretended(target: Target, folder: Path) -> Path:
    """An environment in which pip finds what the target has: metadata without code. Returns its interpreter."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name, package in target.had.items():
        metadata = Message()
        for key, value in (
            ("Metadata-Version", "2.1"),
            ("Name", package.name),
            ("Version", package.version),
            *(("Requires-Dist", line) for line in package.requires or ()),
            *(("Provides-Extra", extra) for extra in package.extras),
        ):
            metadata[key] = value
        info = packages / f"{name.replace('-', '_')}-{package.version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(str(metadata), encoding="utf-8")
        (info / "RECORD").touch()
    return folder / "bin" / "python"


def _platform_options(target: Target, built: Path) -> list[str]:
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    python = ["--python-version", target.python, "--implementation", "cp"]
    return ["--only-binary=:all:", "--find-links", str(built), *python, *platforms]


@dataclass(frozen=True)
class Pip:
    """A pip that can answer for another platform."""

    command: tuple[str, ...]
    python: str
    """Version of the target's Python, for messages."""

    @classmethod
    def found(cls, python: str, workspace: Path) -> Pip:
        """This interpreter's, or a newer one, fetched into the workspace. Raises WheelhouseError."""
        try:
            version = Version(importlib.metadata.version("pip"))
        except importlib.metadata.PackageNotFoundError:
            raise WheelhouseError(f"{sys.executable} has no pip; `{sys.executable} -m ensurepip` brings it") from None
        own = cls((sys.executable, "-m", "pip"), python)
        if version >= OLDEST_PIP:
            return own
        own.run(["install", "--quiet", "--target", str(workspace / "pip"), f"pip>={OLDEST_PIP}"])
        return cls((sys.executable, str(workspace / "pip" / "pip")), python)

    def run(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Raises WheelhouseError with what to do."""
        options = ["--disable-pip-version-check", "--no-input", "--retries", "2"]
        environment = {**os.environ, **(environment or {})}
        finished = subprocess.run([*self.command, *options, *arguments], env=environment, capture_output=True, text=True)
        if finished.returncode != 0:
            raise PipError(finished.stdout + finished.stderr, self.python)


_NO_NETWORK = re.compile(r"Retrying \(|NewConnectionError|ConnectTimeout|ProxyError|Max retries exceeded|name resolution")
_NO_WHEEL = re.compile(r"No matching distribution found for (\S+)")
_NO_WHEELS = re.compile(r"no matching distributions available for your environment:\n((?: +\S+\n)+)")


def without_wheel(complaint: str) -> list[str]:
    """Requirements for which pip found nothing that fits the target."""
    listed = "".join(_NO_WHEELS.findall(complaint)).split()
    return sorted({*_NO_WHEEL.findall(complaint), *listed})


def explained(complaint: str, python: str) -> str:
    """What to do about an error of pip."""
    errors = [line for line in complaint.splitlines() if line.lower().startswith("error")]
    said = "\n  ".join(dict.fromkeys(errors or complaint.strip().splitlines()[-3:]))
    if _NO_NETWORK.search(complaint):
        return f"the package index cannot be reached: run this where there is a network, with pip's settings for it\n  {said}"
    names = ", ".join(without_wheel(complaint))
    lacks = f"{names}: the index has no wheel for Python {python} on Linux x86_64 (glibc 2.{GLIBC}), or not of such a version"
    if "ResolutionImpossible" in complaint:
        conflict = [line.strip() for line in complaint.splitlines() if " depends on " in line or "requested " in line]
        why = [lacks] if names else []
        return "\n  ".join(["the requirements cannot be met together:", *dict.fromkeys(conflict), *why])
    if names:
        return f"{lacks}; build one and let pip find it (PIP_FIND_LINKS names a folder), or leave it out"
    return f"pip failed\n  {said}"


# --- the wheels ---


def build_source(line: str, pip: Pip, built: Path, missing: PipError) -> None:
    """Build the wheel of a requirement that the index has as source only. Raises WheelhouseError."""
    try:
        build(["--no-binary", Requirement(line).name, line], pip, built)
    except WheelhouseError as error:
        raise WheelhouseError(f"{missing}\n  building {line} here: {error}") from None


def build(what: Sequence[str], pip: Pip, built: Path) -> str:
    """Build the wheel of a requirement or a checkout; returns its file name. Raises WheelhouseError for one that fits this
    machine alone."""
    before = set(built.iterdir())
    pip.run(["wheel", "--quiet", "--no-deps", "--wheel-dir", str(built), *what], BUILD)
    (wheel,) = set(built.iterdir()) - before
    if not wheel.name.endswith(("-py3-none-any.whl", "-py2.py3-none-any.whl")):
        raise WheelhouseError(f"its wheel came out as {wheel.name}, which fits this machine alone, not any with Python 3")
    return wheel.name


def download(found: Found, target: Target, pip: Pip, built: Path, folder: Path, workspace: Path) -> None:
    """Fetch the wheels of pip's report, hash by hash."""
    if not found.wheels:
        return
    lines = workspace / "download.txt"
    lines.write_text("".join(f"{_pin(wheel)}\n" for wheel in found.wheels.values()), encoding="utf-8")
    options = ["--quiet", "--no-deps", "--require-hashes", *_platform_options(target, built)]
    pip.run(["download", *options, "--dest", str(folder), "-r", str(lines)])


def _pin(wheel: Mapping[str, Any]) -> str:
    sha256 = wheel["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{canonicalize_name(wheel['metadata']['name'])}=={wheel['metadata']['version']} --hash=sha256:{sha256}"


def write_lists(folder: Path, described: str) -> None:
    """SHA256SUMS and requirements.txt for the wheels of a folder."""
    sums, lines = [], [f"# {described}", f"# {install_command(Path('wheels'))}"]
    for wheel in sorted(folder.glob("*.whl")):
        name, version, *_ = parse_wheel_filename(wheel.name)
        sha256 = sha256_file(wheel)
        sums.append(f"{sha256}  {wheel.name}")
        lines.append(f"{name}=={version} --hash=sha256:{sha256}")
    (folder / REQUIREMENTS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    sums.append(f"{sha256_file(folder / REQUIREMENTS)}  {REQUIREMENTS}")
    (folder / SUMS).write_text("".join(f"{line}\n" for line in sums), encoding="utf-8")


def install_command(folder: Path) -> str:
    """What to type on the target."""
    name = shlex.quote(str(folder))
    return f"python -m pip install --no-index --find-links {name} --no-deps --require-hashes -r {name}/{REQUIREMENTS}"


def check_output(folder: Path) -> None:
    """Raise WheelhouseError unless the folder is new, empty, or an earlier wheelhouse."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise WheelhouseError(f"--output {folder}: is a file; name a folder")
    sums = folder / SUMS
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else []
    ours = {SUMS, *(line.partition("  ")[2] for line in lines)} if lines else set()
    others = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    if others:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        raise WheelhouseError(f"--output {folder}: holds what is no wheelhouse's ({shown}); name a new folder, or an empty one")


def put(folder: Path, output: Path) -> None:
    """Let `folder` take the place of an earlier wheelhouse."""
    if output.exists():
        shutil.rmtree(output)
    shutil.move(folder, output)


# --- the page ---


def table(folder: Path, target: Target) -> list[str]:
    """Lines: the wheels by size, what they replace on the target, and the total."""
    wheels = sorted(folder.glob("*.whl"), key=lambda wheel: (-wheel.stat().st_size, wheel.name))
    lines = []
    for wheel in wheels:
        name, version, *_ = parse_wheel_filename(wheel.name)
        had = target.had.get(name)
        replaces = "" if had is None else f"   in place of {had.version}, which does not fit"
        lines.append(f"{wheel.stat().st_size / 1e6:8.2f} MB  {name} {version}{replaces}")
    return [*lines, f"{total(folder) / 1e6:8.2f} MB  in {len(wheels)} wheels"]


def total(folder: Path) -> int:
    """Bytes of all wheels."""
    return sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))


def left_out(found: Found, target: Target) -> list[str]:
    """Lines: each package that is left out, and what that costs."""
    there = {*target.had, *found.wheels}
    lines = []
    for part, packages in PARTS.items():
        lines += [f"  {name} (--extra {part}): {NOT_FOR_TRAINING[name]}" for name in packages if name not in there]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the wheels; an earlier wheelhouse is replaced")
    parser.add_argument("--python", default=PYTHON, help=f"version of the target's Python [{PYTHON}]")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--torch", default=TORCH, help=f"version of torch that it is assumed to have [{TORCH}]")
    what.add_argument("--have", type=Path, metavar="FILE", help="what it has [torch and transformers, and what they require]")
    which = parser.add_mutually_exclusive_group()
    extras = f"{', '.join(PARTS)}, or an extra of pyproject.toml such as lora"
    which.add_argument("--extra", nargs="+", default=[], metavar="NAME", help=f"carry this too: {extras}")
    which.add_argument("--all", action="store_true", help="carry all that pyproject.toml requires, whatever it weighs")
    parser.add_argument("--add", nargs="+", default=[], metavar="REQUIREMENT", help="carry this too, such as liger-kernel")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="MB", help=f"exit with 1 if it is more [{LIMIT:g}]")
    parsed = parser.parse_args(arguments)
    try:
        return collect(parsed)
    except WheelhouseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def collect(parsed: argparse.Namespace) -> int:
    """All of it; returns the exit code."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    check_python(parsed.python, project["requires-python"])
    check_torch(parsed.torch)
    check_output(parsed.output)
    target = read_target(parsed.have, parsed.python) if parsed.have else assumed_target(parsed.python, parsed.torch)
    wanted = project_requirements(project, parsed.extra, parsed.all, target) + added(parsed.add)
    parsed.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".wheelhouse-", dir=parsed.output.parent) as temporary:
        workspace = Path(temporary).resolve()
        built, folder = workspace / "built", workspace / "wheels"
        built.mkdir()
        folder.mkdir()
        pip = Pip.found(parsed.python, workspace)
        found = resolve(wanted, target, pip, built, workspace)
        refused = [name for name in NEVER_CARRIED if name in found.wheels]
        if refused:
            changes = ", ".join(_change(found, target, name) for name in refused)
            raise WheelhouseError(f"the target has to change first what this tool never carries: {changes} (docs/install.md)")
        own = build([str(ROOT)], pip, built)
        download(found, target, pip, built, folder, workspace)
        shutil.copy2(built / own, folder / own)
        write_lists(folder, f"for Python {parsed.python} on Linux x86_64; what is there already: {target.described}")
        put(folder, parsed.output)
    print("\n".join(table(parsed.output, target)))
    for note in found.notes:
        print(f"note: {note}")
    missing = left_out(found, target)
    if missing:
        print("left out, with what that costs:", *missing, sep="\n")
    print(f"the target ({target.described}; Python {parsed.python}) installs them without a network by")
    print(f"  {install_command(Path(parsed.output.name))}")
    print("and `megatron-plasticity doctor` tells there what it lacks.")
    if not parsed.all and total(parsed.output) > parsed.limit * 1e6:
        print(f"error: {total(parsed.output) / 1e6:.2f} MB is more than --limit {parsed.limit:g}", file=sys.stderr)
        return 1
    return 0


def check_python(python: str, requires: str) -> None:
    """Raise WheelhouseError for a version that the project does not run on, or that is none."""
    if not re.fullmatch(r"\d+\.\d+", python) or not SpecifierSet(requires).contains(f"{python}.0"):
        raise WheelhouseError(f"--python {python}: expected a version such as {PYTHON} that the project runs on ({requires})")


def check_torch(torch: str) -> None:
    """Raise WheelhouseError for what is no version."""
    try:
        Version(torch)
    except InvalidVersion:
        raise WheelhouseError(f"--torch {torch}: expected a version such as {TORCH}, as `pip show torch` says it") from None


def added(lines: Sequence[str]) -> list[Requirement]:
    """--add as requirements."""
    try:
        return [Requirement(line) for line in lines]
    except InvalidRequirement as error:
        raise WheelhouseError(f"--add: {error}") from None


def _change(found: Found, target: Target, name: str) -> str:
    wheel = found.wheels[name]["metadata"]["version"]
    return f"{name} {wheel} instead of {target.had[name].version if name in target.had else 'none'}"


if __name__ == "__main__":
    sys.exit(main())
