"""Prepare a corpus of real text undisturbed, and again with kill -9 on the way, and compare every byte.

    python tools/check_restart.py --megabytes 100

The text is what --text names and the Python source of this environment, dealt into files of every form that `data prepare` reads.
The tokenizer is the quickstart's kind, trained on a part of it, or what --tokenizer names. Killed are all processes of the
command at once, as a power cut would; each attempt has another number of workers. Exit code: 0 if all files are equal, 1 if not.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

FORMS = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".json", ".txt.gz")
FILES_PER_FORM = 4


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100.0, help="text to take [100]")
    parser.add_argument("--kills", type=int, default=2, help="attempts that are killed [2]")
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="text files to take first")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or SentencePiece .model [trained on the text]")
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="check-restart-") as temporary:
        folder = Path(temporary)
        size = write_sources(parsed.text, parsed.megabytes, folder)
        config = write_config(folder, parsed.tokenizer)
        began = time.monotonic()
        attempt(config, folder / "undisturbed", workers=2, seconds=None)
        whole = time.monotonic() - began
        print(f"undisturbed, 2 workers: {size / 1e6:.0f} MB in {whole:.0f} s")
        for number in range(parsed.kills):
            workers = 1 + number % 3
            parts = attempt(config, folder / "killed", workers, seconds=whole * (number + 1) / (parsed.kills + 1.5))
            print(f"killed with {workers} worker{'s' if workers > 1 else ''}: {parts} finished shards are kept")
        attempt(config, folder / "killed", workers=3, seconds=None)
        print("finished with 3 workers")
        return compare(folder / "undisturbed", folder / "killed")


def write_sources(first: list[Path], megabytes: float, folder: Path) -> int:
    """Deal documents out to files of every form; returns the bytes of text."""
    import pyarrow
    import pyarrow.parquet

    (folder / "text").mkdir()
    dealt: list[list[str]] = [[] for _ in range(len(FORMS) * FILES_PER_FORM)]
    size = 0
    for number, text in enumerate(_documents(first)):
        dealt[number % len(dealt)].append(text)
        size += len(text.encode())
        if size >= megabytes * 1e6:
            break
    for number, texts in enumerate(dealt):
        form = FORMS[number % len(FORMS)]
        path = folder / "text" / f"{form.strip('.').replace('.', '-')}-{number}{form}"
        if form == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": texts, "other": list(range(len(texts)))}), path, row_group_size=64)
            continue
        lines = texts if ".txt" in form else [json.dumps({"text": text, "length": len(text)}) for text in texts]
        data = ("\n".join(lines) + "\n").encode()
        path.write_bytes(gzip.compress(data, compresslevel=1) if form.endswith(".gz") else data)
    return size


def _documents(first: list[Path]) -> Iterator[str]:
    roots = [Path(os.__file__).parent, *(Path(path) for path in sys.path if path.endswith("site-packages"))]
    for path in [*first, *(path for root in roots for path in sorted(root.rglob("*.py")))]:
        text = path.read_bytes().decode("utf-8", errors="ignore").strip()
        if text:
            yield text


def write_config(folder: Path, tokenizer: Path | None) -> Path:
    sources = [
        {
            "name": form.strip(".").replace(".", "-"),
            "files": [str(folder / "text" / f"{form.strip('.').replace('.', '-')}-*{form}")],
        }
        for form in FORMS
    ]
    if tokenizer is None:
        tokenizer = folder / "tokenizer.json"
        _train_tokenizer(folder, tokenizer)
    config = {
        "name": "restart",
        "sources": sources,
        "tokenizer": {"load": str(tokenizer), "vocab_size": _vocabulary(tokenizer)},
        "drop_duplicates": True,
        "held_out_fraction": 0.05,
        "shard_megabytes": 4,
    }
    path = folder / "restart.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def _train_tokenizer(folder: Path, path: Path) -> None:
    from megatron_plasticity.data.tokenizer import train_byte_bpe

    texts = [text.read_text(encoding="utf-8")[:500_000] for text in sorted((folder / "text").glob("*.txt"))]
    train_byte_bpe(texts, 4096).save(path)


def _vocabulary(tokenizer: Path) -> int:
    if tokenizer.suffix == ".model":
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).get_piece_size()
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer)).get_vocab_size()


def attempt(config: Path, output: Path, workers: int, seconds: float | None) -> int:
    """Run `data prepare` to its end, or kill it and all its workers after some seconds; returns the number of finished shards."""
    command = [sys.executable, "-m", "megatron_plasticity", "data", "prepare", str(config)]
    command += [f"output={output}", f"workers={workers}"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    else:
        if process.returncode or seconds is not None:
            sys.exit(errors if process.returncode else "it was done before it could be killed; take more --megabytes")
    return sum(1 for _ in output.glob(".*.parts/*/part.json"))


def compare(one: Path, other: Path) -> int:
    folders = [next(path for path in output.iterdir() if path.is_dir() and not path.is_symlink()) for output in (one, other)]
    names = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in folders]
    differing = sorted(str(name) for name in names[0] ^ names[1])
    differing += [str(n) for n in sorted(names[0] & names[1]) if (folders[0] / n).read_bytes() != (folders[1] / n).read_bytes()]
    if differing:
        print(f"NOT equal: {', '.join(differing)}")
        return 1
    print(f"all {len(names[0])} files are equal byte for byte")
    return 0


if __name__ == "__main__":
    sys.exit(main())
