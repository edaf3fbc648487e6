"""The oracle: a layout did the same as one process in plain torch, to the last quantity that training produces."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_plasticity.models.sizes import TOKEN_EMBEDDING, parameter_shapes
from tests.distributed.matrix import Layout
from tests.distributed.runs import Reference, View, reference_run, relative, run_layout
from tests.training.programs import Trajectory

# Largest relative difference allowed: of a number, or of a tensor in L2 norm.
FP32 = {
    "loss of the first step": 1e-5,
    "loss": 1e-5,
    "gradient norm of the first step": 1e-5,
    "gradient norm": 1e-5,
    "gradient of the first step": 1e-5,
    "weights": 1e-5,
    "exp_avg": 1e-5,
    "exp_avg_sq": 1e-5,
    "held-out loss": 1e-5,
    "AdamW's formula": 1e-6,
}
# Another layout rounds to bf16 at other places, and training amplifies what that changes. The first step is compared tightly
# enough that a sum missing over two ranks shows, the rest as it comes; AdamW itself runs in fp32 and owes its formula as in fp32.
BF16 = {
    "loss of the first step": 1e-3,
    "loss": 2e-3,
    "gradient norm of the first step": 5e-3,
    "gradient norm": 2e-2,
    "gradient of the first step": 1e-1,
    "weights": 5e-3,
    "exp_avg": 2e-1,
    "exp_avg_sq": 2e-1,
    "held-out loss": 1e-3,
    "AdamW's formula": 1e-6,
}


def cases(layouts: Iterable[Layout]) -> list[Any]:
    """The layouts as test cases, each under its own name; those that are not quick are left to `make test-full`."""
    return [pytest.param(layout, id=layout.id, marks=[] if layout.quick else [pytest.mark.full]) for layout in layouts]


def check(layout: Layout, log: Path) -> None:
    """Run the layout, and fail with all that differs from one process."""
    wrong = violations(layout, run_layout(layout, log), reference_run(layout))
    assert not wrong, "\n".join([f"{layout.id} differs from one process", *(f"  {key}: {how}" for key, how in wrong.items())])


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of one quantity, and where it is."""

    size: float
    where: str


def differences(ranks: Sequence[Trajectory], reference: Reference) -> dict[str, Difference]:
    """Of every quantity with a tolerance."""
    main, theirs = ranks[0], reference.trajectory
    view: View = main.observed[-1]
    return {
        "loss of the first step": _of_numbers([rank.losses[0] for rank in ranks], theirs.losses[:1] * len(ranks), "rank"),
        "loss": _of_numbers(main.losses, theirs.losses, "step"),
        "gradient norm of the first step": _of_numbers(main.gradient_norms[:1], theirs.gradient_norms[:1], "step"),
        "gradient norm": _of_numbers(main.gradient_norms, theirs.gradient_norms, "step"),
        "gradient of the first step": _of_tensors(main.first_gradients, theirs.first_gradients),
        "weights": _of_tensors(main.weights, theirs.weights),
        **{moment: _of_tensors(tensors, theirs.moments[moment]) for moment, tensors in main.moments.items()},
        "held-out loss": _of_numbers([view.held_out_loss], [reference.held_out_loss], "evaluation"),
        "AdamW's formula": Difference(view.optimizer_error, "one of the steps looked at"),
    }


def violations(layout: Layout, ranks: Sequence[Trajectory], reference: Reference) -> dict[str, str]:
    """What is wrong with a layout's run: each quantity that fails, and how. Empty if nothing does."""
    tolerances = FP32 if layout.dtype == "fp32" else BF16
    wrong = {
        quantity: f"{difference.size:.2e} > {tolerances[quantity]:.0e} at {difference.where}"
        for quantity, difference in differences(ranks, reference).items()
        if not difference.size <= tolerances[quantity]  # a difference that is not a number fails too
    }
    views: list[View] = [rank.observed[-1] for rank in ranks]
    shapes = parameter_shapes(layout.model)
    expected_positions = list(itertools.product(range(layout.pipeline), range(layout.data), range(layout.tensor)))
    exact = {
        "layout": [view.position for view in views] == expected_positions and not _missing_pieces(layout, views),
        "names": list(ranks[0].weights) == list(shapes) and not any(rank.weights for rank in ranks[1:]),
        "decay groups": all(view.groups == reference.groups for view in views),
        "agreement on losses": all(rank.losses == ranks[0].losses for rank in ranks),
        "agreement on gradient norms": all(rank.gradient_norms == ranks[0].gradient_norms for rank in ranks),
        "agreement on held-out loss": all(view.held_out_loss == views[0].held_out_loss for view in views),
    }
    wrong |= {quantity: "not as it should be" for quantity, holds in exact.items() if not holds}
    unequal = unequal_copies(views)
    if unequal:
        wrong["copies"] = f"not bit-equal on all ranks that hold them: {', '.join(unequal)}"
    return wrong


def unequal_copies(views: Sequence[View]) -> list[str]:
    """Parameters of which several processes hold the same piece, but not the same bits of it: norm gains, replicated key/value
    heads, a tied embedding's copy on the last stage, and everything under data parallelism."""
    seen: dict[tuple[str, int], set[tuple[str, str]]] = defaultdict(set)
    for view in views:
        for piece, fingerprints in view.pieces.items():
            seen[piece].add(fingerprints)
    return sorted({name for (name, _), kinds in seen.items() if len(kinds) > 1})


def _missing_pieces(layout: Layout, views: Sequence[View]) -> bool:
    """Whether a stage does not hold exactly its own parameters, or matrices are not really cut."""
    shapes = parameter_shapes(layout.model)
    by_stage: list[set[str]] = [set() for _ in range(layout.pipeline)]
    for view in views:
        by_stage[view.position[0]] |= {name for name, _ in view.pieces}
    copies = {TOKEN_EMBEDDING} if layout.tied and layout.pipeline > 1 else set()
    holders = {name: sum(name in stage for stage in by_stage) for name in shapes}
    pieces = {(name, part) for view in views for name, part in view.pieces}
    parts = {name: sum(other == name for other, _ in pieces) for name in shapes}
    queries = "layers.0.attn.q_proj.weight"
    keys = "layers.0.attn.k_proj.weight"
    return (
        any(holders[name] != (2 if name in copies else 1) for name in shapes)
        or parts[queries] != layout.tensor
        or parts[keys] != min(layout.tensor, layout.kv_heads)
        or parts["layers.0.attn_norm.weight"] != 1
    )


def _of_numbers(ours: Sequence[float], theirs: Sequence[float], unit: str) -> Difference:
    each = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    worst = max(range(len(each)), key=lambda i: float("inf") if each[i] != each[i] else each[i])
    return Difference(each[worst], f"{unit} {worst}")


def _of_tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Difference:
    if ours.keys() != theirs.keys():
        return Difference(float("inf"), f"names {sorted(ours.keys() ^ theirs.keys())}")
    each = {name: relative(ours[name], theirs[name]) for name in theirs}
    worst = max(each, key=lambda name: each[name])
    return Difference(each[worst], worst)
