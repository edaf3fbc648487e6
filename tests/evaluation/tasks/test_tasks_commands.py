"""`tasks prepare`, `tasks list` and `tasks show` as a person meets them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import Run
from tests.evaluation.tasks.rows import write_files
from tests.tools import load_tool


def test_prepare_list_and_show_a_task_of_ones_own(run: Run, data: Path, own_file: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    code, out, err = run("tasks", "prepare", own_file, "--from", data, "--output", tasks)
    assert (code, "Traceback" in err) == (0, False)
    assert "sums: 20 training examples" in out
    assert "asked in training, word for word: 0 (0.0%), by 0 training rows" in out
    assert "warning: test_sets.some: only 5 questions" in out
    assert Path(out.splitlines()[-1]).is_dir()

    code, out, _ = run("tasks", "list", "--folder", tasks)
    assert code == 0
    assert "your own\n  sums: sums\n    prepared: 20 training examples; some 5\n    ! some: only 5 questions" in out
    assert "suite paper" in out
    assert "  mmlu-pro-cot: " in out
    assert "only 67 questions" in out

    code, out, _ = run("tasks", "show", "sums", "--folder", tasks, "--number", "2")
    assert code == 0
    assert "some: 2 of 5 examples" in out
    assert out.count("  Assistant:Adding up. The answer is ") == 2
    assert out.count("── graded as number: ") == 2


def test_show_a_procedural_task(run: Run) -> None:
    code, out, _ = run("tasks", "show", "steps", "--side", "train", "--number", "1")
    assert code == 0
    assert "  Human: Start with" in out


def test_dry_run_says_what_would_be_read(run: Run, tmp_path: Path) -> None:
    write_files(tmp_path)
    code, out, _ = run(
        "tasks", "prepare", "reachable", "pubmedqa-labelled", "--from", tmp_path, "--output", tmp_path / "out", "--dry-run"
    )
    assert code == 0
    assert "  train.train: gsm8k/train.jsonl" in out
    assert out.count("would be written to") == 7
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prepare", "gms8k"), "did you mean gsm8k"),
        (("prepare", "gsm8k", "--from", "nowhere"), "--from nowhere: no such folder"),
        (("prepare", "nothing.yaml"), "no such config file"),
        (("show", "gsm8k", "--folder", "nowhere"), "megatron-plasticity tasks prepare gsm8k --output nowhere"),
        (("show", "steps", "--number", "0"), "--number 0: expected at least 1"),
    ],
)
def test_bad_input_is_one_message(run: Run, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = run("tasks", *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_without_the_hub_a_preparation_says_what_to_do(run: Run, tmp_path: Path) -> None:
    code, _, err = run("tasks", "prepare", "metamathqa", "--output", tmp_path)
    assert code == 2
    assert "train.train.hub: cannot find meta-math/MetaMathQA" in err
    assert "`--from FOLDER` reads what was downloaded before" in err


def test_the_tool_that_checks_the_numbers_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(tmp_path)
    (tmp_path / "cruxeval/cruxeval.jsonl").unlink()  # seconds of running programs
    assert load_tool("check_tasks").main(["--from", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "| boardgameqa | 2 | boardgameqa_500 | 1 | 1 | 1 of 1 (1 training rows, removed) |" in printed.out
    assert "not there: cruxeval: train.output:" in printed.out
    assert "not there: race: train.train:" in printed.out
    assert "wrong: gsm8k: train has 1 examples, expected 7,473" in printed.err
    assert "wrong: mmlu-pro: 39 chains of thought are right, expected 7,559" in printed.err
