from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict

import pytest

from megatron_plasticity.data import labelled_text
from megatron_plasticity.data.labelled_text import label_names, labelled_texts, split_documents


@pytest.mark.parametrize("name", ["topic", "polarity"])
def test_draws_are_balanced_distinct_and_deterministic(name: str) -> None:
    train = labelled_texts(name, "train", 400, seed=0)
    assert train == labelled_texts(name, "train", 400, seed=0)
    assert train != labelled_texts(name, "train", 400, seed=1)
    counts = Counter(item.label for item in train)
    assert set(counts) == set(range(len(label_names(name))))
    assert len(set(counts.values())) == 1
    assert len({item.text for item in train}) == len(train) == 400


@pytest.mark.parametrize("name", ["topic", "polarity"])
def test_train_and_test_share_no_text(name: str) -> None:
    train, test = (labelled_texts(name, split, 1500, seed=0) for split in ("train", "test"))
    assert len(train) >= 400
    assert len(test) >= 200
    assert not {item.text for item in train} & {item.text for item in test}


def test_topic_documents_are_on_one_side() -> None:
    for subject in label_names("topic"):
        train, test = split_documents("train", subject), split_documents("test", subject)
        assert not {document.name for document in train} & {document.name for document in test}
        sizes = [sum(len(document.paragraphs) for document in side) for side in (train, test)]
        assert 0.2 < sizes[1] / sum(sizes) < 0.45


def test_topic_gives_what_there_is() -> None:
    everything = labelled_texts("topic", "test", 10**6, seed=0)
    assert 200 <= len(everything) < 10**6
    assert len(set(Counter(item.label for item in everything).values())) == 1


def test_topic_without_a_standard_library_is_empty(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(labelled_text.sysconfig, "get_path", lambda key: str(tmp_path))
    labelled_text._documents.cache_clear()
    try:
        assert labelled_texts("topic", "train", 100, seed=0) == []
    finally:
        labelled_text._documents.cache_clear()


def test_topic_reads_prose_and_passes_over_broken_files(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    prose = "This module opens a connection to a server and reads the answer of the server from it line by line."
    (tmp_path / "socket.py").write_text(f'"""{prose}\n\nShort.\n\n>>> {"session " * 20}\n"""\n')
    (tmp_path / "ssl.py").write_text(f'"""{prose}"""\ndef broken(:\n')
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {{'if': {prose.replace('server', 'block')!r}}}\n")
    monkeypatch.setattr(labelled_text.sysconfig, "get_path", lambda key: str(tmp_path))
    labelled_text._documents.cache_clear()
    try:
        documents = labelled_text._documents()
    finally:
        labelled_text._documents.cache_clear()
    assert [(d.name, d.paragraphs) for d in documents["internet"]] == [("socket.py", (prose,))]
    assert [d.name for d in documents["language"]] == ["pydoc_data/topics.py#if"]


def test_docstrings_come_level_by_level_from_every_kind_of_block() -> None:
    # Drawn texts, and so published probes, depend on this order.
    module = ast.parse(
        """
'module'
if x:
    def a():
        'a'
        class inner: 'inner'
else:
    async def b(): 'b'
try:
    class c: 'c'
except E:
    def d(): 'd'
else:
    def e(): 'e'
finally:
    def f(): 'f'
match y:
    case 1:
        def g(): 'g'
class last:
    'last'
    def method(self): 'method'
for z in (lambda: 0, [1 for _ in ()]):
    while z:
        with z:
            def h(): 'h'
"""
    )
    expected = [
        ast.get_docstring(node)
        for node in ast.walk(module)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert list(labelled_text._docstrings(module)) == expected
    assert len(expected) == 12


def test_polarity_is_decided_by_the_weightier_opinion() -> None:
    good = {"good", "strong", "fresh", "lovely", "clean", "useful"}
    for item in labelled_texts("polarity", "train", 400, seed=3):
        body = item.text.rpartition(",")[0]
        body = re.sub(r"(^Although .*, )(.*)", r"\2", body)  # what follows a contrast word in front weighs less
        body = re.sub(r"(, although|, even if) .*", "", body)
        body = re.sub(r".*, but ", "", body)
        words = body.split()
        assert ((words[-1] in good) != ("not" in words)) == bool(item.label), item.text


def test_polarity_cannot_be_told_from_any_single_word() -> None:
    """Majority vote per word, the last one included, stays near one half on other texts."""
    train, test = (labelled_texts("polarity", split, 2000, seed=0) for split in ("train", "test"))
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for item in train:
        for word in set(re.findall(r"\w+", item.text)):
            votes[word][item.label] += 1
    for word, counts in votes.items():
        if counts.total() > 100:
            assert abs(counts[1] / counts.total() - 0.5) < 0.15, word
    last = [re.findall(r"\w+", item.text)[-1] for item in test]
    right = sum(votes[word].most_common(1)[0][0] == item.label for word, item in zip(last, test, strict=True))
    assert right / len(test) < 0.56


def test_polarity_cannot_be_told_from_its_bag_of_words() -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, test = (labelled_texts("polarity", split, 2000, seed=0) for split in ("train", "test"))
    counter = CountVectorizer()
    features = counter.fit_transform([item.text for item in train])
    model = LogisticRegression(max_iter=500).fit(features, [item.label for item in train])
    assert model.score(counter.transform([item.text for item in test]), [item.label for item in test]) < 0.6
