"""Activations dumped during training: they are the model's, cost nothing in exactness, and survive being stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_plasticity.capture import writer as writer_module
from megatron_plasticity.capture.sequences import CapturedSequences
from megatron_plasticity.capture.store import ActivationStore
from megatron_plasticity.config.analysis import ModelCaptureConfig
from megatron_plasticity.config.hashing import canonical
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.errors import ConfigError, Interrupted, UserError
from megatron_plasticity.evaluation.capture_job import capture
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.tracking.trained_model import TrainedModel
from megatron_plasticity.training.finetune import finetune, finetune_folder
from megatron_plasticity.training.pretrain import pretrain, pretrain_folder
from megatron_plasticity.training.session import TrainingSession
from tests.training.test_pretrain import StopAt, rows_without_time

MakePretrain = Callable[..., PretrainConfig]
MakeFinetune = Callable[..., FinetuneConfig]


def store_of(folder: RunFolder) -> ActivationStore:
    return ActivationStore(folder.path / "activations")


def assert_same_dumps(ours: ActivationStore, theirs: ActivationStore) -> None:
    assert ours.steps == theirs.steps
    for step in ours.steps:
        assert ours.points(step) == theirs.points(step)
        for point in ours.points(step):
            assert torch.equal(ours.read(step, point), theirs.read(step, point)), (step, point)


@pytest.fixture
def base(pretrain_config: MakePretrain) -> RunFolder:
    return pretrain(pretrain_config({"steps": 2, "model": {"context_length": 128}}), NoProgress())


@pytest.mark.parametrize("changes", [{}, {"batching": "packed"}, {"lora": {"rank": 4}}], ids=["plain", "packed", "lora"])
def test_fine_tuning_dumps_its_own_task_and_is_not_changed_by_it(
    base: RunFolder, finetune_config: MakeFinetune, tmp_path: Path, changes: dict[str, Any]
) -> None:
    shared = {"max_length": 128, "checkpoint": {"every_steps": 4}, **changes}
    without = finetune(finetune_config(base.path, {**shared, "output": str(tmp_path / "a")}), NoProgress())
    recipe = {"points": ["layers.*.resid_post", "logits"], "positions": "answer", "sequences": 5, "keep": "both"}
    settings = {"capture": {**recipe, "steps": [0, 4]}, "output": str(tmp_path / "b")}
    folder = finetune(finetune_config(base.path, {**shared, **settings}), NoProgress())
    assert rows_without_time(folder) == rows_without_time(without)
    store = store_of(folder)
    assert store.steps == [0, 4, 8]
    assert store.points_with_statistics(4) == ["layers.0.resid_post", "layers.1.resid_post"]
    offline = ModelCaptureConfig.model_validate(
        {"name": "test", "run": folder.path / "checkpoints" / "step-4", "output": tmp_path, "device": "cpu", **recipe}
    )
    again = store_of(capture(offline, NoProgress()))
    assert again.sequences.sha256 == store.sequences.sha256
    for point in store.points(4)[:3]:
        torch.testing.assert_close(store.read(4, point), again.read(4, point), rtol=1e-5, atol=1e-5)


def test_a_run_that_was_stopped_dumps_each_step_once_and_the_same(pretrain_config: MakePretrain, tmp_path: Path) -> None:
    shared = {"capture": {"every_steps": 2, "log_spaced": 3, "keep": "both", "sequences": 3}}
    undisturbed = pretrain(pretrain_config({**shared, "output": str(tmp_path / "a")}), NoProgress())
    config = pretrain_config({**shared, "output": str(tmp_path / "b")})
    for step in (4, 7):
        with pytest.raises(Interrupted, match=f"after step {step}"):
            pretrain(config, StopAt(step, signal.SIGTERM))
    resumed = pretrain(config, NoProgress())
    assert store_of(resumed).steps == [1, 2, 3, 4, 6, 8, 10, 12]
    assert_same_dumps(store_of(resumed), store_of(undisturbed))
    takes = sorted(path.relative_to(resumed.path).as_posix() for path in resumed.path.glob("activations/step-*/take-*"))
    assert takes == sorted(f"activations/step-{step}/take-1" for step in store_of(resumed).steps)


def test_going_back_to_an_earlier_checkpoint_replaces_what_came_after_it(pretrain_config: MakePretrain, tmp_path: Path) -> None:
    """As after a kill: the last checkpoint is older than the last dump."""
    shared = {"capture": {"every_steps": 1, "sequences": 3}}
    undisturbed = pretrain(pretrain_config({**shared, "output": str(tmp_path / "a")}), NoProgress())
    config = pretrain_config({**shared, "output": str(tmp_path / "b")})
    with pytest.raises(Interrupted):
        pretrain(config, StopAt(8, signal.SIGTERM))
    (stopped,) = (path for path in pretrain_folder(config).checkpoints() if path.name == "step-8")
    stopped.rename(tmp_path / "lost")
    resumed = pretrain(config, NoProgress())
    assert_same_dumps(store_of(resumed), store_of(undisturbed))
    assert len(list(resumed.path.glob("activations/step-*/take-*"))) == 12, "no take is left over"


def test_training_goes_on_while_a_dump_is_written_and_a_checkpoint_waits_for_it(
    pretrain_config: MakePretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[float] = []
    complete_at_checkpoint: dict[int, list[int]] = {}
    write, save = writer_module.write_tensors, TrainingSession.save

    def slowly(*arguments: Any) -> None:
        time.sleep(0.3)
        write(*arguments)
        finished.append(time.monotonic())

    def saving(session: TrainingSession, step: int) -> None:
        complete_at_checkpoint[step] = store_of(session.folder).steps
        save(session, step)

    began: list[float] = []
    monkeypatch.setattr(writer_module, "write_tensors", slowly)
    monkeypatch.setattr(TrainingSession, "save", saving)

    class Clock:
        def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
            began.append(time.monotonic())

    config = pretrain_config({"capture": {"steps": [1], "points": ["embed", "final_norm"], "sequences": 2}})
    pretrain(config, Clock())
    assert began[3] < finished[1], "three steps later the dump was still being written"
    assert complete_at_checkpoint == {5: [1], 10: [1], 12: [1, 12]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": [13]}, "capture.steps: [13] lie after the last step, 12"),
        ({"points": ["layers.0.nothing"]}, "capture: no hook point matches 'layers.0.nothing'"),
        ({"points": ["*"], "keep": "statistics", "memory_mib": 1}, "capture: the covariance matrices of"),
        ({"texts": "nowhere.txt"}, "capture.texts: nowhere.txt: there is no such file"),
    ],
)
def test_bad_settings_leave_no_folder(pretrain_config: MakePretrain, settings: dict[str, Any], message: str) -> None:
    config = pretrain_config({"capture": settings, "model": {"vocab_size": 400}})
    with pytest.raises(ConfigError) as caught:
        pretrain(config, NoProgress())
    assert message in str(caught.value)
    assert not list(config.output.glob("pretrain-*"))


def test_sequences_that_keep_nothing_stop_before_the_first_step(pretrain_config: MakePretrain) -> None:
    config = pretrain_config({"capture": {"positions": "answer"}})
    with pytest.raises(UserError, match="a corpus has none; state `task`"):
        pretrain(config, NoProgress())
    assert not pretrain_folder(config).checkpoints()


def test_covariances_that_fit_are_dumped(pretrain_config: MakePretrain) -> None:
    """300² · 8 bytes."""
    settings = {"points": ["head"], "keep": "statistics", "positions": "all", "memory_mib": 1}
    assert store_of(pretrain(pretrain_config({"capture": settings}), NoProgress())).points_with_statistics(12) == ["head"]


def test_other_texts_make_another_run_wherever_they_lie(pretrain_config: MakePretrain, tmp_path: Path) -> None:
    texts, moved = tmp_path / "texts.txt", tmp_path / "moved.txt"
    texts.write_text("one\ntwo\n")
    config, elsewhere = (pretrain_config({"capture": {"texts": str(path)}}) for path in (texts, moved))
    with pytest.raises(Interrupted):
        pretrain(config, StopAt(3, signal.SIGTERM))
    done = pretrain(config, NoProgress())
    assert len(CapturedSequences.load(done.path / "activations")) == 2
    moved.write_text("one\ntwo\n")
    assert pretrain(elsewhere, NoProgress()) == done
    texts.write_text("one\ntwo\nthree\n")
    other = pretrain(config, NoProgress())
    assert other != done
    assert len(CapturedSequences.load(other.path / "activations")) == 3


def test_other_texts_make_another_fine_tuning(base: RunFolder, finetune_config: MakeFinetune, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    config, model = finetune_config(base.path, {"capture": {"texts": str(texts)}}), TrainedModel.open(base.path)
    texts.write_text("one\n")
    first = finetune_folder(config, model)
    assert first.inputs.keys() == {"base", "capture_texts"}
    texts.write_text("other\n")
    assert finetune_folder(config, model) != first


def test_runs_without_texts_have_the_hashes_that_they_had(pretrain_config: MakePretrain) -> None:
    config = pretrain_config({"capture": {"steps": [2]}})
    assert pretrain_folder(config).inputs.keys() == {"corpus"}
    assert canonical(config)["capture"].keys() == {"points", "sequences", "positions", "dtype", "steps", "at_end"}
