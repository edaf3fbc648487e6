"""Compiled blocks compute what they say, and activations are seen all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_plasticity.capture.recorder import Recorder
from megatron_plasticity.config.parallel import ParallelConfig
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.training.pretrain import pretrain
from tests.ranks import run_on_ranks
from tests.training.programs import MODEL, OLMO, bare_run, engine_run, initial_model, recipe, repeating_batch


@pytest.mark.slow
def test_compiled_blocks_train_as_they_are_written() -> None:
    """With accumulation, recomputation, and micro-batches of several lengths, as in fine-tuning."""
    torch.compiler.reset()
    settings = recipe(1, micro_batch=2, checkpointing=True, compile=True)
    compiled = engine_run(settings, 4, model=OLMO)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "something was compiled"
    reference = bare_run(settings, 4, model=OLMO)
    assert compiled.losses == pytest.approx(reference.losses, rel=1e-5)
    assert compiled.gradient_norms == pytest.approx(reference.gradient_norms, rel=1e-4)
    for name, gradient in compiled.first_gradients.items():
        torch.testing.assert_close(gradient, reference.first_gradients[name], rtol=1e-3, atol=1e-6)


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("zero_stage", "layout"),
    [(3, {}), (1, {"tensor": 2}), (1, {"tensor": 2, "sequence": True}), (1, {"pipeline": 2})],
    ids=str,
)
def test_compiled_blocks_train_as_one_process_under_every_layout(zero_stage: int, layout: dict[str, Any], tmp_path: Path) -> None:
    settings = recipe(zero_stage, micro_batch=2, parallel=ParallelConfig(**layout), compile=True)
    arguments = (settings, 4, 0.3, OLMO, None, repeating_batch)
    compiled = run_on_ranks(2, engine_run, *arguments, log=tmp_path / "log", seconds=280)[0]
    reference = bare_run(settings, 4, model=OLMO, data=repeating_batch)
    assert compiled.losses == pytest.approx(reference.losses, rel=1e-5)
    assert compiled.gradient_norms == pytest.approx(reference.gradient_norms, rel=1e-4)


@pytest.mark.slow
def test_activations_of_compiled_blocks_are_recorded() -> None:
    tokens = torch.randint(MODEL.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    points = ["layers.*.attn.q", "layers.*.resid_post"]
    expected = Recorder(initial_model(), points).record(tokens)
    model = initial_model()
    model.compile_blocks()
    plain = initial_model()(tokens)
    torch.testing.assert_close(model(tokens), plain, rtol=1e-4, atol=1e-6)
    found = Recorder(model, points).record(tokens)
    assert found.keys() == expected.keys()
    for name, activations in found.items():
        assert torch.equal(activations, expected[name]), name
    torch.testing.assert_close(model(tokens), plain, rtol=1e-4, atol=1e-6)  # compiled again


def test_without_a_compiler_the_run_does_not_start(
    pretrain_config: Callable[..., PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    config = pretrain_config({"engine": {"compile": True}})
    with pytest.raises(UserError, match=r"engine\.compile needs a C\+\+ compiler, and there is no 'no-such-compiler'"):
        pretrain(config, NoProgress())
    assert not config.output.exists()
