"""Corpora from sources: the same bytes for any number of workers and any kill, exact shares, no copies, no leak into training."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_plasticity.config.data import CorpusConfig
from megatron_plasticity.config.load import check_config
from megatron_plasticity.data import assemble as assembling
from megatron_plasticity.data import build
from megatron_plasticity.data.documents import is_held_out
from megatron_plasticity.data.prepare import prepare, prepared_folder, read_manifest
from megatron_plasticity.data.token_store import TokenStore
from megatron_plasticity.data.tokenizer import Tokenizer, train_byte_bpe
from megatron_plasticity.errors import ConfigError, UserError

WORDS = [
    "the",
    "weight",
    "decay",
    "of",
    "a",
    "model",
    "learns",
    "to",
    "forget",
    "what",
    "it",
    "has",
    "never",
    "seen",
    "12",
    "345",
]


def texts(kind: str, count: int) -> list[str]:
    rng = random.Random(kind)
    return [f"{kind} {number}: " + " ".join(rng.choices(WORDS, k=rng.randint(3, 60))) for number in range(count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of several files, and a tokenizer."""
    folder = tmp_path_factory.mktemp("sources")
    for kind, files, documents in (("web", 6, 80), ("code", 3, 40)):
        for number in range(files):
            rows = [{"text": text, kind: number} for text in texts(f"{kind}{number}", documents)]
            (folder / f"{kind}{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_byte_bpe(texts("any", 200), 300).save(folder / "tokenizer.json")
    return folder


def tree(place: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "mixed",
        "output": str(output),
        "sources": [
            {"name": "web", "files": [f"{place}/web*.jsonl"], "licence": "ODC-By 1.0"},
            {"name": "code", "files": [f"{place}/code*.jsonl"]},
        ],
        "tokenizer": {"load": str(place / "tokenizer.json"), "vocab_size": 300},
        "held_out_fraction": 0.1,
        "workers": 1,
        "shard_megabytes": 0.03,  # one or two files a shard
        **changes,
    }


def corpus(place: Path, output: Path, **changes: Any) -> CorpusConfig:
    return check_config(CorpusConfig, tree(place, output, **changes), "test")


def weighted(place: Path, **weights: float) -> list[dict[str, Any]]:
    return [{**source, "weight": weights[source["name"]]} for source in tree(place, place)["sources"]]


@pytest.fixture(scope="module")
def prepared(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(corpus(place, tmp_path_factory.mktemp("data")))


def documents_of(folder: Path, split: str) -> list[str]:
    tokenizer, store = Tokenizer.load(folder / "tokenizer.json"), TokenStore(folder / split)
    found = [store.document(index).tolist() for index in range(store.documents)]
    assert all(ids[-1] == tokenizer.end_of_text and tokenizer.end_of_text not in ids[:-1] for ids in found)
    return [tokenizer.decode(ids[:-1]) for ids in found]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_document_once_each_on_its_side(prepared: Path) -> None:
    wanted = Counter(
        text
        for kind, files, count in (("web", 6, 80), ("code", 3, 40))
        for n in range(files)
        for text in texts(f"{kind}{n}", count)
    )
    train, held_out = documents_of(prepared, "train"), documents_of(prepared, "held_out")
    assert Counter(train + held_out) == wanted
    assert not any(is_held_out(text, 0.1) for text in train)
    assert all(is_held_out(text, 0.1) for text in held_out)
    kinds = [text[:3] for text in held_out]
    assert kinds not in (sorted(kinds), sorted(kinds, reverse=True)), "held-out sources are mixed"


def test_the_manifest(prepared: Path, place: Path) -> None:
    manifest = read_manifest(prepared, full=True)
    web, code = manifest["sources"]["web"], manifest["sources"]["code"]
    assert (web["documents"], code["documents"], web["files_read"], web["licence"]) == (480, 120, 6, "ODC-By 1.0")
    assert web["bytes_read"] == sum(path.stat().st_size for path in place.glob("web*.jsonl"))
    assert code["train"]["first_document"] == web["train"]["documents"]
    for split in ("train", "held_out"):
        store = TokenStore(prepared / split)
        assert manifest["splits"][split]["documents"] == store.documents == web[split]["documents"] + code[split]["documents"]
        assert manifest["splits"][split]["tokens"] == store.tokens == web[split]["tokens"] + code[split]["tokens"]
        assert manifest["splits"][split]["bytes"] == sum(len(text.encode()) for text in documents_of(prepared, split))
    assert manifest["tokenizer"]["sha256"] == Tokenizer.load(place / "tokenizer.json").sha256
    assert "web: ODC-By 1.0" in manifest["licences"]
    assert [path.name for path in prepared.parent.iterdir() if path.name.startswith(".")] == [], "the parts are gone"
    assert (prepared.parent / "mixed").resolve() == prepared.resolve()


@pytest.mark.parametrize(("workers", "megabytes"), [(3, 0.001), (2, 100.0)])
def test_the_same_bytes_for_any_workers_and_shards(
    prepared: Path, place: Path, tmp_path: Path, workers: int, megabytes: float
) -> None:
    again = prepare(corpus(place, tmp_path, workers=workers, shard_megabytes=megabytes))
    assert again.name == prepared.name
    assert contents(again) == contents(prepared)


def test_a_part_of_a_source_is_the_same_for_any_shards(place: Path, tmp_path: Path) -> None:
    """Where shards end is seen neither in the training documents nor in the held-out ones."""
    one_source = {"sources": tree(place, tmp_path)["sources"][:1], "train_tokens": 3_000}
    shares = {"sources": weighted(place, web=1, code=3), "train_tokens": 6_000}
    without_total = {"sources": weighted(place, web=1, code=3), "drop_duplicates": True}
    for number, changes in enumerate((one_source, shares, without_total)):
        folders = [
            prepare(corpus(place, tmp_path / f"{number}-{megabytes}", shard_megabytes=megabytes, workers=workers, **changes))
            for megabytes, workers in ((0.001, 2), (0.03, 1), (100.0, 1))
        ]
        hashes = {read_manifest(folder)["sha256"] for folder in folders}
        assert len(hashes) == 1, changes


def workplace_of(config: CorpusConfig, place: Path) -> Path:
    return build._workplace(config, Tokenizer.load(place / "tokenizer.json").sha256)


def test_parts_without_their_list_are_not_used(
    prepared: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are left by a command that is killed while it deletes its workplace."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "assemble", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus(place, tmp_path, shard_megabytes=100.0))
    monkeypatch.undo()
    (workplace_of(corpus(place, tmp_path), place) / "shards.json").unlink()
    assert contents(prepare(corpus(place, tmp_path, shard_megabytes=0.001))) == contents(prepared)


@pytest.mark.parametrize("moved", [False, True])
def test_killed_while_clearing_up(
    prepared: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    def killed(workplace: Path) -> None:
        if moved:
            workplace.rename(build._trash(workplace))
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_discard", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus(place, tmp_path))
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    again = prepare(corpus(place, tmp_path))
    assert contents(again) == contents(prepared)
    assert {path.name for path in tmp_path.iterdir()} == {again.name, "mixed"}


def test_the_parts_of_another_corpus_are_left_to_it(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(corpus(place, tmp_path))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "assemble", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus(place, tmp_path, drop_duplicates=True))  # has the same parts
    prepare(corpus(place, tmp_path))
    assert parts_in(tmp_path)


def test_a_corpus_whose_sources_have_changed_since(place: Path, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "a0.jsonl", tmp_path / "tokenizer.json"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts("a", 200)))
    tokenizer.write_bytes((place / "tokenizer.json").read_bytes())
    changes = {
        "sources": [{"name": "a", "files": [f"{tmp_path}/a*.jsonl"]}],
        "tokenizer": {"load": str(tokenizer), "vocab_size": 300},
    }
    config = corpus(place, tmp_path / "data", **changes)
    folder = prepare(config)
    assert prepare(config) == folder
    (tmp_path / "a1.jsonl").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"made before .*a1\.jsonl changed or appeared\. Delete the folder"):
        prepare(config)
    (tmp_path / "a1.jsonl").unlink()
    os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match=r"made before .*a0\.jsonl changed.* delete .*read-from\.json"):
        prepare(config)
    path.unlink()
    assert prepare(config) == folder, "what is gone is not needed"
    train_byte_bpe(texts("other", 200), 300).save(tokenizer)
    with pytest.raises(UserError, match=r"made before the tokenizer .*tokenizer\.json changed"):
        prepare(config)


def start(config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_plasticity", "data", "prepare", str(config)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def parts_in(output: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in output.glob(".mixed-*.parts/*/part.json") if ".unfinished" not in str(path)}


def test_killed_twice_and_gone_on_with(prepared: Path, place: Path, tmp_path: Path) -> None:
    """kill -9 of the command alone: its workers have to see by themselves that nobody waits for them."""
    config = tmp_path / "mixed.yaml"
    finished: dict[Path, int] = {}
    for workers in (1, 2):
        config.write_text(yaml.safe_dump(tree(place, tmp_path, workers=workers, shard_megabytes=0.001)))
        process = start(config)
        while process.poll() is None and len(parts_in(tmp_path)) < len(finished) + 2:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=30)  # ends when the workers have let go of the pipe, too
        assert process.returncode == -signal.SIGKILL, output
        assert not prepared_folder(corpus(place, tmp_path)).exists()
        kept = parts_in(tmp_path)
        assert len(kept) >= 2
        assert finished.items() <= kept.items(), "finished parts are not made again"
        finished = kept
    again = prepare(corpus(place, tmp_path, workers=1))
    assert contents(again) == contents(prepared)
    assert {path.name for path in tmp_path.iterdir()} == {again.name, "mixed", "mixed.yaml"}


def test_killed_while_putting_together(prepared: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus(place, tmp_path))
    assert not prepared_folder(corpus(place, tmp_path)).exists()
    monkeypatch.undo()
    monkeypatch.setattr(build, "worker_processes", killed)  # every part is there: no worker is needed
    assert contents(prepare(corpus(place, tmp_path))) == contents(prepared)


def test_ctrl_c_stops_the_workers(place: Path, tmp_path: Path) -> None:
    config = tmp_path / "mixed.yaml"
    config.write_text(yaml.safe_dump(tree(place, tmp_path, workers=2, shard_megabytes=0.001)))
    process = start(config)
    while process.poll() is None and not parts_in(tmp_path):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=30)
    assert "run the same command again" in output or process.returncode == 0
    assert "Traceback" not in output


def test_weights_are_shares_of_the_training_tokens(place: Path, tmp_path: Path) -> None:
    longest = 200  # tokens of a document, at most
    folder = prepare(corpus(place, tmp_path, sources=weighted(place, web=1, code=3), train_tokens=6_000))
    found = read_manifest(folder)["sources"]
    assert 1_500 <= found["web"]["train"]["tokens"] < 1_500 + longest
    assert 4_500 <= found["code"]["train"]["tokens"] < 4_500 + longest
    assert found["web"]["files_read"] < 6, "what is not needed is not used"
    again = prepare(corpus(place, tmp_path / "b", sources=weighted(place, web=1, code=3), train_tokens=6_000, workers=3))
    assert contents(again) == contents(folder), "though more workers read more shards than are used"


def test_validation_has_the_mixture_of_training(place: Path, tmp_path: Path) -> None:
    sources = weighted(place, web=1, code=3)
    folder = prepare(corpus(place, tmp_path, sources=sources, train_tokens=5_000, held_out_fraction=0.3))
    found = read_manifest(folder)["sources"]
    web, code = (found[name]["held_out"]["tokens"] for name in ("web", "code"))
    assert web < code


def test_the_scarcest_source_limits_the_corpus(
    place: Path, prepared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    available = read_manifest(prepared)["sources"]["code"]["train"]["tokens"]
    folder = prepare(corpus(place, tmp_path, sources=weighted(place, web=1, code=1), train_tokens=10**6))
    manifest = read_manifest(folder)
    assert manifest["sources"]["code"]["train"]["tokens"] == available
    assert available <= manifest["sources"]["web"]["train"]["tokens"] < available + 200
    (note,) = manifest["notes"]
    assert f"code has {available:,} training tokens" in note
    assert "of the 1,000,000 asked for" in note
    assert note in caplog.text


def test_one_source_up_to_a_number_of_tokens(place: Path, tmp_path: Path) -> None:
    sources = tree(place, tmp_path)["sources"][:1]
    folder = prepare(corpus(place, tmp_path, sources=sources, train_tokens=3_000))
    assert 3_000 <= TokenStore(folder / "train").tokens < 3_200


def test_copies_are_dropped_on_request(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = tmp_path / "copies.jsonl"
    lines = (place / "web1.jsonl").read_text() + (place / "code0.jsonl").read_text() * 2 + '{"text": ""}\n{"text": null}\n'
    copies.write_text(lines)
    sources = [*tree(place, tmp_path)["sources"], {"name": "copies", "files": [str(copies)]}]
    monkeypatch.setattr(assembling, "_DIGESTS_PER_PASS", 100)  # so that there are several
    folder = prepare(corpus(place, tmp_path, sources=sources, drop_duplicates=True))
    assert Counter(documents_of(folder, "train") + documents_of(folder, "held_out")).most_common(1)[0][1] == 1
    found = read_manifest(folder)["sources"]
    assert found["copies"]["train"]["documents"] == 0
    assert found["copies"]["empty_documents"] == 2
    assert found["web"]["documents"] + found["code"]["documents"] == 600
    assert found["web"]["duplicate_documents"] == 0, "the first one stays"
    kept = prepare(corpus(place, tmp_path / "kept", sources=sources))
    assert read_manifest(kept)["sources"]["copies"]["documents"] == 160


def test_files_that_change_on_the_way(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts("a", 200)))
    sources = [{"name": "a", "files": [str(path)]}]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "assemble", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus(place, tmp_path, sources=sources))
    monkeypatch.undo()
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=r"files of 'a' have changed.*or delete .*\.mixed-.*\.parts"):
        prepare(corpus(place, tmp_path, sources=sources))


def test_two_at_a_time(place: Path, tmp_path: Path) -> None:
    config = corpus(place, tmp_path)
    workplace = workplace_of(config, place)
    with build._held(workplace), pytest.raises(UserError, match="another process is preparing this corpus"):
        prepare(config)


def test_errors_of_workers_reach_the_terminal(place: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"body": "b"}\n')
    sources = [*tree(place, tmp_path)["sources"], {"name": "bad", "files": [str(tmp_path / "bad.jsonl")]}]
    with pytest.raises(UserError, match=r"bad\.jsonl, line 1 \(source 'bad'\): has no column 'text'"):
        prepare(corpus(place, tmp_path, sources=sources, workers=2))
    assert not prepared_folder(corpus(place, tmp_path, sources=sources)).exists()


def test_too_little_for_two_splits(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="held_out split at held_out_fraction=1e-09"):
        prepare(corpus(place, tmp_path, held_out_fraction=1e-9))
    with pytest.raises(UserError, match="no document falls into the training split"):
        prepare(corpus(place, tmp_path, held_out_fraction=1 - 1e-12))


def test_halves_of_characters_do_no_harm(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{text} \ud83d"}) + "\n" for text in texts("a", 100)))
    folder = prepare(corpus(place, tmp_path, sources=[{"name": "a", "files": [str(path)]}]))
    assert all(text.endswith(" ?") for text in documents_of(folder, "train"))


def test_progress_tells_megabytes_and_ends_full(place: Path, tmp_path: Path) -> None:
    stages: dict[str, list[tuple[float, float, str]]] = {}

    class Recorder:
        def update(self, done: float, total: float, unit: str, **info: float | str) -> None:
            stages.setdefault(str(info["stage"]), []).append((done, total, unit))

    prepare(corpus(place, tmp_path, shard_megabytes=0.001), Recorder())
    assert list(stages) == ["tokenizing", "writing", "hashing"]
    assert {unit for _, _, unit in stages["tokenizing"]} == {"MB"}
    for updates in stages.values():
        assert [done for done, _, _ in updates] == sorted(done for done, _, _ in updates)
        assert updates[-1][0] == updates[-1][1]
        assert len({total for _, total, _ in updates}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": [{"name": "a"}]}, "source 'a' takes exactly one of `hub` and `files`"),
        ({"sources": [{"name": "a", "files": ["x"], "revision": "r"}]}, "belong to a data set on the hub"),
        ({"sources": [{"name": "a", "hub": "o/n"}] * 2}, "every source needs a name of its own"),
        (
            {"sources": [{"name": "a", "hub": "o/n", "weight": 1}, {"name": "b", "hub": "o/n"}]},
            "give every source a weight, or none",
        ),
        ({"train_tokens": 5}, "with several sources each needs a weight"),
        ({"tokenizer": {}}, "tokenizer.load: needed beside `sources`"),
        ({"reasoning_text": {"documents": 3}}, "reasoning_text: has no effect beside `sources`"),
        ({"sources": []}, "tokenizer.load: needs `sources`"),
        ({"sources": [], "tokenizer": {}, "drop_duplicates": True}, "drop_duplicates: needs `sources`"),
    ],
)
def test_configs_that_contradict_themselves(place: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        corpus(place, tmp_path, **changes)


def test_nothing_is_read_before_all_is_found(place: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"sources": [*tree(place, tmp_path)["sources"], {"name": "x", "files": [f"{place}/nothing*"]}]}, "no file matches"),
        ({"tokenizer": {"load": str(place / "tokenizer.json"), "vocab_size": 400}}, "has 300 ids"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(corpus(place, tmp_path, **changes))
        assert list(tmp_path.iterdir()) == []


def test_plans_stop_when_enough_is_under_way(tmp_path: Path) -> None:
    def plan(quota: float, done: dict[int, int], running: set[int]) -> build._Plan:
        shard = build.Shard(tmp_path, check_config(CorpusConfig, tree(tmp_path, tmp_path), "t").sources[0], (), 100)
        return build._Plan([], [1] * 10, [shard] * 10, quota, done, running)

    assert plan(50, {}, set()).next_shard() == 0
    assert plan(50, {}, {0, 1}).next_shard() == 2, "nothing is known yet"
    assert plan(50, {0: 20}, {1}).next_shard() == 2
    assert plan(50, {0: 20}, {1, 2}).next_shard() is None
    assert plan(50, {0: 20, 2: 40}, {1}).next_shard() is None
    assert plan(50, {0: 60}, set()).is_satisfied
    assert not plan(50, {1: 60}, set()).is_satisfied, "parts are taken from the first on"
    assert plan(float("inf"), dict.fromkeys(range(10), 5), set()).is_satisfied


def test_int32_where_the_vocabulary_needs_it(place: Path, tmp_path: Path) -> None:
    """dolma2 has 100,278 ids; a store of uint16 would wrap them round without a word."""
    content = json.loads((place / "tokenizer.json").read_text())
    content["model"]["vocab"].update({f"never {number}": number for number in range(300, 100_278)})
    (tmp_path / "large.json").write_text(json.dumps(content))
    tokenizer = {"load": str(tmp_path / "large.json"), "vocab_size": 100_278}
    folder = prepare(corpus(place, tmp_path, tokenizer=tokenizer))
    store = TokenStore(folder / "train")
    assert store.dtype == np.dtype("int32")
    small = prepare(corpus(place, tmp_path / "small"))
    assert np.array_equal(store.read(0, store.tokens), TokenStore(small / "train").read(0, store.tokens))
