"""The manifest of a prepared corpus: what went in, and what pins down every file."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import tokenizers

from megatron_plasticity.config.data import CorpusConfig
from megatron_plasticity.config.files import sha256_file, write_json_atomic
from megatron_plasticity.config.hashing import canonical
from megatron_plasticity.data.token_store import TokenStore
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError

MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
TRAIN = "train"
HELD_OUT = "held_out"
SPLITS = (TRAIN, HELD_OUT)

_FORMAT = 1


def write_manifest(
    folder: Path,
    config: CorpusConfig,
    tokenizer: Tokenizer,
    sources: dict[str, Any],
    splits: dict[str, dict[str, int]],
    notes: list[str],
    licences: str,
) -> None:
    """Hash every file that `folder` holds and write the manifest beside them: the last thing that a corpus gets.

    `sources` tells about each source by name, `splits` the documents, tokens and bytes of text of each split.
    """
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(folder.iterdir())}
    manifest = {
        "format": _FORMAT,
        "sha256": _content_hash(files),
        "name": config.name,
        "config": canonical(config),
        "sources": sources,
        "splits": splits,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
        "files": files,
        "notes": notes,
        "licences": licences,
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
    }
    write_json_atomic(folder / MANIFEST_FILE, manifest)


def read_manifest(folder: Path, full: bool = False) -> dict[str, Any]:
    """The manifest of a prepared folder, after checking that the folder is complete: every file there, of the size recorded.

    `full` also reads every file and compares its hash, and checks the stores' indexes and ids. Raises UserError otherwise.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise UserError(
            f"{folder}: not a prepared corpus (it has no {MANIFEST_FILE}); "
            "make one with `megatron-plasticity data prepare CONFIG`"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files, expected = manifest["files"], manifest["sha256"]
        if manifest["format"] != _FORMAT:
            raise UserError(f"{path}: format {manifest['format']}; this version reads format {_FORMAT}. {advice(folder)}")
        sizes = {name: entry["bytes"] for name, entry in files.items()}
        intact = expected == _content_hash(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged: {type(error).__name__}: {error}. {advice(folder)}") from error
    if not intact:
        raise UserError(f"{path}: damaged: its sha256 is not that of the files it lists. {advice(folder)}")
    for name, size in sizes.items():
        _check_file(folder / name, size, files[name]["sha256"] if full else None)
    if full:
        for split in SPLITS:
            TokenStore(folder / split).check(manifest["tokenizer"]["vocab_size"])
    return manifest


def _check_file(path: Path, size: int, digest: str | None) -> None:
    if not path.is_file():
        raise UserError(f"{path}: missing from the prepared corpus. {advice(path.parent)}")
    if (found := path.stat().st_size) != size:
        raise UserError(f"{path}: damaged: it has {found:,} bytes, the manifest says {size:,}. {advice(path.parent)}")
    if digest is not None and sha256_file(path) != digest:
        raise UserError(f"{path}: damaged: its sha256 is not the manifest's. {advice(path.parent)}")


def advice(folder: Path) -> str:
    """What to do about a folder that cannot be used."""
    return f"Delete {folder} and run `megatron-plasticity data prepare CONFIG` again."


def _content_hash(files: dict[str, Any]) -> str:
    """One hash for what a run can see of the corpus: the names and bytes of its files."""
    lines = [f"{entry['sha256']}  {name}\n" for name, entry in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
