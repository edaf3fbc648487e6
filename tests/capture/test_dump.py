from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_plasticity.capture.dump import recorder_of, write_dump
from megatron_plasticity.capture.sequences import CapturedSequences
from megatron_plasticity.capture.store import ActivationStore
from megatron_plasticity.capture.writer import ActivationWriter
from megatron_plasticity.config.analysis import ActivationsRecipe
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.transformer import Transformer

POINTS = ("layers.0.resid_post", "layers.1.attn.q", "logits")
SEQUENCES = CapturedSequences.of([[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11]], [range(2, 5), range(1), range(1, 3)])


def dump(folder: Path, model: Transformer, recipe: ActivationsRecipe) -> ActivationStore:
    recorder = recorder_of(recipe, model)

    def batches() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for tokens, kept in SEQUENCES.batches(2):
            yield recorder.record(tokens, kept=kept), kept

    with ActivationWriter(folder, {"run": "a"}) as writer:
        write_dump(writer, 3, recipe, batches())
    return ActivationStore(folder)


def test_states_are_those_of_each_sequence_alone(tmp_path: Path, model: Transformer) -> None:
    store = dump(tmp_path, model, ActivationsRecipe(points=POINTS, positions="all"))
    recorder = recorder_of(ActivationsRecipe(points=POINTS, positions="all"), model)
    for row, (length, kept) in enumerate(((5, range(2, 5)), (2, range(1)), (4, range(1, 3)))):
        alone = recorder.record(SEQUENCES.tokens[row : row + 1, :length])
        for name in recorder.names:
            axis = 1 if name.endswith("attn.q") else 0
            stored = store.read(3, name)[row].movedim(axis, 0)
            torch.testing.assert_close(stored[: len(kept)], alone[name][0].movedim(axis, 0)[kept.start : kept.stop])
            assert not stored[len(kept) :].any(), "zeros where a sequence keeps fewer positions than others"


@pytest.mark.parametrize("positions", ["all", "last"])
def test_statistics_are_those_of_the_states(tmp_path: Path, model: Transformer, positions: str) -> None:
    probes = (
        SEQUENCES if positions == "all" else CapturedSequences.of([[1, 2], [3], [4, 5]], [range(1, 2), range(1), range(1, 2)])
    )
    recipe = ActivationsRecipe(points=POINTS, positions=positions, keep="both", dtype="bfloat16")  # type: ignore[arg-type]
    recorder = recorder_of(recipe, model)
    recorded = [(recorder.record(tokens, kept=kept), kept) for tokens, kept in probes.batches(2)]
    with ActivationWriter(tmp_path, {"run": "a"}) as writer:
        write_dump(writer, 3, recipe, recorded)
    store = ActivationStore(tmp_path)
    assert store.points_with_statistics(3) == list(POINTS[:2])
    assert store.read(3, POINTS[0]).dtype == torch.bfloat16
    whole = torch.cat([batch[POINTS[0]].reshape(len(kept), -1, 32)[kept >= 0] for batch, kept in recorded]).double()
    found = store.statistics(3, POINTS[0])
    assert found.count == len(whole) == {"all": 6, "last": 3}[positions]
    torch.testing.assert_close(found.covariance, whole.T.cov())
    assert store.statistics(3, POINTS[1]).mean.shape == (4, 8)


def test_statistics_alone_leave_the_logits_as_they_are(tmp_path: Path, model: Transformer) -> None:
    store = dump(tmp_path, model, ActivationsRecipe(points=POINTS, positions="all", keep="statistics"))
    assert store.points(3) == ["logits.values", "logits.ids"]
    assert store.points_with_statistics(3) == list(POINTS[:2])


def test_bad_recipes_are_refused_before_anything_is_recorded(model: Transformer) -> None:
    with pytest.raises(UserError, match=r"nearest: layers.0.attn.q"):
        recorder_of(ActivationsRecipe(points=("layers.0.attn.qq",)), model)
    wide = model.config.model_copy(update={"hidden_size": 16384})
    model.config = wide
    with pytest.raises(UserError, match=r"2,048 MiB .* memory_mib is 512"):
        recorder_of(ActivationsRecipe(points=("embed",), keep="statistics"), model)
    recorder_of(ActivationsRecipe(points=("embed",), keep="statistics", covariance=False), model)
