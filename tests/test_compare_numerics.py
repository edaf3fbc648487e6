"""The tool that finds where two configs part: it sees what differs, names it, and finds nothing between equal layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.tracking.plain_types import section_to_yaml
from tests.tools import load_tool

compare_numerics = load_tool("compare_numerics")


@pytest.fixture
def config(pretrain_config: Callable[..., PretrainConfig], tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    changes = {"model": {"family": "olmo2"}, "batch": {"micro_batch_size": 2}, "optimizer": {"learning_rate": 0.001, "eps": 1e-5}}
    path.write_text(section_to_yaml(pretrain_config(changes)))
    return str(path)


@pytest.mark.slow
@pytest.mark.distributed
def test_layouts_do_not_part(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_numerics.main([config, config, "--steps", "2", "--b", "parallel.tensor=2", "parallel.sequence=true"]) == 0
    shown = capsys.readouterr().out
    assert "parallel.tensor: A 1, B 2" in shown
    assert "Nothing differs by more than 1e-05 in 2 steps." in shown


@pytest.mark.parametrize(
    ("setting", "where"),
    [
        ("optimizer.decay.scope=matrices", "in step 1, at weight embed.weight"),
        ("optimizer.gradient_clip=0.1", "in step 1, at gradient of head.weight"),
        ("model.rope_theta=100", "in the first forward pass, at activation of layers.0.attn.q"),
        ("seed=1", "in the first forward pass, at activation of embed"),
        ("data.seed=1", "in step 1, at loss"),
    ],
)
def test_the_first_difference_is_named(config: str, setting: str, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_numerics.main([config, config, "--steps", "1", "--b", setting]) == 1
    assert f"They part first {where} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-b", "3"], "cannot be split over 3 data-parallel ranks"),
        (["--b", "data.folder=/nowhere"], "/nowhere: not a prepared corpus"),
        (["--b", "parallel.tensor=3"], "parallel.tensor=3"),
        (["--steps", "0"], "at least one step"),
        (["--steps", "13"], "has 12"),
        (["--data-a", "0"], "at least one data-parallel rank"),
        (["--a", "engine.deepspeed={zero_optimization: 5}"], "engine.deepspeed.zero_optimization"),
    ],
)
def test_bad_input_ends_before_anything_runs(
    config: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_numerics.main([config, config, *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "running" not in errors
