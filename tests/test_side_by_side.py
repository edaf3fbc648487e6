"""The benchmark of ways to train many small models: that each way trains the same models, and what it says when one does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools import TOOLS, load_tool

sys.path.insert(0, str(TOOLS / "bench"))  # as a script it finds its neighbours by itself
training = load_tool("bench/side_by_side_training")
sys.modules["side_by_side_training"] = training
bench = load_tool("bench/side_by_side")

SMALL = {"layers": 1, "hidden_size": 32, "vocab_size": 64, "length": 16, "batch": 2, "steps": 4}
MODELS = [0, 1, 2]


@pytest.fixture
def _sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack replaces torch's attention in its process."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", torch.nn.functional.scaled_dot_product_attention)


def _turn(models: list[int], stacked: bool, **changed: Any) -> Any:
    setting = {**SMALL, "models": models, "stacked": stacked, "threads": 1, **changed}
    batches = [training.batch(setting, number) for number in range(8)]
    losses = {str(model): found for train in training.make_trainers(setting) for model, found in train(batches).items()}
    return bench.Turn(1.0, 1.0, losses)


@pytest.mark.usefixtures("_sdpa")
def test_a_stack_has_the_losses_of_single_models() -> None:
    single, stack = _turn(MODELS, stacked=False), _turn(MODELS, stacked=True)
    assert bench.greatest_difference([stack], [single]) < 1e-5
    assert single.losses["0"][-1] < single.losses["0"][0] - 0.01, "nothing was learnt, so that all optimizers would agree"


@pytest.mark.usefixtures("_sdpa")
@pytest.mark.parametrize("stacked", [False, True])
def test_another_weight_decay_is_seen(stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = _turn(MODELS, stacked=False)
    monkeypatch.setattr(training, "weight_decay", lambda model: 0.5)
    wrong = _turn(MODELS, stacked)
    assert bench.greatest_difference([wrong], [right]) > bench.LOSS_TOLERANCE


def test_a_loss_that_is_not_finite_is_a_difference() -> None:
    turns = [bench.Turn(1.0, 1.0, {"0": [1.0, float("nan")]})]
    assert bench.greatest_difference(turns, turns) == float("inf")


@pytest.mark.parametrize(("models", "cores"), [(4, 2), (5, 2), (3, 16), (1, 4), (4, 1)])
def test_every_way_trains_every_model_once_on_no_more_than_the_cores(models: int, cores: int) -> None:
    for name, processes in bench.ways(models, cores, compiled=True).items():
        assert sorted(model for process in processes for model in process["models"]) == list(range(models)), name
        assert sum(process["threads"] for process in processes) <= cores, name
        assert all(process["models"] for process in processes), name


def test_the_verdict_names_the_ways_that_turns_do_not_tell_apart() -> None:
    assert bench.verdict({"a": [1.0, 1.0], "b": [1.4, 1.6]}) == "→ most by wall time: b, 1.50"
    assert bench.verdict({"a": [1.0, 1.0], "b": [0.9, 1.6]}).endswith("1.25; the turns overlap with: a")


def test_ways_that_fail_or_differ_end_in_a_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes that speak as ours do: one with other losses, one that says why it failed, one that dies."""
    speaker = tmp_path / "speaker.py"
    speaker.write_text(
        "import json, sys\n"
        "setting = json.loads(sys.argv[1])\n"
        "print('{}', flush=True)\n"
        "for _ in sys.stdin:\n"
        "    losses = {str(model): [1.0 + setting['off']] for model in setting['models']}\n"
        "    if setting['off'] == 2: sys.exit(7)\n"
        "    told = {'failed': 'no memory'} if setting['off'] == 1 else {'losses': losses, 'processor_seconds': 1.0}\n"
        "    print(json.dumps(told), flush=True)\n"
    )
    wanted = {"right": 0, "inexact": 1e-3, "told": 1, "died": 2}
    processes = {name: [{"models": [0, 1], "threads": 1, "off": off}] for name, off in wanted.items()}
    monkeypatch.setattr(bench, "TRAINING", speaker)
    monkeypatch.setattr(bench, "ways", lambda *_: processes)
    monkeypatch.setattr(sys, "argv", ["side_by_side.py", "--hidden-sizes", "32", "--turns", "2"])
    assert bench.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert "  inexact (1 × 1): INVALID: its losses are off by 0.001 from those of right (1 × 1)" in lines
    assert "  told (1 × 1): not measured: no memory" in lines
    assert "  died (1 × 1): not measured: a process ended with exit code 7" in lines
    assert lines[-1].startswith("  → most by wall time: right (1 × 1), 1.00")


def test_what_goes_wrong_in_a_process_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    training.work({**SMALL, "models": [0], "threads": 1, "layers": 0})
    [line] = capsys.readouterr().out.splitlines()
    assert "layers" in json.loads(line)["failed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--hidden-sizes", "48"], "expected a multiple of 32"), (["--turns", "0"], "expected a whole number from 1 on")],
)
def test_bad_settings_are_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["side_by_side.py", *arguments])
    with pytest.raises(SystemExit):
        bench.main()
    assert message in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.distributed
def test_the_command() -> None:
    sizes = [f"--{key.replace('_', '-')}={SMALL[key]}" for key in ("layers", "vocab_size", "length", "batch")]
    command = [sys.executable, str(TOOLS / "bench/side_by_side.py"), "--hidden-sizes=32", "--models=3", "--turns=2", *sizes]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "→ most by wall time: " in ended.stdout
    assert ended.stdout.count(" tokens/s (") >= 2
