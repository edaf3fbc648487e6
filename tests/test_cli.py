"""The command line as a person meets it: what it prints, how it ends, and what it says about bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_plasticity.cli import VERBS
from tests.commands import Run
from tests.study.small import small_tree


@pytest.fixture
def debug_run(repository: Path, tiny_corpus: Path, tmp_path: Path) -> list[str]:
    """The shipped debug run, on the tiny corpus."""
    return [
        str(repository / "configs/runs/llama2-debug.yaml"),
        f"data.folder={tiny_corpus}",
        f"output={tmp_path / 'runs'}",
        "steps=4",
    ]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: "-".join(verb.words))
def test_help_fits_a_screen_and_has_an_example(run: Run, verb: object) -> None:
    words = verb.words  # type: ignore[attr-defined]
    code, out, _ = run(*words, "--help")
    assert code == 0
    assert len(out.splitlines()) <= 24
    assert f"megatron-plasticity {' '.join(words)}" in out.split("example:")[1]


def test_the_examples_in_the_help_name_files_that_ship(repository: Path) -> None:
    for verb in VERBS:
        if verb.takes == "config":
            assert (repository / verb.example.split()[0]).is_file(), verb.example


def test_main_help_lists_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert len(out.splitlines()) <= 36
    for verb in VERBS:
        assert f"{' '.join(verb.words)} " in out


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["optimizer.wd=1"], ["optimizer.wd: unknown key"]),
        (["steps=many"], ["steps:", "'many'"]),
        (["model.kv_heads=3"], ["kv_heads=3 must divide query_heads"]),
        (["batch.micro_batch_size=3"], ["micro_batch_size=3 must divide global_batch_size=8"]),
        (["steps=null"], ["exactly one of `steps` and `tokens`"]),
        (
            ["optimizer.weight_decay=-1", "stepz=1", "schedule.kind=cosin"],
            ["weight_decay", "did you mean 'steps'", "schedule.kind", "3 problems"],
        ),
        (["steps"], ["expected key.path=value"]),
        (["model.layers.x=1"], ["'layers' is a value, not a section"]),
        (["batch.global_batch_size=[1"], ["not valid YAML"]),
    ],
)
def test_a_bad_config_is_one_message_and_exit_code_2(
    run: Run, debug_run: list[str], overrides: list[str], messages: list[str]
) -> None:
    code, _, err = run("pretrain", *debug_run, *overrides)
    assert code == 2
    for message in messages:
        assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such config file"),
        ("- 1\n", "a config is a mapping"),
        ("a: [\n", "not valid YAML"),
        ("extends: nowhere.yaml\n", "nowhere.yaml: no such config file (named by `extends`"),
        ("extends: config.yaml\n", "goes round in a circle"),
        ("extends: 3\n", "`extends` takes the path of one file"),
        (b"\xff\xfe\x00", "cannot be read as a text file"),
    ],
)
def test_a_bad_file(run: Run, tmp_path: Path, content: str | bytes | None, message: str) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    code, _, err = run("pretrain", path)
    assert code == 2
    assert message in err


def test_a_misspelt_file_names_the_nearest(run: Run, repository: Path) -> None:
    code, _, err = run("pretrain", repository / "configs/runs/lama2-debug.yaml")
    assert code == 2
    assert "did you mean" in err
    assert "llama2-debug.yaml" in err


def test_extends_lies_underneath_at_any_depth(run: Run, tmp_path: Path, debug_run: list[str]) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"extends: {debug_run[0]}\noptimizer:\n  learning_rate: 0.5\n")
    code, out, _ = run("pretrain", config, *debug_run[1:], "--dry-run")
    assert code == 0
    printed = yaml.safe_load(out.split("parameters:")[0])
    assert printed["optimizer"]["learning_rate"] == 0.5
    assert printed["optimizer"]["weight_decay"] == 0.1
    assert printed["steps"] == 4


def test_a_dry_run_starts_nothing(run: Run, debug_run: list[str], tmp_path: Path) -> None:
    code, out, _ = run("pretrain", *debug_run, "--dry-run")
    assert code == 0
    assert "weight decay: 0.1" in out
    assert not (tmp_path / "runs").exists()


def test_from_pretraining_to_every_analysis(run: Run, debug_run: list[str], repository: Path, tmp_path: Path) -> None:
    """The commands of the README's tour, on the smallest model."""
    output = f"output={tmp_path / 'runs'}"
    code, out, err = run("pretrain", *debug_run, "logging.mlflow=false", "batch.global_batch_size=4")
    assert code == 0, err
    assert "held_out_loss" in out
    base = out.strip().splitlines()[-1]
    code, out, err = run(
        "finetune",
        repository / "configs/finetune/debug.yaml",
        f"base={base}",
        output,
        "logging.mlflow=false",
        "task.train_examples=16",
    )
    assert code == 0, err
    tuned = out.strip().splitlines()[-1]
    evaluation = (
        repository / "configs/evaluate/debug.yaml",
        f"run={tuned}",
        output,
        "tasks=[{name: arithmetic, test_examples: 4}]",
    )
    code, out, err = run("evaluate", *evaluation)
    assert code == 0, err
    assert "greedy" in out
    assert (Path(out.strip().splitlines()[-1]) / "samples.parquet").is_file()
    for analysis, overrides in {
        "probes": ["train_texts=30", "test_texts=20", "seeds=[0]"],
        "attention": [],
        "overfitting": ["sequences=8"],
        "features": ["sequences=8"],
    }.items():
        config = repository / "configs" / "analyze" / f"{analysis}.yaml"
        code, out, err = run("analyze", analysis, config, f"run={base}", output, *overrides)
        assert code == 0, err
        assert Path(out.strip().splitlines()[-1], "results.json").is_file()


@pytest.mark.parametrize("verb", [("evaluate",), ("analyze", "probes"), ("analyze", "overfitting"), ("analyze", "features")])
def test_a_model_that_is_not_there(run: Run, repository: Path, tmp_path: Path, verb: tuple[str, ...]) -> None:
    config = repository / ("configs/evaluate/debug.yaml" if verb == ("evaluate",) else f"configs/analyze/{verb[1]}.yaml")
    code, _, err = run(*verb, config, f"run={tmp_path / 'nothing'}", f"output={tmp_path}")
    assert code == 2
    assert "no such checkpoint or run folder" in err


def test_study_plan_prints_the_grid(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(small_tree(tmp_path)))
    code, out, _ = run("study", "plan", path)
    assert code == 0
    assert "2 base models, 18 runs in all" in out


def test_a_folder_that_is_no_study(run: Run, tmp_path: Path) -> None:
    for verb in ("status", "report"):
        code, _, err = run("study", verb, tmp_path)
        assert code == 2
        assert "study.json" in err


def test_output_into_a_closed_pipe_is_no_error(repository: Path) -> None:
    dry_run = f"{sys.executable} -m megatron_plasticity pretrain configs/runs/llama2-debug.yaml --dry-run"
    script = f"{dry_run} | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", script], cwd=repository, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr


def test_ctrl_c_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    from megatron_plasticity import verbs

    def interrupted(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "study_status", interrupted)
    monkeypatch.setattr(
        "megatron_plasticity.cli.VERBS",
        tuple(
            v if v.words != ("study", "status") else type(v)(v.words, interrupted, v.summary, v.example, v.takes) for v in VERBS
        ),
    )
    code, _, err = run("study", "status", "x")
    assert code == 130
    assert "run the same command again" in err
