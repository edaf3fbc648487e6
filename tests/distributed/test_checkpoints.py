"""A run that was saved under one layout goes on under any other, through real files.

Every ordered pair (A, B) of the layouts below is covered without running each: a checkpoint holds whole tensors by name, and
nothing in it says who wrote it. So it is enough that

- what A writes is right: one process goes on from it as if nothing had happened;
- what B reads is right: from a checkpoint that one process wrote, B goes on as if nothing had happened;
- nothing else passes between them: having loaded that checkpoint, B writes every file of it again, byte for byte. The bytes are
  thus a function of the state alone, and a state that A wrote is one that one process could have written.

A chain through all of them, one step each, is run on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_plasticity.models.checkpoint import open_checkpoint
from tests.distributed.legs import STEPS, Leg, run_leg
from tests.distributed.matrix import Layout, parse
from tests.distributed.runs import WEIGHT_DECAY, data_of, relative
from tests.training.programs import Trajectory, bare_run

pytestmark = pytest.mark.distributed

SAVED_AT = 3

# A tied embedding that lies on two stages, QK-norm, and key/value heads of which four ranks hold two copies.
#                         family  pp  dp  tp  sp   kv  zero  dtype  acc  ckpt  tied  stages  rows    scope     clip
ONE_PROCESS = parse("full olmo2   1   1   1   -    2   0     fp32   1    -     yes   -       varied  matrices  0.5")
LAYOUTS = {
    "tensor2-sequence-data2-zero3": replace(ONE_PROCESS, tensor=2, sequence=True, data=2, zero_stage=3),
    "pipeline2-tensor2-zero1": replace(ONE_PROCESS, pipeline=2, tensor=2, zero_stage=1, accumulation=2),
    "pipeline4-zero1": replace(ONE_PROCESS, pipeline=4, zero_stage=1, accumulation=4),
    "data4-zero2": replace(ONE_PROCESS, data=4, zero_stage=2),
    "tensor4-sequence-zero0": replace(ONE_PROCESS, tensor=4, sequence=True),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
each_dtype = pytest.mark.parametrize("dtype", ["fp32", "bf16"])
fp32_first = pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.full)])

# In bf16 layouts round differently, so their runs part a little; that checkpoints lose nothing is shown bit for bit.
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}

Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoint_of_one_process(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The checkpoint that one process writes after half the run, by dtype; written when it is first asked for."""
    folder = tmp_path_factory.mktemp("one-process")

    def checkpoint(dtype: str) -> Path:
        path = folder / dtype
        if not path.exists():
            run_leg(in_dtype(ONE_PROCESS, dtype), Leg(0, SAVED_AT, end=path), folder / "log")
        return path

    return checkpoint


def in_dtype(layout: Layout, dtype: str) -> Layout:
    return replace(layout, dtype=dtype)  # type: ignore[arg-type]


def undisturbed(dtype: str) -> Trajectory:
    """One process in plain torch from the first step to the last."""
    layout = in_dtype(ONE_PROCESS, dtype)
    return bare_run(layout.recipe, STEPS, WEIGHT_DECAY, layout.model, data_of(layout))


def assert_ended_as_undisturbed(path: Path, losses: list[float], dtype: str) -> None:
    """The losses of the last steps, and the weights in the checkpoint at the end."""
    expected = undisturbed(dtype)
    assert losses == pytest.approx(expected.losses[-len(losses) :], rel=TOLERANCE[dtype])
    checkpoint = open_checkpoint(path)
    assert checkpoint.step == STEPS
    weights = checkpoint.tensors()
    assert set(weights) == set(expected.weights)
    for name, weight in expected.weights.items():
        assert relative(weights[name], weight) < TOLERANCE[dtype], name


def assert_same_files(one: Path, other: Path) -> None:
    files = [{file.name: file.read_bytes() for file in path.iterdir()} for path in (one, other)]
    assert files[0].keys() == files[1].keys()
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []


@each_dtype
@each_layout
def test_a_layout_goes_on_from_one_process(layout: Layout, dtype: str, checkpoint_of_one_process: Make, tmp_path: Path) -> None:
    start, copy, end = checkpoint_of_one_process(dtype), tmp_path / "copy", tmp_path / "end"
    losses = run_leg(in_dtype(layout, dtype), Leg(SAVED_AT, STEPS, start, copy, end), tmp_path / "log")
    assert_same_files(copy, start)
    assert_ended_as_undisturbed(end, losses, dtype)


@fp32_first
@each_layout
def test_one_process_goes_on_from_a_layout(layout: Layout, dtype: str, tmp_path: Path) -> None:
    saved, copy, end = tmp_path / "saved", tmp_path / "copy", tmp_path / "end"
    run_leg(in_dtype(layout, dtype), Leg(0, SAVED_AT, end=saved), tmp_path / "log")
    losses = run_leg(in_dtype(ONE_PROCESS, dtype), Leg(SAVED_AT, STEPS, saved, copy, end), tmp_path / "log")
    assert_same_files(copy, saved)
    assert_ended_as_undisturbed(end, losses, dtype)


@fp32_first
def test_a_chain_through_all_layouts(dtype: str, tmp_path: Path) -> None:
    """One step each; each hands over exactly what it was handed, and the end is that of the undisturbed run."""
    chain = [*LAYOUTS.values(), ONE_PROCESS]
    assert len(chain) == STEPS
    losses: list[float] = []
    here: Path | None = None
    for step, layout in enumerate(chain):
        copy, end = tmp_path / f"copy-{step}", tmp_path / f"step-{step + 1}"
        losses += run_leg(in_dtype(layout, dtype), Leg(step, step + 1, here, copy if here else None, end), tmp_path / "log")
        if here is not None:
            assert_same_files(copy, here)
        here = end
    assert here is not None
    assert_ended_as_undisturbed(here, losses, dtype)


def test_masters_in_bf16_keep_what_bf16_cannot_hold(checkpoint_of_one_process: Make) -> None:
    """Or copies that are equal bit for bit would not say much."""
    weights = open_checkpoint(checkpoint_of_one_process("bf16")).tensors()
    assert not any(torch.equal(weights[name], weights[name].bfloat16().float()) for name in weights)
