"""Which failures pass, and runs whose folder another process has."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.data.stream import corpus_hash
from megatron_plasticity.errors import FolderHeld, TimeLimitTooShort, UserError
from megatron_plasticity.study import runner
from megatron_plasticity.study.backends import Ended
from megatron_plasticity.study.check import check_study
from megatron_plasticity.study.plan import PlannedCell, plan_study
from megatron_plasticity.study.retries import Failure, explain
from megatron_plasticity.study.runner import run_study
from megatron_plasticity.tracking.process import process_start
from megatron_plasticity.tracking.run_folder import RunFolder
from tests.study.machines import counting_study, fake_ssh, stand_in_runs

# What the launcher of several ranks writes after the rank that was refused.
_OF_RANKS = """error: runs/a/pretrain-x-1: is being run by process 7 on n1. Wait for it to end, or stop it first.
error (rank 1): rank 0 on n1: is being run by process 7 on n1
[launch.py:335:sigkill_handler] Killing subprocess 11
[launch.py:335:sigkill_handler] Killing subprocess 12
[launch.py:344:sigkill_handler] ['python', '-u', '-m', 'megatron_plasticity'] exits with return code = 73
error: the deepspeed launcher ended with exit code 73; what the ranks said is above in this log
"""


def first_cell(config: StudyConfig) -> PlannedCell:
    cell = plan_study(config, corpus_hash(check_study(config)[0].data)).cells[0]
    RunFolder.create(cell.folder.parent, cell.kind, cell.name, cell.config, cell.inputs)
    return cell


def why(cell: PlannedCell, code: int, text: str) -> Failure:
    (cell.folder / "log").write_text(text)
    return explain(cell, Ended(code), 0)


@pytest.mark.parametrize(
    ("code", "text", "passing", "headline"),
    [
        (FolderHeld.exit_code, _OF_RANKS, True, "rank 0 on n1: is being run by process 7 on n1"),
        (TimeLimitTooShort.exit_code, "error: raise resources.slurm.time\n", False, "raise resources.slurm.time"),
        (UserError.exit_code, "error: a config\n  key: wrong\nKilling subprocess 1\n", False, "a config"),
        (1, "RuntimeError: CUDA error: out of memory\n", True, "RuntimeError: CUDA error: out of memory"),
        (1, "CUDA error: no kernel image is available for execution on the device\n", False, "CUDA error: no kernel image"),
        (1, "CUDA error: device-side assert triggered\n", False, "CUDA error: device-side assert triggered"),
    ],
)
def test_what_may_pass(tmp_path: Path, tiny_corpus: Path, code: int, text: str, passing: bool, headline: str) -> None:
    failure = why(first_cell(counting_study(tmp_path, tiny_corpus)), code, text)
    assert failure.passing == passing
    assert failure.headline.startswith(headline)
    assert failure.held == (code == FolderHeld.exit_code)


_HOLDER = """
import sys, time
from pathlib import Path
from megatron_plasticity.tracking.process import process_start
from megatron_plasticity.tracking.run_folder import RunFolder
folder, go = map(Path, sys.argv[1:])
with RunFolder(folder).running():
    print("here", flush=True)
    while not go.exists():
        time.sleep(0.05)
    raise KeyboardInterrupt
"""


@pytest.mark.parametrize("seen_before", [True, False])
def test_a_run_that_another_process_of_this_machine_has_is_left_to_it(
    tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], seen_before: bool
) -> None:
    stand_in_runs(monkeypatch)
    fake_ssh(tmp_path, monkeypatch)
    (tmp_path / "hosts").write_text("one slots=2\n")
    resources = {"backend": "hostfile", "hostfile": str(tmp_path / "hosts"), "retries": 0}
    config, go = counting_study(tmp_path, tiny_corpus, {"resources": resources}), tmp_path / "go"
    folder = first_cell(config).folder
    if not seen_before:  # it came between the look and the start
        monkeypatch.setattr(runner, "_held_elsewhere", lambda cell: None)
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, folder, go], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"here\n"
    seen = []

    def watch() -> None:
        while not any(RunFolder(path.parent).is_done for path in folder.parent.glob("*/state.json")):
            time.sleep(0.1)
        time.sleep(1.0)
        seen.append(RunFolder(folder).state)
        go.touch()

    threading.Thread(target=watch, daemon=True).start()
    outcome = run_study(config)
    holder.wait(20)
    assert outcome.failed == {}
    assert len(outcome.done) == 2
    assert (seen[0].status, seen[0].pid) == ("running", holder.pid), "its state was its own"
    assert RunFolder(folder).state.attempts == 2
    said = capfd.readouterr().err
    assert said.count(f"pretrain-wd0 waits: {'process' if seen_before else folder}") == 1
    assert f"process {holder.pid} on" in said


_GUARDED = """
import subprocess, sys, time
from megatron_plasticity.study.cell import _run_guarded
# As DeepSpeed's launcher: one that starts the launcher of a machine, which starts a rank; the first ends at once on SIGTERM.
rank = "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), open(%r, 'w').close(), os._exit(0)))"
rank = (rank % sys.argv[1]) + "; print(os.getpid(), flush=True); time.sleep(600)"
launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
sys.exit(_run_guarded([sys.executable, "-c", launcher]))
"""


def test_ranks_save_and_end_with_a_worker_that_is_killed(tmp_path: Path) -> None:
    worker = subprocess.Popen([sys.executable, "-c", _GUARDED, tmp_path / "saved"], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    rank = int(worker.stdout.readline())
    worker.kill()
    worker.wait()
    deadline = time.monotonic() + 20
    while process_start(rank) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process_start(rank) is None
    assert (tmp_path / "saved").is_file(), "it had time to save, although the launcher was gone before it"
