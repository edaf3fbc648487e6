from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_plasticity.analysis.document_losses import DocumentLosses, document_gap
from megatron_plasticity.analysis.losses import sequence_losses
from megatron_plasticity.analysis.overfitting import gap, run_overfitting
from megatron_plasticity.config.analysis import OverfittingRecipe
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.ledger import Ledger, consumed_blocks
from megatron_plasticity.data.token_store import TokenStore, TokenStoreWriter
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.transformer import Transformer

Make = Callable[..., Transformer]


def reader(folder: Path, name: str, blocks: int, seed: int) -> BlockReader:
    writer = TokenStoreWriter(folder / name, vocab_size=64)
    writer.add_document(np.random.default_rng(seed).integers(0, 64, blocks * 9).tolist())
    writer.close()
    return BlockReader(TokenStore(folder / name), sequence_length=8)


def ledger(consumed: int, blocks: int = 40) -> Ledger:
    return Ledger(seed=1, sequence_length=8, number_of_blocks=blocks, store_sha256="ab", consumed_samples=consumed)


def test_losses_are_the_mean_cross_entropy_of_each_sequence(make_model: Make, tmp_path: Path) -> None:
    model, blocks = make_model().train(), reader(tmp_path, "held", 7, 0)
    losses = sequence_losses(model, blocks, np.array([3, 0, 6]), batch_size=2)
    assert model.training
    for loss, block in zip(losses, (3, 0, 6), strict=True):
        tokens = torch.from_numpy(blocks.read(block))
        logits = model(tokens[None, :-1])[0].detach().double()
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, tokens[1:]).item(), abs=1e-5)


def test_gap_is_found_with_an_honest_interval() -> None:
    generator = np.random.default_rng(0)
    difficulty = 0.5
    covered, estimate = 0, {}
    for trial in range(60):
        seen, held_out = generator.normal(2.0, difficulty, 200), generator.normal(2.1, difficulty, 300)
        estimate = gap(seen, held_out, np.zeros(200, dtype=int), resamples=300, seed=trial)["gap"]
        assert estimate["value"] == pytest.approx(held_out.mean() - seen.mean())
        covered += estimate["low"] <= 0.1 <= estimate["high"]
    assert 52 <= covered <= 60
    # Both sides contribute: the standard error is that of a difference of independent means.
    width = difficulty * math.sqrt(1 / 200 + 1 / 300)
    assert (estimate["high"] - estimate["low"]) / (2 * 1.96 * width) == pytest.approx(1, abs=0.2)


def test_deciles_partition_the_seen_sequences() -> None:
    deciles = np.repeat(np.arange(10), 4)
    seen = 3.0 - 0.1 * deciles + np.tile([-0.01, 0.01, -0.01, 0.01], 10)
    result = gap(seen, np.full(5, 3.0), deciles, resamples=50)
    assert [entry["value"] for entry in result["by_decile"]] == pytest.approx([0.1 * decile for decile in range(10)])
    assert np.mean([entry["value"] for entry in result["by_decile"]]) == pytest.approx(result["gap"]["value"])
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in result["by_decile"])


def test_deciles_without_sequences_are_null_and_single_ones_have_no_interval() -> None:
    result = gap(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0]), np.array([0, 0, 7]), resamples=20)
    assert result["by_decile"][1] is None
    assert result["by_decile"][7] == {"value": 1.5}
    assert set(result["by_decile"][0]) == {"value", "low", "high"}
    json.dumps(result, allow_nan=False)


def test_a_diverged_model_has_no_gap() -> None:
    with pytest.raises(UserError, match="diverged"):
        gap(np.array([1.0, math.nan]), np.array([4.0, 5.0]), np.array([0, 0]))


class MemorisingReader:
    """Notes which blocks are asked for."""

    def __init__(self, inner: BlockReader) -> None:
        self.inner, self.asked = inner, []

    def __len__(self) -> int:
        return len(self.inner)

    def batch(self, blocks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.extend(int(block) for block in blocks)
        return self.inner.batch(blocks)

    def locate(self, block: int) -> tuple[TokenStore, int]:
        return self.inner.locate(block)


def test_only_consumed_sequences_count_as_seen_and_each_decile_is_its_own(make_model: Make, tmp_path: Path) -> None:
    seen, held_out = MemorisingReader(reader(tmp_path, "train", 40, 0)), MemorisingReader(reader(tmp_path, "held", 12, 1))
    recipe = OverfittingRecipe(sequences=20, bootstrap_resamples=50, batch_size=3)
    result = run_overfitting(make_model(), seen, held_out, ledger(30), "ab", recipe)  # type: ignore[arg-type]
    assert len(seen.asked) == len(set(seen.asked)) == 20
    for decile in range(10):
        assert set(seen.asked[2 * decile : 2 * decile + 2]) <= set(consumed_blocks(ledger(30), "ab", decile).tolist())
    assert sorted(held_out.asked) == list(range(12))
    assert (result["sequences"], result["held_out_sequences"]) == (20, 12)
    assert result["held_out_loss"] - result["seen_loss"] == pytest.approx(result["gap"]["value"])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert "by_document" not in result, "each store is of one document"
    assert result["passes"] == 30 / 40
    assert result["seen_blocks"] == seen.asked
    assert result["held_out_blocks"] == list(range(12))
    assert np.mean(result["held_out_losses"]) == pytest.approx(result["held_out_loss"], abs=1e-6)
    assert np.mean(result["seen_losses"]) == pytest.approx(result["seen_loss"], abs=1e-6)
    assert all(loss == round(loss, 6) for loss in result["seen_losses"] + result["held_out_losses"])
    # Another model of the grid is measured on the same sequences.
    first = list(seen.asked)
    run_overfitting(make_model(seed=9), seen, held_out, ledger(30), "ab", recipe)  # type: ignore[arg-type]
    assert seen.asked[20:] == first


def test_progress_runs_to_its_end(make_model: Make, tmp_path: Path) -> None:
    class Log:
        def __init__(self) -> None:
            self.rows: list[tuple[float, float, str]] = []

        def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
            self.rows.append((done, total, unit))

    log = Log()
    blocks = reader(tmp_path, "train", 40, 0)
    run_overfitting(make_model(), blocks, blocks, ledger(40), "ab", OverfittingRecipe(sequences=10, batch_size=4), progress=log)
    assert log.rows[-1] == (20, 20, "sequences")
    assert [done for done, _, _ in log.rows] == sorted(done for done, _, _ in log.rows)


def test_a_run_that_consumed_nothing_or_another_corpus_is_refused(make_model: Make, tmp_path: Path) -> None:
    blocks = reader(tmp_path, "train", 40, 0)
    with pytest.raises(UserError, match="consumed no sequence"):
        run_overfitting(make_model(), blocks, blocks, ledger(0), "ab", OverfittingRecipe())
    with pytest.raises(UserError, match="consumed the corpus"):
        run_overfitting(make_model(), blocks, blocks, ledger(9), "cd", OverfittingRecipe())


def documents_of(folder: Path, name: str, lengths: list[int], sequence_length: int = 39) -> DocumentLosses:
    with TokenStoreWriter(folder / name, vocab_size=64) as writer:
        for length in lengths:
            writer.add_document([1] * length)
    return DocumentLosses(BlockReader(TokenStore(folder / name), sequence_length))


def test_each_token_counts_for_the_document_that_it_is_of(tmp_path: Path) -> None:
    # Blocks of 40 tokens: 0 to 39 and 40 to 79. Documents: 0 to 24, 25 to 64, 65 to 68, 69 to 99.
    losses = documents_of(tmp_path, "train", [25, 40, 4, 31])
    token = np.arange(100, dtype=float)
    losses.add(1, token[41:80])
    losses.add(0, token[1:40])
    expected = [token[1:25], np.r_[token[25:40], token[41:65]], token[65:69], token[69:80]]
    assert losses.sums() == {(tmp_path / "train", index): (part.sum(), len(part)) for index, part in enumerate(expected)}


def test_the_gap_by_document_is_that_of_the_tokens_with_documents_as_units(tmp_path: Path) -> None:
    seen, held_out = documents_of(tmp_path, "train", [20, 100]), documents_of(tmp_path, "held", [60, 60])
    for side, values, end in ((seen, (1.0, 3.0), 20), (held_out, (4.0, 6.0), 60)):
        token = np.where(np.arange(120) < end, *values)
        for block in range(3):
            side.add(block, token[40 * block + 1 : 40 * (block + 1)])
    found = document_gap(seen, held_out, resamples=200, seed=0)
    assert found is not None
    assert found["gap"]["value"] == pytest.approx((58 * 4 + 59 * 6) / 117 - (19 + 98 * 3) / 117)
    assert (found["gap"]["low"], found["gap"]["high"]) == (1, 5)  # now and then a side is one document twice
    assert (found["seen_documents"], found["held_out_documents"]) == (2, 2)
    assert [(entry["document"], entry["targets"], entry["loss"]) for entry in found["best_known"]] == [(0, 19, 1), (1, 98, 3)]
    assert document_gap(documents_of(tmp_path, "one", [40]), held_out, 10, 0) is None


def test_a_sparse_draw_of_long_and_short_documents_makes_no_gap(tmp_path: Path) -> None:
    # Every loss depends on the place in its document alone, and both sides are one distribution. One side is drawn whole, of the
    # other a tenth of the blocks, which meet long documents more often.
    generator = np.random.default_rng(0)
    sides = []
    for name, share in (("train", 0.1), ("held", 1.0)):
        lengths = np.minimum(3 + generator.geometric(0.01, 2000), 2000).tolist()
        losses = documents_of(tmp_path, name, lengths)
        place = np.concatenate([1 + 2 / np.sqrt(1 + np.arange(length)) for length in lengths])
        blocks = generator.permutation(len(place) // 40)
        for block in blocks[: int(share * len(blocks))]:
            losses.add(int(block), place[40 * block + 1 : 40 * (block + 1)])
        sides.append(losses)
    found = document_gap(*sides, resamples=500, seed=1)
    assert found is not None
    assert found["gap"]["low"] < 0 < found["gap"]["high"]
    assert abs(found["gap"]["value"]) < 0.03
