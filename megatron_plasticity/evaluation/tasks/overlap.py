"""Which questions of a test set are also in the training rows: the same ones, and those that share a run of words.

The rule, after the decontamination of GPT-3 (arXiv 2005.14165, appendix C):

1. *Exact*: equal texts, but for white space and case.
2. *N-gram*: not exact, but most of it in common: at least half of the test question's words stand in runs of thirteen words or
   more that one training row has too. A word is a run of letters, digits and underscores, in one case. A question of 8 to 12
   words is looked for as a whole, a shorter one exactly only.
3. Thirteen words in a row that more than ten different questions of the test set have are the wording of the task, and do not
   count.

It differs from GPT-3's in two points. There a single common run is enough, which in tasks whose questions are made of stock
sentences would flag every one. And there a run is common wording by the number of training documents that have it, which here
would hide what matters most: training sets with many rewordings of each question, and so of a leaked one. The texts compared are
the prompts, or what a task file names instead.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

NGRAM_WORDS = 13
SHORTEST_NGRAM = 8
COMMON_QUESTIONS = 10
LEAST_SHARE = 0.5

_WORD = re.compile(r"\w+")
_BATCH = 512
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no position loses bits


@dataclass
class Overlap:
    """Pairs of rows with the same question, or with most of it in common, by number."""

    exact: list[tuple[int, int]] = field(default_factory=list)
    """(test row, training row)"""
    ngram: list[tuple[int, int]] = field(default_factory=list)
    """(test row, training row); none of the training rows is in an exact pair with that test row."""


def normalised(text: str) -> str:
    """Equal for texts that differ in white space and case only."""
    return "".join(text.split()).casefold()


def words(text: str) -> list[str]:
    """The words of a text in one case, without punctuation."""
    return _WORD.findall(text.casefold())


def find_overlap(train: Sequence[str], test: Sequence[str], tick: Callable[[int], None] = lambda _: None) -> Overlap:
    """Overlap of the texts compared of all training rows with those of one test set; `tick` is told of training rows done."""
    found = Overlap()
    same_question: dict[str, list[int]] = defaultdict(list)
    for number, text in enumerate(test):
        same_question[normalised(text)].append(number)
    index = _NgramIndex(test, [numbers[0] for numbers in same_question.values()])
    for start in range(0, len(train), _BATCH):
        batch = train[start : start + _BATCH]
        exact_tests = [same_question.get(normalised(text), ()) for text in batch]
        found.exact += [(number, start + row) for row, numbers in enumerate(exact_tests) for number in numbers]
        for row, question in index.matches([words(text) for text in batch]):
            others = same_question[normalised(test[question])]
            if question not in exact_tests[row]:
                found.ngram += [(number, start + row) for number in others]
        tick(len(batch))
    found.exact.sort()
    found.ngram.sort()
    return found


class _NgramIndex:
    """The n-grams of test questions, found by a rolling hash and then compared word by word."""

    def __init__(self, texts: Sequence[str], questions: Sequence[int]) -> None:
        """`questions` are the numbers of the texts to index, each different from the others."""
        self._hash_of: dict[str, int] = {}
        self._places_of: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        """N-gram → (question, position of its first word) wherever it stands."""
        self._length_of: dict[int, int] = {}
        for question in questions:
            spoken = words(texts[question])
            length = min(NGRAM_WORDS, len(spoken))
            if length >= SHORTEST_NGRAM:
                self._length_of[question] = len(spoken)
                for at in range(len(spoken) - length + 1):
                    self._places_of[tuple(spoken[at : at + length])].append((question, at))
        common = [n for n, places in self._places_of.items() if len({question for question, _ in places}) > COMMON_QUESTIONS]
        for ngram in common:
            del self._places_of[ngram]
        self._hashes = {
            length: np.unique(np.concatenate([self._windows(self._hashed(ngram), length) for ngram in ngrams]))
            for length, ngrams in _by_length(self._places_of).items()
        }
        """Length of n-gram → their hashes, sorted."""

    def matches(self, texts: Sequence[Sequence[str]]) -> Iterator[tuple[int, int]]:
        """(row of `texts`, test question) for each pair that has at least half of the question's words in common runs."""
        row_of = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        flat = [word for text in texts for word in text]
        hashed = self._hashed(flat)
        covered: dict[tuple[int, int], set[int]] = defaultdict(set)
        for length, wanted in self._hashes.items():
            if len(flat) < length:
                continue
            windows = self._windows(hashed, length)
            nearest = wanted[np.minimum(np.searchsorted(wanted, windows), len(wanted) - 1)]
            candidates = np.flatnonzero(nearest == windows)
            for at in candidates[row_of[candidates] == row_of[candidates + length - 1]]:
                for question, position in self._places_of.get(tuple(flat[at : at + length]), ()):
                    covered[int(row_of[at]), question].update(range(position, position + length))
        yield from sorted(pair for pair, places in covered.items() if len(places) >= LEAST_SHARE * self._length_of[pair[1]])

    def _hashed(self, spoken: Sequence[str]) -> NDArray[np.uint64]:
        for word in spoken:
            if word not in self._hash_of:
                self._hash_of[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return np.array([self._hash_of[word] for word in spoken], dtype=np.uint64)

    def _windows(self, hashed: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
        """Hash of the `length` words from each position on, modulo 2^64."""
        count = len(hashed) - length + 1
        windows = np.zeros(count, dtype=np.uint64)
        for offset in range(length):
            windows *= _MULTIPLIER
            windows += hashed[offset : offset + count]
        return windows


def _by_length(ngrams: Iterable[tuple[str, ...]]) -> dict[int, list[tuple[str, ...]]]:
    lengths: dict[int, list[tuple[str, ...]]] = defaultdict(list)
    for ngram in ngrams:
        lengths[len(ngram)].append(ngram)
    return lengths
