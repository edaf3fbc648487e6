"""The tool that says where a study's processor time goes: on fabricated stacks."""

from __future__ import annotations

import ast
import json
import sysconfig
from functools import cache
from pathlib import Path

import pytest

from megatron_plasticity.errors import UserError
from megatron_plasticity.study.jobs import _JOBS
from tests.tools import load_tool

profile = load_tool("bench/study_profile")

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_plasticity"
RUNNER, SERVER, WORKER, GRADER = (f'process {pid}:"python -c x; y; f(1, 2)"' for pid in (1, 2, 3, 4))


def _frame(place: str, line: int = 1) -> str:
    file, _, function = place.partition(":")
    path = file if file.startswith("<") else f"/site{file}" if file.startswith("/") else f"/home/x/megatron_plasticity/{file}"
    return f"{function} ({path}:{line})"


def _line(processes: list[str], *places: str, count: int = 1, thread: str = "MainThread") -> str:
    return ";".join([*processes, f"thread (7): {thread}", *map(_frame, places)]) + f" {count}\n"


IN_A_WORKER = ("/multiprocessing/forkserver.py:main", "launch/workers.py:_work")
TRAINING = (*IN_A_WORKER, "training/pretrain.py:pretrain", "training/loop.py:train")


@pytest.mark.parametrize(
    ("places", "part"),
    [
        ((*TRAINING, "training/engine.py:TrainingEngine.train_batch", "/torch/_tensor.py:Tensor.backward"), "training"),
        (TRAINING, "training"),
        ((*TRAINING, "training/callbacks.py:Checkpoints.after_step", "models/checkpoint.py:save_checkpoint"), "checkpoints"),
        ((*TRAINING, "training/callbacks.py:LossEvaluation.after_step", "/torch/x.py:f"), "losses while training"),
        # The same forward pass is training, loss or capture by what asked for it.
        (
            (*TRAINING, "training/losses.py:mean_cross_entropy", "training/engine.py:TrainingEngine.evaluate"),
            "losses while training",
        ),
        ((*TRAINING, "training/activations.py:record_activations", "training/engine.py:TrainingEngine.evaluate"), "capture"),
        # Imports count as starting, whoever asks for them.
        (
            (*IN_A_WORKER, "evaluation/math_pool.py:_serve", "<frozen importlib._bootstrap>:_find_and_load", "/sympy/x.py:f"),
            "starting",
        ),
        ((*IN_A_WORKER, "analysis/jobs.py:probes.<locals>.work", "analysis/probes.py:run_probes.<locals>.f"), "analysis"),
        ((*IN_A_WORKER, "study/cell.py:a_new_function"), "unclassified"),
        (IN_A_WORKER, "starting"),
        ((*TRAINING, "/threading.py:Condition.wait"), "waiting"),
        ((), "starting"),
    ],
)
def test_a_stack_belongs_to_the_innermost_place_that_is_known(places: tuple[str, ...], part: str) -> None:
    assert profile.part_of([_frame(place) for place in places]) == part


def test_processes_are_sorted_by_what_they_carry_out() -> None:
    serving = "evaluation/math_pool.py:_serve"
    lines = [
        _line([RUNNER], "verbs.py:study_run", "study/runner.py:_Runner.run", count=3),
        _line([RUNNER], "tracking/mlflow_mirror.py:MlflowMirror.sync", thread="mlflow-mirror", count=2),
        _line([RUNNER, SERVER], "/multiprocessing/forkserver.py:main", count=4),  # starts the runs, and is none
        _line([RUNNER, SERVER, WORKER], "evaluation/job.py:evaluate", "evaluation/responses.py:answer_questions", count=10),
        _line([RUNNER, SERVER, WORKER], "/threading.py:Condition.wait", thread="parent-watch", count=50),
        _line([RUNNER, SERVER, WORKER, GRADER], serving, "/math_verify/x.py:parse", count=5),
        _line([RUNNER, SERVER, WORKER, GRADER], "/somewhere.py:else_", count=1),
    ]
    found = profile.sort_samples(profile.read_samples(lines))
    assert found.kinds == ["evaluate", "runner"]
    assert found.counted("evaluate") == {"sampling": 15, "unclassified": 1}
    assert found.counted("runner") == {"runner": 3, "tracking": 2, "starting": 4}
    assert found.counted().total() == 25
    assert list(found.unclassified.values()) == [1]


def test_a_line_that_is_no_stack_is_named() -> None:
    with pytest.raises(UserError, match="line 2 of what py-spy recorded"):
        list(profile.read_samples([_line([RUNNER], "verbs.py:study_run"), "nonsense\n"]))


@pytest.mark.parametrize(("trained", "verdict", "code"), [(80, "as wanted", 0), (79, "TOO LITTLE", 1)])
def test_the_verdict_on_a_record(
    trained: int, verdict: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "runs" / "mine"
    run = study / "pretrain-a-0"
    run.mkdir(parents=True)
    (run / "state.json").write_text(json.dumps({"status": "done", "started": 10.0, "finished": 14.0}))
    resources = {"slots": 2, "threads": 1, "processes_per_run": 1}
    cells = [{"kind": "pretrain", "folder": run.name}]
    (study / "study.json").write_text(json.dumps({"config": {"resources": resources}, "cells": cells}))
    described = {"study": str(study), "rate": 10, "began": "today", "versions": {"torch": "2"}}
    (tmp_path / "profile.json").write_text(json.dumps(described))
    (tmp_path / "run.txt").write_text(
        _line([RUNNER], *TRAINING, count=trained) + _line([RUNNER], *TRAINING, "models/checkpoint.py:open_checkpoint", count=19)
    )
    rest = 100 - trained - 19
    (tmp_path / "report.txt").write_text(_line([WORKER], "verbs.py:study_report", "study/report/page.py:f", count=rest))
    assert profile.main(["--again", str(tmp_path)]) == code
    printed = capsys.readouterr().out
    assert f"proper: {trained / 100:.1%}, {verdict}" in printed
    assert "2 places for runs, 50.0% in use" in printed


def test_a_folder_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no whole record of a study \(profile.json, run.txt, report.txt not found\)"):
        profile.main(["--again", str(tmp_path)])


def test_without_py_spy_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = tmp_path / "new"
    with pytest.raises(UserError, match=r"not on PATH\. Install it .*pip install py-spy"):
        profile.main(["--folder", str(folder)])
    with pytest.raises(UserError, match="no program at"):
        profile.main(["--folder", str(folder), "--py-spy", str(tmp_path / "py-spy")])
    assert not folder.exists()


def test_every_named_place_exists() -> None:
    tables = (profile.KINDS, profile.PARTS, profile.INNERMOST)
    places = [place for table in tables for of_name in table.values() for place in of_name]
    assert [place for place in places if not _exists(place)] == []
    assert not _exists("training/engine.py:TrainingEngine.no_such_method")  # the check itself can fail


def test_every_kind_of_run_has_a_column() -> None:
    jobs = {f"{module.removeprefix('megatron_plasticity.').replace('.', '/')}.py:{name}" for module, name in _JOBS.values()}
    assert jobs <= {place for places in profile.KINDS.values() for place in places}


def _exists(place: str) -> bool:
    file, _, name = place.partition(":")
    if file == "<frozen importlib._bootstrap>":  # how the interpreter names that file
        file = "/importlib/_bootstrap.py"
    if file.startswith("/"):
        roots = [Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib")]
        path = next((root / file[1:] for root in roots if (root / file[1:]).exists()), Path("nowhere"))
    else:
        path = PACKAGE / file
    return path.is_dir() if file.endswith("/") else path.is_file() and (not name or name in _names_in(path))


@cache
def _names_in(path: Path) -> set[str]:
    """Qualified names of the functions and classes of a file."""
    found: set[str] = set()

    def look(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(f"{prefix}{child.name}")
                if isinstance(child, ast.ClassDef):
                    look(child, f"{prefix}{child.name}.")
            else:
                look(child, prefix)

    look(ast.parse(path.read_text(encoding="utf-8")), "")
    return found
