"""Values of ours ↔ the few types that JSON and YAML have."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from megatron_plasticity.config.base import Section
from megatron_plasticity.errors import UserError


def to_json(value: Any) -> Any:
    """JSON types for plain values, paths, and the numbers and arrays of numpy and torch.

    JSON has no name for a float that is not finite: it becomes `{"float": "nan"}`, which no text can be mistaken for.
    """
    match value:
        case Mapping():
            return {str(key): to_json(item) for key, item in value.items()}
        case list() | tuple():
            return [to_json(item) for item in value]
        case float():
            return float(value) if math.isfinite(value) else {"float": str(float(value))}
        case PurePath():
            return str(value)
    return to_json(value.tolist()) if hasattr(value, "tolist") else value


def from_json(value: Any) -> Any:
    """Undo what `to_json` did to floats that are not finite."""
    match value:
        case {"float": "nan" | "inf" | "-inf" as text, **rest} if not rest:
            return float(text)
        case dict():
            return {key: from_json(item) for key, item in value.items()}
        case list():
            return [from_json(item) for item in value]
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`; UserError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; this is not a run folder, or the file was deleted") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def section_to_yaml(section: Section) -> str:
    """A section as readable YAML, one key a line and short lists in brackets, that validates to an equal section."""
    return yaml.dump(_yaml_types(section.model_dump()), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        short = all(not isinstance(item, dict | list) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=short)

    def ignore_aliases(self, data: Any) -> bool:
        return True  # a value that occurs twice is written twice


def _yaml_types(value: Any) -> Any:
    match value:
        case Mapping():
            return {key: _yaml_types(item) for key, item in value.items()}
        case list() | tuple():
            return [_yaml_types(item) for item in value]
        case PurePath():
            return str(value)
    return value
