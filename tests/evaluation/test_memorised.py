"""The whole chain, from fine-tuning to scores: a model that has memorised its training examples must score 100 % on them, and the
model that it was made from nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_plasticity.config.evaluation import EvaluateConfig
from megatron_plasticity.config.load import check_config
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.evaluation.job import evaluate
from megatron_plasticity.evaluation.samples import read_samples
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.training.finetune import finetune
from megatron_plasticity.training.pretrain import pretrain
from tests.ranks import run_on_ranks
from tests.training_configs import MODEL

EXAMPLES = 50
TASK = {"name": "categories", "train_examples": EXAMPLES, "questions": "train"}
SHARED = {"engine": {"zero_stage": 0, "precision": "fp32"}, "logging": {"mlflow": False, "norms_every_steps": 0}, "device": "cpu"}


@pytest.fixture(scope="module")
def untrained(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A model after a single step."""
    width = {"hidden_size": 64, "mlp_hidden_size": 128, "query_heads": 4, "kv_heads": 2, "head_dim": 16, "layers": 2}
    tree = {
        **SHARED,
        "name": "untrained",
        "output": str(tmp_path_factory.mktemp("memorised")),
        "model": {**MODEL, **width, "context_length": 128},
        "data": {"folder": str(tiny_corpus), "held_out_sequences": 2},
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1},
        "batch": {"global_batch_size": 4, "micro_batch_size": 4},
        "steps": 1,
    }
    return pretrain(check_config(PretrainConfig, tree, "test"), NoProgress())


@pytest.fixture(scope="module")
def memorised(untrained: RunFolder) -> RunFolder:
    tree = {
        **SHARED,
        "name": "memorised",
        "output": str(untrained.path.parent),
        "base": str(untrained.path),
        "task": TASK,
        "optimizer": {"learning_rate": 5e-3, "weight_decay": 0.0, "betas": [0.9, 0.99]},
        "schedule": {"kind": "cosine", "final_fraction": 0.0},
        "batch": {"global_batch_size": 10, "micro_batch_size": 10},
        "epochs": 50,
        "max_length": 128,
    }
    return finetune(check_config(FinetuneConfig, tree, "test"), NoProgress())


def evaluation(model: RunFolder, output: Path) -> EvaluateConfig:
    return EvaluateConfig.model_validate(
        {
            "name": "memorised",
            "output": str(output),
            "run": str(model.path),
            "tasks": [TASK],
            "samples": 2,
            "temperature": 0.1,
            "max_new_tokens": 48,
            "bootstrap_resamples": 0,
            "device": "cpu",
        }
    )


def evaluate_on_a_rank(config: EvaluateConfig) -> str:
    """For `run_on_ranks`."""
    return str(evaluate(config, NoProgress()).path)


def test_what_was_memorised_is_right_and_nothing_else_is(memorised: RunFolder, untrained: RunFolder, tmp_path: Path) -> None:
    after = evaluate(evaluation(memorised, tmp_path), NoProgress()).results["tasks"]["categories"]["metrics"]
    before = evaluate(evaluation(untrained, tmp_path), NoProgress()).results["tasks"]["categories"]["metrics"]
    assert (after["greedy"]["value"], before["greedy"]["value"]) == (1.0, 0.0)
    assert after["maj"]["value"] > 0.9
    assert before["pass"]["value"] == 0.0


@pytest.mark.distributed
def test_two_ranks_give_the_same_answers(memorised: RunFolder, tmp_path: Path) -> None:
    alone = evaluate(evaluation(memorised, tmp_path / "alone"), NoProgress())
    (folder, _) = run_on_ranks(2, evaluate_on_a_rank, evaluation(memorised, tmp_path / "ranks"), log=tmp_path / "log")
    assert read_samples(Path(folder)) == read_samples(alone.path)
    assert RunFolder(Path(folder)).results == alone.results
