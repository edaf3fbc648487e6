"""The batch viewer: it shows what training reads, document by document."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_plasticity.cli import main
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.data.ledger import read_ledger
from megatron_plasticity.data.manifest import _content_hash
from megatron_plasticity.data.prepare import read_manifest
from megatron_plasticity.data.stream import corpus_hash, sample_order, training_blocks
from megatron_plasticity.data.token_store import TokenStore, TokenStoreWriter
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.data.viewer import samples_of_step
from megatron_plasticity.parallel.grid import ProcessGrid
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.training.batches import PretrainBatches
from megatron_plasticity.training.pretrain import pretrain, pretrain_folder

MakeConfig = Callable[..., PretrainConfig]


def shown(config: PretrainConfig, step: int) -> np.ndarray:
    samples = samples_of_step(config.data, config.model.context_length, config.batch.global_batch_size, step)
    return np.stack([np.concatenate([piece.tokens for piece in sample.pieces]) for sample in samples])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("blend", [False, True])
def test_it_shows_what_training_reads(pretrain_config: MakeConfig, tiny_corpus: Path, blend: bool, ranks: int) -> None:
    mixed_in = [{"folder": str(tiny_corpus), "weight": 0.25}] if blend else []
    config = pretrain_config({"data": {"blend": mixed_in}, "batch": {"micro_batch_size": 1}})
    blocks = training_blocks(config.data, config.model.context_length)
    order = sample_order(config.data, blocks)
    for step in (1, 2, 12):
        inputs = np.zeros((4, config.model.context_length), dtype=np.int64)
        for rank in range(ranks):
            grid = ProcessGrid(rank, ranks, torch.device("cpu"))
            batch = PretrainBatches(blocks, order, config.batch, grid, config.total_steps).step(step - 1)
            inputs[rank::ranks] = np.concatenate([part.inputs.numpy() for part in batch.micro_batches])
        assert np.array_equal(shown(config, step)[:, :-1], inputs)


def test_documents_and_their_boundaries(tiny_corpus: Path, pretrain_config: MakeConfig) -> None:
    config = pretrain_config()
    store = TokenStore(tiny_corpus / "train")
    for sample in samples_of_step(config.data, 32, 4, 5):
        position = sample.start
        for piece in sample.pieces:
            whole = store.document(piece.document)
            assert np.array_equal(whole[piece.offset : piece.offset + len(piece.tokens)], piece.tokens)
            assert store.document_start(piece.document) + piece.offset == position
            position += len(piece.tokens)
        assert position == sample.start + 33
        assert all(piece.offset == 0 for piece in sample.pieces[1:])


def test_a_store_with_documents_of_several_sequences_and_of_none(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path / "s", 100) as writer:
        for document in ([1, 2, 3], [4], [5, 6, 7, 8]):
            writer.add_document(document)
    content = bytearray((tmp_path / "s.idx").read_bytes())
    content[-32:] = np.array([0, 2, 2, 3], dtype="<i8").tobytes()  # documents: [1 2 3 4], [], [5 6 7 8]
    (tmp_path / "s.idx").write_bytes(content)
    store = TokenStore(tmp_path / "s")
    assert [store.document_start(index) for index in range(3)] == [0, 4, 4]
    assert list(store.documents_at(2, 2)) == [0]
    assert list(store.documents_at(3, 2)) == [0, 1, 2]
    assert list(store.documents_at(4, 1)) == [2]
    for start, length in ((-1, 1), (0, 0), (7, 2)):
        with pytest.raises(IndexError, match="8 tokens"):
            store.documents_at(start, length)
    with pytest.raises(IndexError, match="3 documents"):
        store.document_start(3)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_the_command(pretrain_config: MakeConfig, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = pretrain_config()
    folder = pretrain_folder(config).path  # the config is enough: nothing has been trained
    code, out, err = run(capsys, "data", "show", folder, "--step", 3, "--sequences", 2, "--ids")
    assert code == 0, err
    tokenizer = Tokenizer.load(tiny_corpus / "tokenizer.json")
    first, second, *_ = shown(config, 3)
    lines = out.splitlines()
    assert lines[0] == "step 3 of 12: 4 sequences of 32 + 1 tokens"
    assert [line for line in lines if line.startswith("━━")] == [
        line for line in lines if "sample 8," in line or "sample 9," in line
    ]
    ids = [int(number) for line in lines if line.replace(" ", "").isdigit() for number in line.split()]
    assert set(first) | set(second) <= set(ids)
    assert tokenizer.decode(first[:4].tolist()) in out
    for arguments, message in (
        ((folder, "--step", 0), "this run has steps 1 to 12"),
        ((folder, "--step", 13), "this run has steps 1 to 12"),
        ((folder, "--step", 1, "--sequences", 0), "expected at least 1"),
        ((tiny_corpus, "--step", 1), "not a run folder"),
    ):
        code, _, err = run(capsys, "data", "show", *arguments)
        assert code == 2
        assert message in err


def test_a_link_that_leads_to_another_corpus_by_now(
    pretrain_config: MakeConfig, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link, other = tmp_path / "link", tmp_path / "other"
    link.symlink_to(tiny_corpus)
    config = pretrain_config({"data": {"folder": str(link)}})
    folder = pretrain_folder(config).path
    code, _, err = run(capsys, "data", "show", folder, "--step", 1)
    assert code == 0, err
    shutil.copytree(tiny_corpus, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["files"]["train.bin"]["sha256"] = "0" * 64
    manifest["sha256"] = _content_hash(manifest["files"])
    (other / "manifest.json").write_text(json.dumps(manifest))
    link.unlink()
    link.symlink_to(other)
    code, _, err = run(capsys, "data", "show", folder, "--step", 1)
    assert code == 2
    old, new = read_manifest(tiny_corpus)["sha256"][:12], manifest["sha256"][:12]
    assert f"read the corpus {old}" in err
    assert f"now holds {new}" in err


def test_a_run_on_a_blend(pretrain_config: MakeConfig, tiny_corpus: Path) -> None:
    """Trains, keeps a ledger of both corpora, and has another name than the run without."""
    plain = pretrain_config()
    config = pretrain_config({"data": {"blend": [{"folder": str(tiny_corpus), "weight": 0.25}]}})
    folder = pretrain(config, NoProgress())
    assert folder.is_done
    assert folder.inputs == {"corpus": corpus_hash(config.data)}
    ledger = read_ledger(folder.path)
    assert ledger.consumed_samples == 48
    assert [weight for _, weight in ledger.blend] == [0.75, 0.25]
    assert folder.hash != pretrain_folder(plain).hash
    assert pretrain_folder(plain).inputs == {"corpus": read_manifest(tiny_corpus)["sha256"]}
