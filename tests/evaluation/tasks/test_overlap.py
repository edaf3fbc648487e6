from __future__ import annotations

import random

import pytest

from megatron_plasticity.evaluation.tasks.overlap import COMMON_QUESTIONS, find_overlap, words

QUESTION = [f"q{n}" for n in range(24)]
OTHERS = [f"w{n}" for n in range(40)]


def text(*parts: list[str]) -> str:
    return " ".join(word for part in parts for word in part)


def test_exact_is_blind_to_white_space_and_case_only() -> None:
    test = ["What  is\n2+2?", "What is 2+3?"]
    found = find_overlap(["what is 2 + 2?", "What is 2+2", "WHAT IS 2+3?"], test)
    assert found.exact == [(0, 0), (1, 2)]
    assert found.ngram == []


def test_words_have_no_punctuation_and_no_case() -> None:
    assert words("It's A-1, über_all!") == ["it", "s", "a", "1", "über_all"]


@pytest.mark.parametrize(
    ("common", "counts"),
    [(13, True), (12, False)],
    ids=["thirteen words in a row of twenty-four", "twelve"],
)
def test_runs_of_thirteen_words_count(common: int, counts: bool) -> None:
    train = text(OTHERS, QUESTION[:common], OTHERS)
    assert bool(find_overlap([train], [text(QUESTION)]).ngram) == counts


def test_half_of_the_question_must_be_in_the_runs() -> None:
    assert find_overlap([text(QUESTION[:13], OTHERS)], [text(QUESTION, OTHERS[:2])]).ngram == [(0, 0)]
    assert find_overlap([text(QUESTION[:13])], [text(QUESTION, OTHERS[:3])]).ngram == []


def test_runs_of_two_training_rows_do_not_add_up() -> None:
    question = [f"q{n}" for n in range(52)]
    first, second = text(question[:20], OTHERS), text(question[30:50], OTHERS)
    assert find_overlap([first, second], [text(question)]).ngram == []
    assert find_overlap([first + " " + second], [text(question)]).ngram == [(0, 0)]


@pytest.mark.parametrize(("length", "counts"), [(8, True), (12, True), (7, False)])
def test_a_short_question_is_looked_for_as_a_whole(length: int, counts: bool) -> None:
    question = text(QUESTION[:length])
    assert bool(find_overlap([text(OTHERS, QUESTION[:length], OTHERS)], [question]).ngram) == counts
    assert not find_overlap([text(OTHERS, QUESTION[: length - 1], OTHERS)], [question]).ngram


def test_wording_that_many_questions_share_is_no_overlap() -> None:
    instruction = [f"i{n}" for n in range(20)]

    def asked(number: int) -> list[str]:
        return [text(instruction, [f"x{n}"]) for n in range(number)]

    train = [text(instruction, ["y"])]
    assert find_overlap(train, asked(COMMON_QUESTIONS + 1)).ngram == []
    assert len(find_overlap(train, asked(COMMON_QUESTIONS)).ngram) == COMMON_QUESTIONS
    # The same question asked again is one question.
    assert len(find_overlap(train, asked(1) * (COMMON_QUESTIONS + 1)).ngram) == COMMON_QUESTIONS + 1


def test_an_exact_pair_is_no_ngram_pair() -> None:
    found = find_overlap([text(QUESTION), text(QUESTION, OTHERS)], [text(QUESTION)])
    assert found.exact == [(0, 0)]
    assert found.ngram == [(0, 1)]


def test_agrees_with_a_plain_search() -> None:
    """On random texts of few words, with many chance runs, across several batches."""
    rng = random.Random(0)

    def some(length: int) -> list[str]:
        return [rng.choice("ab") for _ in range(length)]

    test, train = [some(16) for _ in range(60)], [some(rng.randrange(200)) for _ in range(1100)]

    def runs(spoken: list[str]) -> list[tuple[str, ...]]:
        return [tuple(spoken[at : at + 13]) for at in range(len(spoken) - 12)]

    having: dict[tuple[str, ...], set[str]] = {}
    for question in test:
        for run in runs(question):
            having.setdefault(run, set()).add("".join(question))
    expected = []
    for number, question in enumerate(test):
        for row, spoken in enumerate(train):
            there = set(runs(spoken))
            covered = {
                at + offset
                for at, run in enumerate(runs(question))
                if run in there and len(having[run]) <= COMMON_QUESTIONS
                for offset in range(13)
            }
            if len(covered) >= 8 and question != spoken:
                expected.append((number, row))
    assert expected
    assert find_overlap([" ".join(spoken) for spoken in train], [" ".join(question) for question in test]).ngram == expected


def test_nothing_to_compare() -> None:
    assert find_overlap([], ["a"]).exact == []
    assert find_overlap(["", "a"], ["b"]).ngram == []
