"""LoRA through peft: its arithmetic against bare torch, what its checkpoints hold, and the layouts that it goes with."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from megatron_plasticity.config.load import check_config
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import FinetuneConfig, LoraConfig, PretrainConfig, Projection, TrainingRecipe
from megatron_plasticity.errors import CheckpointError, ConfigError, Interrupted, UserError
from megatron_plasticity.models.checkpoint import ADAPTERS, open_checkpoint
from megatron_plasticity.models.lora import Adapters
from megatron_plasticity.models.loss import IGNORE
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.optim.schedule import learning_rate_at
from megatron_plasticity.parallel.grid import process_grid
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.training.engine import TrainingEngine
from megatron_plasticity.training.finetune import finetune
from megatron_plasticity.training.objective import Objective
from megatron_plasticity.training.optimizer_state import MOMENTS
from megatron_plasticity.training.pretrain import pretrain
from tests.ranks import run_on_ranks
from tests.training.programs import (
    MODEL,
    OLMO,
    Trajectory,
    global_batch,
    initial_model,
    recipe,
    repeating_batch,
    step_batch,
    whole,
)
from tests.training.test_finetune import finetune_on_a_rank
from tests.training.test_layouts import assert_close, assert_same_rows
from tests.training.test_pretrain import StopAt, final_weights

STEPS = 5
LORA = LoraConfig(rank=3, alpha=7)
Make = Callable[..., FinetuneConfig]


def base_weights(model: ModelConfig) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in initial_model(model).named_parameters()}


def with_adapters(model: ModelConfig, lora: LoraConfig = LORA, seed: int = 7) -> tuple[Transformer, Adapters]:
    transformer = initial_model(model)
    adapters = Adapters(lora, model, base_weights(model))
    adapters.attach(transformer, seed)
    return transformer, adapters


def trained(transformer: Transformer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in transformer.named_parameters() if p.requires_grad}


def lora_run(settings: TrainingRecipe, model: ModelConfig) -> Trajectory:
    """Of the adapters, under DeepSpeed; what is `observed` last are the merged weights of the whole model."""
    losses, norms = [], []
    gradients: dict[str, Tensor] = {}
    with process_grid(torch.device("cpu"), settings.parallel) as grid:
        transformer, adapters = with_adapters(model)
        engine = TrainingEngine(transformer, settings, 0.3, grid, adapters)
        for step in range(STEPS):
            engine.set_learning_rate(learning_rate_at(step, STEPS, settings.optimizer.learning_rate, settings.schedule))
            batch = step_batch(settings, grid, step, repeating_batch)
            losses.append(float(grid.sum(engine.train_batch(batch))) / batch.target_tokens)
            norms.append(engine.gradient_norm)
            if step == 0:
                first = whole(engine.full_moments("exp_avg"))
                gradients = {name: moment / (1 - settings.optimizer.betas[0]) for name, moment in first.items()}
        weights, merged = whole(engine.trained_weights()), whole(engine.full_weights())
        moments = {moment: whole(engine.full_moments(moment)) for moment in MOMENTS}
        engine.close()
    return Trajectory(losses, norms, weights, moments, gradients, [merged])


def bare_lora_run(settings: TrainingRecipe, model: ModelConfig) -> Trajectory:
    """The same without peft and DeepSpeed: the plain model is called with W + (alpha/rank)·B·A for its weights."""
    plain, base = initial_model(model), base_weights(model)
    values = {name: value.requires_grad_() for name, value in trained(with_adapters(model)[0]).items()}

    def merged() -> dict[str, Tensor]:
        weights = dict(base)
        for name in base:
            module = name.removesuffix(".weight")
            if f"{module}.lora_A.default.weight" in values:
                a, b = (values[f"{module}.lora_{letter}.default.weight"] for letter in "AB")
                weights[name] = base[name] + LORA.alpha / LORA.rank * (b @ a)
        return weights

    optimizer = torch.optim.AdamW(values.values(), betas=settings.optimizer.betas, eps=settings.optimizer.eps, weight_decay=0.3)
    losses, norms = [], []
    gradients: dict[str, Tensor] = {}
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, STEPS, settings.optimizer.learning_rate, settings.schedule)
        inputs, targets = repeating_batch(step, settings.batch.global_batch_size)
        used = int((targets != IGNORE).sum())
        weights_of_objective = {f"model.{name}": weight for name, weight in merged().items()}
        loss = functional_call(Objective(plain), weights_of_objective, (inputs, targets, 1 / used))
        losses.append(float(loss.cross_entropy / used))
        optimizer.zero_grad()
        loss.total.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(values.values(), settings.optimizer.gradient_clip)))
        if step == 0:
            gradients = {name: value.grad.clone() for name, value in values.items() if value.grad is not None}
        optimizer.step()
    weights = {name: value.detach().clone() for name, value in values.items()}
    moments: dict[str, Any] = {m: {name: optimizer.state[value][m] for name, value in values.items()} for m in MOMENTS}
    with torch.no_grad():
        return Trajectory(losses, norms, weights, moments, gradients, [merged()])


def assert_same_training(ours: Trajectory, theirs: Trajectory) -> None:
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6)
    assert ours.gradient_norms == pytest.approx(theirs.gradient_norms, rel=1e-5)
    pairs = [(ours.weights, theirs.weights), (ours.observed[-1], theirs.observed[-1])]
    pairs += [(ours.moments[moment], theirs.moments[moment]) for moment in MOMENTS]
    for mine, other in pairs:
        assert_close(mine, other)
    assert set(ours.first_gradients) == set(theirs.first_gradients) == set(ours.weights)
    for name, gradient in theirs.first_gradients.items():
        torch.testing.assert_close(ours.first_gradients[name], gradient, rtol=1e-5, atol=1e-7)


def smooth(zero_stage: int, micro_batch: int = 8, checkpointing: bool = False) -> TrainingRecipe:
    """With an ε far above the rounding of gradients, which AdamW would otherwise amplify (see tests/distributed/matrix.py)."""
    gathers_everything = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if zero_stage == 3 else None
    return recipe(
        zero_stage, scope="all", eps=1e-4, micro_batch=micro_batch, checkpointing=checkpointing, deepspeed=gathers_everything
    )


@pytest.mark.parametrize("model", [MODEL, OLMO], ids=["llama2", "olmo2"])
@pytest.mark.parametrize(("zero_stage", "micro_batch"), [(0, 8), (1, 2), (2, 2), (3, 2)])
def test_training_equals_a_bare_torch_loop(model: ModelConfig, zero_stage: int, micro_batch: int) -> None:
    settings = smooth(zero_stage, micro_batch, checkpointing=micro_batch == 2)
    reference = bare_lora_run(settings, model)
    assert_same_training(lora_run(settings, model), reference)
    start = trained(with_adapters(model)[0])
    assert all(not torch.equal(start[name], weight) for name, weight in reference.weights.items()), "every tensor is trained"


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_two_ranks_equal_one_process(zero_stage: int, tmp_path: Path) -> None:
    settings = smooth(zero_stage, micro_batch=2)
    (ours, other) = run_on_ranks(2, lora_run, settings, OLMO, log=tmp_path / "log")
    assert_same_training(ours, bare_lora_run(settings, OLMO))
    assert other.losses == ours.losses
    assert other.weights == {}, "whole tensors come together on the main process"


@pytest.mark.parametrize("model", [MODEL, OLMO], ids=["llama2", "olmo2"])
def test_training_begins_at_the_base(model: ModelConfig) -> None:
    inputs, _ = global_batch(0, 4)
    adapted, adapters = with_adapters(model)
    assert torch.equal(adapted(inputs), initial_model(model)(inputs))
    assert list(adapters.shapes) == list(trained(adapted))
    assert adapters.shapes == {name: tuple(value.shape) for name, value in trained(adapted).items()}
    assert len(adapters.shapes) == 2 * 7 * model.layers


def test_adapters_depend_on_the_seed_and_their_name_alone() -> None:
    before = torch.random.get_rng_state()
    one, again, other = (trained(with_adapters(MODEL, seed=seed)[0]) for seed in (7, 7, 8))
    few = trained(with_adapters(MODEL, LoraConfig(rank=3, targets=("down_proj",)))[0])
    assert torch.equal(torch.random.get_rng_state(), before), "nothing is drawn from the global state"
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert all(torch.equal(one[name], few[name]) for name in few)
    for name, value in one.items():
        if "lora_B" in name:
            assert not value.any()
        else:
            assert not torch.equal(value, other[name])
            bound = value.shape[1] ** -0.5
            assert 0.9 * bound < float(value.abs().max()) <= bound
    assert len({float(value.sum()) for name, value in one.items() if "lora_A" in name}) == len(one) // 2


@pytest.mark.parametrize("targets", [("q_proj",), ("v_proj", "up_proj")])
def test_only_the_targets_are_trained(targets: tuple[Projection, ...]) -> None:
    names = trained(with_adapters(MODEL, LoraConfig(targets=targets))[0])
    assert {name.split(".")[3] for name in names} == set(targets)
    assert len(names) == 2 * len(targets) * MODEL.layers


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"rank": 0}, "lora.rank"),
        ({"targets": []}, "at least one projection"),
        ({"targets": ["q_proj", "q_proj"]}, "each once"),
        ({"targets": ["query"]}, "lora.targets"),
        ({"dropout": 0.1}, "lora.dropout: unknown key"),
    ],
)
def test_what_cannot_be_is_refused(finetune_config: Make, lora: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        finetune_config(Path("base"), {"lora": lora})


@pytest.fixture(scope="module")
def base(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An OLMo model of context length 128, pretrained for two steps."""
    model = {**OLMO.model_dump(), "vocab_size": 300, "context_length": 128}
    tree = {
        "name": "base",
        "output": str(tmp_path_factory.mktemp("base")),
        "model": model,
        "data": {"folder": str(tiny_corpus), "held_out_sequences": 2},
        "optimizer": {"learning_rate": 0.005, "weight_decay": 0.1},
        "batch": {"global_batch_size": 4, "micro_batch_size": 4},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "steps": 2,
        "logging": {"mlflow": False},
        "device": "cpu",
    }
    return pretrain(check_config(PretrainConfig, tree, "test"), NoProgress())


def changes(tmp_path: Path, folder: str, **more: Any) -> dict[str, Any]:
    return {
        "output": str(tmp_path / folder),
        "task": {"name": "steps"},
        "max_length": 120,
        "lora": {"rank": 3, "alpha": 7},
        "optimizer": {"learning_rate": 0.01, "weight_decay": 0.2, "eps": 1e-5},
        "logging": {"norms_every_steps": 2},
        **more,
    }


def stored(folder: RunFolder, group: str) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder.path)
    return dict(checkpoint.tensors(group, Adapters(LORA, checkpoint.model, {}).shapes))


def test_a_checkpoint_holds_the_merged_weights_and_the_adapters(
    finetune_config: Make, base: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finetune(finetune_config(base.path, changes(tmp_path, "a")), NoProgress())
    before, after, adapters = final_weights(base), final_weights(folder), stored(folder, ADAPTERS)
    assert set(after) == set(before)
    for name, weight in after.items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.default.weight" in adapters:
            a, b = (adapters[f"{module}.lora_{letter}.default.weight"] for letter in "AB")
            assert b.any()
            torch.testing.assert_close(weight, before[name] + 7 / 3 * (b @ a), rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(weight, before[name]), "what is frozen does not move by a bit"
    assert all(stored(folder, moment).keys() == adapters.keys() for moment in MOMENTS)

    # The plain model with merged weights computes what the one with adapters computed.
    inputs = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    plain = open_checkpoint(folder.path).build_model(torch.device("cpu"))
    adapted = open_checkpoint(base.path).build_model(torch.device("cpu"))
    Adapters(LORA, plain.config, before).attach(adapted, 0)
    adapted.load_whole(adapters)
    torch.testing.assert_close(plain(inputs), adapted(inputs), rtol=1e-5, atol=1e-6)

    # All 28 adapters of the two layers decay, and nothing else is in a group.
    printed = capsys.readouterr().out
    size = sum(tensor.numel() for tensor in adapters.values())
    assert f"decays: 28 tensors, {size:,} parameters\n" in printed
    assert "does not decay: 0 tensors" in printed


def test_an_interrupted_run_goes_on_bit_for_bit(finetune_config: Make, base: RunFolder, tmp_path: Path) -> None:
    undisturbed = finetune(finetune_config(base.path, changes(tmp_path, "a")), NoProgress())
    config = finetune_config(base.path, changes(tmp_path, "b"))
    with pytest.raises(Interrupted, match="after step 3"):
        finetune(config, StopAt(3, signal.SIGTERM))
    resumed = finetune(config, NoProgress())
    assert resumed.state.attempts == 2
    assert resumed.results == undisturbed.results
    for tensors in (final_weights, *(lambda run, group=group: stored(run, group) for group in (ADAPTERS, *MOMENTS))):
        a, b = tensors(undisturbed), tensors(resumed)
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.distributed
def test_a_packed_run_on_two_ranks_in_bf16_or_fp32(finetune_config: Make, base: RunFolder, tmp_path: Path) -> None:
    """With ZeRO-3 against one process, in fp32; a bf16 run rounds, so of it only what is exact is asked."""
    alone = finetune(finetune_config(base.path, changes(tmp_path, "a")), NoProgress())
    split = {"batching": "packed", "batch": {"micro_batch_size": 1}}
    config = finetune_config(base.path, changes(tmp_path, "b", engine={"zero_stage": 3}, **split))
    together = RunFolder.open(Path(run_on_ranks(2, finetune_on_a_rank, config, log=tmp_path / "log")[0]))
    assert_same_rows(together, alone)
    assert_close(final_weights(together), final_weights(alone))

    rounded = finetune(
        finetune_config(base.path, changes(tmp_path, "c", engine={"zero_stage": 3, "precision": "bf16"})), NoProgress()
    )
    assert rounded.results["train_loss"] == pytest.approx(alone.results["train_loss"], rel=1e-2)
    frozen = [name for name in final_weights(base) if "proj" not in name]
    assert all(torch.equal(final_weights(rounded)[name], final_weights(base)[name]) for name in frozen), "not even rounded"


def test_a_checkpoint_of_other_adapters_is_no_start(finetune_config: Make, base: RunFolder, tmp_path: Path) -> None:
    first = finetune(finetune_config(base.path, changes(tmp_path, "a", checkpoint={"every_steps": 2})), NoProgress())
    resume = {"resume_from": str(first.path / "checkpoints" / "step-2")}

    def start(**more: Any) -> None:
        finetune(finetune_config(base.path, changes(tmp_path, "b", checkpoint=resume, **more)), NoProgress())

    with pytest.raises(CheckpointError, match="adapters do not fit the config"):
        start(lora={"rank": 2})
    with pytest.raises(CheckpointError, match=r"data\.lora.*'alpha': 7.*'alpha': 8"):
        start(lora={"rank": 3, "alpha": 8})
    with pytest.raises(CheckpointError, match="other weight-decay groups"):
        start(lora=None)
    full = finetune(finetune_config(base.path, changes(tmp_path, "c", lora=None)), NoProgress())
    resume["resume_from"] = str(full.path)
    with pytest.raises(CheckpointError, match="holds no 'adapters' tensors"):
        start()


def test_without_peft_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'megatron-plasticity\[lora\]'"):
        with_adapters(MODEL)
