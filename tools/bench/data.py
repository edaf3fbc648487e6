"""How fast text becomes tokens and tokens become batches, beside the least that any such program has to do, in one run.

    python tools/bench/data.py [--megabytes 20] [--tokenizer FILE]

Every pair does the same work on the same data, turn by turn, and the best of several turns counts, so that other work on the
machine hits both alike. Text is that of the Python installation, or what `--text` names.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from command import multiple_of, parser, run, verdict

from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.order import SampleOrder
from megatron_plasticity.data.parts import write_part
from megatron_plasticity.data.token_store import TokenStore, TokenStoreWriter, token_dtype
from megatron_plasticity.data.tokenizer import Tokenizer, train_byte_bpe
from megatron_plasticity.errors import UserError

SEQUENCE_LENGTH = 2048
TURNS = 5
DOCUMENT_TOKENS = 1000


@dataclass(frozen=True)
class Side:
    """One of the two that are compared."""

    name: str
    work: Callable[[], object]


def main() -> int:
    """Run all comparisons and print their ratios; 1 if a target was missed."""
    reader = parser(__doc__)
    reader.add_argument("--megabytes", type=_megabytes, default=20.0, help="text to tokenize [20]")
    reader.add_argument(
        "--tokens",
        type=multiple_of(DOCUMENT_TOKENS),
        default=50_000_000,
        help="tokens to write and read, in thousands [50000000]",
    )
    reader.add_argument("--tokenizer", type=Path, help="tokenizer.json [a byte-level BPE trained on the text]")
    reader.add_argument("--text", nargs="+", type=Path, help="text files [the standard library's source]")
    arguments = reader.parse_args()
    if arguments.tokens <= SEQUENCE_LENGTH:
        reader.error(f"--tokens {arguments.tokens}: expected more than the {SEQUENCE_LENGTH} of a sequence")
    for option, paths in (("--tokenizer", [arguments.tokenizer]), ("--text", arguments.text or [])):
        missing = [str(path) for path in paths if path is not None and not path.is_file()]
        if missing:
            reader.error(f"{option} {' '.join(missing)}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        good = [
            tokenizing(arguments.megabytes, arguments.tokenizer, arguments.text, Path(folder)),
            writing(arguments.tokens, Path(folder)),
            reading(Path(folder)),
        ]
    return 0 if all(good) else 1


def _megabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, not {text!r}")
    return value


def tokenizing(megabytes: float, tokenizer_path: Path | None, paths: list[Path] | None, folder: Path) -> bool:
    """A worker's whole way from text to a part on disk, against `encode_batch` alone, which forgets what it has made."""
    texts, size = _texts(megabytes, paths)
    tokenizer = Tokenizer.load(tokenizer_path) if tokenizer_path else train_byte_bpe(texts[: len(texts) // 10], 8_000)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in a worker: one core

    def bare() -> None:
        for start in range(0, len(texts), 512):
            tokenizer._tokenizer.encode_batch(texts[start : start + 512], add_special_tokens=False)

    def ours() -> None:
        for _ in write_part(folder / f"part-{time.monotonic_ns()}", texts, tokenizer, 0.001):
            pass

    return compare("tokenizing", size / 1e6, "MB/s", Side("encode_batch", bare), Side("write_part", ours), 0.9)


def writing(tokens: int, folder: Path) -> bool:
    """A store with its index, made safe on disk, against a numpy memmap that is flushed."""
    ids = np.random.default_rng(0).integers(0, 32_000, tokens, dtype=token_dtype(32_000))
    lengths = np.full(tokens // DOCUMENT_TOKENS, DOCUMENT_TOKENS, dtype="<i4")
    pieces = range(0, len(lengths), 8192)

    def tokens_of(first: int) -> slice:
        return slice(first * DOCUMENT_TOKENS, (first + 8192) * DOCUMENT_TOKENS)

    def bare() -> None:
        raw = np.memmap(folder / "raw.bin", dtype=ids.dtype, mode="w+", shape=(tokens,))
        for first in pieces:
            raw[tokens_of(first)] = ids[tokens_of(first)]
        raw.flush()

    def ours() -> None:
        with TokenStoreWriter(folder / "store", 32_000) as writer:
            for first in pieces:
                writer.add_documents(ids[tokens_of(first)], lengths[first : first + 8192])

    return compare("writing", tokens / 1e6, "M tokens/s", Side("numpy memmap", bare), Side("TokenStoreWriter", ours), 0.8)


def reading(folder: Path) -> bool:
    """Shuffled blocks as int64 against slices of a memmap whose offsets are known; and against litdata.

    Ours is what a training step does: the order of a global batch of 512, read in micro-batches of 32.
    """
    length = SEQUENCE_LENGTH + 1
    blocks = BlockReader(TokenStore(folder / "store"), SEQUENCE_LENGTH)
    order = SampleOrder(len(blocks), 42)
    offsets = [block * length for block in order.blocks(0, len(blocks)).tolist()]
    stream = np.memmap(folder / "store.bin", dtype="<u2", mode="r").view(np.ndarray)  # memmap's own slices are slow

    def bare() -> None:
        for offset in offsets:
            stream[offset : offset + length].astype(np.int64)

    def ours() -> None:
        for start in range(0, len(blocks), 512):
            chosen = order.blocks(start, min(start + 512, len(blocks)))
            for first in range(0, len(chosen), 32):
                blocks.tokens(chosen[first : first + 32])

    good = compare("reading", len(blocks), "blocks/s", Side("numpy memmap", bare), Side("BlockReader", ours), 0.8)
    if importlib.util.find_spec("litdata") is None:
        print("reading: litdata is not installed, so there is nothing to say about its TokensLoader")
        return good
    litdata = Side("litdata", _litdata(folder, blocks))
    return compare("reading", len(blocks), "blocks/s", litdata, Side("BlockReader", ours), 1.0) and good


def compare(what: str, amount: float, unit: str, minimum: Side, own: Side, target: float) -> bool:
    """Take turns and print both rates and their ratio; whether it is the target or more."""
    best = dict.fromkeys((minimum.name, own.name), float("inf"))
    for _ in range(TURNS):
        for side in (minimum, own):
            begun = time.perf_counter()
            side.work()
            best[side.name] = min(best[side.name], time.perf_counter() - begun)
    ratio = best[minimum.name] / best[own.name]
    rates = ", ".join(f"{name} {amount / seconds:,.1f}" for name, seconds in best.items())
    print(f"{what}: {rates} {unit}; ratio {ratio:.2f}, {verdict(ratio >= target, f'at least {target:g}')}", flush=True)
    return ratio >= target


def _litdata(folder: Path, blocks: BlockReader) -> Callable[[], object]:
    """litdata's own format of the same tokens, read in its own shuffled order."""
    from litdata import StreamingDataset, TokensLoader  # pyright: ignore[reportMissingImports]
    from litdata.streaming.writer import BinaryWriter  # pyright: ignore[reportMissingImports]

    length = blocks.sequence_length + 1
    target = folder / "litdata"
    target.mkdir()
    loader = TokensLoader(block_size=length)
    writer = BinaryWriter(str(target), chunk_bytes=64_000_000, item_loader=loader)
    import torch

    for index in range(len(blocks)):
        writer[index] = torch.from_numpy(blocks.read(index))
    writer.done()
    writer.merge()

    def read() -> None:
        for _ in StreamingDataset(str(target), item_loader=TokensLoader(block_size=length), shuffle=True):
            pass

    return read


def _texts(megabytes: float, paths: list[Path] | None) -> tuple[list[str], int]:
    """Documents of some thousand characters, as pages of the web have, up to so many megabytes."""
    files = paths or sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))
    texts: list[str] = []
    size = 0
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        for start in range(0, len(text), 4_000):
            if size >= megabytes * 1e6:
                return texts, size
            texts.append(text[start : start + 4_000])
            size += len(texts[-1].encode())
    if not texts:
        raise UserError("no text: name files that hold some by --text")
    return texts, size


if __name__ == "__main__":
    run(main)
