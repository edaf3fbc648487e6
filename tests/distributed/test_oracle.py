"""The oracle sees what it is there to see: with one thing broken on purpose, it says so, and says what."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from megatron_plasticity.parallel.grid import process_grid
from tests.distributed.matrix import Layout, parse
from tests.distributed.oracle import violations
from tests.distributed.runs import reference_run, run_layout
from tests.distributed.sabotage import SABOTAGES
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

#                       family  pp  dp  tp  sp   kv  zero  dtype  acc  ckpt  tied  stages  rows    scope     clip
SEQUENCE = parse("full olmo2   1   1   2   yes  2   1     fp32   1    -     -     -       -       matrices  0.5")
TENSOR = parse("full   olmo2   1   1   2   -    4   1     fp32   1    -     -     -       -       matrices  0.5")
REPLICATED = parse("full llama2 1  1   4   -    2   0     fp32   1    -     -     -       -       matrices  0.5")
REPLICATED_OLMO = replace(REPLICATED, family="olmo2")
PIPELINE = parse("full llama2  2   1   1   -    2   1     fp32   2    -     -     -       -       matrices  0.5")
TIED = parse("full     llama2  2   1   1   -    2   1     fp32   2    -     yes   -       -       matrices  0.5")
DATA = parse("full     llama2  1   2   1   -    2   1     fp32   2    -     -     -       -       matrices  0.5")
DATA_TENSOR = replace(TENSOR, data=2)
DATA_PIPELINE = replace(PIPELINE, data=2)

FIRST_LOSS, FIRST_NORM, FIRST_GRADIENT = (
    "loss of the first step",
    "gradient norm of the first step",
    "gradient of the first step",
)


@dataclass(frozen=True)
class Control:
    """A defect, where it can happen, what must show it, and what it cannot touch."""

    sabotage: str
    layout: Layout
    shows: set[str]
    spares: set[str]

    @property
    def id(self) -> str:
        return f"{self.sabotage}-{self.layout.id}"


def in_bf16(layout: Layout) -> Layout:
    return replace(layout, dtype="bf16")


FORWARD = {FIRST_LOSS, FIRST_GRADIENT, "weights", "held-out loss"}
CONTROLS = [
    Control("gradient_of_norm_gains_not_summed", SEQUENCE, {FIRST_GRADIENT, FIRST_NORM, "copies"}, {FIRST_LOSS}),
    Control("gradient_of_norm_gains_not_summed", in_bf16(SEQUENCE), {FIRST_GRADIENT, "copies"}, {FIRST_LOSS}),
    Control("qk_norm_of_local_heads", TENSOR, FORWARD, {"copies"}),
    Control("qk_norm_without_its_adjoint", TENSOR, {FIRST_GRADIENT}, {FIRST_LOSS}),
    Control("gradient_of_replicated_heads_not_summed", REPLICATED, {FIRST_GRADIENT, FIRST_NORM, "copies"}, {FIRST_LOSS}),
    Control("gradient_of_replicated_heads_not_summed", REPLICATED_OLMO, {FIRST_GRADIENT, FIRST_NORM, "copies"}, {FIRST_LOSS}),
    Control("gradient_of_replicated_heads_not_summed", in_bf16(REPLICATED), {FIRST_GRADIENT, "copies"}, {FIRST_LOSS}),
    Control("input_gradient_not_summed", TENSOR, {FIRST_GRADIENT, FIRST_NORM, "copies"}, {FIRST_LOSS}),
    Control("input_gradient_not_summed", in_bf16(TENSOR), {FIRST_GRADIENT, "copies"}, {FIRST_LOSS}),
    Control("softmax_of_the_local_vocabulary", TENSOR, {FIRST_LOSS, "held-out loss"}, {"copies"}),
    Control("one_norm_gain_decays_on_the_last_stage", PIPELINE, {"weights", "AdamW's formula"}, {FIRST_LOSS, FIRST_GRADIENT}),
    Control(
        "one_norm_gain_decays_on_the_last_stage",
        in_bf16(PIPELINE),
        {"AdamW's formula"},
        {FIRST_LOSS, FIRST_GRADIENT},
    ),
    Control("replicated_parameters_count_once_per_rank", TENSOR, {FIRST_NORM, FIRST_GRADIENT}, {FIRST_LOSS}),
    Control("replicated_parameters_count_once_per_rank", replace(TENSOR, zero_stage=0), {FIRST_NORM}, {FIRST_LOSS}),
    Control("only_parts_of_the_first_rank_count", TENSOR, {FIRST_NORM, FIRST_GRADIENT}, {FIRST_LOSS}),
    Control("only_parts_of_the_first_rank_count", replace(TENSOR, zero_stage=3), {FIRST_NORM, FIRST_GRADIENT}, {FIRST_LOSS}),
    # What the support table calls adapted: left to DeepSpeed, each stage clips by a norm of its own.
    Control("stage_zero_as_deepspeed_has_it", replace(PIPELINE, zero_stage=0), {FIRST_GRADIENT, "weights"}, {FIRST_LOSS}),
    Control("initial_weights_from_a_local_stream", TENSOR, {*FORWARD, "AdamW's formula"}, {"copies"}),
    Control("matrix_of_the_head_itself_returned", in_bf16(PIPELINE), {FIRST_GRADIENT, FIRST_NORM}, {FIRST_LOSS}),
    Control("tied_gradients_not_exchanged", TIED, {FIRST_GRADIENT, "copies"}, {FIRST_LOSS}),
    Control("tied_embedding_counts_twice", TIED, {FIRST_NORM}, {FIRST_LOSS}),
    Control("other_batches_within_a_pipeline", DATA_TENSOR, {FIRST_LOSS, FIRST_GRADIENT}, set()),
    Control("other_batches_within_a_pipeline", DATA_PIPELINE, {FIRST_GRADIENT}, set()),
    Control("mean_of_micro_batches", DATA, {FIRST_GRADIENT, "weights"}, {FIRST_LOSS, "copies"}),
    Control("mean_of_micro_batches", DATA_PIPELINE, {FIRST_GRADIENT, "weights"}, {FIRST_LOSS, "copies"}),
]


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.id)
def test_a_defect_is_seen(control: Control, tmp_path: Path) -> None:
    ranks = run_layout(control.layout, tmp_path / "log", control.sabotage)
    wrong = violations(control.layout, ranks, reference_run(control.layout))
    assert control.shows <= wrong.keys(), wrong
    assert not control.spares & wrong.keys(), wrong


@pytest.mark.full
@pytest.mark.parametrize(
    "layout", {control.layout.id: control.layout for control in CONTROLS}.values(), ids=lambda layout: layout.id
)
def test_without_the_defect_nothing_is_seen(layout: Layout, tmp_path: Path) -> None:
    assert violations(layout, run_layout(layout, tmp_path / "log"), reference_run(layout)) == {}


def test_every_defect_is_tried() -> None:
    assert {control.sabotage for control in CONTROLS} == set(SABOTAGES)


def one_rank_does_not_come() -> None:
    """An all-reduce that one rank leaves out."""
    with process_grid(torch.device("cpu")) as grid:
        if grid.data_rank == 0:
            grid.barrier()
        time.sleep(60)


def test_a_deadlock_ends_as_a_clear_failure(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] hang"):
        run_on_ranks(2, one_rank_does_not_come, log=tmp_path / "log", seconds=3.0)
