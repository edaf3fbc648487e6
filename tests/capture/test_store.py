from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_plasticity.capture import writer as writer_module
from megatron_plasticity.capture.statistics import StreamingStatistics
from megatron_plasticity.capture.store import ActivationStore
from megatron_plasticity.capture.writer import ActivationWriter
from megatron_plasticity.errors import UserError

IDENTITY = {"family": "llama2", "layers": 2, "weight_decay": 0.1, "betas": (0.9, 0.95)}


def batch(offset: float, rows: int = 4) -> dict[str, Tensor]:
    values = torch.arange(rows * 6, dtype=torch.float32).reshape(rows, 2, 3) + offset
    return {"embed": values, "layers.0.attn.q": -values}


def write(folder: Path, step: int, *batches: dict[str, Tensor], **options: int) -> None:
    with ActivationWriter(folder, IDENTITY, **options) as writer, writer.dump(step):
        for each in batches:
            writer.add(each)


def shards(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("shard_bytes", [1, 100, 200, 1 << 20])
def test_what_was_added_is_read_back_however_it_is_cut(tmp_path: Path, shard_bytes: int) -> None:
    write(tmp_path, 7, batch(0), batch(100, rows=2), batch(200), shard_bytes=shard_bytes)
    store = ActivationStore(tmp_path, IDENTITY)
    assert (store.steps, store.points(7)) == ([7], ["embed", "layers.0.attn.q"])
    expected = torch.cat([batch(0)["embed"], batch(100, rows=2)["embed"], batch(200)["embed"]])
    assert torch.equal(store.read(7, "embed"), expected)
    assert torch.equal(store.read(7, "layers.0.attn.q"), -expected)
    files = [name for name in shards(tmp_path) if "embed" in name]
    assert len(files) == {1: 3, 100: 2, 200: 1, 1 << 20: 1}[shard_bytes]  # batches of 96, 48 and 96 bytes


def test_rows_are_read_from_the_shards_that_hold_them(tmp_path: Path) -> None:
    write(tmp_path, 7, batch(0), batch(100, rows=2), batch(200), shard_bytes=1)
    array = ActivationStore(tmp_path).array(7, "embed")
    whole = array[:]
    assert (array.shape, array.dtype, len(array)) == (tuple(whole.shape), torch.float32, 10)
    for start in range(11):
        for stop in range(start, 11):
            assert torch.equal(array[start:stop], whole[start:stop])
    (tmp_path / "step-7" / "take-1" / "embed-00002.safetensors").unlink()
    assert torch.equal(array[:6], whole[:6]), "a shard that holds none of the rows is not touched"
    with pytest.raises(UserError, match=r"embed-00002.safetensors: this shard is missing"):
        array[5:7]
    with pytest.raises(ValueError, match="stride of 2"):
        array[::2]


def test_statistics_are_part_of_a_dump_and_go_with_it(tmp_path: Path) -> None:
    streaming = StreamingStatistics()
    streaming.add(torch.randn(5, 3))
    for _ in range(2):
        with ActivationWriter(tmp_path, IDENTITY) as writer, writer.dump(5):
            writer.add_statistics("embed", streaming.tensors())
            with pytest.raises(ValueError, match="has statistics of 'embed' already"):
                writer.add_statistics("embed", streaming.tensors())
    store = ActivationStore(tmp_path)
    assert (store.steps, store.points(5), store.points_with_statistics(5)) == ([5], [], ["embed"])
    found = store.statistics(5, "embed")
    assert found.count == 5
    assert found.covariance is not None
    assert torch.equal(found.covariance, streaming.result.covariance)  # type: ignore[arg-type]
    assert shards(tmp_path) == ["manifest.jsonl", "step-5/take-2/embed-statistics.safetensors"]
    with pytest.raises(UserError, match="no point 'statistics of head'; it has embed"):
        store.statistics(5, "head")
    path = tmp_path / "step-5/take-2/embed-statistics.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated or damaged"):
        store.statistics(5, "embed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_number_formats_stay_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(5, 4).to(dtype)
    write(tmp_path, 0, {"embed": values})
    assert torch.equal(ActivationStore(tmp_path).read(0, "embed"), values)


def test_recording_a_step_again_replaces_it_and_leaves_no_old_file(tmp_path: Path) -> None:
    write(tmp_path, 5, batch(0), batch(1), shard_bytes=1)
    write(tmp_path, 9, batch(2))
    write(tmp_path, 5, batch(50))
    store = ActivationStore(tmp_path)
    assert store.steps == [5, 9]
    assert torch.equal(store.read(5, "embed"), batch(50)["embed"])
    assert torch.equal(store.read(9, "embed"), batch(2)["embed"])
    assert len(shards(tmp_path)) == 1 + 2 * 2  # the manifest, and two points of two steps


def test_a_dump_that_fails_is_dropped_and_the_earlier_one_stays(tmp_path: Path) -> None:
    write(tmp_path, 5, batch(0))
    with pytest.raises(ZeroDivisionError), ActivationWriter(tmp_path, IDENTITY, shard_bytes=1) as writer, writer.dump(5):
        writer.add(batch(50))
        raise ZeroDivisionError
    assert torch.equal(ActivationStore(tmp_path).read(5, "embed"), batch(0)["embed"])
    assert len(shards(tmp_path)) == 3
    write(tmp_path, 5, batch(60))
    assert torch.equal(ActivationStore(tmp_path).read(5, "embed"), batch(60)["embed"])


def test_one_writer_takes_several_dumps_and_flush_waits_for_them(tmp_path: Path) -> None:
    with ActivationWriter(tmp_path, IDENTITY) as writer:
        for step in (1, 2, 1):
            with writer.dump(step):
                writer.add(batch(step))
            writer.flush()
            assert step in ActivationStore(tmp_path).steps
        with writer.dump(3):
            writer.add(batch(3))
            writer.flush()  # an open dump is not waited for
    assert ActivationStore(tmp_path).steps == [1, 2, 3]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from megatron_plasticity.capture.writer import ActivationWriter
fatal, rename = int(sys.argv[2]), os.replace
def replace(source, target):
    global fatal
    if fatal == 0:  # the shard is written, but not under its name
        os.kill(os.getpid(), signal.SIGKILL)
    fatal -= 1
    rename(source, target)
os.replace = replace
with ActivationWriter(Path(sys.argv[1]), {"m": 1}, shard_bytes=1) as writer, writer.dump(5):
    for offset in (10.0, 20.0):
        writer.add({"embed": torch.full((2, 3), offset)})
"""


@pytest.mark.parametrize("fatal", [0, 1])
def test_a_kill_leaves_whole_shards_and_the_dump_in_force(tmp_path: Path, fatal: int) -> None:
    before = torch.full((2, 3), 1.0)
    with ActivationWriter(tmp_path, {"m": 1}) as writer, writer.dump(5):
        writer.add({"embed": before})
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(fatal)], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL

    taken = list((tmp_path / "step-5" / "take-2").glob("embed*.safetensors"))
    assert [load_file(path)["activations"].shape for path in taken] == [(2, 3)] * fatal  # no half shard under a final name
    assert torch.equal(ActivationStore(tmp_path).read(5, "embed"), before)

    with ActivationWriter(tmp_path, {"m": 1}) as writer:
        assert shards(tmp_path) == ["manifest.jsonl", "step-5/take-1/embed-00000.safetensors"]
        with writer.dump(5):
            writer.add({"embed": before * 3})
    assert torch.equal(ActivationStore(tmp_path).read(5, "embed"), before * 3)


def test_a_manifest_row_that_was_cut_short_is_no_row(tmp_path: Path) -> None:
    write(tmp_path, 5, batch(0))
    manifest = tmp_path / "manifest.jsonl"
    rows = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(rows[:-1]) + rows[-1][:-4])  # the row that completes the dump
    assert ActivationStore(tmp_path).steps == []
    write(tmp_path, 6, batch(6))
    assert ActivationStore(tmp_path).steps == [6]
    assert all(json.loads(row) for row in manifest.read_text().splitlines())


def test_memory_is_bounded_and_the_caller_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, entered = threading.Event(), threading.Event()
    real = writer_module.write_tensors

    def slow(*arguments: object, **options: object) -> None:
        entered.set()
        assert gate.wait(30)
        real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(writer_module, "write_tensors", slow)
    size = sum(tensor.nbytes for tensor in batch(0).values())
    held: list[int] = []
    with ActivationWriter(tmp_path, IDENTITY, memory_bytes=2 * size) as writer:

        def produce() -> None:
            with writer.dump(1):
                for offset in range(8):
                    writer.add(batch(offset))
                    held.append(writer._unwritten_bytes)

        producer = threading.Thread(target=produce)
        producer.start()
        assert entered.wait(30)  # the third batch does not fit: the fullest shard is written, and the disk hangs
        producer.join(0.3)
        assert producer.is_alive()
        assert len(held) == 2
        gate.set()
        producer.join(30)
        assert not producer.is_alive()
    assert max(held) <= 2 * size
    assert torch.equal(ActivationStore(tmp_path).read(1, "embed"), torch.cat([batch(offset)["embed"] for offset in range(8)]))


def test_a_batch_larger_than_the_bound_goes_through_alone(tmp_path: Path) -> None:
    write(tmp_path, 1, batch(0), batch(1), batch(2), memory_bytes=1)
    assert ActivationStore(tmp_path).read(1, "embed").shape == (12, 2, 3)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), UserError, "disk is full"), (KeyError("x"), RuntimeError, "failed")],
)
def test_an_error_of_the_thread_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    write(tmp_path, 3, batch(3))
    monkeypatch.setattr(writer_module, "write_tensors", fail)
    writer = ActivationWriter(tmp_path, IDENTITY, shard_bytes=1, memory_bytes=1)

    def keep_adding() -> None:
        with writer.dump(4):
            for offset in range(100):  # back-pressure makes the error known long before
                writer.add(batch(offset))

    with pytest.raises(kind, match=message):
        keep_adding()
    for call in (writer.flush, writer.close):
        with pytest.raises(kind, match=message):
            call()
    assert not writer._thread.is_alive()
    assert ActivationStore(tmp_path).steps == [3]
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_error_after_the_last_call_is_raised_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer_module, "write_tensors", fail)
    with pytest.raises(UserError, match="disk is full"):
        write(tmp_path, 4, batch(0))


def test_a_folder_of_another_model_is_refused_with_the_difference(tmp_path: Path) -> None:
    write(tmp_path, 1, batch(0))
    assert ActivationStore(tmp_path, {"weight_decay": 0.1}).steps == [1], "a reader may know a part only"
    with pytest.raises(UserError, match="another model"):
        ActivationWriter(tmp_path, {"weight_decay": 0.1})
    other = {**IDENTITY, "weight_decay": 1.0}
    for use in (lambda: ActivationWriter(tmp_path, other), lambda: ActivationStore(tmp_path, other)):
        with pytest.raises(UserError, match=r"another model \(weight_decay: 0.1 there, 1.0 here\)"):
            use()


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1, batch(0))
    path = tmp_path / "step-1" / "take-1" / "embed-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"embed-00000.safetensors: this shard is truncated or damaged .* record step 1 again"):
        ActivationStore(tmp_path).read(1, "embed")
    path.unlink()
    with pytest.raises(UserError, match=r"embed-00000.safetensors: this shard is missing"):
        ActivationStore(tmp_path).read(1, "embed")


def test_a_shard_of_another_model_or_step_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "mine", 1, batch(0))
    with ActivationWriter(tmp_path / "other", {"m": 2}) as writer, writer.dump(1):
        writer.add(batch(0))
    name = "step-1/take-1/embed-00000.safetensors"
    (tmp_path / "mine" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(UserError, match="another model, step or point"):
        ActivationStore(tmp_path / "mine").read(1, "embed")


def test_a_shard_of_another_shape_or_format_is_noticed(tmp_path: Path) -> None:
    for name, values in (("float", torch.zeros(4, 3)), ("half", torch.zeros(4, 3).half()), ("wide", torch.zeros(4, 5))):
        write(tmp_path / name, 1, {"embed": values})
    shard = "step-1/take-1/embed-00000.safetensors"
    for name, found in (("half", r"\(4, 3\) torch.float16"), ("wide", r"\(4, 5\) torch.float32")):
        (tmp_path / "float" / shard).write_bytes((tmp_path / name / shard).read_bytes())
        with pytest.raises(UserError, match=rf"holds {found}, the manifest says \(4, 3\) float32; record step 1 again"):
            ActivationStore(tmp_path / "float").read(1, "embed")


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no activations"):
        ActivationStore(tmp_path / "nowhere")
    write(tmp_path, 4, batch(0))
    with pytest.raises(UserError, match="no complete dump of step 5; there are 4"):
        ActivationStore(tmp_path).read(5, "embed")
    with pytest.raises(UserError, match=r"no point 'head'; it has embed, layers.0.attn.q"):
        ActivationStore(tmp_path).read(4, "head")


@pytest.mark.parametrize(
    "row", ['{"event": "shard", "step": 1}', "not json", '{"event": "model", "format": 1, "identity": {}}', "[]"]
)
def test_a_damaged_manifest_is_named_with_its_row(tmp_path: Path, row: str) -> None:
    write(tmp_path, 4, batch(0))
    with (tmp_path / "manifest.jsonl").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(UserError, match=r"manifest.jsonl, row 5: damaged"):
        ActivationStore(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"event": "model", "format": 2, "identity": {}}\n')
    with pytest.raises(UserError, match="has format 2, and this version reads 1"):
        ActivationStore(tmp_path)


def test_misuse_is_refused(tmp_path: Path) -> None:
    with ActivationWriter(tmp_path, IDENTITY) as writer:
        with pytest.raises(RuntimeError, match="inside"):
            writer.add(batch(0))
        with pytest.raises(ValueError, match="nothing was added"), writer.dump(1):
            pass
        with writer.dump(2):
            writer.add(batch(0))
            with pytest.raises(RuntimeError, match="still open"), writer.dump(3):
                pass
            with pytest.raises(ValueError, match="differ in their points"):
                writer.add({"embed": batch(0)["embed"]})
            with pytest.raises(ValueError, match="same number of sequences"):
                writer.add({"embed": torch.zeros(2, 2, 3), "layers.0.attn.q": torch.zeros(3, 2, 3)})
    writer.close()
    with pytest.raises(RuntimeError, match="closed"), writer.dump(4):
        writer.add(batch(0))
    assert ActivationStore(tmp_path).steps == [2]
