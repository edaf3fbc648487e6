"""docs/tasks.md describes every key and filter, and what it shows is right."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2.sandbox
import pytest
import yaml

from megatron_plasticity.config.load import check_config
from megatron_plasticity.config.task_files import Decontamination, FileRows, HashedPart, HubRows, Lookup, Rows, TaskFile
from megatron_plasticity.evaluation.tasks.catalogue import load_task_file, shipped_tasks
from megatron_plasticity.evaluation.tasks.overlap import COMMON_QUESTIONS, LEAST_SHARE, NGRAM_WORDS, SHORTEST_NGRAM
from megatron_plasticity.evaluation.tasks.recipes import ANSWER_KINDS, recipes
from megatron_plasticity.evaluation.tasks.templates import environment


@pytest.fixture(scope="module")
def page(request: pytest.FixtureRequest) -> str:
    return (request.config.rootpath / "docs/tasks.md").read_text(encoding="utf-8")


def test_every_key_and_kind_is_described(page: str) -> None:
    sections = (TaskFile, Rows, HubRows, FileRows, Lookup, HashedPart)
    for key in {key for section in sections for key in section.model_fields}:
        assert re.search(rf"`{key}[`:]", page), key
    for key in Decontamination.model_fields:
        assert f"{key}: report" in page
    for kind in ANSWER_KINDS:
        assert kind in page


def test_every_filter_of_ours_is_described(page: str) -> None:
    for name in environment().filters.keys() - jinja2.sandbox.SandboxedEnvironment().filters.keys():
        assert re.search(rf"`{name}[`(]", page), name


def test_the_example_is_a_task_file(page: str) -> None:
    (example,) = (block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if block.startswith("name: capitals"))
    recipes(check_config(TaskFile, yaml.safe_load(example), "docs/tasks.md"), "docs/tasks.md")


def test_every_task_and_every_file_is_in_the_tables(page: str) -> None:
    for name, path in shipped_tasks().items():
        assert f"`{name}`" in page
        for rows in load_task_file(path).rows.values():
            for files in filter(None, [rows.files, *(lookup.files for lookup in rows.lookups.values())]):
                assert files.upstream.removeprefix("https://").split(" at ")[0] in page
                assert all(name in page or "boardmaindp" in name for name in files.paths)


def test_the_rule_of_overlap_has_the_numbers_of_the_code(page: str) -> None:
    assert (NGRAM_WORDS, SHORTEST_NGRAM, COMMON_QUESTIONS, LEAST_SHARE) == (13, 8, 10, 0.5)
    for said in ("thirteen words", "8 to 12 words", "more than ten different questions", "at least half"):
        assert said in " ".join(page.split())


def test_no_task_file_names_a_place_on_a_machine() -> None:
    for path in Path(next(iter(shipped_tasks().values()))).parent.rglob("*.yaml"):
        assert not re.search(r"(?<![\w.:/])/(?:home|work|mnt|data|tmp)/", path.read_text(encoding="utf-8")), path
