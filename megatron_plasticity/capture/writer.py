"""Writing activations: safetensors shards per hook point, in the background, and a manifest that says what is whole.

A folder holds the dumps of one model at several steps::

    manifest.jsonl
    sequences.safetensors
    step-200/take-1/layers.0.resid_post-00000.safetensors
    step-200/take-1/layers.0.resid_post-statistics.safetensors

Shards are written under temporary names and renamed, then listed in the manifest; a dump counts once its last row, `complete`, is
there. So a kill at any moment leaves whole shards and the earlier dumps in force, and the next writer removes what was begun
only. Recording a step again, as a resumed run does, makes a new take that replaces the earlier one when it is complete.
"""

from __future__ import annotations

import shutil
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_plasticity.capture.manifest import (
    Shard,
    StatisticsFile,
    append_complete,
    append_shard,
    append_statistics,
    begin_manifest,
    identity_digest,
)
from megatron_plasticity.capture.shards import write_tensors
from megatron_plasticity.config.files import fsync_folder
from megatron_plasticity.errors import UserError
from megatron_plasticity.tracking.disk import explain_disk_errors

TENSOR = "activations"
"""Name of the tensor in a shard."""


class ActivationWriter:
    """Writes dumps to a folder without making the caller wait for the disk.

    `add` hands a batch over to a thread and returns. It waits only while more than `memory_bytes` are handed over and not yet on
    disk, so a slow disk slows the caller down instead of filling the memory. What goes wrong in the thread is raised by the
    caller's next call, by `close` at the latest::

        with ActivationWriter(folder, identity) as writer:
            with writer.dump(step=200):
                for tokens in batches:
                    writer.add(recorder.record(tokens))

    Args:
        folder: made if it is not there; one that is there is continued.
        identity: what makes the model this one and no other, as a JSON object (see `model_identity`); a folder that was begun
            with another identity is refused (UserError).
        shard_bytes: a point's shard is written once it holds this much.
        memory_bytes: bound on what is handed over and not yet on disk; a single larger batch goes through alone.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], shard_bytes: int = 128 << 20, memory_bytes: int = 512 << 20
    ) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.memory_bytes = memory_bytes
        with explain_disk_errors(folder):
            manifest = begin_manifest(folder, identity)
            _remove_unfinished(folder, manifest.complete)
        self._takes = manifest.last_takes()
        self._digest = identity_digest(identity)
        self._dump: _Dump | None = None
        """The dump that is open; the caller's."""
        self._gathering: _Dump | None = None
        """The dump of which batches are in memory and not on disk; the thread's."""

        # Shared with the thread, under the condition:
        self._changed = threading.Condition()
        self._queue: deque[_Work] = deque()
        self._unwritten_bytes = 0
        self._unfinished_dumps = 0
        self._caller_waits = False
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="activation-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> ActivationWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # else the first error is the one to show
                raise

    @contextmanager
    def dump(self, step: int) -> Iterator[None]:
        """What is added inside the block is the dump of `step`: complete if the block ends well, dropped if it raises."""
        if self._dump is not None:
            raise RuntimeError(f"the dump of step {self._dump.step} is still open")
        self._takes[step] = take = self._takes.get(step, 0) + 1
        dump = self._dump = _Dump(step, take)
        with self._changed:
            self._unfinished_dumps += 1
        try:
            yield
            if dump.is_empty:
                raise ValueError(f"nothing was added to the dump of step {step}")
        except BaseException:
            dump.abandoned = True
            raise
        finally:
            self._dump = None
            self._hand_over(_Work(dump, 0), checked=not dump.abandoned)

    def add(self, activations: Mapping[str, Tensor]) -> None:
        """Append a batch: {point: tensor}, first axis sequences. Every batch of a dump has the same points and shapes beyond it.

        The tensors must not be changed afterwards; `Recorder.record` returns fresh ones.
        """
        if self._dump is None:
            raise RuntimeError("add activations inside `with writer.dump(step):`")
        batch = {name: tensor.detach().cpu() for name, tensor in activations.items()}
        self._dump.check(batch)
        self._hand_over(_Work(self._dump, _bytes(batch), batch=batch))

    def add_statistics(self, point: str, tensors: Mapping[str, Tensor]) -> None:
        """Put the statistics of a point (`StreamingStatistics.tensors`) into the dump, once."""
        if self._dump is None:
            raise RuntimeError("add statistics inside `with writer.dump(step):`")
        if point in self._dump.with_statistics:
            raise ValueError(f"the dump of step {self._dump.step} has statistics of {point!r} already")
        self._dump.with_statistics.add(point)
        self._hand_over(_Work(self._dump, _bytes(tensors), statistics=(point, tensors)))

    def flush(self) -> None:
        """Wait until every dump that has ended is on disk; call it before a checkpoint says that its step is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._unfinished_dumps == (self._dump is not None))
        self._raise_error()

    def close(self) -> None:
        """Finish the dumps that have ended, stop the thread, and raise what went wrong in it. Twice is fine."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._raise_error()

    def _hand_over(self, work: _Work, checked: bool = True) -> None:
        def fits() -> bool:
            return self._error is not None or not self._unwritten_bytes or self._unwritten_bytes + work.size <= self.memory_bytes

        with self._changed:
            if self._closing:
                raise RuntimeError("the activation writer is closed")
            self._caller_waits = not fits()
            self._changed.notify_all()
            self._changed.wait_for(fits)
            self._caller_waits = False
            if self._error is None:
                self._unwritten_bytes += work.size
                self._queue.append(work)
                self._changed.notify_all()
        if checked:
            self._raise_error()

    def _raise_error(self) -> None:
        if self._error is None:
            return
        if isinstance(self._error, UserError):
            raise UserError(str(self._error)) from self._error
        raise RuntimeError(f"writing activations to {self.folder} failed: {self._error}") from self._error

    # What follows runs in the thread.

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or self._closing or (self._caller_waits and self._gathering))
                    work = self._queue.popleft() if self._queue else None
                    if work is None and self._closing:
                        return
                with explain_disk_errors(self.folder):
                    if work is not None:
                        self._take_in(work)
                    elif self._gathering is not None:  # the caller waits for memory, and no shard is full: write the fullest
                        dump = self._gathering
                        self._write(dump, max(dump.gathered, key=dump.gathered_bytes))
        except BaseException as error:
            with self._changed:
                self._error = error
                self._queue.clear()
                self._changed.notify_all()

    def _take_in(self, work: _Work) -> None:
        dump = work.dump
        if work.is_end:
            self._finish(dump)
        elif dump.abandoned:
            self._release(work.size)
        elif work.statistics is not None:
            point, tensors = work.statistics
            path = dump.folder(self.folder) / f"{point}-statistics.safetensors"
            write_tensors(path, {name: [tensor] for name, tensor in tensors.items()}, self._metadata(dump, point))
            append_statistics(self.folder, StatisticsFile(dump.step, dump.take, point, self._relative(path)))
            self._release(work.size)
        else:
            for point, tensor in work.batch.items():
                dump.gathered.setdefault(point, []).append(tensor)
                if dump.gathered_bytes(point) >= self.shard_bytes:
                    self._write(dump, point)
            self._gathering = dump if dump.gathered else None

    def _finish(self, dump: _Dump) -> None:
        self._gathering = None
        if dump.abandoned:
            self._release(sum(map(dump.gathered_bytes, dump.gathered)))
            dump.gathered.clear()
            shutil.rmtree(dump.folder(self.folder), ignore_errors=True)
        else:
            for point in list(dump.gathered):
                self._write(dump, point)
            take = dump.folder(self.folder)
            for folder in (take, take.parent, self.folder):  # the names of the files, and of the folders themselves
                fsync_folder(folder)
            append_complete(self.folder, dump.step, dump.take)
            _remove_other_takes(self.folder, dump.step, dump.take)
        with self._changed:
            self._unfinished_dumps -= 1
            self._changed.notify_all()

    def _write(self, dump: _Dump, point: str) -> None:
        size = dump.gathered_bytes(point)
        pieces = dump.gathered.pop(point)
        shape = (sum(map(len, pieces)), *pieces[0].shape[1:])
        dtype = str(pieces[0].dtype).removeprefix("torch.")
        first_row, number = dump.written.get(point, (0, 0))
        last_row = first_row + shape[0]
        path = dump.folder(self.folder) / f"{point}-{number:05d}.safetensors"
        write_tensors(path, {TENSOR: pieces}, self._metadata(dump, point))
        append_shard(self.folder, Shard(dump.step, dump.take, point, self._relative(path), first_row, last_row, shape, dtype))
        dump.written[point] = (last_row, number + 1)
        if not dump.gathered:
            self._gathering = None
        del pieces
        self._release(size)

    def _metadata(self, dump: _Dump, point: str) -> dict[str, str]:
        """What a file says of itself, so that one from another folder is noticed."""
        return {"model": self._digest, "point": point, "step": str(dump.step)}

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _release(self, size: int) -> None:
        with self._changed:
            self._unwritten_bytes -= size
            self._changed.notify_all()


@dataclass
class _Dump:
    """One take while it is being written."""

    step: int
    take: int
    layout: dict[str, tuple[torch.Size, torch.dtype]] = field(default_factory=dict)
    """Point → shape of one sequence's activations and number format; what every batch must have. The caller's."""
    with_statistics: set[str] = field(default_factory=set)
    """Points of which there are statistics. The caller's."""
    abandoned: bool = False
    gathered: dict[str, list[Tensor]] = field(default_factory=dict)
    """Point → batches that are not on disk. The thread's."""
    written: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Point → rows and shards that are on disk. The thread's."""

    @property
    def is_empty(self) -> bool:
        return not (self.layout or self.with_statistics)

    def folder(self, root: Path) -> Path:
        return root / f"step-{self.step}" / f"take-{self.take}"

    def gathered_bytes(self, point: str) -> int:
        return sum(tensor.nbytes for tensor in self.gathered[point])

    def check(self, batch: Mapping[str, Tensor]) -> None:
        layout = {point: (tensor.shape[1:], tensor.dtype) for point, tensor in batch.items()}
        rows = {tensor.shape[0] for tensor in batch.values()}
        if not batch or len(rows) != 1:
            raise ValueError(f"a batch needs one or more points with the same number of sequences, got {sorted(rows)}")
        if self.layout and layout != self.layout:
            raise ValueError(f"batches of the dump of step {self.step} differ in their points, shapes or number formats")
        self.layout = layout


@dataclass(frozen=True)
class _Work:
    """For the thread: a batch of a dump, or the statistics of a point, or with neither the end of the dump."""

    dump: _Dump
    size: int
    batch: Mapping[str, Tensor] = field(default_factory=dict)
    statistics: tuple[str, Mapping[str, Tensor]] | None = None

    @property
    def is_end(self) -> bool:
        return not self.batch and self.statistics is None


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _remove_unfinished(folder: Path, complete: Mapping[int, int]) -> None:
    """Remove what a kill left behind: takes that were begun only, and takes that a later one has replaced."""
    for step_folder in folder.glob("step-*"):
        number = step_folder.name.removeprefix("step-")
        if number.isdecimal():
            _remove_other_takes(folder, int(number), complete.get(int(number)))
            if not any(step_folder.iterdir()):
                step_folder.rmdir()


def _remove_other_takes(folder: Path, step: int, kept: int | None) -> None:
    for take in (folder / f"step-{step}").glob("take-*"):
        if take.name != f"take-{kept}":
            shutil.rmtree(take)
