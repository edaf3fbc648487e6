"""Studies as array jobs, with a Slurm that runs them on this machine."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.errors import Interrupted, UserError
from megatron_plasticity.study.again import cancel
from megatron_plasticity.study.backends import slurm
from megatron_plasticity.study.backends.slurm_queue import SlurmIsAway, SlurmQueue
from megatron_plasticity.study.runner import run_study
from megatron_plasticity.study.status import StudyStatus, read_status
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.training.signals import StopSignal
from tests.study.machines import counting_study, fake_slurm, stand_in_runs


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    stand_in_runs(monkeypatch)
    monkeypatch.setattr(slurm, "_SECONDS_BETWEEN_QUERIES", 0.2)
    monkeypatch.setattr(slurm, "_SECONDS_FOR_ACCOUNTING", 1.0)
    monkeypatch.setattr(slurm, "_SECONDS_AFTER_A_REFUSAL", 0.3)
    with fake_slurm(tmp_path, monkeypatch) as state:
        yield state


def study(folder: Path, corpus: Path, changes: dict[str, Any] | None = None) -> StudyConfig:
    resources = {"backend": "slurm", **(changes or {}).pop("resources", {})}
    return counting_study(folder, corpus, {"resources": resources, **(changes or {})})


def behave(folder: Path, **behaviour: str) -> None:
    (folder / "runs/small").mkdir(parents=True)
    (folder / "runs/small/behaviour.json").write_text(json.dumps({f"wd{key[1:]}": words for key, words in behaviour.items()}))


def calls(queue: Path, program: str) -> list[str]:
    return [line for line in (queue / "calls").read_text().splitlines() if line.startswith(program)]


def status_of(folder: Path) -> StudyStatus:
    return read_status(folder / "runs/small")


def stop_when_running(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the next runner as Ctrl-C would, as soon as both runs are under way."""

    def enter(self: StopSignal) -> StopSignal:
        def watch() -> None:
            wait_until(lambda: both_under_way(folder))
            self.received = signal.SIGINT

        threading.Thread(target=watch, daemon=True).start()
        return self

    monkeypatch.setattr(StopSignal, "__enter__", enter)


def both_under_way(folder: Path) -> bool:
    states = [path.read_text() for path in folder.glob("pretrain-*/state.json")]
    return len(states) == 2 and all(json.loads(state).get("progress") for state in states)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ready_runs_of_a_kind_are_one_array(
    tmp_path: Path, tiny_corpus: Path, queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted_secret")
    options = {
        "partition": "long",
        "memory": "8G",
        "time": "1:00:00",
        "options": ["--qos=high"],
        "setup": ["export SET_UP=1"],
    }
    outcome = run_study(study(tmp_path, tiny_corpus, {"resources": {"slurm": options, "slots": 4, "threads": 2}}))
    assert outcome.failed == {}
    assert len(outcome.done) == 2
    assert len(calls(queue, "sbatch")) == 1
    script = (queue / "submitted-100").read_text()
    for line in (
        "--array=0-1%4",
        "--partition=long",
        "--mem=8G",
        "--time=1:00:00",
        "--qos=high",
        "--requeue",
        "--signal=B:USR1@300",
    ):
        assert f"#SBATCH {line}\n" in script
    assert "--gpus-per-node" not in script
    assert "\nexport SET_UP=1\nexec " in script
    assert "export OMP_NUM_THREADS=2" in script
    assert "hf_planted_secret" not in script + (queue / "calls").read_text()
    log = (status_of(tmp_path).cells[0].folder / "log").read_text()
    assert "attempt 1 of job 100_0 on node1" in log


def test_a_run_that_needs_longer_than_its_limit_goes_on(tmp_path: Path, tiny_corpus: Path, queue: Path) -> None:
    behave(tmp_path, _0="waits", _1="well")
    (queue / "limit").write_text("2.5")
    outcome = run_study(study(tmp_path, tiny_corpus))
    assert outcome.failed == {}
    cell = status_of(tmp_path).cells[0]
    assert cell.attempts == 2
    assert RunFolder.open(cell.folder).results["begin"] > 0, "from what the first attempt had saved"
    assert len(calls(queue, "sbatch")) == 1, "it queued itself again"
    assert "saved before the time limit and queued again" in (cell.folder / "log").read_text()


@pytest.mark.parametrize("accounting", [True, False])
def test_failures(tmp_path: Path, tiny_corpus: Path, queue: Path, accounting: bool) -> None:
    if not accounting:
        (queue / "no-accounting").touch()
    behave(tmp_path, _0="killed", _1="wrong")
    outcome = run_study(study(tmp_path, tiny_corpus))
    assert outcome.done == ("pretrain-wd0",)
    assert outcome.failed == {"pretrain-wd1": "optimizer.learning_rate: too large"}
    assert len(calls(queue, "sbatch")) == 2, "the one that was killed, again"


def test_a_node_that_fails_is_no_fault_of_the_run(
    tmp_path: Path, tiny_corpus: Path, queue: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (queue / "die").write_text("NODE_FAIL")
    outcome = run_study(study(tmp_path, tiny_corpus, {"resources": {"retries": 0}, "axes": {"optimizer.weight_decay": [0.0]}}))
    assert outcome.failed["pretrain-wd0"] == "Slurm ended its job: NODE_FAIL"
    (queue / "die").unlink()
    assert len(run_study(study(tmp_path, tiny_corpus)).done) == 2


def test_a_runner_that_comes_back_finds_its_jobs(
    tmp_path: Path, tiny_corpus: Path, queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(tmp_path, _0="waits", _1="waits")
    folder = tmp_path / "runs/small"
    with monkeypatch.context() as patched:
        stop_when_running(folder, patched)
        with pytest.raises(Interrupted) as raised:
            run_study(study(tmp_path, tiny_corpus))
    assert "2 runs stay with Slurm" in str(raised.value)
    assert f"study cancel {folder}" in str(raised.value)
    assert calls(queue, "scancel") == []
    (folder / "go").touch()
    outcome = run_study(study(tmp_path, tiny_corpus))
    assert len(outcome.done) == 2
    assert len(calls(queue, "sbatch")) == 1, "nothing was submitted twice"
    assert {cell.attempts for cell in status_of(tmp_path).cells} == {1}


def test_jobs_can_be_cancelled(tmp_path: Path, tiny_corpus: Path, queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    behave(tmp_path, _0="waits", _1="waits")
    folder = tmp_path / "runs/small"
    with monkeypatch.context() as patched:
        stop_when_running(folder, patched)
        with pytest.raises(Interrupted):
            run_study(study(tmp_path, tiny_corpus))
    assert cancel(folder) == ["100_0", "100_1"]
    wait_until(lambda: {cell.status for cell in status_of(tmp_path).cells} == {"waiting"})
    assert cancel(folder) == []
    outcome = run_study(study(tmp_path, tiny_corpus))
    assert len(outcome.done) == 2, "and the study goes on when it is run again"
    assert {RunFolder.open(cell.folder).results["begin"] for cell in status_of(tmp_path).cells} == {1}, "from what was saved"


def test_a_job_that_a_person_cancels_is_not_tried_again(tmp_path: Path, tiny_corpus: Path, queue: Path) -> None:
    behave(tmp_path, _0="waits", _1="well")
    folder = tmp_path / "runs/small"

    def scancel() -> None:
        wait_until(lambda: both_under_way(folder))
        subprocess.run(["scancel", "100_0"], check=True)

    threading.Thread(target=scancel, daemon=True).start()
    outcome = run_study(study(tmp_path, tiny_corpus))
    assert outcome.failed == {"pretrain-wd0": "its job was cancelled"}
    assert len(calls(queue, "sbatch")) == 1


def test_an_answer_of_sbatch_that_is_lost(
    tmp_path: Path, tiny_corpus: Path, queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(tmp_path, _0="waits", _1="waits")
    submit, named = SlurmQueue.submit, SlurmQueue.named

    def submitted(self: SlurmQueue, script: Path) -> str:
        submit(self, script)
        raise SlurmIsAway("Socket timed out on send/recv operation")

    def found(self: SlurmQueue, name: str) -> str | None:
        job = named(self, name)
        (tmp_path / "runs/small/go").touch()
        return job

    monkeypatch.setattr(SlurmQueue, "submit", submitted)
    monkeypatch.setattr(SlurmQueue, "named", found)
    assert len(run_study(study(tmp_path, tiny_corpus)).done) == 2
    assert len(calls(queue, "sbatch")) == 1, "the job is found by its name, and not submitted again"


def test_without_slurm(tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="needs sbatch, squeue, scancel on PATH"):
        run_study(study(tmp_path, tiny_corpus))


def test_slurm_that_does_not_answer(tmp_path: Path, tiny_corpus: Path, queue: Path) -> None:
    (queue / "away").touch()
    with pytest.raises(UserError, match=r"Slurm does not answer: .*Unable to contact slurm controller"):
        run_study(study(tmp_path, tiny_corpus))


@pytest.mark.parametrize("accounting", [True, False])
def test_a_limit_too_short_for_a_first_checkpoint_is_not_tried_again(
    tmp_path: Path, tiny_corpus: Path, queue: Path, accounting: bool
) -> None:
    if not accounting:
        (queue / "no-accounting").touch()
    behave(tmp_path, _0="keeps-nothing", _1="well")
    (queue / "limit").write_text("2.0")
    outcome = run_study(study(tmp_path, tiny_corpus))
    assert outcome.failed == {"pretrain-wd0": "the time limit came before anything was kept: raise resources.slurm.time"}
    assert len(calls(queue, "sbatch")) == 1


def test_slurm_that_takes_few_jobs_gets_few(
    tmp_path: Path, tiny_corpus: Path, queue: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (queue / "room").write_text("1")
    assert len(run_study(study(tmp_path, tiny_corpus)).done) == 2
    said = capfd.readouterr().err
    assert said.count("Slurm takes no more jobs now") == 1
    assert "resources.slots" in said


def test_slurm_that_takes_no_job_is_an_error(tmp_path: Path, tiny_corpus: Path, queue: Path) -> None:
    (queue / "room").write_text("0")
    with pytest.raises(UserError, match=r"takes none of the study's jobs: .*Job violates accounting/QOS policy"):
        run_study(study(tmp_path, tiny_corpus))


def test_a_job_that_may_have_arrived_is_not_submitted_while_nobody_can_say(
    tmp_path: Path, tiny_corpus: Path, queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, named, asked = SlurmQueue.submit, SlurmQueue.named, []

    def submitted(self: SlurmQueue, script: Path) -> str:
        submit(self, script)
        raise SlurmIsAway("Socket timed out on send/recv operation")

    def away_at_first(self: SlurmQueue, name: str) -> str | None:
        asked.append(name)
        if len(asked) == 1:
            raise SlurmIsAway("Unable to contact slurm controller")
        return named(self, name)

    monkeypatch.setattr(SlurmQueue, "submit", submitted)
    monkeypatch.setattr(SlurmQueue, "named", away_at_first)
    assert len(run_study(study(tmp_path, tiny_corpus)).done) == 2
    assert len(calls(queue, "sbatch")) == 1


def test_slurm_that_goes_away_while_jobs_are_adopted(
    tmp_path: Path, tiny_corpus: Path, queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs/small").mkdir(parents=True)
    array = {"number": 1, "name": "small-1", "job": None, "kind": "pretrain", "folders": []}
    (tmp_path / "runs/small/slurm.json").write_text(json.dumps({"arrays": [array]}))

    def away(self: SlurmQueue, name: str) -> str | None:
        raise SlurmIsAway("Unable to contact slurm controller")

    monkeypatch.setattr(SlurmQueue, "named", away)
    with pytest.raises(UserError, match="Slurm does not answer: Unable to contact"):
        run_study(study(tmp_path, tiny_corpus))
