"""The problems say what is true: every prompt is solved here again from its text alone."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from random import Random

import pytest

from megatron_plasticity.data.problems import registry, split
from megatron_plasticity.data.problems.arithmetic import Sum
from megatron_plasticity.data.problems.problem import LETTERS, Family, Problem, Question, in_order, inline_choice
from megatron_plasticity.data.problems.registry import FAMILIES, draw_problems, is_test, problems
from megatron_plasticity.data.problems.split import side_of
from megatron_plasticity.data.problems.steps import Chain
from megatron_plasticity.data.problems.world import COLOURS, PLACES, THINGS, draw_thing, tell_thing
from megatron_plasticity.errors import UserError

EQUATION = re.compile(r"(?<![+-] )(?<!\w)(\d+) ([+-]) (\d+) = (\d+)")


def questions(family: str, count: int = 300) -> list[Question]:
    return [p.ask(Random(i)) for side in ("train", "test") for i, p in enumerate(draw_problems(family, side, count, seed=1))]


def solve_arithmetic(question: Question) -> str:
    value = 0
    for verb, number in re.findall(r"\b(has|buys|finds|gets|sells|loses|gives away) (\d+)", question.prompt):
        value += int(number) if verb in ("has", "buys", "finds", "gets") else -int(number)
    return str(value)


def solve_algebra(question: Question) -> str:
    equation = re.search(r"(?:Solve|if) (.*)\.$", question.prompt)
    assert equation
    factor, constant = Fraction(0), Fraction(0)
    for sign, side in zip((1, -1), equation[1].split(" = "), strict=True):
        for minus, digits, unknown in re.findall(r"(- )?(\d*)([xyn]?)", side):
            if digits or unknown:
                number = sign * (-1 if minus else 1) * int(digits or 1)
                factor, constant = (factor + number, constant) if unknown else (factor, constant + number)
    solution = -constant / factor
    return str(solution) if solution.denominator == 1 else rf"\frac{{{solution.numerator}}}{{{solution.denominator}}}"


def solve_categories(question: Question) -> str:
    things = {thing.name: thing for thing in THINGS}
    asked = re.search(r"the (\w+)(?: from)?\?\n", question.prompt)
    assert asked
    thing = things[asked[1]]
    right = [number for number, option in enumerate(question.choices) if option in (thing.kind, thing.colour, thing.place)]
    assert len(right) == 1
    return LETTERS[right[0]]


def solve_trials(question: Question) -> str:
    counts = re.search(r"(\d+) people got better with \w+ and (\d+) without", question.prompt)
    assert counts
    difference = int(counts[1]) - int(counts[2])
    return "yes" if difference >= 10 else "no" if difference <= -10 else "maybe"


def solve_passage(question: Question) -> str:
    story, asked = question.prompt.split("\n")[:2]
    query = re.fullmatch(r"(?:Where|What|Who) does (\w+) (go|take|eat|meet)( first| last)?\?", asked)
    assert query
    verb = {"go": "goes to"}.get(query[2], query[2] + "s")
    found = re.findall(rf"{query[1]} {verb} the (\w+)\.", story)
    assert len(found) == (2 if query[3] else 1)
    assert story.count(".") <= 5
    assert sum(f" {option}." in story for option in question.choices) >= 3
    return LETTERS[question.choices.index(found[-1] if query[3] == " last" else found[0])]


def solve_steps(question: Question) -> str:
    value = 0
    for verb, number in re.findall(r"(Start with|Add|Take away|Double it) ?(\d*)", question.prompt):
        value = {"Start with": lambda v, n: n, "Add": lambda v, n: v + n, "Take away": lambda v, n: v - n}.get(
            verb, lambda v, n: 2 * v
        )(value, int(number or 0))
    return LETTERS[question.choices.index(str(value))]


SIZES = {
    "arithmetic": (2851, 759),
    "algebra": (2251, 494),
    "categories": (2360, 520),
    "trials": (2616, 465),
    "passage": (7510, 1490),
    "steps": (3518, 969),
}

SOLVERS = {
    "arithmetic": solve_arithmetic,
    "algebra": solve_algebra,
    "categories": solve_categories,
    "trials": solve_trials,
    "passage": solve_passage,
    "steps": solve_steps,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_right(family: str) -> None:
    for question in questions(family):
        assert SOLVERS[family](question) == question.answer, question.prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_end_with_their_answer(family: str) -> None:
    for question in questions(family, 100):
        ending = rf"\boxed{{{question.answer}}}" if family == "algebra" else f"answer is {question.answer}"
        assert question.response.rstrip(".").endswith(ending)
        assert "Human" not in question.prompt + question.response
        assert "Assistant" not in question.prompt + question.response


def test_passage_response_names_the_option_that_its_letter_stands_for() -> None:
    for question in questions("passage", 100):
        assert question.response.startswith(question.choices[LETTERS.index(question.answer)] + ". Therefore")


@pytest.mark.parametrize("family", ["arithmetic", "algebra", "steps"])
def test_every_equation_of_plain_numbers_is_true(family: str) -> None:
    seen = 0
    for number, problem in enumerate(draw_problems(family, "train", 500, seed=2)):
        for text in (problem.ask(Random(number)).response, problem.tell(Random(number))):
            for left, sign, right, result in EQUATION.findall(text):
                seen += 1
                assert int(left) + (1 if sign == "+" else -1) * int(right) == int(result), text
    assert seen > 500


@pytest.mark.parametrize("family", FAMILIES)
def test_sides_are_large_enough_and_share_nothing(family: str) -> None:
    train, test = problems(family, "train"), problems(family, "test")
    assert len(train) >= 2000
    assert len(test) >= 300
    every = FAMILIES[family].problems()
    assert len(set(train) | set(test)) == len(train) + len(test) <= len(set(every)) == len(every)
    if family not in ("arithmetic", "steps", "trials"):  # these leave problems out
        assert len(train) + len(test) == len(every)
    assert not {key for p in train for key in p.keys} & {p.keys[0] for p in test}
    assert all(is_test(p) for p in test)
    assert not any(is_test(p) for p in train)
    asked = [{p.ask(Random(0)).prompt for p in side} for side in (train, test)]
    assert not asked[0] & asked[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_problems_are_graded(family: str) -> None:
    levels = Counter(problem.level for problem in problems(family, "test"))
    assert set(levels) == {1, 2, 3}
    assert min(levels.values()) > 0.1 * sum(levels.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_prose_differs_from_the_task(family: str) -> None:
    prompts = [p.ask(Random(i)).prompt.split("\n")[0] for i, p in enumerate(draw_problems(family, "train", 200, seed=3))]
    prose = " ".join(p.tell(Random(i)) for i, p in enumerate(draw_problems(family, "train", 200, seed=3)))
    assert not any(prompt in prose for prompt in prompts)
    assert "answer is" not in prose
    assert "boxed" not in prose


def solution(problem: Problem) -> str:
    """The worked calculation of an `arithmetic` or `steps` problem."""
    return problem.ask(Random(0)).response.split(" The answer is")[0]


def test_no_solution_of_a_test_problem_is_part_of_a_training_solution() -> None:
    train = "\n".join(solution(problem) for family in ("arithmetic", "steps") for problem in problems(family, "train"))
    tested = {solution(problem) for family in ("arithmetic", "steps") for problem in problems(family, "test")}
    assert all(EQUATION.search(text) for text in tested)
    assert not [text for text in tested if text in train]


def test_a_problem_with_a_test_window_in_its_later_steps_is_on_neither_side(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = ("sum", 8, "-", 3, "+", 1)
    monkeypatch.setattr(split, "on_test_side", lambda key: key == held_out)
    sums = [Sum(8, (("-", 3), ("+", 1))), Sum(8, (("-", 3), ("+", 1), ("+", 2))), Sum(4, (("+", 4), ("-", 3), ("+", 1)))]
    assert [side_of(sum_.keys) for sum_ in sums] == ["test", "test", None]
    assert side_of(Sum(4, (("+", 4), ("-", 3), ("+", 2))).keys) == "train"


def test_chains_of_steps_have_the_windows_of_the_sums_that_they_come_to() -> None:
    chain = Chain(4, (("double", 0), ("take", 3), ("add", 6)))
    assert chain.keys == Sum(4, (("+", 4), ("-", 3), ("+", 6))).keys == (("sum", 4, "+", 4, "-", 3), ("sum", 8, "-", 3, "+", 6))
    assert chain.keys[0] != Sum(4, (("+", 3), ("-", 3))).keys[0]


def test_an_option_that_a_passage_mentions_is_right_one_time_in_three() -> None:
    asked = [(problem, problem.ask(Random(0))) for problem in draw_problems("passage", "test", 600, seed=0)]
    right = [1 / sum(f" {option}." in question.prompt.split("\n")[0] for option in question.choices) for _, question in asked]
    assert 0.25 < sum(right) / len(right) < 0.34
    mentioned = {problem.level: round(1 / share) for (problem, _), share in zip(asked, right, strict=True)}
    assert mentioned == {1: 3, 2: 3, 3: 4}


def test_trials_are_balanced_over_the_answers() -> None:
    counts = Counter(trial.ask(Random(0)).answer for trial in FAMILIES["trials"].problems())
    assert len(set(counts.values())) == 1
    assert set(counts) == {"yes", "no", "maybe"}


def test_facts_behind_test_questions_never_occur_in_training_questions() -> None:
    facts = {
        side: {(p.relation, p.thing.name) for p in problems("categories", side)}  # pyright: ignore[reportAttributeAccessIssue]
        for side in ("train", "test")
    }
    assert not facts["train"] & facts["test"]
    assert len(facts["train"] | facts["test"]) == 3 * len(THINGS)


def test_draws_are_distinct_deterministic_and_nested() -> None:
    first = draw_problems("steps", "train", 500, seed=7)
    assert first == draw_problems("steps", "train", 500, seed=7)
    assert first[:100] == draw_problems("steps", "train", 100, seed=7)
    assert first != draw_problems("steps", "train", 500, seed=8)
    assert len(set(first)) == 500


def test_asking_for_more_than_there_is() -> None:
    available = len(problems("trials", "test"))
    message = rf"'trials' has {available} distinct test problems, {available + 1} were asked for: lower test_examples"
    with pytest.raises(UserError, match=message):
        draw_problems("trials", "test", available + 1, seed=0)


def test_a_family_that_is_too_small_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Family("small", "number", "", lambda: [Sum(1, (("+", number), ("+", 1))) for number in range(50)])
    monkeypatch.setitem(FAMILIES, "small", small)
    with pytest.raises(AssertionError, match="small has"):
        registry.problems("small", "train")


def test_sides_are_the_same_on_every_machine() -> None:
    """Stored sizes: a change would move problems between the sides of corpora and results that exist already."""
    sizes = {name: (len(problems(name, "train")), len(problems(name, "test"))) for name in FAMILIES}
    assert sizes == SIZES


def test_options_stand_in_order() -> None:
    assert in_order("b", ["c", "a"]) == (("a", "b", "c"), "B")
    assert in_order("10", ["9", "12", "0"]) == (("0", "9", "10", "12"), "C")


def test_inline_choice_picks_the_letter_of_the_right_option() -> None:
    for seed in range(50):
        sentence = inline_choice("right", ["a", "b", "c", "d", "e"], Random(seed))
        listed = re.search(r"([A-D])\. right\b", sentence)
        picked = re.search(r", so ([A-D])\.", sentence)
        assert listed
        assert picked
        assert listed[1] == picked[1]


def test_the_world_is_closed_and_balanced() -> None:
    assert len(THINGS) == len({thing.name for thing in THINGS}) == 48
    for values in (Counter(t.colour for t in THINGS), Counter(t.place for t in THINGS)):
        assert max(values.values()) - min(values.values()) <= 1
    assert {thing.colour for thing in THINGS} == set(COLOURS)
    assert {thing.place for thing in THINGS} == set(PLACES)
    assert not {t.name for t in THINGS} & ({t.kind for t in THINGS} | set(COLOURS) | set(PLACES))


def test_early_things_are_talked_about_more_often_and_every_thing_is() -> None:
    rng = Random(0)
    counts = Counter(draw_thing(rng).name for _ in range(20_000))
    assert len(counts) == 48
    assert counts[THINGS[0].name] > 2 * counts[THINGS[-1].name]


def test_what_is_told_of_a_thing_is_true() -> None:
    for number in range(500):
        thing = THINGS[number % 48]
        text = tell_thing(thing, Random(number))
        words = set(re.findall(r"\w+", text.lower()))
        assert thing.name in words
        for value, values in ((thing.colour, COLOURS), (thing.place, PLACES), (thing.kind, {t.kind for t in THINGS})):
            assert words & set(values) <= {value}
