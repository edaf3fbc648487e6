"""Preparing a corpus: complete or not at all, once, and guarded against damage."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_plasticity.config.data import CorpusConfig, PythonTextConfig, ReasoningTextConfig, TokenizerConfig
from megatron_plasticity.data import embedded as module
from megatron_plasticity.data.documents import Document
from megatron_plasticity.data.prepare import prepare, prepared_folder, read_manifest
from megatron_plasticity.data.token_store import TokenStore, TokenStoreWriter
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError


def corpus(output: Path, **changes: Any) -> CorpusConfig:
    settings: dict[str, Any] = {
        "name": "tiny",
        "output": output,
        "python_text": PythonTextConfig(megabytes=0.1, code_fraction=0.4),
        "reasoning_text": ReasoningTextConfig(documents=200),
        "tokenizer": TokenizerConfig(vocab_size=300),
        "held_out_fraction": 0.1,
    }
    return CorpusConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(corpus(tmp_path_factory.mktemp("data")))


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A prepared folder to damage."""
    folder = tmp_path / prepared.name
    folder.mkdir()
    for file in prepared.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def texts_of(folder: Path, split: str) -> list[str]:
    tokenizer, store = Tokenizer.load(folder / "tokenizer.json"), TokenStore(folder / split)
    texts = []
    for index in range(store.documents):
        ids = store.document(index).tolist()
        assert ids[-1] == tokenizer.end_of_text
        assert tokenizer.end_of_text not in ids[:-1]
        texts.append(tokenizer.decode(ids[:-1]))
    return texts


def test_the_manifest_tells_what_is_in_the_folder(prepared: Path) -> None:
    manifest = read_manifest(prepared, full=True)
    assert {path.name for path in prepared.iterdir()} == {*manifest["files"], "manifest.json"}
    assert prepared.parent.joinpath(prepared.name) == prepared
    assert {path.name for path in prepared.parent.iterdir()} == {prepared.name, "tiny"}
    assert (prepared.parent / "tiny").resolve() == prepared.resolve(), "the corpus can be named without its hash"
    sources, splits = manifest["sources"], manifest["splits"]
    assert sources["python_english"]["requested_bytes"] == 60_000
    assert sources["python_english"]["bytes"] >= 60_000
    assert sources["python_code"]["bytes"] >= 40_000
    assert sources["reasoning"]["requested_documents"] == 200
    for split in ("train", "held_out"):
        store = TokenStore(prepared / split)
        assert (splits[split]["documents"], splits[split]["tokens"]) == (store.documents, store.tokens)
    for count in ("documents", "bytes"):
        assert sum(source[count] for source in sources.values()) == sum(split[count] for split in splits.values())
    tokenizer = Tokenizer.load(prepared / "tokenizer.json")
    assert manifest["tokenizer"] == {"vocab_size": 300, "sha256": tokenizer.sha256}
    assert manifest["config"]["seed"] == 42
    assert manifest["notes"] == [note for note in manifest["notes"] if "could not be read" in note]
    assert "output" not in manifest["config"]  # a place is no part of a corpus


def test_splits_share_no_document_and_are_mixed(prepared: Path) -> None:
    train, held_out = texts_of(prepared, "train"), texts_of(prepared, "held_out")
    assert len({*train, *held_out}) == len(train) + len(held_out)
    assert 0.04 < len(held_out) / (len(train) + len(held_out)) < 0.2
    code = [index for index, text in enumerate(train) if "import " in text]
    assert min(code) < len(train) / 4
    assert max(code) > len(train) * 3 / 4


def test_the_same_config_gives_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    again = prepare(corpus(tmp_path / "elsewhere"))
    assert again.name == prepared.name
    for file in prepared.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()
    other = prepare(corpus(tmp_path, seed=7))
    assert other.name != prepared.name
    assert read_manifest(other)["sha256"] != read_manifest(prepared)["sha256"]


def test_the_second_time_does_no_work(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the corpus was built again")

    monkeypatch.setattr(module, "_collect", work)
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    assert prepare(corpus(prepared.parent)) == prepared
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def test_progress_covers_every_stage(tmp_path: Path) -> None:
    stages: dict[str, list[tuple[float, float]]] = {}

    class Recorder:
        def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
            assert unit
            stages.setdefault(str(info["stage"]), []).append((done, total))

    prepare(corpus(tmp_path), Recorder())
    assert list(stages) == ["collecting Python text", "writing reasoning text", "training the tokenizer", "encoding"]
    for updates in stages.values():
        assert [done for done, _ in updates] == sorted(done for done, _ in updates)
        assert all(done <= total for done, total in updates)
    assert stages["encoding"][-1][0] == stages["encoding"][-1][1]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    added = TokenStoreWriter.add_document

    def add_and_fail(writer: TokenStoreWriter, ids: list[int]) -> None:
        added(writer, ids)
        if writer.documents == 20:
            raise error

    monkeypatch.setattr(TokenStoreWriter, "add_document", add_and_fail)
    with pytest.raises(type(error)):
        prepare(corpus(tmp_path))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    read_manifest(prepare(corpus(tmp_path)), full=True)


def test_a_full_disk_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TokenStoreWriter, "add_document", full_disk)
    with pytest.raises(UserError, match=r"tiny-.*No space left on device"):
        prepare(corpus(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_is_recorded_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = module.python_text

    def one_package(*arguments: Any, **options: Any) -> Any:
        root = tmp_path / "site"
        root.mkdir()
        root.joinpath("a.md").write_text("It is the one text of this installation, and there is no other in it. " * 20)
        root.joinpath("b.py").write_text("def broken(:\n")
        return original(*arguments, **options, roots=[(root, False)])

    monkeypatch.setattr(module, "python_text", one_package)
    with caplog.at_level(logging.WARNING):
        manifest = read_manifest(prepare(corpus(tmp_path, tokenizer=TokenizerConfig(vocab_size=60_000))))
    assert manifest["sources"]["python_english"]["documents"] == 1
    assert manifest["sources"]["python_code"]["bytes"] == 0
    for note, words in zip(manifest["notes"], ("0.00 MB of the 0.06", "0.00 MB of the 0.04", "1 files", "60000"), strict=True):
        assert words in note
        assert note in caplog.text


def test_no_text_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "python_text", lambda *_, **__: module.PythonText())
    with pytest.raises(UserError, match="no text"):
        prepare(corpus(tmp_path, reasoning_text=ReasoningTextConfig(documents=0)))
    monkeypatch.setattr(module, "reasoning_documents", lambda *_: iter([Document("one", "reasoning")]))
    with pytest.raises(UserError, match="held_out split"):
        prepare(corpus(tmp_path, held_out_fraction=1e-9))
    assert list(tmp_path.iterdir()) == []


def test_copies_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = [Document(f"the document with number {number % 100}", "reasoning") for number in range(200)]
    monkeypatch.setattr(module, "reasoning_documents", lambda *_: iter(copies))
    manifest = read_manifest(prepare(corpus(tmp_path)))
    assert manifest["sources"]["reasoning"]["documents"] == 100
    assert any("100 of 200 documents" in note for note in manifest["notes"])


def test_a_folder_in_the_way_is_left_alone(tmp_path: Path) -> None:
    folder = prepared_folder(corpus(tmp_path))
    folder.mkdir()
    folder.joinpath("thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="in the way"):
        prepare(corpus(tmp_path))
    assert folder.joinpath("thesis.txt").read_text() == "mine"


def test_a_folder_that_is_no_corpus(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="megatron-plasticity data prepare"):
            read_manifest(folder)


@pytest.mark.parametrize("name", ["train.bin", "held_out.idx", "tokenizer.json"])
def test_missing_and_shortened_files_are_found_on_opening(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{name}: damaged: it has .* Delete .* data prepare"):
        read_manifest(copy)
    with pytest.raises(UserError, match="damaged"):
        prepare(corpus(copy.parent))
    (copy / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: missing"):
        read_manifest(copy)


def test_changed_bytes_are_found_by_the_full_check(copy: Path) -> None:
    content = bytearray((copy / "train.bin").read_bytes())
    content[100] ^= 1
    (copy / "train.bin").write_bytes(content)
    read_manifest(copy)
    with pytest.raises(UserError, match=r"train\.bin: damaged: its sha256"):
        read_manifest(copy, full=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.pop("files"), "KeyError"),
        (lambda manifest: manifest.update(format=2), "format 2"),
        (lambda manifest: manifest.update(files=[]), "damaged"),
        (lambda manifest: manifest["files"].pop("train.idx"), "not that of the files"),
    ],
)
def test_damaged_manifests(copy: Path, change: Any, message: str) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        read_manifest(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        read_manifest(copy)


def test_the_folder_depends_on_what_decides_the_corpus(tmp_path: Path) -> None:
    one = prepared_folder(corpus(tmp_path))
    assert one.parent == tmp_path
    assert one.name.startswith("tiny-")
    assert prepared_folder(corpus(tmp_path / "elsewhere")).name == one.name
    assert prepared_folder(corpus(tmp_path, held_out_fraction=0.2)).name != one.name
