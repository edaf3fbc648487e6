"""The README is true: every command in it parses, names files that exist and checks its config; its study loads."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from megatron_plasticity.cli import _parsed, main
from megatron_plasticity.config.load import load_config
from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.launch.job import LaunchedJob
from megatron_plasticity.study.plan import check_study

README = Path(__file__).resolve().parents[1] / "README.md"


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = [line for block in code_blocks("bash") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"{program} ")]


OURS = commands("megatron-plasticity")


def test_there_are_commands() -> None:
    assert {tuple(words[:2]) for words in OURS} >= {
        ("study", "plan"),
        ("study", "report"),
        ("data", "prepare"),
        ("analyze", "probes"),
    }


@pytest.mark.parametrize("words", [words for words in OURS if words[0] == "launch"], ids=" ".join)
def test_a_launch_is_understood(words: list[str], repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would ask machines that are not here; its parts are understood, and its config loads."""
    monkeypatch.chdir(repository)
    parsed = _parsed(words)
    assert (parsed.hostfile is not None) != parsed.slurm
    job = LaunchedJob.load(parsed.verb, parsed.config, parsed.overrides)
    assert isinstance(job.config, PretrainConfig)
    assert job.config.weight_decay == 1.0


@pytest.mark.parametrize(
    "words", [words for words in OURS if words[0] != "launch" and any(word.endswith(".yaml") for word in words)], ids=" ".join
)
def test_a_command_with_a_config_is_right(
    words: list[str], repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=8\nnode2 slots=8\n", encoding="utf-8")
    monkeypatch.chdir(repository)
    with pytest.raises(SystemExit) as ended:
        main([*(str(hostfile) if word == "hostfile" else word for word in words), "--dry-run"])
    assert ended.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("words", [words for words in OURS if words[-1].startswith("runs/")], ids=" ".join)
def test_a_command_with_a_folder_is_right(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing has run yet it says so: the words are right."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert words[-1] in capsys.readouterr().err


def test_the_launcher_line_starts_a_shipped_config(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (words,) = commands("deepspeed")
    assert words[words.index("--module") + 1] == "megatron_plasticity"
    monkeypatch.chdir(repository)
    with pytest.raises(SystemExit) as ended:
        main([*words[words.index("--module") + 2 :], "--dry-run"])
    assert ended.value.code == 0
    assert "weight decay: 1" in capsys.readouterr().out


def test_make_targets_exist(repository: Path) -> None:
    targets = set(re.findall(r"make ([a-z]+)", README.read_text(encoding="utf-8")))
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    assert {"quickstart", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_linked_files_exist(repository: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (repository / link).exists(), link


def test_pictures_are_pictures(repository: Path) -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README.read_text(encoding="utf-8"))
    assert pictures
    for picture in pictures:
        assert (repository / picture).read_bytes().startswith(b"\x89PNG"), picture


def test_the_study_in_the_readme_is_one(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / "configs", tmp_path / "configs")
    (block,) = code_blocks("yaml")
    path = tmp_path / "configs" / "studies" / "mine.yaml"
    path.write_text(block, encoding="utf-8")
    assert len(check_study(load_config(StudyConfig, path))) == 3
