from __future__ import annotations

import re
from collections import Counter
from random import Random

from megatron_plasticity.config.data import ReasoningTextConfig
from megatron_plasticity.data import reasoning
from megatron_plasticity.data.problems.problem import Problem
from megatron_plasticity.data.problems.registry import FAMILIES, is_test, problems
from megatron_plasticity.data.problems.world import THINGS
from megatron_plasticity.data.reasoning import reasoning_document, reasoning_documents


def texts(count: int, seed: int = 0) -> list[str]:
    return [document.text for document in reasoning_documents(ReasoningTextConfig(documents=count), seed)]


def test_number_and_determinism() -> None:
    assert texts(20) == texts(20) == texts(30)[:20]
    assert texts(20) != texts(20, seed=1)
    assert len(set(texts(300))) == 300
    assert texts(0) == []
    assert reasoning_document(7, 0).source == "reasoning"


def test_documents_are_short() -> None:
    # Words, digits and marks: close to the tokens of a byte-level BPE with single digits and two thousand ids.
    lengths = sorted(len(re.findall(r"\d|[A-Za-z]+|[^\w\s]", text)) for text in texts(500))
    assert lengths[5] >= 40
    assert lengths[-5] <= 230


def test_no_problem_of_the_test_side_is_told(monkeypatch) -> None:
    told: list[tuple[str, Problem]] = []
    for name in FAMILIES:
        cls = type(problems(name, "train")[0])
        tell = cls.tell

        def spy(self: Problem, rng: Random, tell=tell, name: str = name) -> str:
            told.append((name, self))
            return tell(self, rng)

        monkeypatch.setattr(cls, "tell", spy)
    texts(600)
    assert {name for name, _ in told} == set(FAMILIES)
    assert len(told) > 500
    assert not [problem for name, problem in told if is_test(problem)]


def test_reviews_of_the_test_side_are_not_told(monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(reasoning, "on_test_side", lambda key: drawn.append(key) or len(drawn) % 2 == 1)
    text = reasoning._piece_of("reviews", THINGS, Random(0))
    assert [key[0] for key in drawn] == ["review", "review"]  # the first was on the test side and was drawn again
    assert text


def test_no_solution_of_a_test_problem_is_in_the_corpus() -> None:
    corpus = "\n\n".join(text.replace("\n", " ") for text in texts(300))
    tested = {
        problem.ask(Random(0)).response.split(" The answer is")[0]
        for family in ("arithmetic", "steps")
        for problem in problems(family, "test")
    }
    trained = [problem.ask(Random(0)).response.split(" The answer is")[0] for problem in problems("arithmetic", "train")]
    assert any(text in corpus for text in trained)
    assert not [text for text in tested if text in corpus]


def test_every_topic_occurs(monkeypatch) -> None:
    seen: list[str] = []
    piece_of = reasoning._piece_of
    monkeypatch.setattr(reasoning, "_piece_of", lambda topic, *rest: seen.append(topic) or piece_of(topic, *rest))
    texts(300)
    assert set(seen) == set(reasoning._WEIGHTS) == {*FAMILIES, "facts", "recall", "reviews"}


def test_recall_asks_for_the_pairs_that_it_listed_each_once_in_another_order() -> None:
    forms, orders = Counter(), Counter()
    for seed in range(100):
        text = reasoning._piece_of("recall", THINGS, Random(seed))
        listed, asked = text[: text.index(" The ")], re.findall(r"The (\w+) is (\w+)\.", text)
        by_letter, by_number = re.findall(r"([A-D])\. (\w+)", listed), re.findall(r"([a-z]+) (\d+)[,.]", listed)
        pairs = [(word, letter) for letter, word in by_letter] or by_number
        assert len(pairs) == len({word for word, _ in pairs}) == 4
        assert sorted(asked) == sorted(pairs)
        forms["letters" if by_letter else "numbers"] += 1
        orders[asked == pairs] += 1
    assert min(forms.values()) > 20
    assert orders[False] > 80


def test_the_corpus_states_every_fact_of_the_world() -> None:
    text = " ".join(texts(5000))
    sentences = Counter(re.split(r"(?<=[.?])\s", text))
    missing = [
        (thing.name, relation)
        for thing in THINGS
        for relation in ("kind", "colour", "place")
        if sentences[thing.fact(relation)] < 2
    ]
    assert not missing
