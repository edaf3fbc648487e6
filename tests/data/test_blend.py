"""Blends: exact shares in every prefix, each corpus in epochs of its own, and a ledger that knows what was read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_plasticity.config.data import DataConfig
from megatron_plasticity.config.files import write_json_atomic
from megatron_plasticity.config.hashing import canonical
from megatron_plasticity.config.load import check_config
from megatron_plasticity.data.blend import BlendedBlocks, BlendOrder
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.ledger import Ledger, consumed_blocks, draw_consumed_blocks, read_ledger, write_ledger
from megatron_plasticity.data.order import SampleOrder
from megatron_plasticity.data.prepare import read_manifest
from megatron_plasticity.data.stream import corpus_hash, ledger_of, sample_order, training_blocks
from megatron_plasticity.data.token_store import TokenStore, TokenStoreWriter
from megatron_plasticity.errors import ConfigError, UserError

CORPORA = ((50, 0.5), (30, 0.3), (1000, 0.2))


def corpus_of(blocks: np.ndarray) -> np.ndarray:
    return np.searchsorted([50, 80, 1080], blocks, side="right")


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (0.7, 0.2, 0.1), (1, 1, 1), (0.001, 0.9, 0.099)])
def test_shares_are_exact_in_every_prefix(weights: tuple[float, ...]) -> None:
    order = BlendOrder([(1000, weight) for weight in weights], seed=1)
    corpora = order.corpora(0, 3000)
    for corpus, weight in enumerate(weights):
        share = weight / sum(weights)
        given = np.cumsum(corpora == corpus)
        assert np.abs(given - share * np.arange(1, 3001)).max() < 2
    for samples in (0, 1, 17, 3000):
        assert order.counts(samples) == [int((corpora[:samples] == corpus).sum()) for corpus in range(3)]


def test_the_order_is_a_pure_function_of_the_sample() -> None:
    order = BlendOrder(CORPORA, seed=42)
    whole = order.blocks(0, 500)
    pieces = [order.blocks(start, stop) for start, stop in ((0, 1), (1, 96), (96, 96), (96, 333), (333, 500))]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert [order.block(sample) for sample in range(100)] == whole[:100].tolist()
    assert not np.array_equal(BlendOrder(CORPORA, seed=43).blocks(0, 500), whole)
    with pytest.raises(ValueError, match="start"):
        order.blocks(3, 2)


def test_the_order_of_past_blends_stays() -> None:
    # A change here silently changes what every past blended run is said to have consumed: raise RESULTS_VERSION with it.
    assert BlendOrder(CORPORA, 42).blocks(0, 10).tolist() == [979, 48, 51, 27, 1001, 22, 66, 41, 55, 21]


def test_each_corpus_has_epochs_of_its_own() -> None:
    order = BlendOrder(CORPORA, seed=42)
    blocks = order.blocks(0, 1000)
    for corpus, (size, first) in enumerate(((50, 0), (30, 50), (1000, 80))):
        own = blocks[corpus_of(blocks) == corpus] - first
        for start in range(0, len(own), size):
            epoch = own[start : start + size]
            assert len(set(epoch.tolist())) == len(epoch)
        assert np.array_equal(own, SampleOrder(size, 42 + corpus).blocks(0, len(own)))
    assert order.epoch(0) == 0
    assert {order.epoch(sample) for sample in range(900, 1000)} == {0, 9}


def test_what_is_read_for_the_first_time() -> None:
    """Also after the small corpora have begun again: 50 blocks at one half, 30 at three tenths, both at sample 100."""
    order = BlendOrder(CORPORA, seed=42)
    blocks = order.blocks(0, 6000).tolist()
    first = [sample for sample in range(6000) if blocks[sample] not in blocks[:sample]]
    assert len(first) == 1080
    assert [order.first_reading(number) for number in range(1080)] == first
    assert [order.distinct(samples) for samples in (0, 1, 100, 300, 6000)] == [
        len(set(blocks[:samples])) for samples in (0, 1, 100, 300, 6000)
    ]
    with pytest.raises(ValueError, match="below 1080"):
        order.first_reading(1080)


def test_a_share_that_would_vanish_is_refused() -> None:
    for weights in ((1e-9, 0.5), (0.5, 0.3, 1e-9)):
        with pytest.raises(UserError, match="one is too small"):
            BlendOrder([(10, weight) for weight in weights], 1)


def test_large_corpora_take_no_memory() -> None:
    blocks = BlendOrder([(10**11, 0.7), (10**10, 0.3)], 1).blocks(10**12, 10**12 + 1000)
    assert ((blocks >= 0) & (blocks < 11 * 10**10)).all()


def test_a_ledger_of_a_blend(tmp_path: Path) -> None:
    ledger = Ledger(42, 16, 1080, "ab" * 32, 60, CORPORA)
    write_ledger(tmp_path, ledger)
    assert read_ledger(tmp_path) == ledger
    assert np.array_equal(consumed_blocks(ledger, ledger.store_sha256), BlendOrder(CORPORA, 42).blocks(0, 60))
    long = replace(ledger, consumed_samples=5000)
    drawn = draw_consumed_blocks(long, ledger.store_sha256, 40, seed=1)
    assert len(set(drawn.tolist())) == 40
    # All that was read, not only what came before the scarcest corpus began again.
    read = set(BlendOrder(CORPORA, 42).blocks(0, 5000).tolist())
    assert long.distinct_blocks == len(read)
    assert set(consumed_blocks(long, ledger.store_sha256).tolist()) == read
    deciles = [consumed_blocks(long, ledger.store_sha256, decile) for decile in range(10)]
    assert np.array_equal(np.concatenate(deciles), consumed_blocks(long, ledger.store_sha256))
    assert set(draw_consumed_blocks(long, ledger.store_sha256, 10**6, seed=1).tolist()) == read
    (tmp_path / "ledger.json").write_text((tmp_path / "ledger.json").read_text().replace("0.5", '"x"'))
    with pytest.raises(UserError, match="blend must be a list of pairs"):
        read_ledger(tmp_path)


def prepared(folder: Path, first: int, count: int, tokenizer: str = "t", held_out: float = 0.1) -> Path:
    """A corpus whose tokens count up from `first`, with a manifest of its own."""
    for split in ("train", "held_out"):
        with TokenStoreWriter(folder / split, 60_000) as writer:
            writer.add_document(np.arange(first, first + count))
    from megatron_plasticity.data.manifest import _content_hash

    files = {path.name: {"bytes": path.stat().st_size, "sha256": str(first)} for path in folder.iterdir()}
    manifest = {"format": 1, "sha256": _content_hash(files), "files": files, "tokenizer": {"sha256": tokenizer}}
    manifest["config"] = {"held_out_fraction": held_out}
    write_json_atomic(folder / "manifest.json", manifest)
    return folder


def data_config(folder: Path, **blend: float) -> DataConfig:
    parts = [{"folder": str(folder.parent / name), "weight": weight} for name, weight in blend.items()]
    return check_config(DataConfig, {"folder": str(folder), "blend": parts}, "test")


def test_blocks_of_several_stores(tmp_path: Path) -> None:
    main, other = prepared(tmp_path / "main", 0, 100), prepared(tmp_path / "other", 10_000, 57)
    data = data_config(main, other=0.25)
    blocks = training_blocks(data, 4)
    assert isinstance(blocks, BlendedBlocks)
    assert len(blocks) == 20 + 11
    assert blocks.read(19).tolist() == list(range(95, 100))
    assert blocks.read(20).tolist() == list(range(10_000, 10_005))
    store, start = blocks.locate(21)
    assert (store.prefix, start) == (other / "train", 5)
    with pytest.raises(IndexError, match="31 blocks"):
        blocks.read(31)
    order = sample_order(data, blocks)
    assert (order.blocks(0, 12) >= 20).sum() == 3
    ledger = ledger_of(data, blocks, corpus_hash(data), 12)
    assert ledger.blend == ((20, 0.75), (11, 0.25))
    assert np.array_equal(ledger.order().blocks(0, 12), order.blocks(0, 12))


def test_without_a_blend_all_is_as_it_was(tmp_path: Path) -> None:
    main = prepared(tmp_path / "main", 0, 100)
    data = data_config(main)
    assert canonical(data) == {"seed": 42, "held_out_sequences": 512}
    blocks = training_blocks(data, 4)
    assert type(blocks) is BlockReader
    assert type(sample_order(data, blocks)) is SampleOrder
    assert corpus_hash(data) == read_manifest(main)["sha256"]
    write_ledger(tmp_path, ledger_of(data, blocks, corpus_hash(data), 12))
    assert "blend" not in (tmp_path / "ledger.json").read_text()


def test_corpora_that_cannot_be_blended(tmp_path: Path) -> None:
    main = prepared(tmp_path / "main", 0, 100)
    prepared(tmp_path / "other", 200, 100, tokenizer="u")
    with pytest.raises(UserError, match="another tokenizer"):
        corpus_hash(data_config(main, other=0.5))
    prepared(tmp_path / "leaky", 400, 100, held_out=0.01)
    with pytest.raises(UserError, match=r"leaky has held_out_fraction=0\.01, .*main 0\.1, .*with at least 0\.1"):
        corpus_hash(data_config(main, leaky=0.5))
    corpus_hash(data_config(tmp_path / "leaky", main=0.5))
    with pytest.raises(ConfigError, match=r"sum to 1\.2; they must leave a share"):
        data_config(main, other=0.6, more=0.6)
    assert TokenStore(main / "train").tokens == 100


def test_the_hash_knows_every_corpus_and_weight(tmp_path: Path) -> None:
    main = prepared(tmp_path / "main", 0, 100)
    prepared(tmp_path / "other", 200, 100)
    prepared(tmp_path / "more", 400, 100)
    hashes = {corpus_hash(data_config(main, **{name: 0.5})) for name in ("other", "more")} | {corpus_hash(data_config(main))}
    assert len(hashes) == 3
    assert canonical(data_config(main, other=0.5)) != canonical(data_config(main, other=0.4))
