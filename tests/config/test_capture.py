"""Which steps a capture config means, and which configs mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_plasticity.config.analysis import CaptureConfig, model_capture_config
from megatron_plasticity.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, {100}),
        ({"at_end": False}, set()),
        ({"steps": [0, 7], "at_end": False}, {0, 7}),
        ({"every_steps": 40}, {40, 80, 100}),
        ({"log_spaced": 3}, {1, 10, 100}),
        ({"log_spaced": 5, "steps": [0]}, {0, 1, 3, 10, 32, 100}),
        ({"log_spaced": 40, "at_end": False}, None),
    ],
)
def test_steps_are_listed_regular_or_log_spaced(settings: dict[str, Any], steps: set[int] | None) -> None:
    found = CaptureConfig.model_validate(settings).schedule(100)
    if steps is None:  # more than there are whole steps at the beginning: each once
        assert {1, 2, 3, 100} <= found <= set(range(1, 101))
    else:
        assert found == steps


def test_a_step_after_the_last_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"capture.steps: \[101\] lie after the last step, 100"):
        CaptureConfig(steps=(5, 101)).schedule(100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"texts": "a.txt", "task": {"name": "arithmetic"}}, "at most one of `texts` and `task`"),
        ({"texts": "a.txt", "positions": "answer"}, "`texts` have none"),
        ({"log_spaced": 1}, "state 0, or 2 or more"),
        ({"keep": "all"}, "statistics"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CaptureConfig.model_validate(settings)


def test_a_run_folder_stands_for_the_default_config_and_a_step_for_its_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "pretrain-small-0123456789"
    for step in (5, 10):
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True)
    config = model_capture_config(run, ["sequences=3"], step=5)
    assert (config.name, config.sequences, config.run) == (run.name, 3, run / "checkpoints" / "step-5")
    file = tmp_path / "capture.yaml"
    file.write_text(f"name: mine\nrun: {run}\n")
    assert model_capture_config(file).run == run
    with pytest.raises(ConfigError, match="no checkpoint of step 7; there are 5, 10"):
        model_capture_config(file, step=7)
