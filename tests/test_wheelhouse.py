"""The tool that collects wheels for a machine without a network, with an index of tiny wheels made here. No network is used: a
newer pip than this environment's comes from virtualenv, which carries one."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.tools import load_tool

wheelhouse = load_tool("wheelhouse")

OTHER = "3.12" if sys.version_info[:2] == (3, 11) else "3.11"
"""The Python that this one is not: its wheels and markers are those of the target."""
TAG = f"cp{OTHER.replace('.', '')}"
LINUX = f"{TAG}-{TAG}-manylinux_2_28_x86_64"
BACKEND = """
import os, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    name = "{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        info = "{name}-{version}.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: {tag}\\n")
        wheel.writestr(info + "RECORD", "")
    return name
"""


def wheel(folder: Path, name: str, version: str, requires: Sequence[str] = (), tag: str = "py3-none-any", size: int = 0) -> None:
    """A wheel of `size` bytes and a little."""
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        archive.writestr(f"{name}.py", f"VERSION = {version!r}\n" + "#" * size)
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")


def checkout(folder: Path, name: str, tag: str = "py3-none-any", **project: Any) -> Path:
    """A project that builds without a network."""
    folder.mkdir()
    (folder / "backend.py").write_text(BACKEND.format(name=name.replace("-", "_"), version="0.1", tag=tag))
    lines = ["[build-system]", "requires = []", 'build-backend = "backend"', 'backend-path = ["."]']
    stated = {"name": name, "version": "0.1", **project}
    lines += ["[project]", *(f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in stated.items())]
    extras = ["[project.optional-dependencies]", 'lora = ["peft>=0.1"]']
    (folder / "pyproject.toml").write_text("\n".join(lines + extras))
    return folder


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One that answers for another platform: this environment's, or a newer one."""
    spec = importlib.util.find_spec("virtualenv")
    assert spec is not None
    assert spec.origin is not None
    embedded = Path(spec.origin).parent / "seed" / "wheels" / "embed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(embedded))
        return wheelhouse.Pip.found(OTHER, tmp_path_factory.mktemp("pip"))


@pytest.fixture
def index(pip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that pip finds: this folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel(folder, "deepspeed", "0.19.8", ["hjson", "numpy", "torch>=2"])
    wheel(folder, "hjson", "3.1.0")
    wheel(folder, "numpy", "9.0", tag=LINUX)
    wheel(folder, "torch", "9.0", tag=LINUX)
    wheel(
        folder, "compiled", "1.0", [f"for_target; python_version=='{OTHER}'", f"for_host; python_version!='{OTHER}'"], tag=LINUX
    )
    wheel(folder, "compiled", "1.1", tag="cp39-cp39-manylinux_2_28_x86_64")
    wheel(folder, "compiled", "1.2", tag=LINUX.replace("x86_64", "aarch64"))
    wheel(folder, "for_target", "1.0", ["deeper"])
    wheel(folder, "for_host", "1.0")
    wheel(folder, "deeper", "1.0")
    wheel(folder, "pyarrow", "21.0", size=3_000_000)
    wheel(folder, "peft", "0.2")
    wheel(folder, "liger_kernel", "0.8")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(wheelhouse.Pip, "found", lambda python, workspace: dataclasses.replace(pip, python=python))
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = checkout(
        tmp_path / "checkout",
        "megatron-plasticity",
        requires_python=">=3.11,<3.13",
        dependencies=["torch>=2.11", "numpy>=2", "deepspeed>=0.19", "compiled>=1", "pyarrow>=21"],
    )
    monkeypatch.setattr(wheelhouse, "ROOT", folder)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name.split("-")[0] for path in folder.glob("*.whl")}


NEEDED = {"compiled", "deepspeed", "deeper", "for_target", "hjson", "megatron_plasticity"}


def test_what_the_target_lacks_is_collected_and_can_be_installed(
    index: Path, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the target's markers and tags, not this machine's; nothing that it has, and nothing that is left out."""
    output = tmp_path / "new" / "wheels"
    assert wheelhouse.main(["--output", str(output), "--python", OTHER]) == 0
    page = capsys.readouterr().out
    assert names(output) == NEEDED
    assert (output / f"compiled-1.0-{LINUX}.whl").is_file(), "the newest that fits"
    assert "in 6 wheels" in page
    assert "pyarrow (--extra evaluation): no `evaluate`" in page
    assert [path.name for path in output.parent.iterdir()] == ["wheels"], "nothing is left of the work"
    lines = [line.split("  ") for line in (output / "SHA256SUMS").read_text().splitlines()]
    sums = {name: sha256 for sha256, name in lines}
    assert {path.name for path in output.iterdir()} == {"SHA256SUMS", *sums}
    assert all(hashlib.sha256((output / name).read_bytes()).hexdigest() == sha256 for name, sha256 in sums.items())

    install = next(line.split() for line in page.splitlines() if "pip install" in line)
    assert install[:3] == ["python", "-m", "pip"]
    elsewhere = ["--target", str(tmp_path / "installed"), "--python-version", OTHER, "--only-binary=:all:"]
    platform = ["--platform", "manylinux_2_28_x86_64"]
    command = [sys.executable, *install[1:], *elsewhere, *platform]
    environment = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
    subprocess.run(command, cwd=output.parent, env=environment, check=True, capture_output=True)
    assert (tmp_path / "installed" / "compiled.py").read_text().startswith("VERSION = '1.0'")

    damaged = output / f"compiled-1.0-{LINUX}.whl"
    damaged.write_bytes(damaged.read_bytes() + b"more")
    refused = subprocess.run(command, cwd=output.parent, env=environment, capture_output=True, text=True)
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in refused.stderr


def test_more_on_request_over_the_limit_and_in_place_of_an_earlier_one(
    index: Path, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a description of the target by `pip inspect`: its own versions and requirements count."""
    output = tmp_path / "wheels"
    output.mkdir()
    (output / "old-1.0-py3-none-any.whl").write_bytes(b"old")
    (output / "SHA256SUMS").write_text("0  old-1.0-py3-none-any.whl\n")
    had = [("torch", "2.11.0+cu130", []), ("numpy", "1.26.4", []), ("hjson", "3.0.0", []), ("deeper", "0.9", [])]
    target = wheelhouse.assumed_target(OTHER, "2.11.0")
    described = {
        "environment": dict(target.environment),
        "installed": [{"metadata": {"name": n, "version": v, "requires_dist": r}} for n, v, r in had],
    }
    (tmp_path / "target.json").write_text(json.dumps(described))
    arguments = ["--output", str(output), "--python", OTHER, "--have", str(tmp_path / "target.json"), "--limit", "2"]
    assert wheelhouse.main([*arguments, "--extra", "evaluation", "lora", "--add", "liger-kernel>=0.8"]) == 1
    page, complaint = capsys.readouterr()
    assert names(output) == NEEDED - {"hjson", "deeper"} | {"numpy", "pyarrow", "peft", "liger_kernel"}
    assert "numpy 9.0   in place of 1.26.4, which does not fit" in page
    assert page.splitlines()[0].split()[2] == "pyarrow", "the largest first"
    assert "evaluation" not in page, "it is not left out"
    assert "is more than --limit 2" in complaint


def test_a_torch_that_is_too_old_is_not_replaced(
    index: Path, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wheelhouse.main(["--output", str(tmp_path / "wheels"), "--python", OTHER, "--torch", "2.10.0"]) == 2
    assert "torch 9.0 instead of 2.10.0" in capsys.readouterr().err
    assert not (tmp_path / "wheels").exists()


def test_a_package_without_a_wheel_for_the_target_is_named(
    index: Path, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel(index, "elsewhere", "1.0", tag="cp39-cp39-win_amd64")
    assert wheelhouse.main(["--output", str(tmp_path / "wheels"), "--python", OTHER, "--add", "elsewhere"]) == 2
    complaint = capsys.readouterr().err
    assert f"elsewhere: the index has no wheel for Python {OTHER} on Linux x86_64" in complaint
    assert complaint.count("error:") == 1
    assert not (tmp_path / "wheels").exists()


def sdist(index: Path, name: str, tag: str) -> None:
    """A package that the index has as source only."""
    folder = checkout(index / f"{name}-0.1", name, tag)
    (folder / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    with tarfile.open(index / f"{name}-0.1.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    shutil.rmtree(folder)


def test_what_exists_as_source_only_is_built_if_it_is_pure_python(
    index: Path, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sdist(index, "source", "py3-none-any")
    wheel(index, "needs_source", "1.0", ["source>=0.1"])
    arguments = ["--output", str(tmp_path / "wheels"), "--python", OTHER, "--add", "needs_source"]
    assert wheelhouse.main(arguments) == 0
    assert names(tmp_path / "wheels") == NEEDED | {"needs_source", "source"}

    sdist(index, "native", "cp39-cp39-linux_x86_64")
    assert wheelhouse.main([*arguments, "native"]) == 2
    complaint = capsys.readouterr().err
    assert "native: the index has no wheel" in complaint
    assert "building native here: its wheel came out as native-0.1-cp39-cp39-linux_x86_64.whl" in complaint
    assert names(tmp_path / "wheels") == NEEDED | {"needs_source", "source"}, "the earlier ones stay"


def test_requirements_that_contradict_one_another_are_named(
    index: Path, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel(index, "strict", "1.0", ["deeper>=2"])
    wheel(index, "deeper", "2.0")
    assert wheelhouse.main(["--output", str(tmp_path / "wheels"), "--python", OTHER, "--add", "strict", "deeper<2"]) == 2
    complaint = capsys.readouterr().err
    assert "strict 1.0 depends on deeper>=2" in complaint
    assert "requested deeper<2" in complaint


def test_no_network_is_told_in_one_message(
    index: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (index / "deepspeed-0.19.8-py3-none-any.whl").unlink()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert wheelhouse.main(["--output", str(tmp_path / "wheels")]) == 2
    assert "error: the package index cannot be reached" in capsys.readouterr().err


def test_a_wheel_that_fits_this_machine_alone_is_refused(index: Path, tmp_path: Path) -> None:
    pip = wheelhouse.Pip((sys.executable, "-m", "pip"), OTHER)
    (tmp_path / "built").mkdir()
    mine = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    source = checkout(tmp_path / "source", "mine", tag=f"{mine}-{mine}-linux_x86_64")
    with pytest.raises(wheelhouse.WheelhouseError, match="fits this machine alone"):
        wheelhouse.build([str(source)], pip, tmp_path / "built")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--python", "3.9"], r"--python 3.9: expected a version such as 3.12 .*>=3.11"),
        (["--python", "three"], r"--python three: expected a version"),
        (["--python", "3.12.1"], r"--python 3.12.1: expected a version"),
        (["--torch", "abc"], r"--torch abc: expected a version such as 2.11.0"),
        (["--torch", ""], r"--torch : expected a version"),
        (["--extra", "lora", "speed"], r"--extra speed: there is no such thing; known: evaluation, features, mlflow, hub"),
        (["--add", "liger kernel"], r"--add: "),
        (["--have", "nowhere.json"], r"--have nowhere.json: cannot be read"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wheelhouse.main(["--output", str(tmp_path / "wheels"), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "wheels").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert wheelhouse.main(["--output", str(tmp_path)]) == 2
    assert "holds what is no wheelhouse's (thesis.tex)" in capsys.readouterr().err
    assert wheelhouse.main(["--output", str(tmp_path / "thesis.tex")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "mine"


# --- what the target has ---

FREEZE = f"""
# editable things and comments
-e git+https://example.org/mine.git#egg=mine
torch==2.11.0+cu130
Jinja2==3.1.6
flash_attn @ file:///wheels/flash_attn-2.8.3%2Bcu13-{TAG}-{TAG}-linux_x86_64.whl#sha256=0
"""


def test_a_target_can_be_told_in_three_ways(tmp_path: Path) -> None:
    environment = dict(wheelhouse.assumed_target(OTHER, "2.11.0").environment)
    packages = [{"name": "torch", "version": "2.11.0+cu130"}, {"name": "Jinja2", "version": "3.1.6"}]
    inspected = {
        "environment": environment,
        "installed": [
            {"metadata": package | {"requires_dist": ["markupsafe"], "provides_extra": ["i18n"]}} for package in packages
        ],
    }
    for text in (FREEZE, json.dumps(packages), json.dumps(inspected)):
        (tmp_path / "target").write_text(text)
        target = wheelhouse.read_target(tmp_path / "target", OTHER)
        assert target.had["torch"].version == "2.11.0+cu130"
        assert target.had["jinja2"].version == "3.1.6"
        assert target.had["jinja2"].requires == (("markupsafe",) if text.startswith('{"env') else None)
    (tmp_path / "target").write_text(FREEZE)
    assert wheelhouse.read_target(tmp_path / "target", OTHER).had["flash-attn"].version == "2.8.3+cu13"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("numpy @ file:///croot/numpy_and_numpy_base_1708638617955/work/dist", "states no version, as conda's do not"),
        ("numpy", "is not NAME==VERSION"),
        ("numpy==of today", "not what `pip inspect`"),
        ("{}", "not what `pip inspect`"),
        ("[1]", "not what `pip inspect`"),
        ("numpy==2.4", "names no torch"),
    ],
)
def test_a_description_that_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "target").write_text(text)
    with pytest.raises(wheelhouse.WheelhouseError, match=message):
        wheelhouse.read_target(tmp_path / "target", OTHER)


def test_a_description_of_another_python_is_refused(tmp_path: Path) -> None:
    described = {
        "environment": {**wheelhouse.assumed_target("3.11", "2.11.0").environment},
        "installed": [{"metadata": {"name": "torch", "version": "2.11.0"}}],
    }
    (tmp_path / "target").write_text(json.dumps(described))
    with pytest.raises(wheelhouse.WheelhouseError, match=r"was made with Python 3.11, and --python says 3.12"):
        wheelhouse.read_target(tmp_path / "target", "3.12")


def test_an_extra_of_a_package_that_is_there_is_noted() -> None:
    """Whether aiohttp is there is known from `pip inspect` alone."""
    target = wheelhouse.assumed_target(OTHER, "2.11.0")
    found, unseen = wheelhouse._followed([wheelhouse.Requirement("fsspec[http]>=2024")], {}, target)
    assert unseen == []
    assert "fsspec[http] is asked for" in found.notes[0]


# --- what is left out ---


def test_every_part_is_declared_and_its_cost_told() -> None:
    declared = wheelhouse.tomllib.loads((wheelhouse.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "dependencies"
    ]
    parts = [name for packages in wheelhouse.PARTS.values() for name in packages]
    assert sorted(parts) == sorted(wheelhouse.NOT_FOR_TRAINING)
    assert set(parts) <= {wheelhouse.Requirement(line).name for line in declared}


def test_training_capture_and_analyses_import_nothing_that_is_left_out() -> None:
    """The kinds of work that the default is for; importing any of them where a package is missing must not fail."""
    code = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("pyarrow", "scipy", "mlflow", "sklearn", "datasets"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
import megatron_plasticity.training.pretrain, megatron_plasticity.training.finetune
import megatron_plasticity.evaluation.capture_job, megatron_plasticity.analysis.jobs
"""
    finished = subprocess.run([sys.executable, "-c", code], cwd=wheelhouse.ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_a_command_that_lacks_a_package_says_which(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_plasticity import cli

    def lacks(arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'pyarrow.parquet'", name="pyarrow.parquet")

    (doctor,) = (verb for verb in cli.VERBS if verb.words == ("doctor",))
    monkeypatch.setattr(cli, "VERBS", (dataclasses.replace(doctor, run=lacks),))
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    assert ended.value.code == 2
    assert "needs the package 'pyarrow', which is not installed" in capsys.readouterr().err
