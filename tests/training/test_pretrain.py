"""A pretraining run from config to results: what it leaves behind, how it goes on, and what it refuses to go on from."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_plasticity.capture.store import ActivationStore
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.ledger import read_ledger
from megatron_plasticity.data.token_store import TokenStore
from megatron_plasticity.errors import CheckpointError, Interrupted, UserError
from megatron_plasticity.models.attention_choice import AttentionChoice
from megatron_plasticity.models.checkpoint import open_checkpoint
from megatron_plasticity.models.loss import token_loss
from megatron_plasticity.tracking.metrics import read_metrics
from megatron_plasticity.tracking.mlflow_content import run_content
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.tracking.trained_model import TrainedModel
from megatron_plasticity.training import engine
from megatron_plasticity.training.pretrain import pretrain, pretrain_folder
from tests.ranks import run_on_ranks

Make = Callable[..., PretrainConfig]


class StopAt:
    """Progress that sends this process a signal at a step, as a person or a scheduler would."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
        if done == self.step:
            os.kill(os.getpid(), self.number)


def rows_without_time(folder: RunFolder) -> list[dict[str, object]]:
    """Metrics that must be equal bit for bit: all but the clock's."""
    clock = ("time", "train/tokens_per_second")
    return [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(folder.metrics_path)]


def final_weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(folder.path).tensors())


def test_a_run_leaves_what_everything_after_it_needs(pretrain_config: Make, tiny_corpus: Path) -> None:
    config = pretrain_config({"capture": {"steps": [0, 7], "sequences": 3}})
    folder = pretrain(config, NoProgress())
    results = folder.results
    assert results["steps"] == 12
    assert results["tokens"] == 12 * 4 * 32
    assert results["weight_decay"] == 0.1
    assert [p.name for p in folder.checkpoints()] == ["step-5", "step-10", "step-12"]
    assert read_ledger(folder.path).consumed_samples == 48
    assert ActivationStore(folder.path / "activations").steps == [0, 7, 12]
    assert (folder.path / "tokenizer.json").read_bytes() == (tiny_corpus / "tokenizer.json").read_bytes()
    rows = read_metrics(folder.metrics_path)
    steps_with_held_out = [row["step"] for row in rows if "held_out/loss" in row]
    assert steps_with_held_out == [4, 8, 12]
    last = next(row for row in reversed(rows) if "train/loss" in row)
    assert last["train/learning_rate_times_weight_decay"] == pytest.approx(last["train/learning_rate"] * 0.1)
    assert last["train/adamw_timescale"] == pytest.approx(1 / (last["train/learning_rate"] * 0.1 * 12))
    assert {row["step"] for row in rows if "weight_norm/mlp" in row} == {6, 12}
    assert all(math.isfinite(v) for row in rows for v in row.values())


def test_a_run_says_by_which_kernels_it_attends(pretrain_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pretrain(pretrain_config({"steps": 1, "engine": {"attention": "sdpa-math"}}), NoProgress())
    assert "\nattention by math kernel of torch (sdpa-math)\n" in capsys.readouterr().out
    assert folder.results["attention_kernel"] == "math kernel of torch (sdpa-math)"
    assert run_content(folder.path).tags["attention_kernel"] == "math kernel of torch (sdpa-math)"


def test_slow_attention_is_a_loud_warning(
    pretrain_config: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = AttentionChoice("sdpa", "math kernel of torch (sdpa)", "attention runs on torch's math kernel: too wide. Do this")
    monkeypatch.setattr(engine, "choose_attention", lambda *_: choice)
    pretrain(pretrain_config({"steps": 1}), NoProgress())
    assert capsys.readouterr().err.count("warning: SLOW: attention runs on torch's math kernel: too wide. Do this") == 1


def test_attention_that_does_not_fit_ends_before_the_run(pretrain_config: Make) -> None:
    config = pretrain_config({"device": "auto", "engine": {"attention": "flash-attention-2", "precision": "bf16"}})
    if torch.cuda.is_available():
        pytest.skip("the package may fit")
    with pytest.raises(UserError, match=r"engine\.attention: flash-attention-2 runs on CUDA, and the device is cpu"):
        pretrain(config, NoProgress())
    assert not config.output.exists()


def test_the_kernel_of_attention_does_not_name_a_run(pretrain_config: Make) -> None:
    assert pretrain_folder(pretrain_config({"engine": {"attention": "eager"}})).path == pretrain_folder(pretrain_config()).path


def test_the_held_out_loss_is_the_mean_over_the_held_out_sequences(pretrain_config: Make, tiny_corpus: Path) -> None:
    folder = pretrain(pretrain_config(), NoProgress())
    model = open_checkpoint(folder.path).build_model(torch.device("cpu"))
    inputs, targets = BlockReader(TokenStore(tiny_corpus / "held_out"), 32).batch(np.arange(6))
    with torch.no_grad():
        expected = token_loss(model(inputs), targets).cross_entropy.double().mean()
    assert folder.results["held_out_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_weight_and_update_norms_are_those_of_the_weights(pretrain_config: Make) -> None:
    config = pretrain_config({"checkpoint": {"every_steps": 1}})
    folder = pretrain(config, NoProgress())
    before = open_checkpoint(folder.path / "checkpoints" / "step-11").tensors()
    after = open_checkpoint(folder.path / "checkpoints" / "step-12").tensors()
    row = next(r for r in reversed(read_metrics(folder.metrics_path)) if "weight_norm/norm" in r)
    gains = [name for name in after if "norm" in name]
    assert row["weight_norm/norm"] == pytest.approx(math.sqrt(sum(float(after[n].square().sum()) for n in gains)), rel=1e-5)
    moved = math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in gains))
    assert row["update_norm/norm"] == pytest.approx(moved, rel=1e-4)
    last = next(r for r in reversed(read_metrics(folder.metrics_path)) if "train/learning_rate" in r)
    effective = last["train/learning_rate"] / row["weight_norm/norm"]
    assert row["effective_learning_rate/norm"] == pytest.approx(effective)


def test_a_shower_of_signals_is_one_wish(pretrain_config: Make) -> None:
    """A launcher turns one Ctrl-C into a SIGINT and a SIGTERM for each rank; the checkpoint must be written all the same."""

    class Shower:
        def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
            if done == 7:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
                    os.kill(os.getpid(), number)

    config = pretrain_config()
    with pytest.raises(Interrupted, match="SIGINT after step 7"):
        pretrain(config, Shower())
    assert open_checkpoint(pretrain_folder(config).path).step == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_an_interrupted_run_goes_on_bit_for_bit(
    pretrain_config: Make, tmp_path: Path, number: signal.Signals, zero_stage: int
) -> None:
    engine = {"engine": {"zero_stage": zero_stage}}
    undisturbed = pretrain(pretrain_config({"output": str(tmp_path / "a"), **engine}), NoProgress())
    config = pretrain_config({"output": str(tmp_path / "b"), **engine})
    with pytest.raises(Interrupted, match=f"{number.name} after step 7") as stopped:
        pretrain(config, StopAt(7, number))
    assert stopped.value.exit_code == 128 + number
    assert pretrain_folder(config).state.status == "interrupted"
    resumed = pretrain(config, NoProgress())
    assert rows_without_time(resumed) == rows_without_time(undisturbed)
    a, b = final_weights(undisturbed), final_weights(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_kill_between_checkpoints_repeats_the_lost_steps_exactly(pretrain_config: Make, tmp_path: Path) -> None:
    undisturbed = pretrain(pretrain_config({"output": str(tmp_path / "a")}), NoProgress())
    config = pretrain_config({"output": str(tmp_path / "b")})

    class PowerCut:
        def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
            if done == 8:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(config, PowerCut())
    resumed = pretrain(config, NoProgress())
    assert resumed.state.attempts == 2
    assert rows_without_time(resumed) == rows_without_time(undisturbed)
    assert torch.equal(final_weights(resumed)["head.weight"], final_weights(undisturbed)["head.weight"])


def test_a_run_that_is_done_is_not_done_again(pretrain_config: Make) -> None:
    folder = pretrain(pretrain_config(), NoProgress())
    written = (folder.path / "results.json").stat().st_mtime_ns
    assert pretrain(pretrain_config(), NoProgress()).path == folder.path
    assert (folder.path / "results.json").stat().st_mtime_ns == written


def test_a_half_written_checkpoint_is_passed_over(
    pretrain_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = pretrain(pretrain_config({"output": str(tmp_path / "a")}), NoProgress())
    config = pretrain_config({"output": str(tmp_path / "b")})
    with pytest.raises(Interrupted):
        pretrain(config, StopAt(10, signal.SIGTERM))
    checkpoint = pretrain_folder(config).path / "checkpoints" / "step-10"
    weights = checkpoint / "weights-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    resumed = pretrain(config, NoProgress())
    warning = capsys.readouterr().err
    assert "step-10: weights-00001.safetensors is not what was written" in warning
    assert "goes on from step-5" in warning
    assert rows_without_time(resumed) == rows_without_time(undisturbed)


def test_when_every_checkpoint_is_damaged_the_reasons_are_told(pretrain_config: Make) -> None:
    config = pretrain_config()
    with pytest.raises(Interrupted):
        pretrain(config, StopAt(6, signal.SIGTERM))
    folder = pretrain_folder(config)
    for path in folder.checkpoints():
        (path / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match=r"step-6.*marker is missing") as error:
        pretrain(config, NoProgress())
    assert "step-5" in str(error.value)
    assert "Delete" in str(error.value)


def test_a_full_disk_ends_clearly_and_loses_nothing(pretrain_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_plasticity.models import checkpoint as checkpoint_module

    config = pretrain_config()
    write, calls = checkpoint_module.save_file, []

    def full_at_the_second_checkpoint(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) > 4:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(checkpoint_module, "save_file", full_at_the_second_checkpoint)
    with pytest.raises(UserError, match="disk is full"):
        pretrain(config, NoProgress())
    folder = pretrain_folder(config)
    assert folder.state.status == "failed"
    assert [p.name for p in (folder.path / "checkpoints").iterdir()] == ["step-5"]
    monkeypatch.undo()
    assert pretrain(config, NoProgress()).is_done


def test_a_full_disk_while_writing_metrics(pretrain_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pretrain_config()

    def full(self: object, step: int, values: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_plasticity.tracking.metrics.MetricLog.write", full)
    with pytest.raises(UserError, match="disk is full"):
        pretrain(config, NoProgress())
    monkeypatch.undo()
    assert pretrain(config, NoProgress()).is_done


def test_what_a_killed_attempt_left_is_cleared_away(pretrain_config: Make) -> None:
    config = pretrain_config()
    left = pretrain_folder(config).path / "checkpoints" / ".step-5.abc.tmp"
    left.mkdir(parents=True)
    (left / "weights-00001.safetensors").write_bytes(b"half")
    pretrain(config, NoProgress())
    assert not left.exists()


@pytest.mark.parametrize(
    "marker", ["{}", '{"model.json": 1}', "[", '{"model.json": {}, "trainer.json": {}, "weights-00001.safetensors": {}}']
)
def test_a_damaged_marker_is_no_marker(pretrain_config: Make, marker: str) -> None:
    folder = pretrain(pretrain_config(), NoProgress())
    (folder.path / "checkpoints" / "step-12" / "COMPLETE").write_text(marker)
    with pytest.raises(CheckpointError, match="COMPLETE"):
        open_checkpoint(folder.path / "checkpoints" / "step-12")
    with pytest.raises(CheckpointError, match="step-12"):
        TrainedModel.open(folder.path)  # not the model of step 10 in its place


def resumed_from(make: Make, source: Path, changes: dict[str, object]) -> None:
    pretrain(make({"name": "other", "checkpoint": {"resume_from": str(source)}, **changes}), NoProgress())


def test_going_on_from_a_checkpoint_of_another_run(pretrain_config: Make, tmp_path: Path) -> None:
    first = pretrain(pretrain_config(), NoProgress())
    config = pretrain_config({"name": "other", "checkpoint": {"resume_from": str(first.path / "checkpoints" / "step-5")}})
    assert torch.equal(final_weights(pretrain(config, NoProgress()))["embed.weight"], final_weights(first)["embed.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"weight_decay": 0.5}}, r"weight_decay: checkpoint 0\.1, config 0\.5"),
        ({"optimizer": {"decay": {"scope": "matrices"}}}, r"embed\.weight: checkpoint decays, config does not decay"),
        ({"optimizer": {"learning_rate": 0.1}}, r"optimizer\.learning_rate: checkpoint 0\.005, config 0\.1"),
        ({"model": {"mlp_hidden_size": 64}}, r"another model\n  model\.mlp_hidden_size: checkpoint 48, config 64"),
        ({"data": {"seed": 7}}, r"data\.seed: checkpoint 42, config 7"),
        ({"steps": 13}, r"optimizer\.total_steps: checkpoint 12, config 13"),
        ({"optimizer": {"betas": [0.9, 0.99]}}, r"optimizer\.betas"),
        ({}, r"at step 12, not before the last of the 12 steps"),
    ],
)
def test_a_checkpoint_that_disagrees_with_the_config_stops_with_a_diff(
    pretrain_config: Make, changes: dict[str, object], message: str
) -> None:
    first = pretrain(pretrain_config(), NoProgress())
    with pytest.raises(CheckpointError, match=message):
        resumed_from(pretrain_config, first.path, changes)
    assert final_weights(first), "the first run is untouched"


def test_a_checkpoint_that_is_not_there(pretrain_config: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint or run folder"):
        resumed_from(pretrain_config, tmp_path / "nowhere", {})


def test_a_vocabulary_that_is_too_small_for_the_tokenizer(pretrain_config: Make) -> None:
    with pytest.raises(UserError, match=r"300.*128|128.*300"):
        pretrain(pretrain_config({"model": {"vocab_size": 128}}), NoProgress())


def test_a_corpus_that_is_not_prepared(pretrain_config: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data prepare"):
        pretrain(pretrain_config({"data": {"folder": str(tmp_path / "none")}}), NoProgress())


def test_a_hook_point_that_does_not_exist_stops_before_the_first_step(pretrain_config: Make) -> None:
    config = pretrain_config({"capture": {"points": ["layers.*.resid_pots"]}})
    with pytest.raises(UserError, match="resid_post"):
        pretrain(config, NoProgress())
    assert not pretrain_folder(config).checkpoints()


def test_a_run_that_diverges_stops(pretrain_config: Make) -> None:
    with pytest.raises(UserError, match=r"step 2: the gradient is not finite.*Lower the learning rate"):
        pretrain(pretrain_config({"optimizer": {"learning_rate": 1e20, "gradient_clip": 0.0}}), NoProgress())


def test_capture_does_not_change_training(pretrain_config: Make, tmp_path: Path) -> None:
    without = pretrain(pretrain_config({"output": str(tmp_path / "a")}), NoProgress())
    with_capture = pretrain(pretrain_config({"output": str(tmp_path / "b"), "capture": {"steps": [0, 3]}}), NoProgress())
    assert rows_without_time(with_capture) == rows_without_time(without)


def pretrain_on_a_rank(config: PretrainConfig) -> str:
    """For `run_on_ranks`."""
    return str(pretrain(config, NoProgress()).path)


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_two_ranks_train_the_same_model(pretrain_config: Make, tmp_path: Path, zero_stage: int) -> None:
    alone = pretrain(pretrain_config({"output": str(tmp_path / "a")}), NoProgress())
    changes = {
        "output": str(tmp_path / "b"),
        "engine": {"zero_stage": zero_stage},
        "batch": {"micro_batch_size": 1},
        "capture": {"steps": [2], "sequences": 3},
    }
    paths = run_on_ranks(2, pretrain_on_a_rank, pretrain_config(changes), log=tmp_path / "log")
    assert paths[0] == paths[1]
    together = RunFolder.open(Path(paths[0]))
    for key in ("held_out_loss", "seen_loss", "train_loss"):
        assert together.results[key] == pytest.approx(alone.results[key], rel=1e-5)
    a, b = final_weights(alone), final_weights(together)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4
    assert together.results["checkpoint"] == "checkpoints/step-12"


@pytest.mark.distributed
def test_a_checkpoint_of_two_zero3_ranks_goes_on_as_one_process(pretrain_config: Make, tmp_path: Path) -> None:
    alone = pretrain(pretrain_config({"output": str(tmp_path / "a")}), NoProgress())
    on_two = pretrain_config({"output": str(tmp_path / "b"), "engine": {"zero_stage": 3}, "batch": {"micro_batch_size": 1}})
    (path, _) = run_on_ranks(2, pretrain_on_a_rank, on_two, log=tmp_path / "log")
    source = {"checkpoint": {"resume_from": f"{path}/checkpoints/step-5"}}
    together = pretrain(pretrain_config({"output": str(tmp_path / "c"), **source}), NoProgress())
    assert together.results["held_out_loss"] == pytest.approx(alone.results["held_out_loss"], rel=1e-5)
    a, b = final_weights(alone), final_weights(together)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4


def test_the_trainer_state_says_what_it_was_trained_on(pretrain_config: Make) -> None:
    folder = pretrain(pretrain_config(), NoProgress())
    state = json.loads((folder.path / "checkpoints" / "step-12" / "trainer.json").read_text())
    assert state["run"] == folder.path.name
    assert state["decay_groups"]["weight_decay"] == 0.1
    assert len(state["decay_groups"]["decayed"]) == len(final_weights(folder))
