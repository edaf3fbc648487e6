"""Which files of a Python installation may hold text for a corpus, and in which order they are read. No package is imported."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "node_modules"}
    | {"_vendor", "vendor", "vendored", "third_party"}
)
# Hidden folders; and our own code and metadata, with which the corpus would change from version to version.
_SKIPPED_BEGINNINGS = (".", "megatron_plasticity")
_SKIPPED_NAMES = re.compile(
    r"licen[cs]e|copying|notice|authors|requirements|cmakelists|^test_|_pb2\.py$|^(top_level|entry_points|sources)\.txt$",
    re.IGNORECASE,
)
_DOCUMENTATION_SUFFIXES = frozenset({".rst", ".md", ".txt"})
_METADATA_FOLDERS = (".dist-info", ".egg-info")
METADATA_FILES = frozenset({"METADATA", "PKG-INFO"})


@dataclass(frozen=True)
class TextFile:
    """A file that may hold text."""

    path: Path
    name: str
    """Path below its root, with forward slashes: the same on every machine with the same packages."""
    group: str
    """Package, or `python/<module>` for the standard library."""


def installation_roots() -> list[tuple[Path, bool]]:
    """Folders to look in, each with whether it is the standard library; what does not exist is left out."""
    paths = sysconfig.get_paths()
    roots = {Path(paths["stdlib"]).resolve(): True}
    for key in ("purelib", "platlib"):
        roots.setdefault(Path(paths[key]).resolve(), False)
    return [(root, standard) for root, standard in roots.items() if root.is_dir()]


def find_text_files(roots: Iterable[tuple[Path, bool]], seed: int) -> list[TextFile]:
    """All candidate files, in a seeded order that takes one of each package in turn, so that none drowns the others."""
    groups: dict[str, list[TextFile]] = defaultdict(list)
    for root, standard in roots:
        for file in _walk(root, standard):
            groups[file.group].append(file)

    def key(file: TextFile) -> bytes:
        return hashlib.sha256(f"{seed}/{file.name}".encode("utf-8", errors="surrogateescape")).digest()

    ranked = []
    for files in groups.values():
        ranked += [(rank, key(file), file) for rank, file in enumerate(sorted(files, key=key))]
    ranked.sort(key=lambda entry: entry[:2])
    return [file for _, _, file in ranked]


def _walk(root: Path, standard: bool) -> Iterator[TextFile]:
    for folder, folders, names in os.walk(root):  # links are not followed, and folders that cannot be listed are passed over
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_BEGINNINGS))
        above = Path(folder).relative_to(root).parts
        for name in sorted(names):
            parts = (*above, name)
            if _is_candidate(parts):
                yield TextFile(Path(folder, name), "/".join(parts), _group(parts, standard))


def _is_candidate(parts: tuple[str, ...]) -> bool:
    name = parts[-1]
    if any(part.endswith(_METADATA_FOLDERS) for part in parts[:-1]):
        return name in METADATA_FILES
    suffix = PurePath(name).suffix
    return (suffix == ".py" or suffix in _DOCUMENTATION_SUFFIXES) and not _SKIPPED_NAMES.search(name)


def _group(parts: tuple[str, ...], standard: bool) -> str:
    # "numpy-2.4.6.dist-info" belongs to numpy, "typing_extensions.py" to typing_extensions.
    top = parts[0].split("-")[0] if parts[0].endswith(_METADATA_FOLDERS) else PurePath(parts[0]).stem
    return f"python/{top}" if standard else top
