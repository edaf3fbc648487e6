"""Prepare a corpus: text in, token stores, tokenizer and manifest out, all or nothing.

A prepared folder holds `train.bin/.idx`, `held_out.bin/.idx`, `tokenizer.json` and `manifest.json`. It appears under its name
when everything in it is complete; its manifest says what went in and pins down every file.
"""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_plasticity.config.data import CorpusConfig
from megatron_plasticity.config.files import atomic_folder, point_link_at
from megatron_plasticity.config.hashing import config_hash
from megatron_plasticity.data.embedded import EmbeddedCorpus
from megatron_plasticity.data.manifest import HELD_OUT, MANIFEST_FILE, TOKENIZER_FILE, TRAIN, advice, read_manifest
from megatron_plasticity.data.python_text import Progress
from megatron_plasticity.errors import UserError

__all__ = ["HELD_OUT", "MANIFEST_FILE", "TOKENIZER_FILE", "TRAIN", "prepare", "prepared_folder", "read_manifest"]

_log = logging.getLogger(__name__)


def prepared_folder(config: CorpusConfig) -> Path:
    """Where `prepare` puts the corpus of this config: `<output>/<name>-<hash of what decides the corpus>`."""
    return config.output / f"{config.name}-{config_hash(config)}"


def prepare(config: CorpusConfig, progress: Progress | None = None) -> Path:
    """Build the corpus and return its folder. A corpus that is there already is checked for damage and otherwise left as it is.

    Raises UserError when the folder that is there is damaged or its local sources have changed since, when a source or the
    tokenizer cannot be used, or when there is too little text for two splits.
    """
    folder = prepared_folder(config)
    if folder.exists():
        if not (folder / MANIFEST_FILE).is_file():
            raise UserError(
                f"{folder}: in the way of the corpus, and not one itself (it has no {MANIFEST_FILE}). {advice(folder)}"
            )
        manifest = read_manifest(folder)
        if config.sources:
            from megatron_plasticity.data.build import check_sources_unchanged, clear_leftovers

            clear_leftovers(config, folder, manifest["tokenizer"]["sha256"])
            check_sources_unchanged(config, folder, manifest["tokenizer"]["sha256"])
        _point_name_at(folder, config.name)
        return folder
    try:
        notes = _build(config, folder, progress)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the corpus: {error}; nothing was left half-written") from error
    for note in notes:
        _log.warning("%s", note)
    _point_name_at(folder, config.name)
    return folder


def _build(config: CorpusConfig, folder: Path, progress: Progress | None) -> list[str]:
    """Make the folder; returns what is worth a warning."""
    if config.sources:
        from megatron_plasticity.data.build import build_from_sources  # pyarrow and multiprocessing are not for everyone

        return build_from_sources(config, folder, progress)
    corpus = EmbeddedCorpus(config, progress)
    with atomic_folder(folder) as building:
        corpus.write(building)
    return corpus.notes


def _point_name_at(folder: Path, name: str) -> None:
    """Let `<output>/<name>` lead to the corpus that was prepared last, so that a config can name it without its hash.

    What a run was trained on stays certain: the hash of the manifest enters the run's own.
    """
    if not point_link_at(folder, name):
        _log.warning("%s is in the way of a link to %s; name the corpus by its full folder", folder.parent / name, folder.name)
