"""A fine-tuning run: its arithmetic against a bare torch loop on the task's texts, what it leaves behind, what it refuses."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_plasticity.config.load import check_config
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.data.order import SampleOrder
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import CheckpointError, ConfigError, Interrupted, UserError
from megatron_plasticity.evaluation.tasks.registry import get_task
from megatron_plasticity.models.checkpoint import open_checkpoint
from megatron_plasticity.tracking.metrics import read_metrics
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.tracking.trained_model import TrainedModel
from megatron_plasticity.training.finetune import finetune, finetune_folder
from megatron_plasticity.training.pretrain import pretrain
from tests.ranks import run_on_ranks
from tests.training.test_pretrain import StopAt, final_weights, rows_without_time
from tests.training_configs import MODEL

Make = Callable[..., FinetuneConfig]
# Prompts of 74 to 122 tokens and examples of 103 to 170, so at 120 some are whole, some are cut, and some are all prompt.
UNEQUAL = {"task": {"name": "steps"}, "max_length": 120}


@pytest.fixture(scope="module")
def base(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A model of context length 128, pretrained for two steps."""
    tree = {
        "name": "base",
        "output": str(tmp_path_factory.mktemp("base")),
        "model": {**MODEL, "context_length": 128},
        "data": {"folder": str(tiny_corpus), "held_out_sequences": 2},
        "optimizer": {"learning_rate": 0.005, "weight_decay": 0.1},
        "batch": {"global_batch_size": 4, "micro_batch_size": 4},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "steps": 2,
        "checkpoint": {"every_steps": 1},
        "logging": {"mlflow": False},
        "device": "cpu",
    }
    return pretrain(check_config(PretrainConfig, tree, "test"), NoProgress())


def expected_examples(config: FinetuneConfig, tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
    """(ids, prompt length) of the examples that have something to learn, from the task's texts."""
    kept = []
    for example in get_task(config.task).train(config.task.train_examples, config.task.seed):
        prompt = tokenizer.encode(f"Human: {example.prompt}\nAssistant:")
        ids = [*prompt, *tokenizer.encode(example.response), tokenizer.end_of_text]
        if len(prompt) < config.max_length:
            kept.append((ids[: config.max_length], len(prompt)))
    return kept


def one_bare_step(
    config: FinetuneConfig, base: RunFolder, examples: list[tuple[list[int], int]]
) -> tuple[dict[str, Tensor], float]:
    """One step on `examples`, each by itself without padding, under Adam without any decay: weights, and loss before it."""
    model = open_checkpoint(base.path).build_model(torch.device("cpu")).train()
    response_tokens = sum(len(ids) - prompt_length for ids, prompt_length in examples)
    total = 0.0
    for ids, prompt_length in examples:
        tokens = torch.tensor(ids)
        logits = model(tokens[None, :-1])[0, prompt_length - 1 :]
        loss = functional.cross_entropy(logits, tokens[prompt_length:], reduction="sum") / response_tokens
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
    settings = config.optimizer
    torch.optim.Adam(model.parameters(), lr=settings.learning_rate, betas=settings.betas, eps=settings.eps).step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, total


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert set(a) == set(b)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_one_step_equals_a_bare_torch_loop(finetune_config: Make, base: RunFolder, accumulation: int) -> None:
    """Micro-batches have different numbers of response tokens, so a mean of means would show."""
    changes = {
        **UNEQUAL,
        "batch": {"global_batch_size": 8, "micro_batch_size": 8 // accumulation},
        "schedule": {"kind": "constant", "warmup_fraction": 0.0},
        "epochs": 1,
    }
    config = finetune_config(base.path, changes)
    examples = expected_examples(config, Tokenizer.load(base.path / "tokenizer.json"))
    chosen = [examples[i] for i in SampleOrder(len(examples), config.seed).blocks(0, 8)]
    lengths = [len(ids) - prompt_length for ids, prompt_length in chosen]
    assert max(lengths) > 2 * min(lengths)
    folder = finetune(config, NoProgress())
    expected, loss = one_bare_step(config, base, chosen)
    assert folder.results["steps"] == 1
    assert folder.results["train_loss"] == pytest.approx(loss, rel=1e-6)
    assert largest_difference(final_weights(folder), expected) < 1e-6
    assert largest_difference(final_weights(folder), final_weights(base)) > 5e-4, "the step must move weights"


def finetune_on_a_rank(config: FinetuneConfig) -> str:
    """For `run_on_ranks`."""
    return str(finetune(config, NoProgress()).path)


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_two_ranks_train_the_same_model(finetune_config: Make, base: RunFolder, tmp_path: Path, zero_stage: int) -> None:
    alone = finetune(finetune_config(base.path, {**UNEQUAL, "output": str(tmp_path / "a")}), NoProgress())
    changes = {"output": str(tmp_path / "b"), "batch": {"micro_batch_size": 1}, "engine": {"zero_stage": zero_stage}}
    paths = run_on_ranks(2, finetune_on_a_rank, finetune_config(base.path, {**UNEQUAL, **changes}), log=tmp_path / "log")
    assert paths[0] == paths[1]
    together = RunFolder.open(Path(paths[0]))
    losses = [[row["train/loss"] for row in read_metrics(run.metrics_path)] for run in (alone, together)]
    assert len(losses[0]) == alone.results["steps"] > 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert together.results["examples"] == alone.results["examples"]
    assert largest_difference(final_weights(alone), final_weights(together)) < 1e-5


def test_an_interrupted_run_goes_on_bit_for_bit(finetune_config: Make, base: RunFolder, tmp_path: Path) -> None:
    changes = {**UNEQUAL, "batch": {"global_batch_size": 4, "micro_batch_size": 2}}
    undisturbed = finetune(finetune_config(base.path, {**changes, "output": str(tmp_path / "a")}), NoProgress())
    config = finetune_config(base.path, {**changes, "output": str(tmp_path / "b")})
    with pytest.raises(Interrupted, match="SIGTERM after step 4") as stopped:
        finetune(config, StopAt(4, signal.SIGTERM))
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    interrupted = finetune_folder(config, TrainedModel.open(base.path))
    assert interrupted.state.status == "interrupted"
    assert [path.name for path in interrupted.checkpoints()] == ["step-4"]
    resumed = finetune(config, NoProgress())
    assert resumed.state.attempts == 2
    assert resumed.results == undisturbed.results
    assert rows_without_time(resumed) == rows_without_time(undisturbed)
    a, b = final_weights(undisturbed), final_weights(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_what_everything_after_it_needs(finetune_config: Make, base: RunFolder) -> None:
    config = finetune_config(base.path, UNEQUAL)
    folder = finetune(config, NoProgress())
    kept = len(expected_examples(config, Tokenizer.load(base.path / "tokenizer.json")))
    assert 4 < kept < 16, "some prompts must fill max_length, or this test says nothing of them"
    assert folder.results["examples"] == kept
    assert folder.results["examples_without_response"] == 16 - kept
    assert folder.results["steps"] == kept * 2 // 4
    assert folder.results["checkpoint"] == f"checkpoints/step-{kept * 2 // 4}"
    assert (folder.path / "tokenizer.json").read_bytes() == (base.path / "tokenizer.json").read_bytes()
    trained = TrainedModel.open(folder.path)
    assert trained.pretraining_run().path == base.path
    assert folder.inputs == {"base": base.hash}
    written = (folder.path / "results.json").stat().st_mtime_ns
    assert finetune(config, NoProgress()).path == folder.path
    assert (folder.path / "results.json").stat().st_mtime_ns == written, "a run that is done is not done again"


def test_any_checkpoint_along_a_run_is_a_base(finetune_config: Make, base: RunFolder) -> None:
    """The last one is the run itself; an earlier one is another base, with a folder of its own. Nothing is learned here."""
    still = {**UNEQUAL, "optimizer": {"learning_rate": 1e-30}}
    checkpoints = [base.path / "checkpoints" / f"step-{step}" for step in (1, 2)]
    early, last = (finetune(finetune_config(path, still), NoProgress()) for path in checkpoints)
    assert early.inputs == {"base": f"{base.hash}@1"}
    assert last.path == finetune(finetune_config(base.path, still), NoProgress()).path != early.path
    for folder, checkpoint in zip((early, last), checkpoints, strict=True):
        assert largest_difference(final_weights(folder), dict(open_checkpoint(checkpoint).tensors())) == 0.0
    assert early.results["train_loss"] != last.results["train_loss"]
    assert 0 < early.results["padding_share"] < 0.2


def test_only_a_decay_that_is_asked_for_shrinks_weights(finetune_config: Make, base: RunFolder) -> None:
    """Rows of the token embedding that no example reads have no gradient: without λ they must not move by a single bit."""
    config = finetune_config(base.path, UNEQUAL)
    read = {token for ids, _ in expected_examples(config, Tokenizer.load(base.path / "tokenizer.json")) for token in ids[:-1]}
    unread = [token for token in range(300) if token not in read]
    assert len(unread) > 10
    before = final_weights(base)["embed.weight"]
    without = finetune(config, NoProgress())
    assert without.results["weight_decay"] == 0.0
    assert torch.equal(final_weights(without)["embed.weight"][unread], before[unread])
    assert not torch.equal(final_weights(without)["embed.weight"], before)

    decayed = finetune(finetune_config(base.path, {**UNEQUAL, "optimizer": {"weight_decay": 0.5}}), NoProgress())
    factor = 1.0
    for row in read_metrics(decayed.metrics_path):
        factor *= 1 - row["train/learning_rate"] * 0.5
    assert factor < 0.9999
    torch.testing.assert_close(final_weights(decayed)["embed.weight"][unread], before[unread] * factor, rtol=2e-6, atol=1e-8)


def test_what_cannot_work_on_a_base_is_told_at_once_and_leaves_no_folder(finetune_config: Make, base: RunFolder) -> None:
    patterns = [{"pattern": "nothing.*", "decay": True}, {"pattern": "*", "decay": False}]
    changes = {
        "max_length": 129,
        "capture": {"points": ["nope"], "steps": [99]},
        "optimizer": {"decay": {"scope": "patterns", "patterns": patterns}},
    }
    config = finetune_config(base.path, changes)
    with pytest.raises(ConfigError) as error:
        finetune(config, NoProgress())
    for part in (
        "max_length=129 exceeds the base model's context_length=128",
        "capture: no hook point matches 'nope'",
        "capture.steps: [99] lie after the last step, 8",
        "optimizer.decay.patterns: 'nothing.*' matches no parameter",
    ):
        assert part in str(error.value)
    assert not list(config.output.glob("finetune-*"))


def test_prompts_that_all_fill_the_length_are_refused(finetune_config: Make, base: RunFolder) -> None:
    with pytest.raises(UserError, match=r"'arithmetic'.*max_length=32"):
        finetune(finetune_config(base.path), NoProgress())


def test_fewer_examples_than_a_batch_are_refused(finetune_config: Make, base: RunFolder) -> None:
    changes = {"task": {"train_examples": 3}, "epochs": 1, "max_length": 128}
    with pytest.raises(UserError, match=r"task\.train_examples: 3 .*epochs=1.*batch\.global_batch_size=4"):
        finetune(finetune_config(base.path, changes), NoProgress())


def test_a_base_without_a_complete_checkpoint_is_refused(finetune_config: Make, base: RunFolder, tmp_path: Path) -> None:
    broken = tmp_path / base.path.name
    shutil.copytree(base.path, broken)
    (broken / "checkpoints" / "step-2" / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="complete checkpoint"):
        finetune(finetune_config(broken), NoProgress())
    with pytest.raises(CheckpointError, match="marker is missing"):
        finetune(finetune_config(broken / "checkpoints" / "step-2"), NoProgress())
    with pytest.raises(CheckpointError, match="no such checkpoint or run folder"):
        finetune(finetune_config(tmp_path / "nowhere"), NoProgress())
    assert not (tmp_path / "runs").exists(), "nothing is made for a base that cannot be used"
