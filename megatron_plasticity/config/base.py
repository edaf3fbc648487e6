"""The base of every config section: frozen, closed to unknown keys, documented by the text under each field."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

AFFECTS_RESULTS = "affects_results"
ADDED_LATER = "added_later"


class Section(BaseModel):
    """A part of the config tree. The string under a field is its documentation (see docs/config.md)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, protected_namespaces=()
    )


def neutral(default: Any = ..., **constraints: Any) -> Any:
    """A field that cannot change a run's results (a place, a label, a progress setting), so that it stays out of the hash."""
    return Field(default, json_schema_extra={AFFECTS_RESULTS: False}, **constraints)


def added_later(default: Any, **constraints: Any) -> Any:
    """A field that came after runs had been made: at its default it stays out of the hash, so that they keep their names."""
    return Field(default, json_schema_extra={ADDED_LATER: True}, **constraints)
