"""A corpus from sources, in three steps: plan the shards, tokenize each into a part, put the parts together.

All of it happens in `<output>/.<name>-<hash>.parts/`, beside the place of the finished corpus:

    made-for           name of the folder of the corpus
    tokenizer.json     what everything is encoded with
    shards.json        the files of every shard, with their sizes; hub files with the commit
    SSS-NNNNNN/        the part of shard N of source S (`data/parts.py`)
    corpus/            the corpus while it is put together

A command that is killed, at any point and by any means, is run again: it keeps the parts that are finished, and its corpus is the
same to the byte. The folder disappears when the corpus is in its place. Its hash covers only what decides the parts, so that a
corpus that is cut or weighted differently, prepared after a failure, finds them too.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_plasticity.config.data import CorpusConfig
from megatron_plasticity.config.files import fsync_folder, write_json_atomic
from megatron_plasticity.config.hashing import HASH_DIGITS, RESULTS_VERSION, canonical
from megatron_plasticity.data.assemble import SourceParts, assemble
from megatron_plasticity.data.manifest import TOKENIZER_FILE, TRAIN, write_manifest
from megatron_plasticity.data.parts import PART_FORMAT, Part
from megatron_plasticity.data.python_text import Progress
from megatron_plasticity.data.sources import SourceFile, source_files
from megatron_plasticity.data.token_store import token_dtype
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.data.tokenizer_source import load_tokenizer
from megatron_plasticity.data.workers import Shard, Workers, worker_processes
from megatron_plasticity.errors import UserError

_SHARDS_FILE = "shards.json"
_MADE_FOR_FILE = "made-for"
READ_FROM_FILE = "read-from.json"
"""In a corpus folder: the local files that it was made from, with size and time of change. Not among the files that the manifest
lists, since it says where and when, not what."""
_SECONDS_BETWEEN_UPDATES = 0.5


def build_from_sources(config: CorpusConfig, folder: Path, progress: Progress | None) -> list[str]:
    """Make the prepared corpus at `folder`; returns notes that are worth a warning.

    Raises UserError when the tokenizer or a source cannot be used, before any text is read; when a file turns out to be damaged;
    and when the disk is full. Finished shards are kept in all cases.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    workplace = _workplace(config, tokenizer.sha256)
    try:
        with _held(workplace):
            shutil.rmtree(_trash(workplace), ignore_errors=True)  # of a command that was killed at its very end
            if folder.exists():  # made by another process while this one waited to hold the folder
                return []
            plans = _plan(config, workplace)
            (workplace / _MADE_FOR_FILE).write_text(folder.name, encoding="utf-8")
            tokenizer.save(workplace / TOKENIZER_FILE)
            _tokenize(config, plans, workplace, progress)
            return _finish(config, plans, tokenizer, workplace, folder, progress)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write the corpus: {error}; nothing was left half-written. Finished shards are kept in "
            f"{workplace}: run the same command again to go on"
        ) from error


def check_sources_unchanged(config: CorpusConfig, folder: Path, tokenizer_sha256: str) -> None:
    """Raise UserError when the local files that the corpus at `folder` was made from are now others, or its local tokenizer.

    Files that are gone are no reason: the corpus is what is left of them.
    """
    assert config.tokenizer.load is not None, "the config sees to it"
    local = Path(config.tokenizer.load).expanduser().exists()
    path = folder / READ_FROM_FILE
    changes = []
    if local and load_tokenizer(config.tokenizer).sha256 != tokenizer_sha256:
        changes.append(f"the tokenizer {config.tokenizer.load}")
    if path.is_file():
        for source in config.sources:
            before = {file["path"]: file for file in json.loads(path.read_text(encoding="utf-8")).get(source.name, [])}
            try:
                found = source_files(source, config.seed) if source.files else []
            except UserError:
                continue
            changes += [file.path for file in found if asdict(file) != before.get(file.path)]
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise UserError(
            f"{folder}: made before {', '.join(changes[:3])}{more} changed or appeared. Delete the folder to make the corpus "
            f"anew, or give the new one another name; if the text is the same after all, delete {path}"
        )


def clear_leftovers(config: CorpusConfig, folder: Path, tokenizer_sha256: str) -> None:
    """Remove what a command that was killed after it had put the corpus in its place has left."""
    workplace = _workplace(config, tokenizer_sha256)
    shutil.rmtree(_trash(workplace), ignore_errors=True)
    made_for = workplace / _MADE_FOR_FILE
    # Another corpus of the same parts may be under way there. A folder that cannot be written is no reason to fail, either.
    if made_for.is_file() and made_for.read_text(encoding="utf-8") == folder.name:
        with suppress(OSError, UserError), _held(workplace):
            _discard(workplace)


def _discard(workplace: Path) -> None:
    """Renamed first: half of a workplace would be taken for a whole one by the next command."""
    trash = _trash(workplace)
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(workplace, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _trash(workplace: Path) -> Path:
    return workplace.with_name(f"{workplace.name}.trash")


def _workplace(config: CorpusConfig, tokenizer_sha256: str) -> Path:
    identity = {
        "version": [RESULTS_VERSION["corpus"], PART_FORMAT],
        "sources": [{k: v for k, v in canonical(source).items() if k != "weight"} for source in config.sources],
        "tokenizer": tokenizer_sha256,
        "held_out_fraction": config.held_out_fraction,
        "seed": config.seed,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:HASH_DIGITS]
    return config.output / f".{config.name}-{digest}.parts"


@contextmanager
def _held(workplace: Path) -> Iterator[None]:
    """One process at a time; the kernel gives the lock back however its holder ends."""
    workplace.mkdir(parents=True, exist_ok=True)
    with (workplace / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{workplace}: another process is preparing this corpus; wait for it to end, or stop it first"
            ) from None
        try:
            yield
        finally:
            if workplace.is_dir() and [path.name for path in workplace.iterdir()] == ["lock"]:
                shutil.rmtree(workplace)  # nothing was begun


# --- shards ---


@dataclass
class _Plan:
    """The shards of one source, and how many of its training tokens are wanted and done."""

    files: list[SourceFile]
    files_of_shard: list[int]
    shards: list[Shard]
    quota: float
    """Training tokens after which no more shards are needed."""
    done: dict[int, int] = field(default_factory=dict)
    """Finished shard → its training tokens."""
    running: set[int] = field(default_factory=set)

    @property
    def bytes_done(self) -> int:
        return sum(self.shards[index].bytes for index in self.done)

    @property
    def tokens_done(self) -> int:
        return sum(self.done.values())

    @property
    def finished_from_the_first(self) -> int:
        """Number of shards before the first that is not finished."""
        return next((index for index in range(len(self.shards)) if index not in self.done), len(self.shards))

    @property
    def is_satisfied(self) -> bool:
        """Whether the finished shards, taken from the first one on, hold all that is wanted."""
        finished = self.finished_from_the_first
        return finished == len(self.shards) or sum(self.done[index] for index in range(finished)) >= self.quota

    def next_shard(self) -> int | None:
        """The shard to start next; None if those that are finished and running will do."""
        unstarted = next((i for i in range(len(self.shards)) if i not in self.done and i not in self.running), None)
        per_byte = self.tokens_done / max(1, self.bytes_done)
        expected = self.tokens_done + per_byte * sum(self.shards[index].bytes for index in self.running)
        # Before the first shard is done nothing is known, and every worker gets one. One too many does no harm: it is not used.
        return None if self.is_satisfied or (self.done and expected >= self.quota) else unstarted


def _plan(config: CorpusConfig, workplace: Path) -> list[_Plan]:
    """The shards, from `shards.json` if an earlier attempt has left one, since a data set may have moved on."""
    path = workplace / _SHARDS_FILE
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        listed = [[SourceFile(**file) for file in source["files"]] for source in stored]
        for source, files in zip(config.sources, listed, strict=True):
            if source.files and source_files(source, config.seed) != files:
                raise UserError(
                    f"sources: the files of {source.name!r} have changed since this corpus was begun; put the old ones back, or "
                    f"delete {workplace} to begin anew"
                )
        sizes = [source["files_of_shard"] for source in stored]
    else:
        # Without the list nothing says which files a part holds.
        for leftover in workplace.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
        listed = [source_files(source, config.seed) for source in config.sources]
        sizes = [_grouped(files, config.shard_megabytes * 1e6) for files in listed]
        tree = [
            {"files_of_shard": groups, "files": [asdict(file) for file in files]}
            for files, groups in zip(listed, sizes, strict=True)
        ]
        write_json_atomic(path, tree)
    weights = [source.weight or 1.0 for source in config.sources]
    plans = []
    for number, source in enumerate(config.sources):
        files, shards, first = listed[number], [], 0
        for index, count in enumerate(sizes[number]):
            group = files[first : first + count]
            first += count
            folder = workplace / f"{number:03d}-{index:06d}"
            shards.append(Shard(folder, source, tuple(file.path for file in group), sum(file.bytes for file in group)))
        # Which documents are copies shows only when all have been read.
        limited = config.train_tokens is not None and not config.drop_duplicates
        quota = config.train_tokens * weights[number] / sum(weights) if limited and config.train_tokens else float("inf")
        plans.append(_Plan(files, sizes[number], shards, quota))
    return plans


def _grouped(files: Sequence[SourceFile], most: float) -> list[int]:
    """Number of files of each shard: neighbours up to `most` bytes together, larger ones alone."""
    groups: list[int] = []
    size = 0
    for file in files:
        if groups and size + file.bytes <= most:
            groups[-1] += 1
            size += file.bytes
        else:
            groups.append(1)
            size = file.bytes
    return groups


# --- parts ---


def _tokenize(config: CorpusConfig, plans: list[_Plan], workplace: Path, progress: Progress | None) -> None:
    """Make the parts that are missing."""
    dtype = token_dtype(Tokenizer.load(workplace / TOKENIZER_FILE).vocab_size)
    for plan in plans:
        for index, shard in enumerate(plan.shards):
            if shard.folder.is_dir():
                plan.done[index] = Part(shard.folder, dtype).info.splits[TRAIN].tokens
    if all(plan.is_satisfied for plan in plans):
        return
    missing = sum(len(plan.shards) - len(plan.done) for plan in plans)
    count = min(config.workers or len(os.sched_getaffinity(0)), missing)
    with worker_processes(count, workplace / TOKENIZER_FILE, config.held_out_fraction) as workers:
        advance = _Advance(plans, workers, progress)
        running: dict[concurrent.futures.Future[None], tuple[_Plan, int]] = {}
        while True:
            while len(running) < count and (task := _next(plans)) is not None:
                plan, index = task
                plan.running.add(index)
                running[workers.submit(plan.shards[index])] = task
            if not running:
                return
            finished, _ = concurrent.futures.wait(running, _SECONDS_BETWEEN_UPDATES, concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                plan, index = running.pop(future)
                future.result()  # raises what the worker raised
                plan.running.remove(index)
                plan.done[index] = Part(plan.shards[index].folder, dtype).info.splits[TRAIN].tokens
            advance.show()


def _next(plans: Sequence[_Plan]) -> tuple[_Plan, int] | None:
    """A shard of the source that is furthest behind."""
    open_plans = [(plan, index) for plan in plans if (index := plan.next_shard()) is not None]

    def share_begun(task: tuple[_Plan, int]) -> float:
        return (len(task[0].done) + len(task[0].running)) / len(task[0].shards)

    return min(open_plans, key=share_begun, default=None)


class _Advance:
    """Tells how far the tokenizing is, in megabytes of files, or in tokens where a number of them is wanted.

    Of shards that are under way only the bytes of text are known; they count at the rate of those that are finished.
    """

    def __init__(self, plans: Sequence[_Plan], workers: Workers, progress: Progress | None) -> None:
        self._plans, self._workers, self._progress = plans, workers, progress
        self._in_tokens = all(plan.quota != float("inf") for plan in plans)
        megabytes = sum(shard.bytes for plan in plans for shard in plan.shards) / 1e6
        self._total = sum(plan.quota for plan in plans) if self._in_tokens else megabytes
        self._before = self._finished()
        self._shown = 0.0
        self.show()

    def _finished(self) -> float:
        if self._in_tokens:
            return sum(min(plan.tokens_done, plan.quota) for plan in self._plans)
        return sum(plan.bytes_done for plan in self._plans) / 1e6

    def show(self) -> None:
        if self._progress is None:
            return
        text = self._workers.done_bytes
        finished = self._finished()
        guess = 0.25 if self._in_tokens else 1e-6  # units for each byte of text, until a shard is done
        rate = (finished - self._before) / text if finished > self._before else guess
        estimate = max(finished, min(self._before + rate * text, self._total * 0.999))
        self._shown = min(self._total, max(self._shown, estimate))
        unit = "tokens" if self._in_tokens else "MB"
        self._progress.update(self._shown, self._total, unit, stage="tokenizing", text=f"{text / 1e6:,.1f} MB")


# --- the corpus ---


def _finish(
    config: CorpusConfig, plans: list[_Plan], tokenizer: Tokenizer, workplace: Path, folder: Path, progress: Progress | None
) -> list[str]:
    corpus = workplace / "corpus"
    shutil.rmtree(corpus, ignore_errors=True)  # of an attempt that was killed while writing it
    corpus.mkdir()
    dtype = token_dtype(tokenizer.vocab_size)
    sources = [
        SourceParts(
            source,
            plan.files,
            [Part(shard.folder, dtype) for shard in plan.shards[: plan.finished_from_the_first]],
            plan.files_of_shard,
        )
        for source, plan in zip(config.sources, plans, strict=True)
    ]
    tokenizer.save(corpus / TOKENIZER_FILE)
    described, splits, notes = assemble(corpus, config, sources, tokenizer.vocab_size, progress)
    licences = "; ".join(f"{source.name}: {source.licence}" for source in config.sources)
    if progress is not None:
        progress.update(0, 1, "corpus", stage="hashing")
    write_manifest(
        corpus, config, tokenizer, described, splits, notes, f"The text is under the licences of its sources: {licences}."
    )
    if progress is not None:
        progress.update(1, 1, "corpus", stage="hashing")
    read_from = {
        source.name: [asdict(file) for file in plan.files]
        for source, plan in zip(config.sources, plans, strict=True)
        if source.files
    }
    write_json_atomic(corpus / READ_FROM_FILE, read_from)
    fsync_folder(corpus)
    os.replace(corpus, folder)
    fsync_folder(folder.parent)
    _discard(workplace)
    return notes
