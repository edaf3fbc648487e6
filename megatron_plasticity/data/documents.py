"""A document of a corpus, its identity, and the side of the train/held-out split on which it falls."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    text: str
    source: str
    """Kind of text, such as `python_english`; the manifest counts documents by it."""


def document_digest(text: str) -> bytes:
    """SHA-256 of the text's UTF-8 bytes: two documents are the same if and only if their digests are."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()


def is_held_out(text: str, fraction: float) -> bool:
    """Whether the document belongs to the held-out split of the given share of documents.

    The answer depends on the text alone, so a document keeps its side whatever else the corpus holds, and enlarging `fraction`
    only adds documents to the held-out side.
    """
    return is_held_out_digest(document_digest(text), fraction)


def is_held_out_digest(digest: bytes, fraction: float) -> bool:
    """As `is_held_out`, for a text whose digest is known."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
