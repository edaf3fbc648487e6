"""The split: a share of the documents, decided by each document alone."""

from __future__ import annotations

from megatron_plasticity.data.documents import document_digest, is_held_out

TEXTS = [f"document {number}" for number in range(20_000)]


def test_the_share_is_kept() -> None:
    share = sum(is_held_out(text, 0.03) for text in TEXTS) / len(TEXTS)
    assert abs(share - 0.03) < 0.005


def test_a_larger_share_only_adds() -> None:
    small = {text for text in TEXTS if is_held_out(text, 0.03)}
    large = {text for text in TEXTS if is_held_out(text, 0.1)}
    assert small < large


def test_the_side_of_a_document_stays() -> None:
    # A change here moves documents that models were trained on into the held-out split.
    assert [text for text in TEXTS[:100] if is_held_out(text, 0.03)] == [
        "document 21",
        "document 22",
        "document 55",
        "document 59",
        "document 80",
        "document 94",
    ]
    assert document_digest("naïve \ud800").hex()[:8] == "f02a6e48"
