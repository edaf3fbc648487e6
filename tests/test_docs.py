"""Generated documents are current, complete, and link to places that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest

from megatron_plasticity.config.base import Section
from megatron_plasticity.config.hashing import KINDS
from megatron_plasticity.config.support import SUPPORT
from tests.tools import load_tool

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_tool("generate_docs")


def test_generated_documents_are_current(generator: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert generator.main(["--check"]) == 0, capsys.readouterr().err


def test_check_sees_drift(
    generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0
    config, orphan = tmp_path / "docs/config.md", tmp_path / "docs/schema/former.json"
    config.write_text(config.read_text(encoding="utf-8") + "drift\n", encoding="utf-8")
    orphan.write_text("{}", encoding="utf-8")
    capsys.readouterr()
    assert generator.main(["--check"]) == 1
    complaint = capsys.readouterr().err
    assert "docs/config.md is not current" in complaint
    assert "docs/schema/former.json belongs to no kind" in complaint
    assert generator.main([]) == 0
    assert not orphan.exists()
    assert generator.main(["--check"]) == 0


def sections_below(section: type[Section], generator: ModuleType) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        child = generator._section_in(field.annotation)
        if child is not None:
            yield from sections_below(child, generator)


def test_every_field_is_documented(generator: ModuleType) -> None:
    text = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    for kind in KINDS.values():
        for section in sections_below(kind, generator):
            for name, field in section.model_fields.items():
                assert field.description, f"{section.__name__}.{name} has no text under it"
                assert re.search(rf"^\| `([\w.\[\]]+\.)?{name}` \|.*{re.escape(field.description.split()[0])}", text, re.M), name


def test_links_inside_the_reference_lead_somewhere(generator: ModuleType) -> None:
    text = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    headings = {generator._anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert links
    assert links <= headings


def mappings_in(node: Any) -> Iterator[dict[str, Any]]:
    """Every schema of a mapping in a JSON schema."""
    if isinstance(node, dict):
        if node.get("type") == "object":
            yield node
        for value in node.values():
            yield from mappings_in(value)
    elif isinstance(node, list):
        for value in node:
            yield from mappings_in(value)


@pytest.mark.parametrize("name", [*KINDS, "model", "finetune-recipe"])
def test_schemas_accept_extends_in_every_mapping(generator: ModuleType, name: str) -> None:
    schema = generator.editor_schema(name)
    mappings = list(mappings_in(schema))
    assert mappings
    for mapping in mappings:
        assert mapping["properties"]["extends"]["type"] == "string"
        assert "required" not in mapping
    assert schema["anyOf"][0] == {"required": ["extends"]}


def test_schema_still_refuses_unknown_keys_and_a_missing_name(generator: ModuleType) -> None:
    validator = jsonschema.Draft202012Validator(generator.editor_schema("corpus"))
    assert validator.is_valid({"name": "a"})
    assert validator.is_valid({"extends": "b.yaml", "tokenizer": {"extends": "c.yaml"}})
    assert not validator.is_valid({"seed": 1})
    assert not validator.is_valid({"name": "a", "tokeniser": {}})
    assert not validator.is_valid({"name": "a", "held_out_fraction": 2})


def test_default_by_family_is_not_shown_as_required(generator: ModuleType) -> None:
    assert "norm_eps" not in generator.editor_schema("model")["anyOf"][1]["required"]
    assert "layers" in generator.editor_schema("model")["anyOf"][1]["required"]


def test_the_support_table_is_in_the_documents() -> None:
    """Row by row as the code has it."""
    rows = [f"| {row.combination} | {row.verdict} | {row.reason} |" for row in SUPPORT]
    assert "\n".join(rows) in (ROOT / "docs/parallelism.md").read_text(encoding="utf-8")
